"""Recipe + registry -> parts that fit each other; every cross-check, before any heavy work."""

from __future__ import annotations

import contextlib
import itertools
import math
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import ValidationError
from torch.utils.flop_counter import FlopCounterMode

from cmkit.denoiser import Cond, Denoiser, Guided, Network
from cmkit.device import precision
from cmkit.errors import CmkitError, PluginError, RecipeError, ResourceError, inline
from cmkit.kinds import Backbone, Metric, Precond, Rescaler, Sampler
from cmkit.noise import Noise
from cmkit.plugins import discover
from cmkit.recipe import Recipe, TeacherTable, load
from cmkit.tensors import load_weights
from cmkit.traits import interchangeable, traits
from cmkit.values import Companion, DataSpec
from cmkit.weights import Weights, adapt, find, read

CONDITIONS = frozenset({"label", "guidance", "sigma_to", "text"})


@dataclass(frozen=True)
class Plan:
    """A recipe whose parts are known to fit, with what it will cost."""

    recipe: Recipe
    data: DataSpec
    conditions: frozenset[str]
    sites: tuple[str, ...]
    parameters: int
    flops: int
    """Floating-point operations of one forward pass for one image."""
    disk: int
    """Bytes that the run folder will hold at most, pictures aside."""
    memory: int
    """Bytes of weights, their copies and the optimizer's state."""
    downloads: tuple[Weights, ...] = ()
    """Published weights that are not here yet."""
    nfe: int | None = None
    """Network evaluations a sample, if any are drawn."""


def plan(recipe: Recipe) -> Plan:
    """The plan of a recipe to run; raises the error of the first check that fails."""
    _stages_are_complete(recipe)
    return fit(recipe)


def fit(recipe: Recipe) -> Plan:
    """The plan of a recipe whose parts fit each other, whatever its stages; errors as of `plan`.

    Reads the data set's headers, builds the network without memory (on the `meta` device) and
    runs the sampler once on it, so that shapes, sites and conditions are tried, not assumed.
    """
    data = recipe.data or recipe.dataset.spec()
    conditions = conditions_of(recipe, data)
    with at(recipe, "backbone"), torch.device("meta"):
        network = _built(recipe.backbone, data, conditions)
    denoiser = _denoiser(recipe, network)
    sites = denoiser.network.sites
    if recipe.rescaler:
        with at(recipe, "rescaler"):
            denoiser.rescaled(recipe.rescaler)
    for values in cells(recipe):
        cell = with_values(recipe, values)
        with at(recipe, "search", "grid"):
            cell.bind(sites)
    if recipe.train and recipe.objective:
        with at(recipe, "objective"):
            recipe.objective.check(data)
            _check_grids(recipe, denoiser.noise)
        with at(recipe, "train", "batch"):
            recipe.objective.check_batch(recipe.train.batch // recipe.train.accumulate)
    for index, metric in enumerate(recipe.metric):
        with at(recipe, "metric", index):
            metric.check(data, recipe.sample.images if recipe.sample else 0)
    if recipe.search:
        with at(recipe, "search", "images"):
            minimized(recipe).check(data, recipe.search.images)
    if recipe.denoiser.weights:
        with at(recipe, "denoiser", "weights"):
            _check_weights(recipe.denoiser.weights, recipe.backbone, recipe.precond)
            _load_start(recipe, denoiser.network, data, conditions)
    if recipe.teacher:
        _check_teacher(recipe, denoiser, data, conditions)
    elif recipe.train and recipe.objective:
        with at(recipe, "objective"):
            recipe.objective.check_networks(denoiser.network, None)
    flops = _dry_run(recipe, denoiser, data, conditions)
    parameters = sum(p.numel() for p in denoiser.parameters())
    memory = 4 * parameters * _copies(recipe) + _companions_memory(recipe, data)
    return Plan(
        recipe=recipe,
        data=data,
        conditions=conditions,
        sites=sites,
        parameters=parameters,
        flops=flops,
        disk=_disk(recipe, data, memory),
        memory=memory,
        downloads=tuple(_downloads(recipe)),
        nfe=recipe.sampler.nfe * _steered(recipe, denoiser).passes if recipe.sampler else None,
    )


def build(plan: Plan, device: torch.device) -> Denoiser:
    """The recipe's denoiser on `device`: its given weights, or fresh ones that the seed decides."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(plan.recipe.seed)
        network = _built(plan.recipe.backbone, plan.data, plan.conditions)
    _load_start(plan.recipe, network, plan.data, plan.conditions)
    network = network.to(device).to(memory_format=torch.channels_last)
    return _denoiser(plan.recipe, network)


def ready(plan: Plan, device: torch.device, name: str) -> Denoiser:
    """What is sampled from on `device`, not rescaled yet: the recipe's weights rounded to the
    `precision` key `name`, and guided if the recipe says so. Training never sees it."""
    denoiser = build(plan, device)
    if precision(name, device) == "bf16":
        denoiser.network.lower(torch.bfloat16)
    return _steered(plan.recipe, denoiser.eval())


def conditions_of(recipe: Recipe, data: DataSpec) -> frozenset[str]:
    """What the network of a recipe must embed; RecipeError when its backbone cannot."""
    wanted = {"label"} if data.num_classes else set()
    if recipe.objective:
        wanted |= recipe.objective.needs & CONDITIONS
    if recipe.denoiser.embeds_guidance:
        wanted.add("guidance")
    missing = wanted - recipe.backbone.accepts
    if missing:
        accepts = ", ".join(sorted(recipe.backbone.accepts)) or "nothing"
        raise recipe.source.error(
            ("backbone",),
            f"cannot embed {', '.join(sorted(missing))}; it accepts {accepts}; choose another"
            " backbone or objective, or leave the labels out",
        )
    return frozenset(wanted)


def build_teacher(plan: Plan, device: torch.device) -> Denoiser:
    """The recipe's teacher on `device`, frozen."""
    table = plan.recipe.teacher
    assert table is not None
    with torch.random.fork_rng(devices=[]):
        teacher = _teacher(plan.recipe, plan.data)
    _fill(teacher.network, table.weights, _teacher_backbone(plan.recipe), plan.data)
    teacher.network.to(device).to(memory_format=torch.channels_last)
    return teacher.eval().requires_grad_(False)


def build_companions(plan: Plan, device: torch.device) -> dict[str, Companion]:
    """What the recipe's objective trains beside the denoiser, on `device`; the seed decides."""
    objective = plan.recipe.objective
    assert objective is not None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(plan.recipe.seed)
        companions = dict(objective.companions(plan.data))
    for companion in companions.values():
        companion.network.to(device)
    return companions


def cells(recipe: Recipe) -> Iterator[dict[str, float]]:
    """Values of each cell of the search's grid, the last axis fastest; where it goes by
    coordinates, of each that differs from the recipe's own rescaler in one number."""
    if recipe.search is None or recipe.rescaler is None:
        return
    grid = recipe.search.grid
    if recipe.search.method == "coordinate":
        yield from ({axis: value} for axis, values in grid.items() for value in values)
    else:
        for combined in itertools.product(*grid.values()):
            yield dict(zip(grid, combined, strict=True))


def with_values(recipe: Recipe, values: Mapping[str, float]) -> Rescaler:
    """The recipe's rescaler with other values of some of its numbers, validated."""
    assert recipe.rescaler is not None
    try:
        return recipe.rescaler.with_values(values)
    except ValueError as error:
        reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
        raise recipe.source.error(
            ("search", "grid"), f"the rescaler refuses {dict(values)}: {reason}"
        ) from error


def minimized(recipe: Recipe) -> Metric:
    """The cheapest metric that returns the number that the search minimizes."""
    assert recipe.search is not None
    key = recipe.search.minimize
    for metric in recipe.metric:
        if key in metric.keys():  # noqa: SIM118 - a method of Metric, not of a mapping
            return metric.only(key)
    known = ", ".join(key for metric in recipe.metric for key in metric.keys())  # noqa: SIM118
    raise recipe.source.error(
        ("search", "minimize"), f"no [[metric]] returns it; known: {known or 'none'}", f" = {key!r}"
    )


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


def _stages_are_complete(recipe: Recipe) -> None:
    needs = {
        "train": ("objective",),
        "search": ("rescaler", "sampler", "metric"),
        "sample": ("sampler",),
        "metric": ("sample",),
    }
    for stage, tables in needs.items():
        for table in tables:
            if getattr(recipe, stage) and not getattr(recipe, table):
                raise recipe.source.error((stage,), f"[{stage}] needs a [{table}] table")
    if not (recipe.train or recipe.search or recipe.sample):
        raise recipe.source.error((), "nothing to do: add a [train], [search] or [sample] table")
    if not recipe.train and not recipe.denoiser.weights:
        raise recipe.source.error(
            (), "no weights to sample from: add [train], or denoiser.weights = a file"
        )
    _teacher_is_said(recipe)
    if recipe.search:
        minimized(recipe)
        assert recipe.rescaler is not None
        for name in recipe.search.grid:
            try:
                recipe.rescaler.value_of(name)
            except ValueError as error:
                raise recipe.source.error(("search", "grid", name), str(error)) from error


def _downloads(recipe: Recipe) -> Iterator[Weights]:
    named = {}
    if recipe.denoiser.weights:
        named[recipe.denoiser.weights] = recipe.backbone
    if recipe.teacher:
        named[recipe.teacher.weights] = _teacher_backbone(recipe)
    for weights, backbone in named.items():
        if (found := find(weights, backbone)).missing:
            yield found


def _teacher_is_said(recipe: Recipe) -> None:
    """Whoever needs a teacher has one, and what the student starts from is no guess."""
    table, needs = recipe.denoiser, recipe.objective.needs if recipe.objective else frozenset()
    if "teacher" in needs and not recipe.teacher:
        raise recipe.source.error(
            ("objective",), "it distils a teacher: add a [teacher] table with its weights"
        )
    _scalings_serve(recipe)
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


def noise_of(recipe: Recipe) -> Noise:
    """The noise axis of a recipe; RecipeError for levels that its precond does not know."""
    table = recipe.denoiser
    with at(recipe, "denoiser"):
        return _axis(recipe.precond, table.sigma_min, table.sigma_max, table.rho)


def _axis(precond: Precond, low: float, high: float, rho: float) -> Noise:
    known = precond.known
    if not known[0] <= low < high <= known[1]:
        raise RecipeError(
            f"sigma_min {low:g}, sigma_max {high:g}: its precond knows noise levels {known[0]:g} to"
            f" {known[1]:g}; set both within, or drop them"
        )
    return precond.noise(low, high, rho) or Noise(low, high, rho)


CURES = {
    "boundary": 'the boundary of a consistency model: set denoiser.precond = "consistency", or'
    " timestep_scaling of precond discrete",
    "diffusion": 'the scalings of a diffusion model: set denoiser.precond = "edm"',
    "identity": 'scalings that leave clean images alone: set denoiser.precond = "edm"',
    "continuous": "a network that hears of every change of sigma: set denoiser.precond ="
    ' "consistency" or "edm"',
    "edm": 'the scalings of EDM: set denoiser.precond = "edm"',
}
"""What is said where scalings lack a trait."""


def traits_of(recipe: Recipe) -> frozenset[str]:
    """What holds of the recipe's scalings, by `cmkit.denoiser.TRAITS`."""
    return traits(recipe.precond.scalings, noise_of(recipe), recipe.denoiser.sigma_data)


def _scalings_serve(recipe: Recipe) -> None:
    """RecipeError where the recipe's scalings lack what its objective needs of them."""
    needs = recipe.objective.needs if recipe.objective else frozenset()
    held = traits_of(recipe)
    for name in CURES:
        if name in needs - held:
            raise recipe.source.error(
                ("denoiser", "precond"),
                f"the objective needs {CURES[name]}",
                f" = {inline(recipe.denoiser.precond)}",
            )


def _check_grids(recipe: Recipe, noise: Noise) -> None:
    """RecipeError where the noise axis has no grid that the objective asks for, first or last."""
    assert recipe.train is not None
    assert recipe.objective is not None
    for step in (0, recipe.train.steps - 1):
        if n := recipe.objective.phase(step, recipe.train.steps).num_sigmas:
            noise.sigmas(n)


def _check_weights(weights: str, backbone: Backbone, precond: Precond) -> None:
    """RecipeError where it is known that `weights` were trained under other scalings."""
    if weights in backbone.published:
        backbone.check_published(weights, precond)
        return
    path = Path(weights.removeprefix("path:"))
    folder = path.parent if path.name == "model.safetensors" else path
    try:
        trained = load(folder / "recipe.toml", [], discover())
    except CmkitError:  # no run folder, or one of parts that are not here: nothing is known
        return
    if not interchangeable(trained.precond.scalings, precond.scalings):
        raise RecipeError(
            f"{weights}: was trained under other scalings; set the precond beside it to"
            f" {inline(trained.denoiser.precond)}"
        )


def _built(backbone: Backbone, data: DataSpec, conditions: frozenset[str]) -> Network:
    network = backbone.build(data, conditions)
    if not isinstance(network, Network):
        raise PluginError(f"backbone.build returned {type(network).__name__}, not cmkit.Network")
    return network


def _denoiser(recipe: Recipe, network: Network) -> Denoiser:
    return Denoiser(network, noise_of(recipe), recipe.precond.scalings, recipe.denoiser.sigma_data)


def _steered(recipe: Recipe, denoiser: Denoiser) -> Denoiser:
    """`denoiser` as the recipe samples from it: guided, if it says so; RecipeError where the
    network cannot be."""
    w = recipe.denoiser.guidance
    needs = recipe.objective.needs if recipe.objective else frozenset()
    embedded = recipe.denoiser.embeds_guidance or "guidance" in needs
    if w is None:
        if embedded and (recipe.search or recipe.sample):
            raise recipe.source.error(
                ("denoiser",), "the network embeds a guidance weight: say with which guidance to"
                " sample, such as guidance = 1.0"
            )  # fmt: skip
        return denoiser
    if not embedded and denoiser.network.null_label is None:
        raise recipe.source.error(
            ("denoiser", "guidance"),
            "guidance compares with no label, and the backbone has no null class; set its"
            " null_class = true, with weights that were trained so, or drop guidance",
            f" = {w}",
        )
    return Guided(denoiser, w, embedded)


def _teacher(recipe: Recipe, data: DataSpec) -> Denoiser:
    """The recipe's teacher with fresh weights."""
    table, student = recipe.teacher, recipe.denoiser
    precond = recipe.teacher_precond
    assert table is not None
    assert precond is not None
    network = _built(_teacher_backbone(recipe), data, _teacher_conditions(table, data))
    known_low, known_high = precond.known
    low = (known_low or student.sigma_min) if table.sigma_min is None else table.sigma_min
    high = table.sigma_max or (known_high if known_high < math.inf else student.sigma_max)
    noise = _axis(precond, low, high, student.rho)
    return Denoiser(network, noise, precond.scalings, table.sigma_data or student.sigma_data)


def _teacher_conditions(table: TeacherTable, data: DataSpec) -> frozenset[str]:
    if table.conditions is not None:
        return frozenset(table.conditions)
    return frozenset({"label"} if data.num_classes else ())


def _check_teacher(
    recipe: Recipe, denoiser: Denoiser, data: DataSpec, conditions: frozenset[str]
) -> None:
    """The teacher's weights fit its network, it knows the student's noise levels, and the student
    can start from it where it shall."""
    table = recipe.teacher
    assert table is not None
    with at(recipe, "teacher"), torch.device("meta"):
        teacher = _teacher(recipe, data)
    with at(recipe, "teacher", "weights"):
        assert recipe.teacher_precond is not None
        _check_weights(table.weights, _teacher_backbone(recipe), recipe.teacher_precond)
        _fill(teacher.network, table.weights, _teacher_backbone(recipe), data)
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
                f" network than the teacher's {inline(table.precond)}; let them agree, or set"
                ' init = "random"',
                ' = "teacher"',
            )
        with at(recipe, "denoiser", "init"):
            _load_start(recipe, denoiser.network, data, conditions)
    if recipe.objective:
        with at(recipe, "objective"):
            recipe.objective.check_networks(denoiser.network, teacher.network)
    x, cond = _dry_input(data, conditions)
    with at(recipe, "teacher"), _trying("teacher's backbone"):
        teacher(x, x.new_empty(1), cond)


def _load_start(
    recipe: Recipe, network: Network, data: DataSpec, conditions: frozenset[str]
) -> None:
    """Load what the recipe says that `network` starts from; nothing for fresh weights.

    Where the student embeds more than its teacher, those embeddings keep their fresh weights.
    """
    weights, kept = recipe.denoiser.weights, {}
    if recipe.denoiser.init == "teacher":
        assert recipe.teacher is not None
        weights = recipe.teacher.weights
        if conditions - _teacher_conditions(recipe.teacher, data):
            kept = network.state_dict()
    if weights:
        _fill(network, weights, recipe.backbone, data, kept)


def _fill(
    network: Network,
    weights: str,
    backbone: Backbone,
    data: DataSpec,
    kept: Mapping[str, torch.Tensor] = {},
) -> None:
    """Load `weights` into `network`, whatever their layout, with `kept` where they lack names.

    Weights that are still to be downloaded cannot be tried on a network without memory.
    """
    found = find(weights, backbone)
    if found.missing and next(network.parameters()).is_meta:
        return
    tensors = adapt(read(found), network, backbone.layouts(data))
    load_weights(network, {**kept, **tensors}, weights)


def _teacher_backbone(recipe: Recipe) -> Backbone:
    return recipe.teacher_backbone or recipe.backbone


def _dry_run(recipe: Recipe, denoiser: Denoiser, data: DataSpec, conditions: frozenset[str]) -> int:
    """FLOPs of a forward pass of one image; the sampler, if any, is run through on the way."""
    x, cond = _dry_input(data, conditions)
    with at(recipe, "backbone"), _trying("backbone"), FlopCounterMode(display=False) as counter:
        denoiser(x, x.new_empty(1), cond)
    if recipe.sampler:
        with at(recipe, "sampler"), _trying("sampler"):
            _check_sampler(recipe.sampler, _steered(recipe, denoiser), x, cond)
    return int(counter.get_total_flops())


def _dry_input(data: DataSpec, conditions: frozenset[str]) -> tuple[torch.Tensor, Cond]:
    """One image and its conditions without data."""
    x = torch.empty(1, data.channels, data.resolution, data.resolution, device="meta")
    label = torch.empty(1, dtype=torch.int64, device="meta") if "label" in conditions else None
    levels = conditions & {"guidance", "sigma_to"}
    return x, Cond(label=label, **{name: x.new_empty(1) for name in levels})


@contextlib.contextmanager
def _trying(kind: str) -> Iterator[None]:
    """Whatever a part raises on shapes alone is the part's fault."""
    try:
        with torch.inference_mode():
            yield
    except (RuntimeError, TypeError, ValueError, AttributeError, LookupError) as error:
        reason = str(error).strip().splitlines()[:1]
        raise PluginError(
            f"the {kind} fails on a tensor without data ({type(error).__name__}:"
            f" {''.join(reason)}); does it make all its tensors on x.device?"
        ) from error


def _check_sampler(sampler: Sampler, denoiser: Denoiser, x: torch.Tensor, cond: Cond) -> None:
    out = sampler.sample(denoiser, x, cond, lambda k: torch.empty_like(x))
    if out.shape != x.shape:
        raise PluginError(f"the sampler returned {tuple(out.shape)} for images {tuple(x.shape)}")


def _copies(recipe: Recipe) -> int:
    """Float32 copies of the weights that a run keeps: online, gradient, optimizer, EMAs, target."""
    if recipe.train is None or recipe.objective is None:
        return 1
    return 4 + len(recipe.train.ema) + len(recipe.objective.needs & {"target", "teacher"})


def _companions_memory(recipe: Recipe, data: DataSpec) -> int:
    """Bytes of what the objective trains beside the denoiser; PluginError where it cannot be."""
    if recipe.train is None or recipe.objective is None:
        return 0
    with at(recipe, "objective"), torch.device("meta"):
        companions = recipe.objective.companions(data)
        for name, companion in companions.items():
            if not (name.isidentifier() and isinstance(companion, Companion)):
                raise PluginError(
                    f"companions() returned {name!r}: {type(companion).__name__}; it must map names"
                    " such as 'discriminator' to cmkit.Companion"
                )
    parameters = [p for c in companions.values() for p in c.network.parameters()]
    return sum(4 * p.numel() * (4 if p.requires_grad else 1) for p in parameters)


def _disk(recipe: Recipe, data: DataSpec, memory: int) -> int:
    checkpoints = (recipe.train.keep + 1) * memory if recipe.train else 0
    pixels = data.channels * data.resolution**2
    return checkpoints + (recipe.sample.images * pixels if recipe.sample else 0)


@contextlib.contextmanager
def at(recipe: Recipe, *path: str | int) -> Iterator[None]:
    """Errors raised inside name the recipe's line of this table."""
    try:
        yield
    except CmkitError as error:
        raise type(error)(str(recipe.source.error(path, str(error)))) from error
