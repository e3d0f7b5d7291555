"""The rescaler's numbers by search, and the honest comparison of the winner with (1, 1)."""

from __future__ import annotations

import functools
import json
import math
import statistics
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cmkit.denoiser import Denoiser, Encodings
from cmkit.device import autocast
from cmkit.errors import NonFiniteError
from cmkit.kinds import Meter, Rescaler
from cmkit.measure import meter
from cmkit.plan import Plan, cells, minimized, with_values
from cmkit.recipe import Recipe
from cmkit.sample import Draws, RepeatedDraws, starts, to_uint8
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
class Unfinished:
    """Cells drawn together, of which each has `drawn` images so far.

    `labels` say which noise and which scales; `tensors` are the meters' states, each name headed by
    the cell's place in `labels`.
    """

    labels: tuple[str, ...]
    drawn: int
    tensors: Mapping[str, Tensor]

    def of(self, label: str) -> dict[str, Tensor]:
        """What there is of one cell."""
        prefix = f"{self.labels.index(label)}/"
        found = (name for name in self.tensors if name.startswith(prefix))
        return {name.removeprefix(prefix): self.tensors[name] for name in found}


@dataclass(frozen=True)
class Drawn:
    """Images of the next cells drawn so far. The caller may stop here, and keep `unfinished`."""

    done: int
    total: int
    unfinished: Callable[[], Unfinished] | None = None


@dataclass(frozen=True)
class Duel:
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
    begun: Unfinished | None = None,
) -> Iterator[Cell | Drawn]:
    """Each cell of the search that `stored` has no record of, scored on the same noise and labels.

    Cells in `begun` go on from there, here and in the stages below.

    Cells that differ in the network's late scales alone are drawn together, since they share the
    encoder's work.
    """
    recipe = plan.recipe
    assert recipe.search is not None
    table, total = recipe.search, most_cells(recipe)
    draws = RepeatedDraws(plan.data, recipe.seed, "search")
    scores = {_place(recipe, record): record["score"] for record in stored}
    indices: dict[tuple[float, ...], int] = {}
    for _, tried in trials(recipe, scores):
        for values in tried:
            indices.setdefault(_place(recipe, values), len(indices))
        every = list({_place(recipe, v): v for v in tried}.values())
        for row in _rows(denoiser, [with_values(recipe, values) for values in every]):
            left = [every[k] for k in row if _place(recipe, every[k]) not in scores]
            if not left:
                continue
            rescalers = [with_values(recipe, values) for values in left]
            found = yield from _scored(
                plan, denoiser, rescalers, draws, table.images, reference, device, begun
            )
            for values, (score, thumbnails) in zip(left, found, strict=True):
                scores[_place(recipe, values)] = score
                index = indices[_place(recipe, values)]
                yield Cell(index, total, values, score, thumbnails)


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
        found = [scores[_place(recipe, cell)] for cell in tried]
        ranks = [math.inf if score is None else score for score in found]
        best = {**best, axis: values[ranks.index(min(ranks))]}


def _completed(recipe: Recipe, values: Mapping[str, float]) -> dict[str, float]:
    """The values with those of all other axes: the rescaler's own, but a part of a number, such as
    "skip.3", follows that number."""
    rescaler = recipe.rescaler
    assert recipe.search is not None
    assert rescaler is not None
    moved = with_values(recipe, values)
    others = {
        axis: (moved if "." in axis else rescaler).value_of(axis)
        for axis in recipe.search.grid
        if axis not in values
    }
    return {axis: {**others, **values}[axis] for axis in recipe.search.grid}


def descent(recipe: Recipe, stored: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The way of a finished search by coordinates: each axis with its trials, by their places in
    `stored`, first the one that it came from. Empty for a grid."""
    scores = {_place(recipe, record): record["score"] for record in stored}
    places = {_place(recipe, record): k for k, record in enumerate(stored)}
    way = []
    for axis, tried in trials(recipe, scores):
        if axis is not None:
            own = list(dict.fromkeys(places[_place(recipe, values)] for values in tried))
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


def _place(recipe: Recipe, values: Mapping[str, Any]) -> tuple[float, ...]:
    """A cell's values in the order of the axes."""
    assert recipe.search is not None
    return tuple(values[axis] for axis in recipe.search.grid)


def rerank(
    plan: Plan,
    denoiser: Denoiser,
    chosen: Sequence[Mapping[str, Any]],
    reference: Reference,
    device: torch.device,
    begun: Unfinished | None = None,
) -> Iterator[Cell | Drawn]:
    """The records `chosen` of cells again, scored on more images of other noise."""
    recipe = plan.recipe
    table = recipe.search
    assert table is not None
    count = table.rerank_images or 4 * table.images
    draws = RepeatedDraws(plan.data, recipe.seed, "rerank")
    for record in chosen:
        values = {axis: record[axis] for axis in table.grid}
        rescaler = with_values(recipe, values)
        ((score, thumbnails),) = yield from _scored(
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
    begun: Unfinished | None = None,
) -> Iterator[Duel | Drawn]:
    """The winner against the unscaled model, on noise that the search never saw, seed by seed."""
    table = plan.recipe.search
    assert table is not None
    count = table.confirm_images or table.images
    for k in range(done, table.confirm_seeds):
        draws = RepeatedDraws(plan.data, plan.recipe.seed, f"confirm-{k}")
        ((plain, _), (rescaled, _)) = yield from _scored(
            plan, denoiser, (None, winner), draws, count, reference, device, begun
        )
        if plain is None or rescaled is None:
            raise NonFiniteError(
                f"search: seed confirm-{k} has no finite {table.minimize}; try search.precision ="
                ' "fp32" and scales nearer to 1'
            )
        yield Duel(k, table.confirm_seeds, plain, rescaled)


def best(scored: Sequence[Mapping[str, Any]], count: int) -> list[Mapping[str, Any]]:
    """The `count` records with the lowest scores; NonFiniteError when no cell has one."""
    finite = [record for record in scored if record["score"] is not None]
    if not finite:
        raise NonFiniteError("search: no cell has a finite score; look at the samples in search/")
    return sorted(finite, key=lambda record: record["score"])[:count]


def interval(values: Sequence[float]) -> dict[str, float]:
    """Mean and 95 % confidence interval (Student's t) of independent values."""
    from scipy.stats import t

    mean = statistics.fmean(values)
    half = float(t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))
    return {"mean": mean, "low": mean - half, "high": mean + half}


def verdict(key: str, plain: Sequence[float], rescaled: Sequence[float]) -> str:
    """One sentence that says who won on fresh noise, and by how much."""
    difference = interval([b - a for a, b in zip(plain, rescaled, strict=True)])
    before, after = statistics.fmean(plain), statistics.fmean(rescaled)
    numbers = (
        f"{key} {before:.4g} -> {after:.4g}, difference {difference['mean']:+.3g}"
        f" [{difference['low']:+.3g}, {difference['high']:+.3g}] over {len(plain)} noise seeds"
    )
    if difference["high"] < 0:
        return f"Rescaling helps: {numbers}."
    if difference["low"] > 0:
        return f"Rescaling harms: {numbers}."
    return f"No difference that these seeds can show: {numbers}."


def _rows(denoiser: Denoiser, every: Sequence[Rescaler]) -> list[list[int]]:
    """Cells by equal early scales at sigma_max; without late sites each cell is a row."""
    sigma = torch.full((1,), denoiser.noise.sigma_max)
    network = denoiser.network
    rows: dict[tuple[Any, ...], list[int]] = {}
    for index, rescaler in enumerate(every):
        scales = rescaler.bind(network.sites)(sigma)
        early = {site: s for site, s in scales.items() if site not in network.late}
        key = tuple(
            (site, *s.tolist()) if s.ndim else (site, s.item()) for site, s in early.items()
        )
        rows.setdefault(key if network.late else (index,), []).append(index)
    return list(rows.values())


@torch.inference_mode()
def _scored(
    plan: Plan,
    denoiser: Denoiser,
    rescalers: Sequence[Rescaler | None],
    draws: Draws,
    count: int,
    reference: Reference,
    device: torch.device,
    begun: Unfinished | None,
) -> Generator[Drawn, None, list[tuple[float | None, Tensor]]]:
    """Score of `count` images of each rescaler, None where it is not finite, and its first images,
    uint8 (n, C, H, W). Images go to the metric as they are drawn, and only the first are kept."""
    table, sampler = plan.recipe.search, plan.recipe.sampler
    assert table is not None
    assert sampler is not None
    cast = autocast(table.precision, device)
    metric = minimized(plan.recipe)
    meters = [meter(metric, count, reference, device) for _ in rescalers]
    finite = torch.ones(len(rescalers), dtype=torch.bool, device=device)
    thumbnails: list[list[Tensor]] = [[] for _ in rescalers]
    labels = tuple(
        json.dumps([draws.purpose, count, rescaler and rescaler.model_dump(mode="json")])
        for rescaler in rescalers
    )
    first = 0
    if begun and set(labels) <= set(begun.labels):
        first = begun.drawn
        for k, label in enumerate(labels):
            state = begun.of(label)
            finite[k] = state.pop("finite")
            thumbnails[k].append(state.pop("thumbnails"))
            meters[k].restore(state)

    def unfinished(drawn: int) -> Unfinished:
        tensors: dict[str, Tensor] = {}
        for k, taken in enumerate(meters):
            own = {"finite": finite[k].cpu(), "thumbnails": torch.cat(thumbnails[k])}
            tensors |= {f"{k}/{name}": value for name, value in {**own, **taken.state()}.items()}
        return Unfinished(labels, drawn, tensors)

    indices, total = range(first, count), count * len(rescalers)
    for start in starts(draws, denoiser.noise.sigma_max, indices, table.batch, device):
        drawn = start.rows.start
        so_far = functools.partial(unfinished, drawn) if drawn else None
        yield Drawn(drawn * len(rescalers), total, so_far)
        encodings = Encodings(start.x)
        for k, rescaler in enumerate(rescalers):
            model = denoiser.rescaled(rescaler, encodings) if rescaler else denoiser
            with cast:
                x0 = sampler.sample(model, start.x, start.cond, start.noise)
            finite[k] &= x0.isfinite().all()
            images = to_uint8(x0)
            meters[k].add(images)
            if drawn < table.thumbnails:
                thumbnails[k].append(images[: table.thumbnails - drawn].cpu())
    return [
        (_value(taken, table.minimize) if whole else None, torch.cat(shown))
        for taken, whole, shown in zip(meters, finite.tolist(), thumbnails, strict=True)
    ]


def _value(taken: Meter, key: str) -> float | None:
    """The number `key`, None where it is not finite."""
    try:
        value = taken.values()[key]
    except NonFiniteError:
        return None
    return value if math.isfinite(value) else None
