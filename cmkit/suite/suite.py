"""A suite file becomes a `Suite`: the rows and axes by which it varies a recipe. Free of torch."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator

from cmkit.errors import RecipeError, did_you_mean, inline
from cmkit.kinds import Part
from cmkit.recipe import NAME, Source, find_recipe
from cmkit.recipe.parts import shown_value, validated
from cmkit.recipe.tables import KEYS, Count
from cmkit.recipe.toml import key_path, read

CHANGEABLE = tuple(key for key in KEYS if key not in ("name", "seed"))
"""Tables of a recipe that a row or an axis may change."""
COUNTED = 10**6
"""Cells of a seed that are gone through to count those that are left."""
ROW_KEYS = ("note", "budget", "axis", *CHANGEABLE)
UNITS = ("steps", "images", "evaluations", "seconds")


class BudgetTable(Part):
    """What the training of each row may cost, in one of four units. It decides `train.steps`, which
    are rounded down."""

    steps: Count | None = None
    """Optimizer steps."""
    images: int | None = Field(None, ge=1, le=10**18)
    """Images seen: steps of `train.batch` images."""
    evaluations: float | None = Field(None, gt=0, le=1e18)
    """Network evaluations: for each image seen, a forward pass counts 1, its backward pass 2, those
    of teacher, target and companions included."""
    seconds: float | None = Field(None, gt=0, le=1e9)
    """Seconds of training steps, by the time of one that is measured before."""
    teacher: bool = False
    """Whether the training of a row's teacher, or of the row that it starts from, is paid from its
    own budget."""

    @model_validator(mode="after")
    def _one_unit(self) -> BudgetTable:
        said = [unit for unit in UNITS if getattr(self, unit) is not None]
        if len(said) != 1:
            raise ValueError(
                f"a budget has one unit, not {' and '.join(said)}; drop all but one"
                if said
                else f"say one of {', '.join(UNITS)}"
            )
        return self

    @property
    def unit(self) -> str:
        """One of `UNITS`."""
        return next(unit for unit in UNITS if getattr(self, unit) is not None)

    @property
    def amount(self) -> float:
        """How much of the unit."""
        return float(getattr(self, self.unit))


class SuiteTable(Part):
    """The keys of a suite file."""

    name: str
    """Name of the suite: letters, digits, '.', '_' and '-'."""
    base: str
    """The recipe that rows change: a file, seen from the suite's folder, or the bare name of a
    recipe that comes with cmkit."""
    seeds: tuple[Annotated[int, Field(ge=0, lt=2**63)], ...] = Field((0, 1, 2), min_length=1)
    """Seeds of each row, which are those of its recipes."""
    baseline: str | dict[str, Any] | None = Field(None, min_length=1)
    """The row that others are compared with; or a value of an axis, such as { rescaling = "off" }:
    each line is compared with that of its own row there."""
    exclude: tuple[Annotated[dict[str, Any], Field(min_length=1)], ...] = ()
    """Cells that are left out: those that have all values of axes, or the `row`, of a table."""
    budget: BudgetTable | None = None
    """What training may cost; needed where a row trains."""
    axis: dict[str, Any] = {}
    """What each row is varied in: a recipe's key in quotation marks and a list of its values, or a
    name and a table of changes for each value."""
    row: dict[str, dict[str, Any]] = Field(min_length=1)
    """The rows by name: tables of a recipe, merged into the base's. `note` says what a row is;
    `axis` gives it values of its own (false = none); `budget = false` lets it say train.steps."""


@dataclass(frozen=True)
class Reference:
    """Weights that a row's training leaves: `{ row = NAME }` in a suite."""

    row: str
    key: str = "weights"
    """The key of the table that says it."""


@dataclass(frozen=True)
class Change:
    """`value` to be merged into a recipe at `path`, said at the path `origin` of a suite."""

    path: tuple[str, ...]
    value: Any
    origin: tuple[str, ...]


@dataclass(frozen=True)
class Row:
    """A row: its changes, and the values of each axis by their names, which change more."""

    name: str
    note: str
    change: Change
    axes: Mapping[str, Mapping[str, Change]]
    budgeted: bool
    """Whether the budget decides its steps."""


@dataclass(frozen=True)
class Suite:
    """A suite whose own keys are known to be sound; its cells are yet to be validated."""

    path: Path
    table: SuiteTable
    rows: Mapping[str, Row]
    source: Source
    base: Mapping[str, Any]
    """The tables of the base recipe."""
    base_source: Source

    @property
    def name(self) -> str:
        return self.table.name

    @property
    def axes(self) -> tuple[str, ...]:
        """Names of the axes, in order."""
        return tuple(self.table.axis)

    @property
    def measured(self) -> bool:
        """Whether the steps of its budget follow from a measurement."""
        budget = self.table.budget
        return budget is not None and budget.unit in ("evaluations", "seconds")

    def places(self, row: Row) -> Iterator[dict[str, str]]:
        """The value of each axis in each of a row's cells, the last axis fastest."""
        for labels in itertools.product(*row.axes.values()):
            axis = dict(zip(row.axes, labels, strict=True))
            own = {**axis, "row": row.name}.items()
            if not any(left_out.items() <= own for left_out in self.table.exclude):
                yield axis

    def count(self) -> int:
        """How many cells it has; of millions those that are excluded are not taken off."""
        count = sum(math.prod(map(len, row.axes.values())) for row in self.rows.values())
        if self.table.exclude and count <= COUNTED:
            count = sum(1 for row in self.rows.values() for _ in self.places(row))
        return count * len(self.table.seeds)


def load_suite(path: str | Path) -> Suite:
    """The suite in the TOML file `path`; RecipeError for whatever is wrong with its own keys.

    What rows and axes change in a recipe is validated with the cells.
    """
    tables, source = read(path, ())
    if "name" in tables and "base" in tables and not tables.get("row"):
        raise source.error((), "no cell: add a row, such as [row.ct]")
    budget = tables.pop("budget", None)
    table = validated(SuiteTable, tables, (), source)
    assert isinstance(table, SuiteTable)
    if budget is not None:
        if not isinstance(budget, dict):
            raise source.error(("budget",), "expected a table such as { steps = 500 }")
        checked = validated(BudgetTable, budget, ("budget",), source)
        table = table.model_copy(update={"budget": checked})
    if not NAME.fullmatch(table.name):
        raise source.error(
            ("name",), "use 1 to 64 letters, digits, '.', '_' or '-'", f" = {inline(table.name)}"
        )
    for index, seed in enumerate(table.seeds):
        if seed in table.seeds[:index]:
            raise source.error(("seeds",), f"{seed} stands twice; drop one", f" = {_list(table)}")
    axes = {name: _values(name, said, ("axis", name), source) for name, said in table.axis.items()}
    rows = {name: _row(name, said, axes, source) for name, said in table.row.items()}
    table = _placed(table, rows, source)
    recipe = find_recipe(table.base, Path(path).parent)
    if not recipe.exists():
        raise source.error(
            ("base",),
            f"no such recipe: {recipe} is no file, and none of that name comes with cmkit",
            f" = {inline(table.base)}",
        )
    base, base_source = read(recipe, ())
    return Suite(Path(path), table, rows, source, base, base_source)


def _placed(table: SuiteTable, rows: Mapping[str, Row], source: Source) -> SuiteTable:
    """The table with the values of axes in `baseline` and `exclude` by their labels; RecipeError
    for a row, an axis or a value that is not there."""
    axes: dict[str, dict[str, Change]] = {}
    for row in rows.values():
        for axis, values in row.axes.items():
            axes.setdefault(axis, {}).update(values)
    baseline = table.baseline
    if isinstance(baseline, str) and baseline not in rows:
        raise source.error(
            ("baseline",), f"no such row{did_you_mean(baseline, rows)}", f" = {inline(baseline)}"
        )
    if isinstance(baseline, dict):
        baseline = dict(_labels(baseline, axes, ("baseline",), source))
    known = {"row": rows, **axes}
    excluded = (
        dict(_labels(said, known, ("exclude", index), source))
        for index, said in enumerate(table.exclude)
    )
    return table.model_copy(update={"baseline": baseline, "exclude": tuple(excluded)})


def _labels(
    said: Mapping[str, Any],
    known: Mapping[str, Collection[str]],
    path: tuple[str | int, ...],
    source: Source,
) -> Iterator[tuple[str, str]]:
    """Each axis of a table with the label of its value; RecipeError where that is not `known`."""
    for axis, value in said.items():
        if axis not in known:
            raise source.error((*path, axis), f"no such axis{did_you_mean(axis, known)}")
        label = _label(value) or ""
        if label not in known[axis]:
            near = did_you_mean(label, known[axis])
            raise source.error((*path, axis), f"no such value{near}", f" = {shown_value(value)}")
        yield axis, label


def _list(table: SuiteTable) -> str:
    return shown_value(list(table.seeds))


def _row(
    name: str, said: Mapping[str, Any], shared: Mapping[str, Mapping[str, Change]], source: Source
) -> Row:
    path = ("row", name)
    if not NAME.fullmatch(name):
        raise source.error(path, "name a row by letters, digits, '.', '_' or '-'")
    for key in said:
        if key in ("name", "seed"):
            cure = "a cell is named after its row" if key == "name" else "say seeds = [..] instead"
            raise source.error((*path, key), f"a row has none: {cure}")
        if key not in ROW_KEYS:
            raise source.error((*path, key), f"unknown key{did_you_mean(key, ROW_KEYS)}")
    note, budget, own = said.get("note", ""), said.get("budget", True), said.get("axis", {})
    if not isinstance(note, str):
        raise source.error((*path, "note"), "expected text", f" = {shown_value(note)}")
    if not isinstance(budget, bool):
        raise source.error(
            (*path, "budget"),
            "the budget is the suite's; a row may say budget = false, and train.steps itself",
            f" = {shown_value(budget)}",
        )
    if not isinstance(own, dict):
        raise source.error((*path, "axis"), "expected axis.NAME = its values in this row")
    for axis in own:
        if axis not in shared:
            raise source.error(
                (*path, "axis", axis), f"the suite has no such axis{did_you_mean(axis, shared)}"
            )
    axes = {
        axis: _own_values(axis, own.get(axis, True), values, (*path, "axis", axis), source)
        for axis, values in shared.items()
        if own.get(axis) is not False
    }
    changes = {key: value for key, value in said.items() if key in CHANGEABLE}
    change = Change((), _referenced(changes, path, source), path)
    return Row(name, note, change, axes, budget)


def _own_values(
    name: str, said: Any, shared: Mapping[str, Change], path: tuple[str, ...], source: Source
) -> Mapping[str, Change]:
    """The values of an axis in a row: those that it says, or that it chooses of the shared ones."""
    if said is True:
        return shared
    if not isinstance(said, list) or next(iter(shared.values())).path:
        return _values(name, said, path, source)
    chosen = [_label(value) or "" for value in said]
    for label in chosen:
        if label not in shared:
            raise source.error(path, f"no such value{did_you_mean(label, shared)}", f" = {label}")
    if not chosen:
        raise source.error(path, f"no value; {name} = false leaves the axis out")
    return {label: shared[label] for label in chosen}


def _values(name: str, said: Any, path: tuple[str, ...], source: Source) -> dict[str, Change]:
    """The values of an axis by their labels, and what each changes."""
    if not said:
        raise source.error(path, "no value; name some, or drop the axis")
    if isinstance(said, list):
        return _key_values(name, said, path, source)
    if not isinstance(said, dict) or not all(isinstance(value, dict) for value in said.values()):
        raise source.error(
            path,
            'expected "table.key" = [its values], in quotation marks, or a name and for each value'
            ' a table of changes, such as nfe.1 = { sampler = { use = "multistep" } }',
        )
    found = {}
    for label, tables in said.items():
        inner = (*path, label)
        if not NAME.fullmatch(label):
            raise source.error(inner, "name a value by letters, digits, '.', '_' or '-'")
        for key in tables:
            if key not in CHANGEABLE:
                raise source.error(
                    (*inner, key), f"unknown key of a recipe{did_you_mean(key, CHANGEABLE)}"
                )
        found[label] = Change((), _referenced(tables, inner, source), inner)
    return found


def _key_values(
    name: str, values: list[Any], path: tuple[str, ...], source: Source
) -> dict[str, Change]:
    """The values of an axis that is a recipe's key, by their labels."""
    key = key_path(name)
    if not key or key[0] not in CHANGEABLE:
        cure = "; say seeds = [..] instead" if name == "seed" else ""
        near = cure or did_you_mean(key[0] if key else name, CHANGEABLE)
        raise source.error(path, f"unknown key of a recipe{near}")
    found: dict[str, Change] = {}
    for value in values:
        label = _label(value)
        if label is None or label in found:
            said = "has no short name" if label is None else f"is called {label!r} like another"
            raise source.error(
                path,
                f"the value {shown_value(value)} {said}; name the values, such as"
                f" axis.NAME.{label or 'VALUE'} = {{ {name} = .. }}",
            )
        inner: Any = value
        at = key
        if key == ("teacher", "row"):
            at, inner = ("teacher", "weights"), {"row": value}
        nested: dict[str, Any] = {}
        node = nested
        for part in at[:-1]:
            node = node.setdefault(part, {})
        node[at[-1]] = inner
        resolved = _referenced(nested, path, source)
        for part in at:
            resolved = resolved[part]
        found[label] = Change(at, resolved, path)
    return found


def _label(value: Any) -> str | None:
    """What names a value in the names of cells; None where nothing short does."""
    if isinstance(value, dict):
        value = value.get("use", value.get("row"))
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, int | float):
        return f"{value:.12g}"
    if not isinstance(value, str):
        return None
    label = re.sub(r"[^A-Za-z0-9_.-]+", "-", value).strip("-._")
    return label if NAME.fullmatch(label) else None


def _referenced(tables: Mapping[str, Any], path: tuple[str, ...], source: Source) -> dict[str, Any]:
    """Tables of a recipe in which `{ row = NAME }` is a `Reference`: in denoiser.weights and
    teacher.weights, for which `teacher = { row = NAME }` is short."""
    found = dict(tables)
    for key in ("teacher", "denoiser"):
        if not isinstance(found.get(key), dict):
            continue
        table = dict(found[key])
        short = key == "teacher" and "row" in table
        if short and "weights" in table:
            raise source.error((*path, key), "it has a row and weights; drop one of them")
        said = {"row": table.pop("row")} if short else table.get("weights")
        if isinstance(said, dict):
            if said.keys() != {"row"} or not isinstance(said["row"], str):
                raise source.error(
                    (*path, key, "row" if short else "weights"),
                    "expected the place of weights, or { row = NAME }",
                    f" = {shown_value(said)}",
                )
            table["weights"] = Reference(said["row"], "row" if short else "weights")
        found[key] = table
    return found


def refuse_many(suite: Suite, most: int) -> None:
    """RecipeError for no cell, or more than `most` cells, with what these would cost."""
    count, budget = suite.count(), suite.table.budget
    if count > most:
        each = f"{budget.amount:,.12g} {budget.unit} a training, " if budget else ""
        total = f"at most {count * budget.amount:,.6g} in all; " if budget else ""
        raise RecipeError(
            f"{suite.source.file}: {count:,} cells, more than {most:,}: {each}{total}name fewer"
            " values, rows or seeds, or say --yes"
        )
