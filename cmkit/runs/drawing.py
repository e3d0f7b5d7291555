"""Images drawn or edited from a finished run, outside the stages of any run."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cmkit.denoiser import Denoiser
from cmkit.device import autocast
from cmkit.edit import Task, edit
from cmkit.errors import RecipeError, did_you_mean
from cmkit.files import atomic_write, new_file, new_folder
from cmkit.latents.coding import Coding
from cmkit.pictures import grid_png, png
from cmkit.plan import (
    Plan,
    check_disk,
    check_fit,
    coding_of,
    for_sampling,
    noise_of,
    prompts_of,
    traits_of,
)
from cmkit.recipe import Recipe, SampleTable
from cmkit.runs.events import Event, Note, Sampled, StageFinished, StageStarted
from cmkit.runs.places import make_out
from cmkit.sample import Batch, Draws, finite_uint8, sample, starts, write_npz
from cmkit.weights import download


def draw(
    recipe: Recipe,
    seed: int,
    classes: Sequence[str | int],
    out: Path,
    device: torch.device,
    negative: str | None = None,
) -> Iterator[Event]:
    """Events of drawing a recipe's images into `out`; the last is StageFinished.

    `out` becomes a grid (.png), arrays in ADM's format (.npz) or a folder of PNG files. Image k
    follows from `seed` and k alone. Guidance leads away from the prompt `negative`, if any.
    RecipeError where `out` exists or has another ending.
    """
    began = time.perf_counter()
    _check_out(out, ("", ".png", ".npz"))
    if recipe.sampler is None:
        raise recipe.source.error(
            ("sampler",), 'say how to draw, such as --set sampler={use="multistep"}'
        )
    plan, table, numbers = _fitted(recipe, classes, out)
    _check_negative(plan, negative)
    prompts, coding = prompts_of(recipe), coding_of(plan, device, negative)
    model = yield from model_of(plan, table, device, coding)
    count, rule = table.images, plan.label_rule
    draws = Draws(plan.space, seed, "sample", numbers, rule, prompts, coding)
    yield StageStarted("sample", 0, count)
    batches = sample(
        model, recipe.sampler, draws, range(count), table.batch, device, table.precision
    )
    shape = (count, plan.data.channels, plan.data.resolution, plan.data.resolution)
    for batch in _written(out, batches, shape):
        yield Sampled(batch.first + len(batch.images), count)
    drawn = draws.labels(range(count)) if "label" in plan.conditions else None
    labels = None if drawn is None else drawn.tolist()
    facts: dict[str, Any] = {"images": count, "seed": seed, "labels": labels, "nfe": plan.nfe}
    if labels is not None:
        names = [plan.data.classes[label] for label in labels] if plan.data.classes else None
        facts |= {"classes": names, "label_rule": "given" if numbers else plan.label_rule}
    if prompts:
        facts |= {"prompts": draws.prompts_of(range(count)), "negative": negative}
    yield _finished("sample", out, recipe, facts, began)


def redraw(
    recipe: Recipe,
    pictures: Sequence[Path],
    task: Task,
    seed: int,
    classes: Sequence[str | int],
    out: Path,
    device: torch.device,
) -> Iterator[Event]:
    """Events of editing pictures into `out`; the last is StageFinished.

    `out` becomes a grid (.png) with the known part beside each result, or a folder with both for
    each picture. Every picture is read and checked before the model is loaded.
    """
    began = time.perf_counter()
    _check_out(out, ("", ".png"))
    plan, table, numbers = _fitted(replace(recipe, sampler=None), classes, out)
    _check_editable(plan, numbers)
    coding = coding_of(plan, device)
    count, side = len(pictures), plan.data.resolution
    known, kept = task.known(pictures, plan.data.channels, side), task.kept(side)
    given = task.given(known, kept)
    levels = task.levels(noise_of(recipe))
    model = yield from model_of(plan, table, device, coding)
    cast = autocast(table.precision, device)
    draws = Draws(plan.space, seed, "edit", numbers, None, prompts_of(recipe), coding)
    yield StageStarted("edit", 0, count)
    edited = []
    for start in starts(draws, model.noise.sigma_max, range(count), table.batch, device):
        own = known[start.rows.start : start.rows.stop].to(device)
        with torch.inference_mode(), cast:
            project = task.projection(own, kept)
            x0 = edit(model, start.x, levels, project, start.cond, start.noise)
        edited.append(finite_uint8(x0, start.rows))
        yield Sampled(start.rows.stop, count)
    after, before = torch.cat(edited), finite_uint8(given, range(count))
    if out.suffix == ".png":
        both = torch.stack([before, after], 1).flatten(0, 1)
        atomic_write(out, grid_png(both, 2 * math.ceil(math.sqrt(count / 2))))
    else:
        named = {}
        for k, path in enumerate(pictures):
            named[f"{k:03d}-{path.stem}-before"] = before[k]
            named[f"{k:03d}-{path.stem}-after"] = after[k]
        with new_folder(out) as stage:
            _write_pictures(stage, named)
    nfe = (1 + len(levels)) * model.passes
    facts = {"images": count, "task": task.name, "seed": seed, "sigmas": levels, "nfe": nfe}
    yield _finished("edit", out, recipe, facts, began)


def _finished(
    stage: str, out: Path, recipe: Recipe, facts: dict[str, Any], began: float
) -> StageFinished:
    scales = recipe.rescaler.settled().model_dump(mode="json") if recipe.rescaler else {}
    seconds = time.perf_counter() - began
    return StageFinished(stage, {"out": str(out), **facts, "scales": scales, "seconds": seconds})


def _fitted(
    recipe: Recipe, classes: Sequence[str | int], out: Path
) -> tuple[Plan, SampleTable, tuple[int, ...]]:
    """The plan and [sample] of a recipe, and the numbers of `classes`; RecipeError for those that
    its model does not have."""
    assert recipe.sample is not None
    plan = check_fit(recipe)
    numbers = tuple(numbered(label, plan) for label in classes)
    check_disk(plan, out.parent)
    return plan, recipe.sample, numbers


def numbered(label: str | int, plan: Plan) -> int:
    """The class that a name, or where there is no such name a number, means."""
    if "label" not in plan.conditions:
        raise RecipeError(f"--label {label}: the model draws no classes; leave it out")
    names, last = plan.data.classes, (plan.data.num_classes or 0) - 1
    if label in names:
        return names.index(str(label))
    if re.fullmatch(r"-?\d{1,9}", str(label)) and 0 <= int(label) <= last:
        return int(label)
    hint = did_you_mean(str(label), names) if names else ""
    raise RecipeError(f"--label {label}: no class of the model's; give 0 to {last}{hint}")


def _check_editable(plan: Plan, classes: Sequence[int]) -> None:
    """RecipeError where the model is no consistency model of pixels, or needs classes that are not
    given."""
    recipe = plan.recipe
    if recipe.codec:
        raise recipe.source.error(
            ("codec",),
            "edits keep pixels, and the model draws latents; take a model of pixels",
        )
    if "boundary" not in traits_of(recipe):
        raise recipe.source.error(
            ("denoiser", "precond"),
            "only a consistency model can be edited with",
            f" = {recipe.denoiser.precond!r}",
        )
    if "sigma_to" in plan.conditions:
        raise recipe.source.error(
            ("objective",), "its network jumps to a given noise level, which edits do not have"
        )
    if "label" in plan.conditions and not classes:
        last = (plan.data.num_classes or 0) - 1
        named = " or by name" if plan.data.classes else ""
        raise RecipeError(
            f"the model draws classes: give the pictures' by --label, 0 to {last}{named}"
        )


def _check_negative(plan: Plan, negative: str | None) -> None:
    """RecipeError where nothing leads away from a negative prompt."""
    if negative is None:
        return
    if plan.recipe.text is None:
        raise RecipeError("--negative: the model knows no prompts; leave it out")
    if plan.recipe.denoiser.guidance is None:
        raise RecipeError("--negative: guidance leads away from it; say --guidance as well")
    if "guidance" in plan.conditions:
        raise RecipeError(
            "--negative: the network embeds its guidance weight and never sees another prompt;"
            " leave it out"
        )


def model_of(
    plan: Plan, table: SampleTable, device: torch.device, coding: Coding
) -> Generator[Event, None, Denoiser]:
    """The rescaled denoiser on `device`, after any download of its weights."""
    yield from map(Note, plan.notes)
    for weights in plan.downloads:
        yield from download(weights)
    denoiser = for_sampling(plan, device, table.precision, coding.null)
    return denoiser.rescaled(plan.recipe.rescaler) if plan.recipe.rescaler else denoiser


def _check_out(out: Path, endings: Sequence[str]) -> None:
    if out.exists():
        raise RecipeError(f"--out {out}: exists already; name a new one, or remove it")
    if out.suffix not in endings:
        known = ", ".join(f"FILE{ending}" for ending in endings if ending)
        raise RecipeError(f"--out {out}: write to {known} or a FOLDER, whose name has no dot")
    make_out(out.parent)


def _written(
    out: Path, batches: Iterator[Batch], shape: tuple[int, int, int, int]
) -> Iterator[Batch]:
    """Each of `batches`, written to arrays or a folder as it comes; a grid needs all of them."""
    if out.suffix == ".npz":
        with new_file(out) as file:
            yield from write_npz(file, batches, shape)
    elif out.suffix == ".png":
        images = []
        for batch in batches:
            images.append(batch.images)
            yield batch
        atomic_write(out, grid_png(torch.cat(images)))
    else:
        with new_folder(out) as stage:
            for batch in batches:
                _write_pictures(
                    stage, {f"{batch.first + k:07d}": image for k, image in enumerate(batch.images)}
                )
                yield batch


def _write_pictures(folder: Path, images: dict[str, Tensor]) -> None:
    """Write a file for each."""
    for name, image in images.items():
        atomic_write(folder / f"{name}.png", png(image))
