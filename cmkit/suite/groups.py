"""The runs that are to be a line of a table, and which of them --where chooses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from cmkit.errors import RecipeError, did_you_mean, inline
from cmkit.suite.cells import Cell
from cmkit.suite.results import Baseline, title_of
from cmkit.suite.runs import Run

Where = Mapping[str, str]
"""What --where says: a value by row, seed, axis or dotted key of a recipe."""


@dataclass
class Group:
    """The runs that are to be a line: by seed those that are finished, and why others are not."""

    row: str
    axis: Mapping[str, str]
    note: str = ""
    runs: dict[int, Run] = field(default_factory=dict)
    failures: dict[int, str] = field(default_factory=dict)
    recipes: list[Mapping[str, Any]] = field(default_factory=list)
    """Resolved, of all seeds."""
    cost: dict[str, Any] = field(default_factory=dict)
    """What no report tells: "evaluations" of the training, "parameters" without one."""
    differs: Mapping[str, str] = field(default_factory=dict)
    """Of a run that was named by itself, what sets it apart from the others."""

    @property
    def title(self) -> str:
        return title_of(self.row, self.axis)


def check_where(groups: Sequence[Group], where: Where) -> None:
    """RecipeError for a key that no group has."""
    recipes = [recipe for group in groups for recipe in group.recipes]
    axes = {axis for group in groups for axis in group.axis}
    for key in where:
        if key in ("row", "seed") or key in axes:
            continue
        if all(_at(recipe, key) is None for recipe in recipes):
            known = dict.fromkeys(path for recipe in recipes for path in _paths(recipe))
            raise RecipeError(
                f"--where {key}: no such key{did_you_mean(key, ['row', 'seed', *axes, *known])}"
            )


def baseline_of(text: str, groups: Sequence[Group]) -> Baseline:
    """What --baseline means: a row, or as AXIS=VALUE each line's own row at that value."""
    axis, equals, value = text.partition("=")
    if not equals or any(group.row == text for group in groups):
        return text
    return {axis.strip().strip('"'): value.strip().strip('"')}


def check_baseline(groups: Sequence[Group], baseline: Baseline | None) -> None:
    """RecipeError for a row, an axis or a value that no group has."""
    if isinstance(baseline, str):
        rows = dict.fromkeys(group.row for group in groups)
        if baseline not in rows:
            raise RecipeError(f"baseline {baseline}: no such row{did_you_mean(baseline, rows)}")
    for axis, value in ({} if baseline is None or isinstance(baseline, str) else baseline).items():
        known = dict.fromkeys(v for group in groups for k, v in group.axis.items() if k == axis)
        if not known:
            axes = dict.fromkeys(axis for group in groups for axis in group.axis)
            raise RecipeError(f"baseline {axis}={value}: no such axis{did_you_mean(axis, axes)}")
        if value not in known:
            raise RecipeError(f"baseline {axis}={value}: no such value{did_you_mean(value, known)}")


def chosen(group: Group, where: Where) -> bool:
    """Whether a group is so in all of its recipes."""
    for key, wanted in where.items():
        if key == "seed":
            continue
        if key == "row" or key in group.axis:
            if wanted != (group.row if key == "row" else group.axis[key]):
                return False
            continue
        found = [_words(_at(recipe, key)) for recipe in group.recipes]
        if not found or not all(wanted in words for words in found):
            return False
    return True


def selected(cells: Sequence[Cell], where: Where) -> list[Cell]:
    """The cells that are so, and those that they need, in order; RecipeError for none."""
    every = [Group(cell.row, cell.axis, recipes=[cell.recipe.resolved]) for cell in cells]
    check_where(every, where)
    seed = where.get("seed")
    found = [
        cell
        for cell, group in zip(cells, every, strict=True)
        if chosen(group, where) and seed in (None, str(cell.seed))
    ]
    if not found:
        said = " ".join(f"{key}={value}" for key, value in where.items())
        raise RecipeError(f"--where {said}: no cell is so")
    return _with_needs(cells, found)


def covering(cells: Sequence[Cell]) -> list[Cell]:
    """The first cells that have every row and every value of an axis, and those that they need."""
    seen: set[object] = set()
    found = []
    for cell in cells:
        own = {cell.row, *cell.axis.items()}
        if not cell.alone and own - seen:
            seen |= own
            found.append(cell)
    return _with_needs(cells, found)


def unpaid(cells: Sequence[Cell]) -> Iterator[str]:
    """Notes of the rows whose trainings start from those of others, which their costs leave out."""
    rows = {cell.name: cell.row for cell in cells}
    starts: dict[str, dict[str, None]] = {}
    for cell in cells:
        for name in cell.needs:
            if rows[name] != cell.row and cell.name == cell.group:
                starts.setdefault(rows[name], {})[cell.row] = None
    for start, own in starts.items():
        yield f"{', '.join(own)}: the costs leave out the training of {start} that is used"


def _with_needs(cells: Sequence[Cell], wanted: Sequence[Cell]) -> list[Cell]:
    needs, found = {cell.name: cell.needs for cell in cells}, set()
    waiting = [cell.name for cell in wanted]
    while waiting:
        found.add(name := waiting.pop())
        waiting += set(needs[name]) - found
    return [cell for cell in cells if cell.name in found]


def of_seed(group: Group, seed: str) -> Group:
    """The group's run of one seed alone."""
    return replace(
        group,
        runs={s: run for s, run in group.runs.items() if str(s) == seed},
        failures={s: why for s, why in group.failures.items() if str(s) == seed},
    )


def _paths(table: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Dotted paths of all keys of a recipe."""
    for key, value in table.items():
        yield f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _paths(value, f"{prefix}{key}.")


def _at(recipe: Mapping[str, Any], key: str) -> Any:
    """The value of a dotted key; None where there is none."""
    node: Any = recipe
    for part in key.split("."):
        node = node.get(part) if isinstance(node, Mapping) else None
    return node


def _words(value: Any) -> set[str]:
    """What a value may be called: as TOML says it, without quotation marks, or by its part."""
    if isinstance(value, list) and value and all(isinstance(one, Mapping) for one in value):
        return {word for one in value for word in _words(one)}
    if isinstance(value, Mapping):
        return {str(value.get("use"))}
    return {inline(value), str(value)}
