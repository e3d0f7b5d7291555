"""The cells of Optuna's methods, "tpe" and "cmaes": asked for and told, the same every time."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

from cmkit.recipe import Recipe

Place = tuple[float, ...]
"""A cell's values in the order of the axes."""
Score = float | None


def tuned(
    recipe: Recipe,
    scores: Mapping[Place, Score],
    cut: Mapping[Place, tuple[int, Score]],
) -> Iterator[list[dict[str, float]]]:
    """Lists of cells to score before the next are asked for, first the rescaler's own alone.

    "cmaes" asks for a generation at a time, 4 + floor(3 ln d) cells for d axes with a range
    (Hansen 2016, arXiv:1604.00772, table 1), "tpe" for one cell, and with halving for as many as
    leave one in the last rung. The study is in memory, and its sampler is seeded by the recipe's
    seed: told the same scores it asks for the same cells, to the bit.
    """
    import optuna

    table = recipe.search
    assert table is not None
    assert table.trials is not None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    ends = {axis: (min(values), max(values)) for axis, values in table.grid.items()}
    fixed = {axis: low for axis, (low, high) in ends.items() if low == high}
    ranges: dict[str, optuna.distributions.BaseDistribution] = {
        axis: optuna.distributions.FloatDistribution(*pair)
        for axis, pair in ends.items()
        if axis not in fixed
    }
    digest = hashlib.sha256(f"{recipe.seed}/search/{table.method}".encode()).digest()
    seed = int.from_bytes(digest[:4], "little") >> 1
    sampler: Any
    if table.method == "cmaes":
        sampler = optuna.samplers.CmaEsSampler(seed=seed)
    else:
        sampler = optuna.samplers.TPESampler(multivariate=True, seed=seed)
    study = optuna.create_study(sampler=sampler)
    study.enqueue_trial(_own(recipe, ends))
    left, size = table.trials, 1
    while left:
        asked = [study.ask(ranges) for _ in range(min(size, left))]
        cells = [{axis: {**fixed, **trial.params}[axis] for axis in ends} for trial in asked]
        yield cells
        for trial, cell in zip(asked, cells, strict=True):
            place = tuple(cell.values())
            images, score = cut.get(place) or (table.images, scores[place])
            study.tell(trial, _rank(table.rung_images.index(images), score, table.rung_images))
        left, size = left - len(asked), group(recipe)


def group(recipe: Recipe) -> int:
    """How many cells are asked for together."""
    table = recipe.search
    assert table is not None
    if table.method == "cmaes":
        ranges = sum(min(values) < max(values) for values in table.grid.values())
        return 4 + math.floor(3 * math.log(ranges))
    size: int = (table.halving or 1) ** (len(table.rung_images) - 1)
    return size


def _own(recipe: Recipe, ends: Mapping[str, tuple[float, float]]) -> dict[str, float]:
    """The rescaler's own numbers, brought into the ranges."""
    assert recipe.rescaler is not None
    values = {axis: recipe.rescaler.value_of(axis) for axis in ends}
    return {axis: min(max(values[axis], low), high) for axis, (low, high) in ends.items()}


def _rank(rung: int, score: Score, rungs: tuple[int, ...]) -> float:
    """A number that orders cells by the rung that they reached, then by score: scores of different
    numbers of images do not compare, and both methods look at the order alone."""
    if score is None:
        return math.inf
    return 2.0 * (len(rungs) - 1 - rung) + score / (1 + abs(score))
