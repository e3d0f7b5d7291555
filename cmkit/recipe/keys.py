"""What the stages of a recipe depend on, and the keys that follow from it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from cmkit.kinds import Part
from cmkit.recipe.grid import minimized
from cmkit.recipe.recipe import Recipe

Inputs = Mapping[str, Mapping[str, Any]]
"""Identities of what each table reads from the disk."""


def run_name(recipe: Recipe, keys: Mapping[str, str] | None = None) -> str:
    """`<name>-<key>`: the key is 8 digits of that of the last stage, whatever lies on the disk.
    `keys` are `stage_keys(recipe)`, where they are known."""
    *_, last = ("", *(stage_keys(recipe) if keys is None else keys).values())
    return f"{recipe.name}-{last[:8]}"


def stage_keys(recipe: Recipe, inputs: Inputs = MappingProxyType({})) -> dict[str, str]:
    """The key of each stage, in order: a SHA-256 of the stage before it, of the tables that decide
    it, and of the identities `inputs` of what these read."""
    keys: dict[str, str] = {}
    before = ""
    for name in recipe.stages:
        tables = stage_tables(recipe, name)
        known = [table for table in tables if table in inputs]
        read = {table: read_by(recipe, table, name, inputs[table]) for table in known}
        text = json.dumps([before, tables, read], sort_keys=True)
        before = keys[name] = hashlib.sha256(text.encode()).hexdigest()
    return keys


def stage_tables(recipe: Recipe, stage: str) -> dict[str, Any]:
    """The tables that decide the result of a stage, beside the stages before it: without defaults,
    which may be added to a part later, and without what changes no bit of it."""
    found: dict[str, Any] = {"seed": recipe.seed, **({"smoke": True} if recipe.smoke else {})}
    for table in dict.fromkeys((*recipe.stages[stage].reads, stage)):
        if table in recipe.resolved or (table == "minimized" and recipe.metric):
            found[table] = _said(recipe, table, stage)
    if stage == "search" and recipe.sample:
        drawn = recipe.sample
        found |= {"labels": drawn.labels} if drawn.labels != "data" else {}
        found |= {"prompts": list(drawn.prompts)} if drawn.prompts else {}
    return found


def read_by(recipe: Recipe, table: str, stage: str, about: Mapping[str, Any]) -> dict[str, Any]:
    """What a stage reads of the identity of a table's inputs, whose keys may be those of fields."""
    part = getattr(recipe, table, None)
    known = part.read_by if isinstance(part, Part) else {}
    return {key: value for key, value in about.items() if stage in known.get(key, (stage,))}


def _said(recipe: Recipe, table: str, stage: str) -> Any:
    """What a table says to a stage."""
    if table == "minimized":  # adding another metric must not search again
        metric = minimized(recipe)
        return {"use": type(metric).__qualname__, **_lean(metric, stage)}
    if table == "metric":
        pairs = zip(recipe.metric, recipe.resolved["metric"], strict=True)
        return [{"use": said["use"], **_lean(part, stage)} for part, said in pairs]
    if table == "denoiser":
        found = {**_lean(recipe.denoiser, stage), "precond": _inside(recipe, table, stage)}
        for key, level in zip(("sigma_min", "sigma_max"), recipe.precond.levels, strict=True):
            if getattr(recipe.denoiser, key) == level:
                found.pop(key, None)
            else:
                found[key] = getattr(recipe.denoiser, key)
        return found
    if table == "teacher":
        assert recipe.teacher is not None
        inner = {kind: _inside(recipe, table, stage, kind) for kind in ("precond", "backbone")}
        return {**_lean(recipe.teacher.table, stage), **inner}
    part = recipe.stages.get(table) or getattr(recipe, table)
    return {"use": recipe.resolved[table].get("use"), **_lean(part, stage)}


def _inside(recipe: Recipe, table: str, stage: str, kind: str = "precond") -> Any:
    """What a table says of the part of a `kind` in it."""
    said = recipe.resolved[table].get(kind)
    if said is None:
        return None
    part = getattr(recipe.teacher if table == "teacher" else recipe, kind)
    return {"use": said if isinstance(said, str) else said["use"], **_lean(part, stage)}


def _lean(part: Part, stage: str) -> dict[str, Any]:
    dump = part.model_dump(mode="json", exclude_none=True, exclude_defaults=True)
    return {key: value for key, value in dump.items() if stage in part.read_by.get(key, (stage,))}
