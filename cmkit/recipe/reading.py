"""Reading a recipe: each table validated by the part or record that it belongs to."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cmkit.errors import did_you_mean
from cmkit.kinds import Part
from cmkit.plugins import Registry
from cmkit.recipe.parts import dumped, part_of, shown_value, validated
from cmkit.recipe.recipe import Recipe
from cmkit.recipe.tables import (
    KEYS,
    NAME,
    PART_TABLES,
    REQUIRED,
    STAGES,
    StageTable,
    core_tables,
    stage_class,
)
from cmkit.recipe.toml import Source, read

if TYPE_CHECKING:
    from cmkit.kinds import Precond


def load(path: str | Path, overrides: Sequence[str], registry: Registry) -> Recipe:
    """The recipe in the file `path` with `key=value` overrides applied.

    Raises RecipeError for whatever is wrong with the text, PluginError for a part that is missing
    or broken. Imports the parts that it names and nothing else.
    """
    tables, source = read(path, overrides)
    return _resolve(tables, source, registry)


def _resolve(tables: dict[str, Any], source: Source, registry: Registry) -> Recipe:
    for key in tables:
        if key not in KEYS:
            raise source.error((key,), f"unknown key{did_you_mean(key, KEYS)}")
    for key in REQUIRED:
        if key not in tables:
            raise source.error((), f"the key {key!r} is missing")
    name, seed = _name(tables["name"], source), _seed(tables.get("seed", 0), source)
    resolved: dict[str, Any] = {"name": name, "seed": seed}
    parts: dict[str, Any] = {}
    for kind in PART_TABLES:
        parts[kind] = None
        if kind in tables:
            parts[kind], resolved[kind] = part_of(kind, tables[kind], (kind,), source, registry)
    tables, inner = _without_backbone(tables)
    parts["teacher_backbone"] = parts["teacher_precond"] = None
    stages: dict[str, Any] = {}
    for key, model in core_tables().items():
        table = tables.get(key, {} if key == "denoiser" else None)
        kept = stages if issubclass(model, StageTable) else parts
        kept[key] = None
        if table is not None and "precond" in model.model_fields:
            precond, table = _preconditioned(key, model, table, source, registry)
            parts["precond" if key == "denoiser" else "teacher_precond"] = precond
        if table is not None:
            kept[key] = validated(model, table, (key,), source)
            resolved[key] = dumped(kept[key])
    if inner is not None:
        path = ("teacher", "backbone")
        parts["teacher_backbone"], plain = part_of("backbone", inner, path, source, registry)
        resolved["teacher"]["backbone"] = plain
    metrics = tables.get("metric", [])
    if not isinstance(metrics, list):
        raise source.error(("metric",), 'expected a list of tables: [[metric]] use = "fidelity"')
    pairs = [
        part_of("metric", table, ("metric", index), source, registry)
        for index, table in enumerate(metrics)
    ]
    if pairs:
        resolved["metric"] = [table for _, table in pairs]
        stages["metric"] = stage_class("metric")()
    parts["metric"] = tuple(part for part, _ in pairs)
    parts["stages"] = {key: stages[key] for key in STAGES if stages.get(key)}
    return Recipe(name=name, seed=seed, resolved=resolved, source=source, **parts)


def _without_backbone(tables: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    """The tables without the part inside [teacher], and that part's own table, if any."""
    teacher = tables.get("teacher")
    if not isinstance(teacher, dict) or "backbone" not in teacher:
        return tables, None
    rest = {key: value for key, value in teacher.items() if key != "backbone"}
    return {**tables, "teacher": rest}, teacher["backbone"]


def _preconditioned(
    key: str, model: type[Part], table: Any, source: Source, registry: Registry
) -> tuple[Precond, dict[str, Any]]:
    """The precond of a [denoiser] or [teacher], and the table with all that follows from it.

    A precond without options is written as its name.
    """
    if not isinstance(table, dict):
        raise source.error((key,), "expected a table")
    said, path = table.get("precond", model.model_fields["precond"].default), (key, "precond")
    by_name = isinstance(said, str)
    precond, plain = part_of(
        "precond", {"use": said} if by_name else said, path, source, registry, by_name
    )
    ends = dict(zip(("sigma_min", "sigma_max"), precond.levels, strict=True))
    full = {**table, "precond": plain if len(plain) > 1 else plain["use"]}
    return precond, ({**ends, **full} if key == "denoiser" else full)


def _name(name: object, source: Source) -> str:
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise source.error(
            ("name",), "use 1 to 64 letters, digits, '.', '_' or '-'", f" = {shown_value(name)}"
        )
    return name


def _seed(seed: object, source: Source) -> int:
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**63:
        raise source.error(("seed",), "expected a whole number from 0", f" = {shown_value(seed)}")
    return seed
