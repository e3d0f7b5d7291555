"""Which cells to try next: pure functions of the recipe and the scores so far."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cmkit.plan import cells
from cmkit.recipe import Recipe


def trials(
    recipe: Recipe, scores: Mapping[tuple[float, ...], float | None]
) -> Iterator[tuple[str | None, list[dict[str, float]]]]:
    """(axis, cells to score before the next are asked for), cells as a value of every axis.

    A grid is one such list, of no axis. A search by coordinates goes on from the best of each list,
    the earliest of equals: it depends on `scores`, by the cells' values, and on nothing else. A
    list begins with the cell that it goes on from.
    """
    table = recipe.search
    assert table is not None
    if table.method != "coordinate":
        yield None, list(cells(recipe))
        return
    best: dict[str, float] = {}  # of the axes that had their turn
    for axis in [*table.grid] * (table.rounds or 1):
        values = [_completed(recipe, best)[axis], *table.grid[axis]]
        tried = [_completed(recipe, {**best, axis: value}) for value in values]
        yield axis, tried
        found = [scores[place(recipe, cell)] for cell in tried]
        ranks = [math.inf if score is None else score for score in found]
        best = {**best, axis: values[ranks.index(min(ranks))]}


def _completed(recipe: Recipe, values: Mapping[str, float]) -> dict[str, float]:
    """The values with those of all other axes: what they decide, else the rescaler's own."""
    assert recipe.search is not None
    assert recipe.rescaler is not None
    decided = recipe.rescaler.complete(values, recipe.search.grid)
    return {
        axis: decided[axis] if axis in decided else recipe.rescaler.value_of(axis)
        for axis in recipe.search.grid
    }


def trace(recipe: Recipe, stored: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The way of a finished search by coordinates: each axis with its trials, by their places in
    `stored`, first the one that it came from. Empty for a grid."""
    scores = {place(recipe, record): record["score"] for record in stored}
    places = {place(recipe, record): k for k, record in enumerate(stored)}
    way = []
    for axis, tried in trials(recipe, scores):
        if axis is not None:
            own = list(dict.fromkeys(places[place(recipe, values)] for values in tried))
            way.append({"axis": axis, "cells": own})
    return way


def most_cells(recipe: Recipe) -> int:
    """How many cells a search draws, or at most where that depends on their scores."""
    table, rescaler = recipe.search, recipe.rescaler
    assert table is not None
    assert rescaler is not None
    if table.method != "coordinate":
        return math.prod(map(len, table.grid.values()))
    new = sum(len({*v} - {rescaler.value_of(axis)}) for axis, v in table.grid.items())
    return 1 + new * (table.rounds or 1)


def place(recipe: Recipe, values: Mapping[str, Any]) -> tuple[float, ...]:
    """A cell's values in the order of the axes."""
    assert recipe.search is not None
    return tuple(values[axis] for axis in recipe.search.grid)
