"""A model as a whole pipeline of another library, which has drawn the same picture from it.

Imports no torch."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import warnings
from collections.abc import Generator, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cmkit.errors import CheckpointError, RecipeError
from cmkit.export.card import Card, card
from cmkit.files import atomic_write, new_folder, read_json

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from cmkit.denoiser import Denoiser, Network
    from cmkit.latents.coding import Coding
    from cmkit.plan import Plan
    from cmkit.recipe import Recipe
    from cmkit.values import Scheduler

TOLERANCE = 0.5 / 255
"""Of pictures in [0, 1]: files then differ by one step at most."""
PROMPT = "a red apple"
"""Of the compared picture, where the recipe has none."""


def export(
    recipe: Recipe, target: Path, to: str, about: Card, device: torch.device
) -> Generator[Any, None, dict[str, Any]]:
    """Events of writing what `recipe` draws from to the folder `target`, which diffusers'
    DiffusionPipeline opens; facts of it in the end.

    RecipeError for what diffusers has no like of: a backbone, sampler, precond, codec or prompt
    encoder, or scales that cannot be folded into weights. CheckpointError where a pipeline that is
    opened again draws another picture; `target` is then not there.
    """
    from cmkit.convert import write
    from cmkit.plan import check_fit, coding_of, for_sampling, naming_table, noise_of
    from cmkit.runs.events import Note
    from cmkit.weights import download

    recipe = _in_full(recipe)
    assert recipe.sampler is not None
    with naming_table(recipe, "sampler"):
        noise, sigma_data = noise_of(recipe), recipe.denoiser.sigma_data
        scheduler = recipe.sampler.scheduler(recipe.precond, noise, sigma_data)
    plan = check_fit(recipe)
    said = _arguments(plan)
    yield from map(Note, plan.notes)
    for weights in plan.downloads:
        yield from download(weights)
    components: dict[str, Any] = {}
    for kind in ("codec", "text"):
        if part := getattr(recipe, kind):
            with naming_table(recipe, kind):
                components |= part.exported()
    kind = scheduler.config["_class_name"]
    with naming_table(recipe, "backbone"):
        index = dict(recipe.backbone.pipeline(components, kind, plan.conditions))
    coding = coding_of(plan, device)
    denoiser = for_sampling(plan, device, "fp32", coding.null)
    folded, done = _folded(plan, denoiser.network)
    yield from map(Note, done)
    if recipe.rescaler:
        denoiser = denoiser.rescaled(recipe.rescaler)
    with new_folder(target) as stage:
        layouts = recipe.backbone.layouts(plan.space)
        write({k: v.cpu() for k, v in folded.items()}, stage / "unet", "diffusers", layouts)
        _write(stage, index, scheduler.config, components)
        del components, folded
        ours = _drawn(plan, denoiser, coding, scheduler, device)
        del denoiser, coding  # the pipeline needs their memory
        theirs = _reopened(stage, target, {**scheduler.call, **said}, recipe.seed, device)
        if ours.shape != theirs.shape:
            raise CheckpointError(
                f"{target}: not kept, diffusers draws {tuple(theirs.shape[1:])}, not"
                f" {tuple(ours.shape[1:])}; report it"
            )
        difference = (ours - theirs).abs().max().item()
        if not difference <= TOLERANCE:
            raise CheckpointError(
                f"{target}: not kept, diffusers draws another picture from it, which differs by"
                f" {255 * difference:.3g} of 255; draw with `cmkit sample`, and report it"
            )
        atomic_write(stage / "README.md", card(about, to, {**scheduler.call, **said}))
    return {
        "pipeline": index["_class_name"],
        "scheduler": kind,
        "difference": 255 * difference,
    }


def _in_full(recipe: Recipe) -> Recipe:
    """The recipe with codec and prompt encoder in float32, as diffusers opens pipelines."""
    full = {
        kind: part.model_copy(update={"dtype": "fp32"})
        for kind in ("codec", "text")
        if hasattr(part := getattr(recipe, kind), "dtype")
    }
    return replace(recipe, **full)


def _arguments(plan: Plan) -> dict[str, Any]:
    """Arguments of the pipeline's call beside those of the scheduler: prompt, guidance, class."""
    recipe, w = plan.recipe, plan.recipe.denoiser.guidance
    said: dict[str, Any] = {"class_labels": [0]} if "label" in plan.conditions else {}
    if recipe.text:
        prompts = recipe.sample.prompts if recipe.sample else ()
        said |= {"prompt": (prompts or (PROMPT,))[0], "guidance_scale": 1.0 + (w or 0.0)}
    if w is not None and (not recipe.text or (w < 0 and "guidance" not in plan.conditions)):
        raise recipe.source.error(
            ("denoiser", "guidance"),
            "no pipeline of diffusers guides so; drop it, or draw with `cmkit sample`",
            f" = {w}",
        )
    return said


def _folded(plan: Plan, network: Network) -> tuple[dict[str, Tensor], list[str]]:
    """The weights of a network with the recipe's scales folded into them, and what is said of it;
    RecipeError where that is not exact."""
    from cmkit.convert import multiplied
    from cmkit.runs.policies import constant_scales

    own, rescaler = network.state_dict(), plan.recipe.rescaler
    if rescaler is None:
        return own, []
    scales = constant_scales(rescaler, plan.recipe, network.sites)
    cure = "draw with `cmkit sample`, or write the unscaled model with --drop-scales"
    if scales is None:
        raise RecipeError(f"its scales depend on the noise level, and weights do not; {cure}")
    factors, left = network.factors(scales)
    if left:
        site, why = next(iter(left.items()))
        raise RecipeError(
            f"no weights hold exactly its scale {site} = {scales[site]:g} ({why}); {cure}"
        )
    done = ", ".join(f"{site} = {value:g}" for site, value in scales.items() if value != 1)
    return multiplied(own, factors), [f"folded into the weights: {done}"] if done else []


def _write(
    stage: Path, index: dict[str, Any], scheduler: Mapping[str, Any], components: Mapping[str, Any]
) -> None:
    """Write model_index.json with all that `index` lacks, scheduler and components beside unet/."""
    import diffusers

    version = {"_diffusers_version": diffusers.__version__}
    unet = read_json(stage / "unet" / "config.json")["_class_name"]
    index |= {**version, "unet": ["diffusers", unet]}
    index["scheduler"] = ["diffusers", scheduler["_class_name"]]
    for name, part in components.items():
        index[name] = part
        if hasattr(part, "save_pretrained"):
            index[name] = [type(part).__module__.partition(".")[0], type(part).__name__]
            with quiet():
                part.save_pretrained(stage / name)
    (stage / "scheduler").mkdir()
    files = {
        "scheduler/scheduler_config.json": {**version, **scheduler},
        "model_index.json": index,
    }
    for name, content in files.items():
        atomic_write(stage / name, json.dumps(content, indent=2) + "\n")


def _drawn(
    plan: Plan, denoiser: Denoiser, coding: Coding, scheduler: Scheduler, device: torch.device
) -> Tensor:
    """cmkit's picture (1, C, H, W) in [0, 1], of the noise that a pipeline draws by a generator
    with the recipe's seed."""
    import torch

    recipe, space = plan.recipe, plan.space
    assert recipe.sampler is not None
    generator = torch.Generator().manual_seed(recipe.seed)
    shape = (1, space.channels, space.resolution, space.resolution)
    drawn: list[Tensor] = []

    def noise(k: int) -> Tensor:
        while len(drawn) <= k:
            drawn.append(torch.randn(shape, generator=generator).to(device))
        return drawn[k]

    label = torch.zeros(1, dtype=torch.long, device=device) if "label" in plan.conditions else None
    prompts = [_arguments(plan)["prompt"]] if recipe.text else []
    cond = coding.conditions(prompts, label)
    with torch.inference_mode():
        x0 = recipe.sampler.sample(denoiser, scheduler.start * noise(0), cond, noise)
        return (coding.pictures(x0) / 2 + 0.5).clamp(0, 1).cpu()


def _reopened(
    folder: Path, target: Path, call: Mapping[str, Any], seed: int, device: torch.device
) -> Tensor:
    """The picture (1, C, H, W) in [0, 1] of the pipeline in `folder`, which becomes `target`."""
    import torch
    from diffusers import DiffusionPipeline

    generator = torch.Generator().manual_seed(seed)
    with quiet():
        try:
            library: Any = DiffusionPipeline
            pipeline = library.from_pretrained(folder, local_files_only=True).to(device)
            pipeline.set_progress_bar_config(disable=True)
            if hasattr(pipeline, "watermark"):
                pipeline.watermark = None
            drawn = pipeline(**call, generator=generator, output_type="pt").images
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # whatever the libraries raise
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            raise CheckpointError(
                f"{target}: not kept, diffusers cannot draw from it: {reason}; report it"
            ) from error
    return drawn.float().cpu()  # type: ignore[no-any-return]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Inside, diffusers and transformers print no warnings and no bars."""
    import diffusers.utils.logging

    libraries = [diffusers.utils.logging]
    if importlib.util.find_spec("transformers"):
        import transformers.utils.logging

        libraries.append(transformers.utils.logging)
    with contextlib.ExitStack() as after:
        after.enter_context(warnings.catch_warnings())
        # Of numpy, by what diffusers hands it.
        warnings.filterwarnings("ignore", "__array__ implementation", DeprecationWarning)
        for library in libraries:
            after.callback(library.set_verbosity, library.get_verbosity())
            library.set_verbosity(logging.ERROR)
            if library.is_progress_bar_enabled():
                after.callback(library.enable_progress_bar)
                library.disable_progress_bar()
        yield
