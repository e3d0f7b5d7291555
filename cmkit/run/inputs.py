"""What a run reads from the disk: recorded when it is begun, and compared at every start."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import torch

from cmkit import files
from cmkit.checkpoint import MANIFEST
from cmkit.device import auto_precision, precision
from cmkit.errors import CheckpointError, DataError
from cmkit.plan import Plan
from cmkit.recipe import Recipe, minimized, stage_tables
from cmkit.recipe.keys import Inputs
from cmkit.run.folder import RunFolder
from cmkit.values import DataSpec
from cmkit.weights import identity, start_checkpoint

SHOWN = 5
"""Names of a list that a sentence shows."""


def inputs_of(recipe: Recipe, data: DataSpec, device: torch.device) -> dict[str, dict[str, Any]]:
    """The identity of what each table of a recipe reads, and the precisions that its keys mean."""
    found: dict[str, dict[str, Any]] = {}
    for table in ("backbone", "objective", "rescaler", "sampler"):
        if part := getattr(recipe, table):
            found[table] = dict(part.identity())
    shape = {key: value for key, value in asdict(data).items() if value is not None}
    found["dataset"] = {**shape, **recipe.dataset.identity()}
    found["metric"] = {key: v for part in recipe.metric for key, v in part.identity().items()}
    if recipe.search:
        found["minimized"] = dict(minimized(recipe).identity())
    if recipe.denoiser.weights:
        found["denoiser"] = identity(recipe.denoiser.weights, recipe.backbone)
    if teacher := recipe.teacher:
        found["teacher"] = identity(teacher.table.weights, teacher.backbone)
    if recipe.train and recipe.train.start:
        manifest = start_checkpoint(recipe.train.start) / MANIFEST
        found["train"] = {"start": files.sha256_of(manifest)}
    for name, stage in recipe.stages.items():
        if said := getattr(stage, "precision", None):
            found.setdefault(name, {})["precision"] = precision(said, device)
    return {table: about for table, about in found.items() if about}


def chosen_precision(recipe: Recipe, device: torch.device) -> str:
    """What "auto" means here and why, where a stage of the recipe says it; "" elsewhere."""
    if all(getattr(stage, "precision", "") != "auto" for stage in recipe.stages.values()):
        return ""
    chosen, why = auto_precision(device)
    return f"{chosen}: {why}"


def changes(then: Inputs, now: Inputs, tables: Sequence[str]) -> Iterator[str]:
    """A sentence for each input of `tables` that is not what it was."""
    for table in tables:
        was, new = then.get(table, {}), now.get(table, {})
        for key in dict.fromkeys((*was, *new)):
            if was.get(key) != new.get(key):
                yield f"{table}: {_change(key.replace('_', ' '), was.get(key), new.get(key))}"


def _change(key: str, was: Any, new: Any) -> str:
    if isinstance(was, list) and isinstance(new, list):
        added = [str(each) for each in new if each not in was]
        gone = [str(each) for each in was if each not in new]
        parts = [f"{_names(added)} new"] * bool(added) + [f"{_names(gone)} gone"] * bool(gone)
        said = ", ".join(parts) or "in another order"
        return f"{key}: {said}; it was begun with {', '.join(map(str, was[: 4 * SHOWN]))}"
    if all(isinstance(v, str) and re.fullmatch(r"[0-9a-f]{64}", v) for v in (was, new)):
        return f"{key} changed: SHA-256 {new[:12]}.., it was begun with {was[:12]}.."
    return f"{key} {_shown(new)}, it was begun with {_shown(was)}"


def _names(names: Sequence[str]) -> str:
    shown = ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" * (len(names) > SHOWN))
    return f"{shown} {'is' if len(names) == 1 else 'are'}"


def _shown(value: Any) -> str:
    return "none" if value is None else str(value)


def check_inputs(
    plan: Plan, folder: RunFolder, now: Inputs, finished: Sequence[str]
) -> Iterator[str]:
    """Sentences about inputs that changed since the run was begun, and that `finished` stages
    alone read; DataError or CheckpointError where a stage that is to be done reads one."""
    recipe, then = plan.recipe, folder.inputs()["inputs"]
    open_stages = [name for name in recipe.stages if name not in finished]
    read = {table for name in open_stages for table in stage_tables(recipe, name)}
    read |= {"dataset"} if open_stages else set()
    every = dict.fromkeys((*then, *now))
    for sentence in changes(then, now, [table for table in every if table in read]):
        kind = DataError if sentence.startswith(("dataset", "metric")) else CheckpointError
        raise kind(
            f"{folder.path}: what it reads has changed: {sentence}; restore it, or begin a new run"
            " with another name or --out"
        )
    yield from changes(then, now, [table for table in every if table not in read])
