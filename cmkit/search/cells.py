"""The stages of a search as generators: cells, the best again, the winner on fresh noise."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from cmkit.errors import NonFiniteError
from cmkit.kinds import Rescaler
from cmkit.recipe import with_values
from cmkit.sample import RepeatedDraws
from cmkit.search.score import CellsDrawn, Scoring, encoder_rows, scored
from cmkit.search.strategies import most_cells, place, trials


@dataclass(frozen=True)
class Cell:
    """One searched cell: its place in the search, its values, its score (None: not a number), and
    its first images, uint8 (n, C, H, W)."""

    index: int
    total: int
    values: Mapping[str, float]
    score: float | None
    thumbnails: Tensor
    about: Mapping[str, Any] = field(default_factory=dict)
    """What else its record says."""


@dataclass(frozen=True)
class Comparison:
    """Scores of the unscaled and the rescaled model on the fresh noise of one seed."""

    index: int
    total: int
    plain: float
    rescaled: float


def search(
    scoring: Scoring, stored: Sequence[Mapping[str, Any]] = ()
) -> Iterator[Cell | CellsDrawn]:
    """Each cell of the search that `stored` has no record of, scored on the same noise and labels.

    Cells that differ in the network's late scales alone are drawn together, since they share the
    encoder's work.
    """
    recipe, count = scoring.plan.recipe, scoring.table.images
    draws, total = _draws(scoring, "search"), most_cells(recipe)
    scores = {place(recipe, record): record["score"] for record in stored}
    indices: dict[tuple[float, ...], int] = {}
    for _, tried in trials(recipe, scores):
        every = {place(recipe, values): values for values in tried}
        for key in every:
            indices.setdefault(key, len(indices))
        keys, rescalers = list(every), [with_values(recipe, values) for values in every.values()]
        for row in encoder_rows(scoring.denoiser, rescalers):
            left = [k for k in row if keys[k] not in scores]
            if not left:
                continue
            found = yield from scored(scoring, [rescalers[k] for k in left], draws, count)
            for key, (score, thumbnails) in zip((keys[k] for k in left), found, strict=True):
                scores[key] = score
                yield Cell(indices[key], total, every[key], score, thumbnails)


def rerank(scoring: Scoring, chosen: Sequence[Mapping[str, Any]]) -> Iterator[Cell | CellsDrawn]:
    """The cells of the records `chosen` again, scored on more images of other noise."""
    recipe, table = scoring.plan.recipe, scoring.table
    count = table.rerank_images or 4 * table.images
    draws = _draws(scoring, "rerank")
    for record in chosen:
        values = {axis: record[axis] for axis in table.grid}
        ((score, shown),) = yield from scored(scoring, [with_values(recipe, values)], draws, count)
        yield Cell(record["index"], len(chosen), values, score, shown)


def confirm(
    scoring: Scoring, winner: Rescaler, seeds: Iterable[int]
) -> Iterator[Comparison | CellsDrawn]:
    """The winner against the unscaled model, on noise that the search never saw, seed by seed."""
    table = scoring.table
    count = table.confirm_images or table.images
    for k in seeds:
        draws = _draws(scoring, f"confirm-{k}")
        ((plain, _), (rescaled, _)) = yield from scored(scoring, (None, winner), draws, count)
        if plain is None or rescaled is None:
            raise NonFiniteError(
                f"search: seed confirm-{k} has no finite {table.minimize}; try search.precision ="
                ' "fp32" and scales nearer to 1'
            )
        yield Comparison(k, table.confirm_seeds, plain, rescaled)


def _draws(scoring: Scoring, purpose: str) -> RepeatedDraws:
    plan = scoring.plan
    return RepeatedDraws(plan.data, plan.recipe.seed, purpose, rule=plan.label_rule)
