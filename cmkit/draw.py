"""Images from a finished run, or from a recipe with weights, outside the stages of any run."""

from __future__ import annotations

import math
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from cmkit.denoiser import Denoiser
from cmkit.device import autocast
from cmkit.edit import Projection, brightness, check_levels, colorize, edit, inpaint, superres
from cmkit.errors import CheckpointError, RecipeError, ResourceError
from cmkit.files import atomic_write, new_folder
from cmkit.noise import Noise
from cmkit.pictures import grid_png, png, read_picture
from cmkit.plan import Plan, check_disk, check_fit, for_sampling, noise_of, traits_of, with_values
from cmkit.plugins import Registry
from cmkit.recipe import Recipe, SampleTable, load
from cmkit.run import (
    Event,
    Sampled,
    StageFinished,
    StageStarted,
    data_of,
    read_status,
    trained,
    winner,
)
from cmkit.sample import Draws, finite_uint8, npz, sample, starts
from cmkit.weights import download

WHITE = 128
"""From this grey on a mask is white."""


def drawn_from(source: Path, overrides: Sequence[str], registry: Registry, images: int) -> Recipe:
    """The recipe that only draws `images`, with the weights and the winning scales that the run
    folder `source` holds, or those of the recipe file `source`. What `overrides` say goes first.

    CheckpointError for a folder without them, RecipeError for a recipe that has yet to be trained.
    """
    run = source.is_dir()
    if run and not (source / "recipe.toml").is_file():
        raise CheckpointError(
            f"{source}: no run folder, it has no recipe.toml; give one such as runs/NAME-HASH, or a"
            " recipe with denoiser.weights"
        )
    recipe = load(source / "recipe.toml" if run else source, overrides, registry)
    if run:
        recipe = _finished(recipe, source)
    elif recipe.train and not _said(recipe, "denoiser", "weights"):
        raise recipe.source.error(
            ("train",),
            f"the model is yet to be trained: run the recipe, and give the folder of that run, such"
            f" as runs/{recipe.name}-{recipe.hash}",
        )
    if not recipe.denoiser.weights:
        raise recipe.source.error((), "no weights to draw from: add denoiser.weights = a file")
    table = (recipe.sample or SampleTable(images=images)).model_copy(update={"images": images})
    gone = dict.fromkeys(("train", "search", "teacher", "teacher_backbone", "teacher_precond"))
    return replace(recipe, **gone, metric=(), sample=table)


def _finished(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe of a run with what its stages left in `folder`."""
    if not _said(recipe, "denoiser", "weights"):
        recipe = trained(recipe, folder)
        if recipe.train and not Path(recipe.denoiser.weights or "").is_file():
            raise CheckpointError(
                f"{recipe.denoiser.weights}: not there yet; finish the run first:"
                f" cmkit run {folder / 'recipe.toml'}"
            )
    if recipe.search and recipe.rescaler:
        axes = [axis for axis in recipe.search.grid if not _said_of(recipe, axis)]
        found = winner(read_status(folder))
        families = dict.fromkeys(axis.partition(".")[0] for axis in axes)
        if axes and not found:
            raise CheckpointError(
                f"{folder}: its search has no winner yet; finish the run, or give values yourself:"
                f" {' '.join(f'--set rescaler.{family}=1.0' for family in families)}"
            )
        values = {axis: found[axis] for axis in axes}
        recipe = replace(recipe, rescaler=with_values(recipe, values))
    if any(path[0] == "dataset" for path in recipe.source.overrides):
        return recipe
    return replace(recipe, data=data_of(folder))


def _said(recipe: Recipe, *path: str) -> bool:
    """Whether --set gave the value at `path`."""
    return any(path[: len(given)] == given for given in recipe.source.overrides)


def _said_of(recipe: Recipe, axis: str) -> bool:
    """Whether --set gave the rescaler's number `axis`, or that of its family."""
    names = {"rescaler", axis, axis.partition(".")[0]}
    return any(path[0] == "rescaler" and path[-1] in names for path in recipe.source.overrides)


def draw(
    recipe: Recipe, seed: int, classes: Sequence[int], out: Path, device: torch.device
) -> Iterator[Event]:
    """Draw a recipe's images into `out` as events; the last, StageFinished, tells what is there.

    `out` becomes a grid (.png), ADM's arrays (.npz) or a folder of PNG files. Image k is that of
    the seed, whatever their number. RecipeError where `out` exists or has another ending.
    """
    began = time.perf_counter()
    _check_out(out, ("", ".png", ".npz"))
    if recipe.sampler is None:
        raise recipe.source.error(
            ("sampler",), 'say how to draw, such as --set sampler={use="multistep"}'
        )
    plan = _fitted(recipe, classes, out)
    assert recipe.sample is not None
    model = yield from _model(plan, device)
    count, table = recipe.sample.images, recipe.sample
    draws = Draws(plan.data, seed, classes=tuple(classes))
    yield StageStarted("sample", 0, count)
    batches = []
    for batch in sample(
        model, recipe.sampler, draws, range(count), table.batch, device, table.precision
    ):
        batches.append(batch)
        yield Sampled(batch.first + len(batch.images), count)
    if out.suffix == ".npz":
        atomic_write(out, npz(batches))
    else:
        images = torch.cat([batch.images for batch in batches])
        _write_pictures(out, {f"{k:07d}": image for k, image in enumerate(images)})
    labels = draws.labels(range(count)) if "label" in plan.conditions else None
    result = {
        "out": str(out),
        "images": count,
        "seed": seed,
        "labels": None if labels is None else labels.tolist(),
        "nfe": plan.nfe,
        "scales": recipe.rescaler.model_dump(mode="json") if recipe.rescaler else {},
        "seconds": time.perf_counter() - began,
    }
    yield StageFinished("sample", result)


@dataclass(frozen=True)
class Task:
    """What is known of a picture that is edited, and the noise levels of the edit."""

    name: Literal["inpaint", "colorize", "superres"]
    mask: Path | None = None
    """The picture whose white part `inpaint` paints anew."""
    patch: int = 8
    """The side, in pixels, of the squares whose means `superres` keeps."""
    steps: int = 40
    """Points of the Karras grid from sigma_max on, as in the official code."""
    sigmas: tuple[float, ...] = ()
    """Falling noise levels below sigma_max instead."""

    def levels(self, noise: Noise) -> list[float]:
        """Falling noise levels that follow sigma_max; RecipeError where they do not."""
        check_levels(noise, self.sigmas)
        grid = noise.sigmas(self.steps, dtype=torch.float64).flip(0)
        return list(self.sigmas) or grid[1:-1].tolist()

    def known(self, pictures: Sequence[Path], channels: int, side: int) -> Tensor:
        """The pictures, (n, channels, side, side) in [-1, 1]; `superres` enlarges small ones."""
        sides = [side]
        if self.name == "superres" and side % self.patch == 0:
            sides.append(side // self.patch)
        read = [read_picture(path, channels, sides) for path in pictures]
        large = [image if image.shape[-1] == side else self._enlarged(image) for image in read]
        return torch.stack(large) / 127.5 - 1

    def _enlarged(self, image: Tensor) -> Tensor:
        return image.repeat_interleave(self.patch, 1).repeat_interleave(self.patch, 2)

    def kept(self, side: int) -> Tensor | None:
        """Where the mask is black, bool (side, side); None without a mask."""
        if (self.name == "inpaint") != (self.mask is not None):
            raise RecipeError(
                "--task inpaint wants --mask FILE, white where to paint anew"
                if self.mask is None
                else f"--mask {self.mask}: only --task inpaint takes a mask; leave it out"
            )
        return None if self.mask is None else read_picture(self.mask, 1, [side])[0] < WHITE

    def projection(self, known: Tensor, kept: Tensor | None) -> Projection:
        """What puts the known part of `known` back; DataError where the task does not suit."""
        match self.name:
            case "inpaint":
                assert kept is not None
                return inpaint(known, kept.to(known.device))
            case "colorize":
                return colorize(known)
            case "superres":
                return superres(known, self.patch)

    def given(self, known: Tensor, kept: Tensor | None) -> Tensor:
        """The known part as pictures to look at."""
        project = self.projection(known, kept)
        if self.name == "colorize":
            return brightness(known).expand_as(known)
        return project(torch.zeros_like(known))


def redraw(
    recipe: Recipe,
    pictures: Sequence[Path],
    task: Task,
    seed: int,
    classes: Sequence[int],
    out: Path,
    device: torch.device,
) -> Iterator[Event]:
    """Edit pictures into `out` as events; the last, StageFinished, tells what is there.

    `out` becomes a grid (.png) with what is known beside the result, or a folder with both for
    each picture. Every picture is read and checked before the model is.
    """
    began = time.perf_counter()
    _check_out(out, ("", ".png"))
    plan = _fitted(replace(recipe, sampler=None), classes, out)
    _check_editable(plan, classes)
    count, side = len(pictures), plan.data.resolution
    known, kept = task.known(pictures, plan.data.channels, side), task.kept(side)
    given = task.given(known, kept)
    levels = task.levels(noise_of(recipe))
    model = yield from _model(plan, device)
    assert recipe.sample is not None
    batch, cast = recipe.sample.batch, autocast(recipe.sample.precision, device)
    draws = Draws(plan.data, seed, "edit", tuple(classes))
    yield StageStarted("edit", 0, count)
    edited = []
    for start in starts(draws, model.noise.sigma_max, range(count), batch, device):
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
        for k, (path, *pair) in enumerate(zip(pictures, before, after, strict=True)):
            for name, image in zip(("before", "after"), pair, strict=True):
                named[f"{k:03d}-{path.stem}-{name}"] = image
        _write_pictures(out, named)
    result = {
        "out": str(out),
        "images": count,
        "task": task.name,
        "seed": seed,
        "sigmas": levels,
        "nfe": (1 + len(levels)) * model.passes,
        "scales": recipe.rescaler.model_dump(mode="json") if recipe.rescaler else {},
        "seconds": time.perf_counter() - began,
    }
    yield StageFinished("edit", result)


def _fitted(recipe: Recipe, classes: Sequence[int], out: Path) -> Plan:
    """The recipe's plan; RecipeError for classes that its model does not have."""
    plan = check_fit(recipe)
    number = plan.data.num_classes if "label" in plan.conditions else None
    for label in classes:
        if number is None:
            raise RecipeError(f"--label {label}: the model draws no classes; leave it out")
        if not 0 <= label < number:
            raise RecipeError(f"--label {label}: no class of the model's; give 0 to {number - 1}")
    check_disk(plan, out.parent)
    return plan


def _check_editable(plan: Plan, classes: Sequence[int]) -> None:
    """RecipeError where the model is no consistency model, or must be told a class."""
    recipe = plan.recipe
    if "boundary" not in traits_of(recipe):
        raise recipe.source.error(
            ("denoiser", "precond"),
            "only a consistency model can be edited with",
            f" = {recipe.denoiser.precond!r}",
        )
    if "sigma_to" in plan.conditions:
        raise recipe.source.error(
            ("objective",), "its network jumps to a level that it is told: no edits with it"
        )
    if "label" in plan.conditions and not classes:
        last = (plan.data.num_classes or 0) - 1
        raise RecipeError(f"the model draws classes: give the pictures' by --label, 0 to {last}")


def _model(plan: Plan, device: torch.device) -> Generator[Event, None, Denoiser]:
    """The rescaled denoiser on `device`, after any download of its weights."""
    for weights in plan.downloads:
        yield from download(weights)
    assert plan.recipe.sample is not None
    denoiser = for_sampling(plan, device, plan.recipe.sample.precision)
    return denoiser.rescaled(plan.recipe.rescaler) if plan.recipe.rescaler else denoiser


def _check_out(out: Path, endings: Sequence[str]) -> None:
    if out.exists():
        raise RecipeError(f"--out {out}: exists already; name a new one, or remove it")
    if out.suffix not in endings:
        known = ", ".join(f"FILE{ending}" for ending in endings if ending)
        raise RecipeError(f"--out {out}: write to {known} or a FOLDER, whose name has no dot")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ResourceError(
            f"{out.parent}: cannot be made: {error.strerror}; name another place with --out"
        ) from error


def _write_pictures(out: Path, images: dict[str, Tensor]) -> None:
    """One grid, or a folder with a file for each."""
    if out.suffix == ".png":
        atomic_write(out, grid_png(torch.stack(list(images.values()))))
        return
    with new_folder(out) as stage:
        for name, image in images.items():
            atomic_write(stage / f"{name}.png", png(image))
