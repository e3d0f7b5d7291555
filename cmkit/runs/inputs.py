"""What a run reads from the disk: recorded when it is begun, and compared at every start."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from cmkit import files
from cmkit.checkpoint import MANIFEST
from cmkit.device import auto_precision, precision
from cmkit.errors import CheckpointError, DataError
from cmkit.kinds import Dataset, Metric
from cmkit.plan import Plan
from cmkit.recipe import Recipe, minimized, stage_tables
from cmkit.recipe.keys import Inputs, read_by
from cmkit.runs.folder import RunFolder
from cmkit.values import DataSpec
from cmkit.weights import identity, start_checkpoint

SHOWN = 5
"""Names of a list that a sentence shows."""


def inputs_of(recipe: Recipe, data: DataSpec, device: torch.device) -> dict[str, dict[str, Any]]:
    """The identity of what each table of a recipe reads, and the precisions that its keys mean."""
    found: dict[str, dict[str, Any]] = {}
    for table in ("codec", "text", "backbone", "adapter", "objective", "rescaler", "sampler"):
        if part := getattr(recipe, table):
            found[table] = dict(part.identity())
    shape = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(data).items()}
    shape = {key: value for key, value in shape.items() if value not in (None, [])}
    found["dataset"] = {**shape, **recipe.dataset.identity()}
    found["metric"] = {k: v for part in recipe.metric for k, v in _identity(recipe, part)}
    if recipe.search and recipe.metric:
        found["minimized"] = dict(_identity(recipe, minimized(recipe)))
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


def _identity(recipe: Recipe, metric: Metric) -> Iterator[tuple[str, Any]]:
    """What a metric reads from the disk, with the images that no training saw."""
    yield from metric.identity().items()
    if metric.heldout:
        about = recipe.compared_with(metric).identity()
        yield from ((f"{metric.prefix}{key}", value) for key, value in about.items())


def chosen_precision(recipe: Recipe, device: torch.device) -> str:
    """What "auto" means here and why, where a stage of the recipe says it; "" elsewhere."""
    if all(getattr(stage, "precision", "") != "auto" for stage in recipe.stages.values()):
        return ""
    chosen, why = auto_precision(device)
    return f"{chosen}: {why}"


def as_begun(plan: Plan, folder: RunFolder) -> Plan:
    """The plan as a run that is begun in `folder` goes on: "auto" is the precision that it was, and
    names and counts of classes that were not known then are not used, so that labels are uniform,
    as an earlier cmkit drew them."""
    if not folder.begun:
        return plan
    then = folder.inputs().get("inputs", {})
    known, data = then.get("dataset", {}), plan.data
    classes = data.classes if "classes" in known else ()
    counts = data.counts if "counts" in known else ()
    data, space = (replace(x, classes=classes, counts=counts) for x in (data, plan.space))
    stages = {}
    for name, stage in plan.recipe.stages.items():
        was = then.get(name, {}).get("precision")
        auto = getattr(stage, "precision", None) == "auto" and was
        stages[name] = stage.model_copy(update={"precision": was}) if auto else stage
    recipe = replace(plan.recipe, stages=stages)
    return replace(plan, data=data, space=space, recipe=recipe)


def left_out(dataset: Dataset) -> Iterator[str]:
    """A sentence of the images that a data set leaves out, if any."""
    if bad := dataset.left_out():
        more = f"; and {len(bad) - SHOWN} more, which cmkit check lists" * (len(bad) > SHOWN)
        yield f"dataset: left out, bad files: {len(bad)}: {'; '.join(bad[:SHOWN])}{more}"


def changes(then: Inputs, now: Inputs) -> Iterator[tuple[str, str, str]]:
    """(table, key, sentence) of each input that is not what it was."""
    for table in dict.fromkeys((*then, *now)):
        was, new = then.get(table, {}), now.get(table, {})
        for key in dict.fromkeys((*was, *new)):
            if was.get(key) != new.get(key):
                said = _change(key.replace("_", " "), was.get(key), new.get(key))
                yield table, key, f"{table}: {said}"


def _change(key: str, was: Any, new: Any) -> str:
    if isinstance(was, list) and isinstance(new, list):
        if key == "counts":
            return f"images by class: {_few(new)}; it was begun with {_few(was)}"
        added = [str(each) for each in new if each not in was]
        gone = [str(each) for each in was if each not in new]
        parts = [f"{_names(added)} new"] * bool(added) + [f"{_names(gone)} gone"] * bool(gone)
        said = ", ".join(parts) or "in another order"
        return f"{key}: {said}; it was begun with {_few(was)}"
    if all(isinstance(v, str) and re.fullmatch(r"[0-9a-f]{64}", v) for v in (was, new)):
        return f"{key} changed: SHA-256 {new[:12]}.., it was begun with {was[:12]}.."
    return f"{key} {_shown(new)}, it was begun with {_shown(was)}"


def _few(values: Sequence[Any]) -> str:
    return ", ".join(map(str, values[: 4 * SHOWN]))


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
    read: dict[str, set[str]] = {}
    for name in recipe.stages:
        if name not in finished:
            for table in (*stage_tables(recipe, name), "dataset"):
                both = {**then.get(table, {}), **now.get(table, {})}
                read.setdefault(table, set()).update(read_by(recipe, table, name, both))
    refused: dict[str, str] = {}
    for table, key, sentence in changes(then, now):
        if key in read.get(table, ()):
            refused[f"{table}.{key}"] = sentence
        else:
            yield sentence
    if refused:
        # Names say more than numbers.
        first = sorted(refused, key=lambda place: not place.endswith(".classes"))
        kind = DataError if first[0].startswith(("dataset", "metric")) else CheckpointError
        raise kind(
            f"{folder.path}: what it reads has changed:"
            f" {'; '.join(refused[place] for place in first[:2])}; restore it, or begin a new run"
            " with another name or --out"
        )
