"""The cells of a suite: rows, axes and seeds become ordinary recipes, and what they share."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from cmkit.errors import RecipeError, did_you_mean, inline
from cmkit.plugins import Registry
from cmkit.recipe import (
    NAME,
    Recipe,
    Source,
    from_tables,
    run_name,
    stage_keys,
    stage_tables,
)
from cmkit.recipe.tables import stage_class
from cmkit.suite.merge import merge, value_at
from cmkit.suite.suite import Change, Reference, Row, Suite, refuse_many

MOST = 200
"""Cells of a suite that need no --yes."""
BUDGETED = ("train", "steps")

Cost = Callable[[Recipe], float]
"""What a training step of a recipe costs, in the unit of the suite's budget."""
Shrink = Callable[[Recipe], dict[str, Any]]
"""The tables of a recipe to take a recipe's place."""


@dataclass(frozen=True)
class Cell:
    """One run of a suite: an ordinary recipe. Names of cells are those of run folders."""

    row: str
    axis: Mapping[str, str]
    """Name of the value on each axis that its row has."""
    seed: int
    recipe: Recipe
    name: str
    """NAME-KEY, the name of its run's folder."""
    group: str
    """The cell that does the training which this one's is equal to; its own name where it does, or
    where it trains nothing."""
    needs: tuple[str, ...] = ()
    """The cells whose training must be finished before it starts."""
    alone: bool = False
    """Whether it is the training of a row's cells, apart from them because other rows start from
    it: what else is done with that row, such as one metric more, then changes nothing in these."""


@dataclass(frozen=True, kw_only=True)
class Changed(Source):
    """Where the values of a cell stand: in the base, or in the suite that changed it."""

    suite: Source
    row: str
    origins: Mapping[tuple[str, ...], tuple[str, ...]]
    """Path in the suite of what was changed in the recipe, by its path there."""

    def error(self, path: Sequence[str | int], message: str, value: str = "") -> RecipeError:
        """RecipeError that names the suite's line and row where the suite says the value, else the
        base's line."""
        keys = tuple(str(part) for part in path)
        prefixes = [keys[:n] for n in range(len(keys), 0, -1)]
        for prefix in prefixes:
            if prefix in self.origins:
                return self._in_suite((*self.origins[prefix], *keys[len(prefix) :]), message, value)
        beneath = [p for p in self.origins if p != BUDGETED]
        for prefix in prefixes:
            if prefix == keys or prefix not in self.lines:
                for changed in beneath:
                    if changed[: len(prefix)] == prefix:
                        return self._in_suite(self.origins[changed], message, value)
            if prefix in self.lines:
                break
        return super().error(path, f"{message} (in row {self.row} of {self.suite.file})", value)

    def _in_suite(self, path: tuple[str, ...], message: str, value: str) -> RecipeError:
        said = "" if path[:2] == ("row", self.row) else f" (in row {self.row})"
        return self.suite.error(path, message + said, value)


@dataclass(eq=False)
class _Draft:
    """A cell whose recipe is not loaded yet."""

    row: Row
    axis: Mapping[str, str]
    seed: int
    tables: dict[str, Any]
    """What its recipe says, with each `Reference` and the budget's steps once it is loaded."""
    source: Changed
    starts: dict[str, list[_Draft]] = field(default_factory=dict)
    """The cells that {row = NAME} may mean, by the table whose weights they are."""
    recipe: Recipe | None = None
    keys: Mapping[str, str] = field(default_factory=dict)
    """Keys of its stages."""
    run: str = ""
    """The name of its run's folder."""
    first: _Draft | None = None
    """The first cell with this training."""

    @property
    def title(self) -> str:
        """The name of its recipe."""
        return "-".join([self.row.name, *self.axis.values(), f"s{self.seed}"])

    @property
    def parents(self) -> list[_Draft]:
        """The cells whose training it starts from or distils."""
        firsts = (drafts[0].first for drafts in self.starts.values())
        return list(dict.fromkeys(first for first in firsts if first))


def cells(
    suite: Suite,
    registry: Registry,
    most: int = MOST,
    cost: Cost | None = None,
    shrink: Shrink | None = None,
) -> list[Cell]:
    """The cells of a suite in its order: rows, then axes, the last fastest, then seeds.

    Every cell's recipe is validated; RecipeError also for more than `most` cells, before any is
    loaded. `cost` says what a step costs where the budget is of evaluations or seconds; without it
    such a training has 1 step, and names are not final. `shrink` gives the tables of a recipe that
    takes a recipe's place, as `cmkit.smoke.smoke` does. Imports no torch.
    """
    refuse_many(suite, most)
    drafts = list(_drafts(suite))
    _find_starts(suite, drafts)
    loading = _Loading(suite, registry, cost, shrink)
    loading.load(drafts)
    if shrink is None:  # recipes that differ may be alike once they are shrunk
        _refuse_duplicates(drafts)
    found = []
    left = dict(loading.trainings)
    for draft in drafts:
        if training := left.pop(draft.keys.get("train", ""), None):
            found.append(training)
        found.append(loading.cell(draft))
    return found


def _drafts(suite: Suite) -> Iterator[_Draft]:
    for row in suite.rows.values():
        places = list(suite.places(row))
        if not places:
            raise suite.source.error(("row", row.name), "all of its cells are excluded; drop it")
        for axis in places:
            tables = copy.deepcopy(dict(suite.base))
            origins: dict[tuple[str, ...], tuple[str, ...]] = {}
            merge(tables, row.change, origins)
            for name, label in axis.items():
                merge(tables, row.axes[name][label], origins)
            _budget(suite, row, tables, origins)
            base = suite.base_source
            source = Changed(
                file=base.file, lines=base.lines, suite=suite.source, row=row.name, origins=origins
            )
            for seed in suite.table.seeds:
                draft = _Draft(row, axis, seed, tables, source)
                if not NAME.fullmatch(draft.title):
                    raise suite.source.error(
                        ("row", row.name),
                        f"a cell would be called {draft.title!r}, of more than 64 characters;"
                        " shorten the names of the row and of values",
                    )
                yield draft


def _budget(
    suite: Suite, row: Row, tables: dict[str, Any], origins: dict[tuple[str, ...], tuple[str, ...]]
) -> None:
    """Give the row's training a number of steps that the budget is to replace."""
    if "train" not in tables or not row.budgeted:
        return
    budget = suite.table.budget
    if budget is None:
        raise suite.source.error(
            ("row", row.name),
            "it trains, and the suite has no budget: add [budget] with steps, images, evaluations"
            " or seconds, or say budget = false in the row and its own train.steps",
        )
    if BUDGETED in origins:
        raise suite.source.error(
            origins[BUDGETED],
            f"the budget decides train.steps; drop it, or say budget = false in row {row.name}",
        )
    change = Change(BUDGETED, 1, ("budget", budget.unit))
    merge(tables, change, origins)


def _find_starts(suite: Suite, drafts: Iterable[_Draft]) -> None:
    """Find for each `Reference` of the drafts the cells that it may mean: those of the row with the
    same seed, and the same values of axes where the row has these."""
    by_row: dict[tuple[str, int], list[_Draft]] = {}
    drafts = list(drafts)
    for draft in drafts:
        by_row.setdefault((draft.row.name, draft.seed), []).append(draft)
    for draft in drafts:
        for table in ("teacher", "denoiser"):
            said = value_at(draft.tables, (table, "weights"))
            if not isinstance(said, Reference):
                continue
            if said.row not in suite.rows:
                raise draft.source.error(
                    (table, "weights"),
                    f"no such row{did_you_mean(said.row, suite.rows)}",
                    f" = {inline(said.row)}",
                )
            found = by_row[said.row, draft.seed]
            for axis, label in draft.axis.items():
                found = [d for d in found if d.axis.get(axis) == label] or found
            for other in found:
                if "train" not in other.tables:
                    raise draft.source.error(
                        (table, "weights"),
                        "that row trains nothing; name one that does, or published weights",
                        f" = {inline(said.row)}",
                    )
            draft.starts[table] = found


def kind_of_step(recipe: Recipe) -> str:
    """What the cost of a training step depends on: neither seed nor number of steps nor weights."""
    tables = stage_tables(recipe, "train")
    same = {key: said for key, said in tables.items() if key not in ("seed", "train")}
    for table in ("teacher", "denoiser"):
        if table in same:
            same[table] = {k: v for k, v in same[table].items() if k != "weights"}
    train = {key: said for key, said in tables["train"].items() if key != "steps"}
    return json.dumps([same, train], sort_keys=True)


class _Loading:
    """The loading of drafts: a row's recipe once for all seeds, teachers before their students."""

    def __init__(self, suite: Suite, registry: Registry, cost: Cost | None, shrink: Shrink | None):
        self.suite, self.registry, self.shrink = suite, registry, shrink
        self.budget = suite.table.budget
        self.cost = cost
        if self.budget and self.budget.unit == "steps":
            self.cost = lambda _: 1.0
        if self.budget and self.budget.unit == "images":
            self.cost = lambda recipe: recipe.train.batch if recipe.train else 0
        self.firsts: dict[str, _Draft] = {}
        self.recipes: dict[str, Recipe] = {}
        self.costs: dict[str, float] = {}
        self.trainings: dict[str, Cell] = {}
        """Cells that are a training alone, by its key."""

    def load(self, drafts: Sequence[_Draft]) -> None:
        """Load all, in rounds of those whose starts are all loaded."""
        waiting = list(drafts)
        while waiting:
            ready = [
                d
                for d in waiting
                if all(other.recipe for others in d.starts.values() for other in others)
            ]
            if not ready:
                raise _circle(waiting)
            for draft in ready:
                self._load(draft)
            waiting = [draft for draft in waiting if draft.recipe is None]

    def _load(self, draft: _Draft) -> None:
        tables = dict(draft.tables)
        for table, others in draft.starts.items():
            first = self._only(draft, table, others)
            tables[table] = {**tables[table], "weights": f"run:{self._training(first)}"}
        if "train" in tables and draft.row.budgeted and self.cost:
            tables["train"] = {**tables["train"], "steps": self._steps(draft, tables)}
        recipe = draft.recipe = self._recipe(draft, tables)
        if not recipe.stages:
            raise draft.source.error((), "nothing to do: add a [train], [search] or [sample] table")
        draft.tables = tables
        draft.keys = stage_keys(recipe)
        draft.run = run_name(recipe, draft.keys)
        if "train" in draft.keys:
            draft.first = self.firsts.setdefault(draft.keys["train"], draft)

    def _training(self, first: _Draft) -> str:
        """The run of a training: that of a cell of its own where `first` does more than train."""
        if list(first.keys)[-1] == "train":
            return first.run
        key = first.keys["train"]
        if key not in self.trainings:
            alone = ("cache", "train", *stage_class("train").reads)
            tables = {table: said for table, said in first.tables.items() if table in alone}
            recipe = self._recipe(first, tables, f"{first.row.name[:48]}-train-s{first.seed}")
            name = run_name(recipe)
            self.trainings[key] = Cell(
                first.row.name, {}, first.seed, recipe, name, name, self._needs(first), alone=True
            )
        return self.trainings[key].name

    def _needs(self, draft: _Draft) -> tuple[str, ...]:
        return tuple(self._training(parent) for parent in draft.parents)

    def cell(self, draft: _Draft) -> Cell:
        """The cell of a draft that is loaded."""
        assert draft.recipe is not None
        training = self.trainings.get(draft.keys.get("train", ""))
        group = training.name if training else (draft.first or draft).run
        needs = (*self._needs(draft), *[group] * (group != draft.run))
        row, axis = draft.row.name, draft.axis
        return Cell(row, axis, draft.seed, draft.recipe, draft.run, group, needs)

    def _only(self, draft: _Draft, table: str, others: list[_Draft]) -> _Draft:
        """The one training that the cells `others` have in common."""
        firsts = list(dict.fromkeys(other.first for other in others))
        if len(firsts) > 1:
            names = " and ".join(first.title for first in firsts[:2] if first)
            raise draft.source.error(
                (table, "weights"),
                f"{draft.title} cannot tell which training is meant, {names} differ: give both rows"
                " the same values of an axis that changes the training",
                f" = {inline(draft.tables[table]['weights'].row)}",
            )
        (first,) = firsts
        assert first is not None
        return first

    def _steps(self, draft: _Draft, tables: dict[str, Any]) -> int:
        """The steps that the budget leaves the draft's training."""
        assert self.budget is not None
        left, spent = self.budget.amount, ""
        if self.budget.teacher:
            for parent in _ancestors(draft):
                assert parent.recipe is not None
                assert parent.recipe.train is not None
                paid = parent.recipe.train.steps * self._cost(parent.recipe)
                left -= paid
                spent += f", {paid:,.6g} of which the training of {parent.title} takes"
        by_step = self.budget.unit == "steps"
        each = 1.0 if by_step else self._cost(self._recipe(draft, tables))
        steps = math.floor(left / each * (1 + 1e-12))  # 60 / 0.4 is not to be 149
        if steps < 1:
            cure = "give that row budget = false and fewer train.steps, or raise the budget"
            raise self.suite.source.error(
                ("budget", self.budget.unit),
                f"nothing is left for {draft.title}{spent}; {cure}"
                if spent
                else f"a step of {draft.title} costs {each:,.6g}; raise the budget",
                f" = {self.budget.amount:,.12g}",
            )
        return steps

    def _cost(self, recipe: Recipe) -> float:
        """What a step costs, asked once for trainings that differ in seed, steps or weights."""
        assert self.cost is not None
        key = kind_of_step(recipe)
        if key not in self.costs:
            self.costs[key] = self.cost(recipe)
        return self.costs[key]

    def _recipe(self, draft: _Draft, tables: dict[str, Any], name: str = "") -> Recipe:
        """The draft's recipe, loaded once for tables that differ in the seed alone."""
        name = name or draft.title
        own = {"name": name, "seed": draft.seed}
        rest = {key: value for key, value in tables.items() if key not in own}
        key = json.dumps([draft.row.name, rest], default=str)
        if key not in self.recipes:
            self.recipes[key] = self._shrunk(
                from_tables({**own, **rest}, draft.source, self.registry)
            )
        recipe = self.recipes[key]
        resolved = {**recipe.resolved, **own}
        return replace(recipe, name=name, seed=draft.seed, resolved=resolved, source=draft.source)

    def _shrunk(self, recipe: Recipe) -> Recipe:
        """What takes the recipe's place; what it takes of other cells stays that of them."""
        if self.shrink is None:
            return recipe
        tables = self.shrink(recipe)
        for table in ("denoiser", "teacher"):
            said = recipe.resolved.get(table, {}).get("weights") or ""
            if said.startswith("run:"):
                tables[table] = {**tables[table], "weights": said}
        return from_tables(tables, recipe.source, self.registry)


def _ancestors(draft: _Draft) -> list[_Draft]:
    """The cells whose training it starts from or distils, those of these, and so on."""
    found: dict[_Draft, None] = {}
    waiting = draft.parents
    while waiting:
        parent = waiting.pop()
        if parent not in found:
            found[parent] = None
            waiting += parent.parents
    return list(found)


def _circle(waiting: Sequence[_Draft]) -> RecipeError:
    """What to say of drafts of which each waits for another."""
    path = [waiting[0]]
    while True:
        table, following = next(
            (table, other)
            for table, others in path[-1].starts.items()
            for other in others
            if other.recipe is None
        )
        if following in path:
            break
        path.append(following)
    rows = [draft.row.name for draft in (*path[path.index(following) :], following)]
    return path[-1].source.error(
        (table, "weights"),
        f"each waits for the training of the next: {' -> '.join(rows)}; break the circle",
        f" = {inline(path[-1].tables[table]['weights'].row)}",
    )


def _refuse_duplicates(drafts: Iterable[_Draft]) -> None:
    """RecipeError where two cells are called alike, or would be one run."""
    names: dict[str, _Draft] = {}
    runs: dict[str, _Draft] = {}
    for draft in drafts:
        place = ("row", draft.row.name)
        if (other := names.setdefault(draft.title, draft)) is not draft:
            raise draft.source.suite.error(
                place,
                f"two cells are called {draft.title!r}, the other of row {other.row.name}; name"
                " rows and values apart",
            )
        *_, key = draft.keys.values()
        if (other := runs.setdefault(key, draft)) is not draft:
            cure = (
                "an axis changes nothing in it: give the row one value, axis.NAME = [..], or none,"
                " axis.NAME = false"
                if other.row is draft.row
                else "drop one of the rows"
            )
            raise draft.source.suite.error(
                place, f"cells {other.title} and {draft.title} are the same run: {cure}"
            )
