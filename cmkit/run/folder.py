"""The folder of a run: which files it holds, how they are written and read."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from cmkit import files
from cmkit.errors import CheckpointError
from cmkit.plan import Plan
from cmkit.recipe import Recipe
from cmkit.sample import SavedImages
from cmkit.search import PartialCells
from cmkit.values import DataSpec


def kept_samples(folder: Path) -> int:
    """Samples in the files of `folder` that follow each other from the first on. A file is named
    after its first image; those behind a gap are drawn again."""
    kept = 0
    for path in sorted(folder.glob(f"{'[0-9]' * 7}.npz")):
        if int(path.stem) == kept:
            kept += len(SavedImages([path]))
        else:
            path.unlink()
    return kept


def keep_partial(path: Path, unfinished: PartialCells) -> None:
    from safetensors.torch import save

    about = {"labels": json.dumps(unfinished.labels), "drawn": str(unfinished.drawn)}
    files.atomic_write(path, save(dict(unfinished.tensors), about))


def partial_cells(path: Path) -> PartialCells | None:
    """What `keep_partial` wrote; None where there is nothing that can be read, since it only
    saves time."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            about = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (FileNotFoundError, SafetensorError):
        return None
    return PartialCells(tuple(json.loads(about["labels"])), int(about["drawn"]), tensors)


def trained(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe that starts from what its training, if any, left in `folder`."""
    if not recipe.train:
        return recipe
    weights = str(folder / "model.safetensors")
    table = recipe.denoiser.model_copy(update={"weights": weights, "init": None})
    return replace(recipe, denoiser=table)


def read_status(folder: Path) -> dict[str, Any]:
    """What the finished stages of a run folder left to say, by stage."""
    path = folder / "status.json"
    try:
        return dict(json.loads(path.read_text("utf-8")))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise CheckpointError(f"{path}: damaged ({error}); delete it to redo the stages") from error


def data_of(folder: Path) -> DataSpec | None:
    """What a finished run says of its data, which then need not be there; None of any other."""
    try:
        report = json.loads((folder / "report.json").read_text("utf-8"))
        return DataSpec(**report["data"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None  # it is of an earlier version, or yet to be written


def winner(status: Mapping[str, Any]) -> dict[str, Any]:
    """The rescaler's values that the search found best; none before the search is finished."""
    found = status.get("search")
    return {axis: found["best"][axis] for axis in found["axes"]} if found else {}


def run_folder(plan: Plan, out: Path) -> Path:
    """Where a plan's run lives: `<out>/<name>-<hash of the resolved recipe>`."""
    return out / f"{plan.recipe.name}-{plan.recipe.hash}"


def keep_recipe(plan: Plan, folder: Path) -> None:
    path, text = folder / "recipe.toml", plan.recipe.toml()
    if path.exists() and _toml(path) != tomllib.loads(text):  # keys may have changed places
        raise CheckpointError(
            f"{path}: is not the recipe that this folder is named after; restore it, or run with"
            " another --out"
        )
    if not path.exists():
        files.atomic_write(path, text)


def _toml(path: Path) -> dict[str, Any] | None:
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except ValueError:
        return None


def write_json(path: Path, content: dict[str, Any]) -> None:
    files.atomic_write(path, json.dumps(content, indent=1, allow_nan=False) + "\n")
