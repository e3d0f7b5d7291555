"""Which cells to try next: pure functions of the recipe and the scores so far."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np

from cmkit.recipe import Recipe, cells
from cmkit.recipe.search_table import TUNERS
from cmkit.search.tuner import Place, Score, group, tuned

CANDIDATES = 1000
"""Cells that a search by interpolation scores, unless the recipe says how many."""


def trials(
    recipe: Recipe,
    scores: Mapping[Place, Score],
    cut: Mapping[Place, tuple[int, Score]] = MappingProxyType({}),
) -> Iterator[tuple[str | None, list[dict[str, float]]]]:
    """(axis, cells to score before the next are asked for); a cell has a value of every axis.

    A grid is one list of cells, and no axis. A search by coordinates has a list for each axis; it
    begins with the best cell of the list before, the earliest of equals by `scores`. `tuned` has
    the lists of Optuna. A search by interpolation is a grid, or `_by_lot` where that has too many
    cells. Of cells that halving has cut, `cut` has (images, score), and `scores` nothing or None.
    """
    table, rescaler = recipe.search, recipe.rescaler
    assert table is not None
    assert rescaler is not None
    if table.method in TUNERS:
        yield from ((None, tried) for tried in tuned(recipe, scores, cut))
        return
    if table.method == "surrogate":
        yield from _by_lot(recipe, scores)
        return
    if table.method != "coordinate":
        yield None, list(cells(recipe))
        return

    def completed(values: Mapping[str, float]) -> dict[str, float]:
        """The values with those of all other axes: what they decide, else the rescaler's own."""
        decided = rescaler.complete(values, table.grid)
        axes = table.grid
        return {a: decided[a] if a in decided else rescaler.value_of(a) for a in axes}

    best: dict[str, float] = {}  # of the axes that had their turn
    for axis in [*table.grid] * (table.rounds or 1):
        values = [completed(best)[axis], *table.grid[axis]]
        tried = [completed({**best, axis: value}) for value in values]
        yield axis, tried
        keys = [place(recipe, cell) for cell in tried]
        found = [None if key in cut else scores[key] for key in keys]
        ranks = [math.inf if score is None else score for score in found]
        best = {**best, axis: values[ranks.index(min(ranks))]}


def _by_lot(
    recipe: Recipe, scores: Mapping[tuple[float, ...], float | None]
) -> Iterator[tuple[str | None, list[dict[str, float]]]]:
    """Every cell of the grid; of a grid with more than `candidates` half as many, the nearest to
    the rescaler's own numbers and others by lot, and from the best of them on one axis after the
    other until none moves, or there are as many as that."""
    table, rescaler = recipe.search, recipe.rescaler
    assert table is not None
    assert rescaler is not None
    grid = {axis: list(dict.fromkeys(values)) for axis, values in table.grid.items()}
    most = table.candidates or CANDIDATES
    if math.prod(map(len, grid.values())) <= most:
        yield (
            None,
            [dict(zip(grid, each, strict=True)) for each in itertools.product(*grid.values())],
        )
        return
    lot = np.random.default_rng(recipe.seed)
    own = [min(values, key=lambda v: abs(v - rescaler.value_of(a))) for a, values in grid.items()]
    known = {tuple(own): None}
    while len(known) < max(most // 2, 1):
        known[tuple(v[lot.integers(len(v))] for v in grid.values())] = None
    axis, tried = None, [dict(zip(grid, each, strict=True)) for each in known]
    turns, moved = itertools.cycle(grid), 0
    while tried:
        yield axis, tried
        found = [scores[place(recipe, cell)] for cell in tried]
        ranks = [math.inf if score is None else score for score in found]
        best = tried[ranks.index(min(ranks))]
        moved = 0 if axis is None or best != tried[0] else moved + 1
        if moved == len(grid):
            return
        axis = next(turns)
        tried = [best, *({**best, axis: v} for v in grid[axis] if v != best[axis])]
        known |= {place(recipe, cell): None for cell in tried}
        if len(known) > most:
            return


def trace(recipe: Recipe, stored: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The steps of a finished search that went on by coordinates: each axis with the cells tried,
    by their places in `stored`, first the one that it went on from."""
    assert recipe.search is not None
    if recipe.search.method in TUNERS:
        return []
    scores, cut = known(recipe, stored)
    places = {place(recipe, record): k for k, record in enumerate(stored)}
    steps = []
    for axis, tried in trials(recipe, scores, cut):
        if axis is not None:
            own = list(dict.fromkeys(places[place(recipe, values)] for values in tried))
            steps.append({"axis": axis, "cells": own})
    return steps


def known(
    recipe: Recipe, stored: Iterable[Mapping[str, Any]]
) -> tuple[dict[Place, Score], dict[Place, tuple[int, Score]]]:
    """What `trials` takes: scores of the stored cells, and of those that halving has cut (images,
    score)."""
    assert recipe.search is not None
    whole = recipe.search.images
    pairs = [(place(recipe, r), r.get("images", whole), r["score"]) for r in stored]
    scores = {key: score for key, images, score in pairs if images == whole}
    return scores, {key: (images, score) for key, images, score in pairs if images != whole}


def survivors(cells: int, halving: int | None) -> int:
    """How many of as many cells go on to the next rung of successive halving: the best 1 in
    `halving`, rounded up (Jamieson and Talwalkar 2016, arXiv:1502.07943, round down)."""
    return -(-cells // (halving or 1))


def lists(recipe: Recipe) -> list[int]:
    """Sizes of the lists of new cells, or at most where that depends on their scores."""
    table, rescaler = recipe.search, recipe.rescaler
    assert table is not None
    assert rescaler is not None
    if table.method in TUNERS:
        size, (whole, rest) = group(recipe), divmod((table.trials or 1) - 1, group(recipe))
        return [1, *[size] * whole, *([rest] if rest else [])]
    if table.method == "surrogate":
        count = math.prod(len(set(values)) for values in table.grid.values())
        return [min(count, table.candidates or CANDIDATES)]
    if table.method != "coordinate":
        return [math.prod(map(len, table.grid.values()))]
    new = [len({*v} - {rescaler.value_of(axis)}) for axis, v in table.grid.items()]
    first, *others = new * (table.rounds or 1)
    return [1 + first, *others]


def most_cells(recipe: Recipe) -> int:
    """How many cells a search draws, or at most where that depends on their scores."""
    return sum(lists(recipe))


def most_images(recipe: Recipe) -> tuple[int, int]:
    """(images that the cells of a search draw, cells that have all of them), or at most: of the
    images of a rung those of the rung before are drawn already."""
    table = recipe.search
    assert table is not None
    if table.method == "surrogate":
        return table.passes()[0] * table.images, most_cells(recipe)
    images = whole = 0
    for size in lists(recipe):
        for few, many in itertools.pairwise((0, *table.rung_images)):
            size = size if few == 0 else survivors(size, table.halving)
            images += size * (many - few)
        whole += size
    return images, whole


def all_images(recipe: Recipe) -> int:
    """Images that a whole search draws, or at most: of the cells, of the best again, and of the
    comparison on fresh noise."""
    table = recipe.search
    assert table is not None
    images, whole = most_images(recipe)
    images += min(table.rerank, whole) * (table.rerank_images or 4 * table.images)
    return images + 2 * table.confirm_seeds * (table.confirm_images or table.images)


def place(recipe: Recipe, values: Mapping[str, Any]) -> Place:
    """A cell's values in the order of the axes."""
    assert recipe.search is not None
    return tuple(values[axis] for axis in recipe.search.grid)
