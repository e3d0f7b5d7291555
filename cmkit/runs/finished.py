"""The recipe that samples from a finished run: its weights, scales and data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from cmkit import hub
from cmkit.errors import CheckpointError, RecipeError, inline
from cmkit.plugins import Registry
from cmkit.recipe import Recipe, SampleTable, load, load_pipeline, run_name, with_values
from cmkit.runs.folder import RunFolder
from cmkit.runs.places import chosen


def drawn_from(
    source: Path | str,
    overrides: Sequence[str],
    registry: Registry,
    images: int,
    rescaler: str | None = None,
    prompts: Sequence[str] = (),
) -> Recipe:
    """The recipe that only draws `images`, with the weights and the winning scales that the run
    `source` holds, or those of the recipe file `source`. What `overrides` say goes first, and the
    scales of the file or run `rescaler`; "off" means none. `prompts` are what images are drawn from
    in turns, instead of the recipe's.

    A run is its folder, or "run:NAME-KEY"; "RUN@STEP" and "RUN:ema-0.9999" draw from its other
    weights; a run on the hub is "hub:OWNER/NAME". A pipeline of diffusers, its folder or a name of
    the hub, needs no recipe.
    CheckpointError for a folder without them, RecipeError for a recipe that has yet to be trained.
    """
    if rescaler not in (None, "off"):
        saved = inline({"use": "saved", "path": str(rescaler)})
        overrides = [f"rescaler={saved}", *overrides]
    source = hub.run_of(str(source)) or source
    if pipeline := load_pipeline(str(source), overrides, registry):
        return _drawing(pipeline, images, prompts)
    place, step, average = chosen(str(source))
    folder = RunFolder.at(place)
    if folder.path.name == "checkpoints":
        folder = RunFolder(folder.path.parent)
        step = next(reversed(folder.steps()), None)
    elif folder.path.parent.name == "checkpoints" and folder.path.name.startswith("step-"):
        step, folder = int(folder.path.name[5:]), RunFolder(folder.path.parent.parent)
    source, run = folder.path, folder.path.is_dir()
    if run and not folder.recipe.is_file():
        if (source / "unet").is_dir():
            raise CheckpointError(
                f"{source}: half a pipeline, no model_index.json; fetch or save it again"
            )
        raise CheckpointError(
            f"{source}: no run folder, it has no recipe.toml; give one such as runs/NAME-KEY, or a"
            " recipe with denoiser.weights"
        )
    recipe = load(folder.recipe if run else source, overrides, registry)
    if rescaler == "off":
        if any(path[0] == "rescaler" for path in recipe.source.overrides):
            raise RecipeError("--rescaler off: --set rescaler changes what is off; drop one")
        recipe = replace(recipe, rescaler=None)
    if run:
        at = ("" if step is None else f"@{step}") + (f":{average}" if average else "")
        recipe = _finished(recipe, folder, at)
    elif recipe.train and not _said(recipe, "denoiser", "weights"):
        raise recipe.source.error(
            ("train",),
            f"the model is yet to be trained: run the recipe, and give the folder of that run, such"
            f" as runs/{run_name(recipe)}",
        )
    if not recipe.denoiser.weights:
        raise recipe.source.error((), "no weights to draw from: add denoiser.weights = a file")
    return _drawing(recipe, images, prompts)


def run_at(source: str) -> Path | None:
    """The folder of the run whose own weights `source` names; None for other weights of it, for a
    recipe, and for a pipeline."""
    if found := hub.run_of(source):
        return found
    place, step, average = chosen(source)
    folder, own = RunFolder.at(place), step is None and average is None
    return folder.path if own and folder.recipe.is_file() else None


def _drawing(recipe: Recipe, images: int, prompts: Sequence[str]) -> Recipe:
    """The recipe that only draws."""
    if prompts and recipe.text is None:
        raise RecipeError(f"--prompt {prompts[0]!r}: the model knows no prompts; leave it out")
    said = {"images": images, **({"prompts": tuple(prompts)} if prompts else {})}
    table = (recipe.sample or SampleTable(images=images)).model_copy(update=said)
    data = recipe.data or recipe.dataset.declared()
    return replace(recipe, teacher=None, metric=(), stages={"sample": table}, data=data)


def trained(recipe: Recipe, folder: RunFolder) -> Recipe:
    """The recipe that starts from what its training, if any, left in `folder`."""
    if not recipe.train:
        return recipe
    return _with_weights(recipe, str(folder.weights))


def _with_weights(recipe: Recipe, weights: str) -> Recipe:
    """The recipe with the trained `weights`: of its adapter, where it has one, beside those that
    training started from."""
    adapter, base = recipe.adapter, weights
    if adapter:
        adapter = adapter.model_copy(update={"weights": weights})
        teacher = recipe.teacher.table.weights if recipe.teacher else None
        base = (recipe.denoiser.init == "teacher" and teacher) or recipe.denoiser.weights or ""
    denoiser = recipe.denoiser.model_copy(update={"weights": base, "init": None})
    return replace(recipe, denoiser=denoiser, adapter=adapter)


def _finished(recipe: Recipe, folder: RunFolder, at: str) -> Recipe:
    """The recipe of a run with what its stages left in `folder`; `at` names other weights of it."""
    if at:
        recipe = _at_home(_with_weights(recipe, f"{folder.path}{at}"), folder)
    elif not _said(recipe, "adapter" if recipe.adapter else "denoiser", "weights"):
        for name, fault in folder.damage("train", folder.status().get("train", {})).items():
            if fault == "damaged" and name == folder.weights.name:
                raise CheckpointError(
                    f"{folder.weights}: damaged, its SHA-256 is not that of status.json; restore"
                    " it, or draw from a checkpoint, such as RUN@STEP"
                )
        recipe = _at_home(trained(recipe, folder), folder)
        if recipe.train and not folder.weights.is_file():
            raise CheckpointError(
                f"{folder.weights}: not there yet; finish the run first:"
                f" cmkit run {folder.recipe} --out {folder.path.parent}"
            )
    if recipe.search and recipe.rescaler:
        said = {path[-1] for path in recipe.source.overrides if path[0] == "rescaler"}
        values = dict.fromkeys(recipe.search.grid if "rescaler" in said else said, 1.0)
        decided = recipe.rescaler.complete(values, recipe.search.grid)
        axes = [axis for axis in recipe.search.grid if axis not in decided]
        found = folder.winner()
        if axes and not found:
            given = " ".join(f"--set rescaler.{name}=1.0" for name in recipe.rescaler.numbers())
            raise CheckpointError(
                f"{folder.path}: its search has no winner yet; finish the run, or give values"
                f" yourself: {given}"
            )
        values = {axis: found[axis] for axis in axes}
        recipe = replace(recipe, rescaler=with_values(recipe, values))
    if any(path[0] == "dataset" for path in recipe.source.overrides):
        return recipe
    return replace(recipe, data=folder.data())


def _at_home(recipe: Recipe, folder: RunFolder) -> Recipe:
    """The recipe with relative weights where they are not here, but where the run was begun."""
    weights = recipe.denoiser.weights
    if weights is None or Path(weights).exists():
        return recipe
    there = Path(folder.inputs().get("home", ".")) / weights
    if not there.exists():
        return recipe
    denoiser = recipe.denoiser.model_copy(update={"weights": str(there)})
    return replace(recipe, denoiser=denoiser)


def _said(recipe: Recipe, *path: str) -> bool:
    """Whether --set gave the value at `path`."""
    return any(path[: len(given)] == given for given in recipe.source.overrides)
