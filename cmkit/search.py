"""The rescaler's numbers by grid search, and the honest comparison of the winner with (1, 1)."""

from __future__ import annotations

import contextlib
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cmkit.compose import Plan, cells, minimized
from cmkit.denoiser import Denoiser
from cmkit.errors import NonFiniteError
from cmkit.kinds import Reference, Rescaler
from cmkit.measure import Images, measure
from cmkit.sample import Draws, RepeatedDraws, sample


@dataclass(frozen=True)
class Cell:
    """One searched cell: its place in the grid, its values, its score (None: not a number), and
    its first images, uint8 (n, C, H, W)."""

    index: int
    total: int
    values: Mapping[str, float]
    score: float | None
    thumbnails: Tensor


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
    done: frozenset[int] = frozenset(),
) -> Iterator[Cell]:
    """Each cell of the grid that is not in `done`, scored on the same noise and labels."""
    recipe = plan.recipe
    assert recipe.search is not None
    axes = list(recipe.search.grid)
    rescalers = list(cells(recipe))
    draws = RepeatedDraws(plan.data, recipe.seed, "search")
    for index, rescaler in enumerate(rescalers):
        if index in done:
            continue
        values = {axis: getattr(rescaler, axis) for axis in axes}
        score = None
        thumbnails = torch.zeros(1, *draws.shape, dtype=torch.uint8)
        with contextlib.suppress(NonFiniteError):  # the cell stays, without a score
            images = _images(plan, denoiser, rescaler, draws, recipe.search.images, device)
            thumbnails = images[: recipe.search.thumbnails].clone()
            score = _score(plan, images, reference, device)
        yield Cell(index, len(rescalers), values, score, thumbnails)


def confirm(
    plan: Plan,
    denoiser: Denoiser,
    winner: Rescaler,
    reference: Reference,
    device: torch.device,
    done: int = 0,
) -> Iterator[Duel]:
    """The winner against the unscaled model, on noise that the search never saw, seed by seed."""
    table = plan.recipe.search
    assert table is not None
    count = table.confirm_images or table.images
    for k in range(done, table.confirm_seeds):
        draws = RepeatedDraws(plan.data, plan.recipe.seed, f"confirm-{k}")
        pair = (_images(plan, denoiser, r, draws, count, device) for r in (None, winner))
        scores = [_score(plan, images, reference, device) for images in pair]
        yield Duel(k, table.confirm_seeds, *scores)


def best(scored: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The record with the lowest score; NonFiniteError when no cell has one."""
    finite = [record for record in scored if record["score"] is not None]
    if not finite:
        raise NonFiniteError("search: no cell has a finite score; look at the samples in search/")
    return min(finite, key=lambda record: record["score"])


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


def _images(
    plan: Plan,
    denoiser: Denoiser,
    rescaler: Rescaler | None,
    draws: Draws,
    count: int,
    device: torch.device,
) -> Tensor:
    table, sampler = plan.recipe.search, plan.recipe.sampler
    assert table is not None
    assert sampler is not None
    model = denoiser.rescaled(rescaler) if rescaler else denoiser
    batches = sample(model, sampler, draws, range(count), table.batch, device, table.precision)
    return torch.cat([batch.images for batch in batches])


def _score(plan: Plan, images: Tensor, reference: Reference, device: torch.device) -> float:
    metric = minimized(plan.recipe)
    values, _ = measure([metric], Images(images), reference, device)
    assert plan.recipe.search is not None
    return values[plan.recipe.search.minimize]
