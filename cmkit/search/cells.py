"""The stages of a search as generators: cells, the best again, the winner on fresh noise."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cmkit.denoiser import Denoiser
from cmkit.errors import NonFiniteError
from cmkit.kinds import Rescaler
from cmkit.plan import Plan, with_values
from cmkit.sample import RepeatedDraws
from cmkit.search.score import CellsDrawn, PartialCells, encoder_rows, scored
from cmkit.search.strategies import most_cells, place, trials
from cmkit.values import Reference


@dataclass(frozen=True)
class Cell:
    """One searched cell: its place in the search, its values, its score (None: not a number), and
    its first images, uint8 (n, C, H, W)."""

    index: int
    total: int
    values: Mapping[str, float]
    score: float | None
    thumbnails: Tensor


@dataclass(frozen=True)
class Comparison:
    """Scores of the unscaled and the rescaled model on the fresh noise of one seed."""

    index: int
    total: int
    plain: float
    rescaled: float


def search(
    plan: Plan,
    denoiser: Denoiser,
    reference: Reference,
    device: torch.device,
    stored: Sequence[Mapping[str, Any]] = (),
    begun: PartialCells | None = None,
) -> Iterator[Cell | CellsDrawn]:
    """Each cell of the search that `stored` has no record of, scored on the same noise and labels.

    Cells in `begun` go on from there, here and in the stages below.

    Cells that differ in the network's late scales alone are drawn together, since they share the
    encoder's work.
    """
    recipe = plan.recipe
    assert recipe.search is not None
    table, total = recipe.search, most_cells(recipe)
    draws = RepeatedDraws(plan.data, recipe.seed, "search")
    scores = {place(recipe, record): record["score"] for record in stored}
    indices: dict[tuple[float, ...], int] = {}
    for _, tried in trials(recipe, scores):
        for values in tried:
            indices.setdefault(place(recipe, values), len(indices))
        every = list({place(recipe, v): v for v in tried}.values())
        for row in encoder_rows(denoiser, [with_values(recipe, values) for values in every]):
            left = [every[k] for k in row if place(recipe, every[k]) not in scores]
            if not left:
                continue
            rescalers = [with_values(recipe, values) for values in left]
            found = yield from scored(
                plan, denoiser, rescalers, draws, table.images, reference, device, begun
            )
            for values, (score, thumbnails) in zip(left, found, strict=True):
                scores[place(recipe, values)] = score
                index = indices[place(recipe, values)]
                yield Cell(index, total, values, score, thumbnails)


def rerank(
    plan: Plan,
    denoiser: Denoiser,
    chosen: Sequence[Mapping[str, Any]],
    reference: Reference,
    device: torch.device,
    begun: PartialCells | None = None,
) -> Iterator[Cell | CellsDrawn]:
    """The records `chosen` of cells again, scored on more images of other noise."""
    recipe = plan.recipe
    table = recipe.search
    assert table is not None
    count = table.rerank_images or 4 * table.images
    draws = RepeatedDraws(plan.data, recipe.seed, "rerank")
    for record in chosen:
        values = {axis: record[axis] for axis in table.grid}
        rescaler = with_values(recipe, values)
        ((score, thumbnails),) = yield from scored(
            plan, denoiser, [rescaler], draws, count, reference, device, begun
        )
        yield Cell(record["index"], len(chosen), values, score, thumbnails)


def confirm(
    plan: Plan,
    denoiser: Denoiser,
    winner: Rescaler,
    reference: Reference,
    device: torch.device,
    done: int = 0,
    begun: PartialCells | None = None,
) -> Iterator[Comparison | CellsDrawn]:
    """The winner against the unscaled model, on noise that the search never saw, seed by seed."""
    table = plan.recipe.search
    assert table is not None
    count = table.confirm_images or table.images
    for k in range(done, table.confirm_seeds):
        draws = RepeatedDraws(plan.data, plan.recipe.seed, f"confirm-{k}")
        ((plain, _), (rescaled, _)) = yield from scored(
            plan, denoiser, (None, winner), draws, count, reference, device, begun
        )
        if plain is None or rescaled is None:
            raise NonFiniteError(
                f"search: seed confirm-{k} has no finite {table.minimize}; try search.precision ="
                ' "fp32" and scales nearer to 1'
            )
        yield Comparison(k, table.confirm_seeds, plain, rescaled)
