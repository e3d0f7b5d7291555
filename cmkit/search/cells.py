"""The stages of a search as generators: cells, the best again, the winner on fresh noise."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from cmkit.errors import NonFiniteError
from cmkit.kinds import Rescaler
from cmkit.recipe import with_values
from cmkit.search.score import CellsDrawn, Rungs, Scoring, encoder_rows, label_of, scored
from cmkit.search.strategies import known, most_cells, place, survivors, trials
from cmkit.search.tuner import Place


@dataclass(frozen=True)
class Cell:
    """One searched cell: its place in the search, its values, its score (None: not a number), its
    first pictures, uint8 (n, C, H, W), and how many images the score is of."""

    index: int
    total: int
    values: Mapping[str, float]
    score: float | None
    thumbnails: Tensor
    images: int
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
    encoder's work. With halving, a cell comes once it is cut, or has all images.
    """
    recipe, rungs = scoring.plan.recipe, Rungs.of(scoring)
    draws, total = scoring.draws("search"), most_cells(recipe)
    scores, cut = known(recipe, stored)
    indices: dict[Place, int] = {}
    for _, tried in trials(recipe, scores, cut):
        every = {place(recipe, values): values for values in tried}
        alive = [key for key in every if key not in indices]  # the others had their turn
        for key in every:
            indices.setdefault(key, len(indices))
        keys, rescalers = list(every), [with_values(recipe, values) for values in every.values()]
        rows = encoder_rows(scoring.denoiser, rescalers)
        for count in rungs.images:
            last = count == rungs.images[-1]
            found: dict[Place, Cell] = {}
            going = {key for key in alive if key not in scores and key not in cut}
            passed = sum(key in scores or (key in cut and cut[key][0] > count) for key in alive)
            room = survivors(len(alive), scoring.table.halving) - passed
            for row in rows if last or len(going) > room else ():
                left = [k for k in row if keys[k] in going]
                if not left:
                    continue
                some = [rescalers[k] for k in left]
                results = yield from scored(scoring, some, draws, count, rungs)
                for k, (score, shown) in zip(left, results, strict=True):
                    key = keys[k]
                    found[key] = Cell(indices[key], total, every[key], score, shown, count)
                    if last:
                        scores[key] = score
                        yield found[key]
            if not last and found:
                for cell in sorted(found.values(), key=_order)[room:]:
                    key = place(recipe, cell.values)
                    rungs.kept.pop(label_of(draws, rungs.images[-1], rescalers[keys.index(key)]), 0)
                    cut[key] = count, cell.score
                    yield cell
            alive = [key for key in alive if key not in cut or cut[key][0] > count]


def _order(cell: Cell) -> tuple[float, int]:
    """What the cells of a rung are sorted by; the earlier of equals is the better."""
    return math.inf if cell.score is None else cell.score, cell.index


def rerank(scoring: Scoring, chosen: Sequence[Mapping[str, Any]]) -> Iterator[Cell | CellsDrawn]:
    """The cells of the records `chosen` again, scored on more images of other noise."""
    recipe, table = scoring.plan.recipe, scoring.table
    count = table.rerank_images or 4 * table.images
    draws = scoring.draws("rerank")
    for record in chosen:
        values = {axis: record[axis] for axis in table.grid}
        ((score, shown),) = yield from scored(scoring, [with_values(recipe, values)], draws, count)
        yield Cell(record["index"], len(chosen), values, score, shown, count)


def confirm(
    scoring: Scoring, winner: Rescaler, seeds: Iterable[int]
) -> Iterator[Comparison | CellsDrawn]:
    """The winner against the unscaled model, on noise that the search never saw, seed by seed."""
    table = scoring.table
    count = table.confirm_images or table.images
    for k in seeds:
        draws = scoring.draws(f"confirm-{k}")
        ((plain, _), (rescaled, _)) = yield from scored(scoring, (None, winner), draws, count)
        if plain is None or rescaled is None:
            raise NonFiniteError(
                f"search: seed confirm-{k} has no finite {table.minimize}; try search.precision ="
                ' "fp32" and scales nearer to 1'
            )
        yield Comparison(k, table.confirm_seeds, plain, rescaled)
