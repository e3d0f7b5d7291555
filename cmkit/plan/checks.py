"""Cross-checks of a recipe's parts, each an error that names the line and the cure."""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from cmkit import files
from cmkit.denoiser import NO_COND, Cond, Denoiser, Network
from cmkit.errors import CmkitError, DataError, PluginError, RecipeError, ResourceError, inline
from cmkit.kinds import Backbone, Precond
from cmkit.plan import networks
from cmkit.plan.data import batches, cache_bytes, kept
from cmkit.plan.networks import naming_table, noise_of
from cmkit.plan.record import CONDITIONS, Plan
from cmkit.plan.trial import dry_input, trying
from cmkit.plugins import discover
from cmkit.recipe import Recipe, Teacher, load
from cmkit.recipe.grid import minimized, numbers
from cmkit.recipe.search_table import TUNERS
from cmkit.runs.folder import RunFolder
from cmkit.traits import interchangeable, traits, uses_sigma_data
from cmkit.values import Companion, DataSpec
from cmkit.weights import TO_COME, start_checkpoint


def conditions_of(recipe: Recipe, space: DataSpec) -> frozenset[str]:
    """What the network of a recipe must embed; RecipeError when its backbone cannot."""
    wanted = {*networks.told(space, recipe.backbone), *(recipe.needs & CONDITIONS)}
    if recipe.denoiser.embeds_guidance:
        wanted.add("guidance")
    missing = wanted - recipe.backbone.accepts
    if missing:
        accepts = ", ".join(sorted(recipe.backbone.accepts)) or "nothing"
        spare = "[text]" if missing & {"text", "pooled", "size"} else "the labels"
        raise recipe.source.error(
            ("backbone",),
            f"cannot embed {', '.join(sorted(missing))}; it accepts {accepts}; choose another"
            f" backbone or objective, or leave {spare} out",
        )
    return frozenset(wanted)


def check_classes(data: DataSpec) -> None:
    """PluginError where names or counts of the classes are not one for each."""
    for key, values in (("classes", data.classes), ("counts", data.counts)):
        if values and len(values) != data.num_classes:
            raise PluginError(
                f"dataset: spec() gives {len(values)} {key} and num_classes {data.num_classes};"
                " give one for each, or none"
            )
    if data.counts and (min(data.counts) < 0 or not sum(data.counts)):
        raise PluginError(f"dataset: spec() gives counts {data.counts[:5]}; count the images")


def check_disk(plan: Plan, out: Path) -> None:
    """ResourceError when the disk below `out` has no room for the run."""
    existing = next(p for p in (out, *out.absolute().parents) if p.exists())
    free = shutil.disk_usage(existing).free
    if plan.disk > free:
        raise ResourceError(
            f"{existing}: the run needs about {plan.disk / 2**20:,.0f} MiB and"
            f" {free / 2**20:,.0f} MiB are free; name another disk with --out, or lower train.keep"
            " or the number of images"
        )
    _, needed = cache_bytes(plan)
    if not needed:
        return
    home = files.cache_folder("latents")
    existing = next(p for p in (home, *home.parents) if p.exists())
    if needed > (free := shutil.disk_usage(existing).free):
        raise ResourceError(
            f"{existing}: the cache needs about {needed / 2**20:,.0f} MiB and {free / 2**20:,.0f}"
            " MiB are free; set XDG_CACHE_HOME to a folder on a larger disk, or say cache = false"
        )


def check_stages(recipe: Recipe) -> None:
    """RecipeError where a stage, or the whole recipe, lacks a table that it needs."""
    for name, stage in recipe.stages.items():
        for table in stage.needs:
            if table not in recipe.resolved:
                raise recipe.source.error((name,), f"[{name}] needs a [{table}] table")
    if not (recipe.train or recipe.search or recipe.sample):
        raise recipe.source.error((), "nothing to do: add a [train], [search] or [sample] table")
    if not recipe.train and not recipe.denoiser.weights:
        raise recipe.source.error(
            (), "no weights to sample from: add [train], or denoiser.weights = a file"
        )
    _check_start(recipe)
    for index, tracker in enumerate(recipe.tracker):
        with naming_table(recipe, "tracker", index):
            tracker.check()
    if recipe.train and recipe.train.compile:
        with naming_table(recipe, "train", "compile"):
            _check_compiler()
    given: dict[str, int] = {}
    for index, metric in enumerate(recipe.metric):
        recipe.compared_with(metric)
        for number in numbers(metric):
            if (first := given.setdefault(number, index)) != index:
                raise recipe.source.error(
                    ("metric", index),
                    f"it gives {number!r}, as metric.{first} does: switch it off in one of them, or"
                    " set heldout = true",
                )
    if recipe.search and recipe.rescaler:
        minimized(recipe)
        if recipe.search.method in TUNERS:
            with naming_table(recipe, "search", "method"):
                _check_optuna(recipe.search.method)
        for name in recipe.search.grid:
            try:
                recipe.rescaler.value_of(name)
            except ValueError as error:
                raise recipe.source.error(("search", "grid", name), str(error)) from error


def _check_optuna(method: str) -> None:
    """PluginError where a package is not installed that the method of a search needs."""
    for package in ("optuna", *(["cmaes"] if method == "cmaes" else [])):
        if importlib.util.find_spec(package) is None:
            raise PluginError(
                f"method = \"{method}\" needs the package {package}; pip install 'cmkit[search]'"
            )


def check_standard_error(recipe: Recipe, data: DataSpec) -> None:
    """RecipeError where images are too few for the standard error of a cell's score, for which a
    tenth of them is left out."""
    assert recipe.search is not None
    images = recipe.search.images
    left = images - math.ceil(images / 10)
    try:
        minimized(recipe).check(data, left)
        if left < 2:
            raise DataError(f"{left} images")
    except CmkitError as error:
        raise recipe.source.error(
            ("search", "images"),
            f"the standard error of a score takes those of {left} images ({error}); draw more, or"
            " say search.tolerance",
            f" = {images}",
        ) from error


def _check_compiler() -> None:
    """ResourceError where torch.compile would look in vain for the compiler that it calls."""
    if torch.cuda.is_available():  # Triton's, for the calls of its kernels
        known = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang", "cc"]
    else:
        known = [os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")]
    if not any(map(shutil.which, known)):
        raise ResourceError(
            f"torch.compile calls {' or '.join(known)}, which is not here; install it, name another"
            " in CXX (with a GPU in CC), or set train.compile = false"
        )


def _check_start(recipe: Recipe) -> None:
    """RecipeError where a teacher is missing, the scalings lack what the objective needs of them,
    or the student's start is not said."""
    table = recipe.denoiser
    if "teacher" in recipe.needs and not recipe.teacher:
        raise recipe.source.error(
            ("objective",), "it distils a teacher: add a [teacher] table with its weights"
        )
    lacking = recipe.needs - traits_of(recipe)
    for name, cure in CURES.items():
        if name in lacking:
            raise recipe.source.error(
                ("denoiser", "precond"),
                f"the objective needs {cure}",
                f" = {inline(table.precond)}",
            )
    if table.init == "teacher" and not recipe.teacher:
        raise recipe.source.error(
            ("denoiser", "init"), "add a [teacher] table with its weights", ' = "teacher"'
        )
    if recipe.train and recipe.teacher and not (table.init or table.weights):
        raise recipe.source.error(
            ("teacher",),
            'say what the student starts from: denoiser.init = "teacher" or "random", or'
            " denoiser.weights",
        )


CURES = {
    "boundary": 'the boundary of a consistency model: set denoiser.precond = "consistency", or'
    " timestep_scaling of precond discrete",
    "diffusion": 'the scalings of a diffusion model: set denoiser.precond = "edm"',
    "identity": 'scalings that leave clean images alone: set denoiser.precond = "edm"',
    "continuous": "a network that hears of every change of sigma: set denoiser.precond ="
    ' "consistency" or "edm"',
    "edm": 'the scalings of EDM: set denoiser.precond = "edm"',
}
"""What to say where scalings lack one of `cmkit.traits.TRAITS`."""


def traits_of(recipe: Recipe) -> frozenset[str]:
    """Which of `cmkit.traits.TRAITS` the recipe's scalings have."""
    return traits(recipe.precond.scalings, noise_of(recipe), recipe.denoiser.sigma_data)


def check_training_start(recipe: Recipe) -> None:
    """RecipeError or CheckpointError where there is no checkpoint that training can go on from."""
    if recipe.train is None or recipe.train.start is None:
        return
    with naming_table(recipe, "train", "start"):
        step = int(start_checkpoint(recipe.train.start).name.removeprefix("step-"))
    if step >= recipe.train.steps:
        raise recipe.source.error(
            ("train", "steps"),
            f"{recipe.train.start} is at step {step} already; raise train.steps above it",
            f" = {recipe.train.steps}",
        )


def check_sampler(recipe: Recipe) -> None:
    """RecipeError where the scalings lack what the sampler needs of them.

    An objective that trains a diffusion model under the scalings of a consistency model, such as
    `edm`, makes one for the samplers of diffusion models.
    """
    if recipe.sampler is None or (recipe.objective and "boundary" not in recipe.needs):
        return
    for name in sorted(recipe.sampler.needs - traits_of(recipe)):
        raise recipe.source.error(
            ("sampler",),
            f"it needs {CURES[name]}; or choose another sampler, such as lcm or multistep",
        )


def check_shown(
    recipe: Recipe, denoiser: Denoiser, space: DataSpec, conditions: frozenset[str]
) -> None:
    """RecipeError where pictures that train.show or sample.show_steps ask for cannot be drawn."""
    show = recipe.train.show if recipe.train else 0
    if show and recipe.sampler is None:
        raise recipe.source.error(
            ("train", "show"), "pictures need a [sampler] table that says how to draw; add one"
        )
    if isinstance(show, tuple) and show and recipe.text is None:
        raise recipe.source.error(
            ("train", "show"),
            "prompts need a [text] table; without one say a number of pictures",
            f" = {inline(show)}",
        )
    if recipe.sampler is None or recipe.sample is None:
        return
    x, cond = dry_input(space, conditions)
    still = _Still(denoiser.network, denoiser.noise, denoiser.scalings, denoiser.sigma_data)
    for steps in recipe.sample.show_steps:
        sampler = recipe.sampler_in(steps)
        try:
            with torch.no_grad():
                sampler.sample(still, x, cond, lambda k: torch.empty_like(x))
        except Exception as error:  # samplers raise anything at a number that they cannot take
            raise recipe.source.error(
                ("sample", "show_steps"),
                f"the sampler cannot take steps = {steps}: {error}",
                f" = {inline(recipe.sample.show_steps)}",
            ) from error


def lost_of_prompts(recipe: Recipe) -> Iterator[str]:
    """A sentence of each prompt of the recipe that is too long for its encoder, or has words which
    say nothing to it; RecipeError for one that has no others."""
    show = recipe.train.show if recipe.train else ()
    drawn = recipe.sample.prompts if recipe.sample else ()
    said = {("train", "show"): () if isinstance(show, int) else show, ("sample", "prompts"): drawn}
    for place, prompts in said.items():
        if recipe.text is None or not prompts:
            continue
        with naming_table(recipe, *place):
            found, cuts = recipe.text.unknown(prompts), recipe.text.cut(prompts)
        for prompt, words, cut in zip(prompts, found, cuts, strict=True):
            if cut:
                yield f"the last {cut} tokens of a prompt are cut off: {prompt[:60]!r}.."
            if words:
                yield f"not known, and left out: {', '.join(map(repr, words))} in {prompt[:60]!r}"


class _Still(Denoiser):
    """x itself at any noise level, so that a sampler can be tried at once."""

    def forward(self, x: torch.Tensor, sigma: torch.Tensor, cond: Cond = NO_COND) -> torch.Tensor:
        return x


def guidance_note(recipe: Recipe) -> tuple[str, ...]:
    """A sentence where a network that embeds its guidance weight is told one it does not learn."""
    w = recipe.denoiser.guidance
    learned = recipe.objective.guided_by() if recipe.objective else None
    if w is None or learned is None or learned[0] <= w <= learned[1]:
        return ()
    low, high = learned
    return (f"denoiser.guidance is {w:g}, and the network learns weights from {low:g} to {high:g}",)


def cut_note(plan: Plan, captions: int = 1000) -> str:
    """A sentence where some of the first `captions` of training are too long for the prompt
    encoder; "" elsewhere."""
    recipe, read = plan.recipe, plan.space.text
    if recipe.train and recipe.text and read and (known := recipe.dataset.captions()):
        first = known[:captions]
        if longer := sum(cut > 0 for cut in recipe.text.cut(first)):
            return (
                f"{longer} of the first {len(first)} captions are longer than the prompt encoder"
                f" reads ({read.length} tokens); their ends are cut off"
            )
    return ""


def sigma_data_note(plan: Plan, images: int = 256) -> str:
    """A sentence where the standard deviation of the first `images` of training is not the
    recipe's sigma_data, by more than a quarter of it; "" elsewhere, before latents are kept, and
    where scalings do not depend on it."""
    recipe = plan.recipe
    if not recipe.train or not uses_sigma_data(recipe.precond.scalings):
        return ""
    if recipe.codec and ((store := kept(plan).latents) is None or store.missing()):
        return ""
    only = replace(plan, recipe=replace(recipe, text=None))
    with contextlib.suppress(DataError):  # training names a bad picture when it comes to it
        x0, _ = next(iter(batches(only, images, torch.device("cpu"))))
        found, said = float(x0.float().std()), recipe.denoiser.sigma_data
        if abs(found - said) > said / 4:
            return (
                f"denoiser.sigma_data is {said:g}, and the data have a standard deviation of"
                f" {found:.2g}; the losses and scalings are best where both agree"
            )
    return ""


def check_weights(weights: str, backbone: Backbone, precond: Precond) -> None:
    """RecipeError where `weights` are known to have been trained under other scalings."""
    if weights in backbone.published or backbone.located(weights):
        backbone.check_published(weights, precond)
        return
    try:
        to_come = TO_COME.get().get(weights)
        trained = to_come or load(RunFolder.of_weights(weights).recipe, [], discover())
    except CmkitError:  # no run folder, or one of parts that are not here: nothing is known
        return
    if not interchangeable(trained.precond.scalings, precond.scalings):
        raise RecipeError(
            f"{weights}: was trained under other scalings; set the precond beside it to"
            f" {inline(trained.denoiser.precond)}"
        )


def check_teacher(
    recipe: Recipe, given: Teacher, denoiser: Denoiser, data: DataSpec, conditions: frozenset[str]
) -> tuple[str, ...]:
    """Notes of what the `given` teacher's weights hold; errors where they do not fit its network,
    it was trained on other noise levels than those of the student `denoiser`, or this cannot start
    from it where the recipe says so."""
    with naming_table(recipe, "teacher"), torch.device("meta"):
        teacher = networks.teacher_of(given, recipe.denoiser, data)
    with naming_table(recipe, "teacher", "weights"):
        check_weights(given.table.weights, given.backbone, given.precond)
        notes = networks.load_into(teacher.network, given.table.weights, given.backbone, data)
    own, other = denoiser.noise, teacher.noise
    if not other.sigma_min <= own.sigma_min < own.sigma_max <= other.sigma_max:
        raise recipe.source.error(
            ("teacher",),
            f"it knows noise levels {other.sigma_min:g} to {other.sigma_max:g}, the student's are"
            f" {own.sigma_min:g} to {own.sigma_max:g}; set denoiser.sigma_min and sigma_max within",
        )
    if recipe.denoiser.init == "teacher":
        if not interchangeable(teacher.scalings, denoiser.scalings):
            raise recipe.source.error(
                ("denoiser", "init"),
                f"precond {inline(recipe.denoiser.precond)} means another input or output of the"
                f" network than the teacher's {inline(given.table.precond)}; let them agree, or set"
                ' init = "random"',
                ' = "teacher"',
            )
        with naming_table(recipe, "denoiser", "init"):
            networks.load_start(recipe, denoiser.network, data, conditions)
    if recipe.objective:
        with naming_table(recipe, "objective"):
            recipe.objective.check_networks(denoiser.network, teacher.network)
    x, cond = dry_input(data, conditions)
    with naming_table(recipe, "teacher"), trying("teacher's backbone"):
        teacher(x, x.new_empty(1), cond)
    return notes


def check_adapter(recipe: Recipe, network: Network) -> None:
    """Attach the adapter to a network without memory; RecipeError where there is nothing that it
    changes, or nothing that it says."""
    if networks.base_of(recipe) is None:
        raise recipe.source.error(
            ("adapter",),
            "it changes a trained network: say denoiser.weights, or with a [teacher]"
            ' denoiser.init = "teacher"',
        )
    assert recipe.adapter is not None
    if not recipe.train and recipe.adapter.weights is None:
        raise recipe.source.error(
            ("adapter",), "it is not trained here: say adapter.weights, a file or a run"
        )
    with torch.device("meta"), naming_table(recipe, "adapter"):
        networks.attach(recipe.adapter, network, recipe.seed)


def memory_of(recipe: Recipe, denoiser: Denoiser, data: DataSpec) -> int:
    """Bytes of float32 weights and what a run keeps beside them: of what is trained the gradient,
    two numbers of the optimizer, the averages and the target; the teacher; the companions.

    PluginError where the objective's companions are none.
    """
    every = sum(p.numel() for p in denoiser.parameters())
    if recipe.train is None or recipe.objective is None:
        return 4 * every
    trained = sum(p.numel() for p in denoiser.parameters() if p.requires_grad)
    target = "target" in recipe.needs and not networks.target_is_average(recipe)
    copies = 3 + len(recipe.train.ema) + target
    with naming_table(recipe, "objective"), torch.device("meta"):
        companions = recipe.objective.companions(data)
        for name, companion in companions.items():
            if not (name.isidentifier() and isinstance(companion, Companion)):
                raise PluginError(
                    f"companions() returned {name!r}: {type(companion).__name__}; it must map names"
                    " such as 'discriminator' to cmkit.Companion"
                )
    parameters = [p for c in companions.values() for p in c.network.parameters()]
    beside = sum(p.numel() * (4 if p.requires_grad else 1) for p in parameters)
    teacher = 0.0
    conditions = conditions_of(recipe, data)
    if networks.teacher_is_base(recipe, data, conditions):
        pass
    elif "teacher" in recipe.needs and recipe.teacher:
        teacher = every / (2 if recipe.teacher.table.dtype == "bf16" else 1)
    return int(4 * (every + trained * copies + teacher + beside))
