"""The rescaler's numbers by grid search, and the honest comparison of the winner with (1, 1)."""

from __future__ import annotations

import contextlib
import math
import statistics
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cmkit.compose import Plan, autocast, cells, minimized, with_values
from cmkit.denoiser import Denoiser, Encodings
from cmkit.errors import NonFiniteError
from cmkit.kinds import Reference, Rescaler
from cmkit.measure import Images, measure
from cmkit.sample import Draws, RepeatedDraws, starts, to_uint8

ROW_BYTES = 1 << 30
"""Images of cells that are drawn together are held in memory up to here."""


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
class Drawn:
    """Images of the next cells drawn so far: nothing is kept yet, but the caller may stop."""

    done: int
    total: int


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
) -> Iterator[Cell | Drawn]:
    """Each cell of the grid that is not in `done`, scored on the same noise and labels.

    Cells that differ in the network's late scales alone are drawn together, since they share the
    encoder's work.
    """
    recipe = plan.recipe
    assert recipe.search is not None
    every = list(cells(recipe))
    draws = RepeatedDraws(plan.data, recipe.seed, "search")
    for row in _rows(denoiser, every, recipe.search.images * math.prod(draws.shape)):
        left = [index for index in row if index not in done]
        if not left:
            continue
        drawn = yield from _drawn(
            plan, denoiser, [every[index] for index in left], draws, recipe.search.images, device
        )
        for index, images in zip(left, drawn, strict=True):
            values = {axis: getattr(every[index], axis) for axis in recipe.search.grid}
            score = None
            thumbnails = torch.zeros(1, *draws.shape, dtype=torch.uint8)
            if images is not None:
                thumbnails = images[: recipe.search.thumbnails].clone()
                with contextlib.suppress(NonFiniteError):  # the cell stays, without a score
                    score = _score(plan, images, reference, device)
            yield Cell(index, len(every), values, score, thumbnails)


def rerank(
    plan: Plan,
    denoiser: Denoiser,
    chosen: Sequence[Mapping[str, Any]],
    reference: Reference,
    device: torch.device,
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
        (images,) = yield from _drawn(plan, denoiser, [rescaler], draws, count, device)
        score = None
        if images is not None:
            with contextlib.suppress(NonFiniteError):
                score = _score(plan, images, reference, device)
        yield Cell(record["index"], len(chosen), values, score, torch.empty(0))


def confirm(
    plan: Plan,
    denoiser: Denoiser,
    winner: Rescaler,
    reference: Reference,
    device: torch.device,
    done: int = 0,
) -> Iterator[Duel | Drawn]:
    """The winner against the unscaled model, on noise that the search never saw, seed by seed."""
    table = plan.recipe.search
    assert table is not None
    count = table.confirm_images or table.images
    for k in range(done, table.confirm_seeds):
        draws = RepeatedDraws(plan.data, plan.recipe.seed, f"confirm-{k}")
        pair = yield from _drawn(plan, denoiser, (None, winner), draws, count, device)
        whole = [images for images in pair if images is not None]
        if len(whole) < len(pair):
            raise NonFiniteError(
                f"search: images of seed confirm-{k} hold NaN or infinity; try search.precision ="
                ' "fp32" and scales nearer to 1'
            )
        scores = [_score(plan, images, reference, device) for images in whole]
        yield Duel(k, table.confirm_seeds, *scores)


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


def _rows(denoiser: Denoiser, every: Sequence[Rescaler], image_bytes: int) -> list[list[int]]:
    """Cells by equal early scales at sigma_max, in rows whose images fit into `ROW_BYTES`."""
    sigma = torch.full((1,), denoiser.noise.sigma_max)
    network = denoiser.network
    rows: dict[tuple[Any, ...], list[int]] = {}
    for index, rescaler in enumerate(every):
        scales = rescaler.bind(network.sites)(sigma)
        early = {site: s for site, s in scales.items() if site not in network.late}
        # Without late sites nothing is shared: each cell is a row.
        key = tuple(
            (site, *s.tolist()) if s.ndim else (site, s.item()) for site, s in early.items()
        )
        rows.setdefault(key if network.late else (index,), []).append(index)
    most = max(1, ROW_BYTES // image_bytes)
    return [row[i : i + most] for row in rows.values() for i in range(0, len(row), most)]


@torch.inference_mode()
def _drawn(
    plan: Plan,
    denoiser: Denoiser,
    rescalers: Sequence[Rescaler | None],
    draws: Draws,
    count: int,
    device: torch.device,
) -> Generator[Drawn, None, list[Tensor | None]]:
    """Images uint8 (count, C, H, W) of each rescaler, None where one is not finite."""
    table, sampler = plan.recipe.search, plan.recipe.sampler
    assert table is not None
    assert sampler is not None
    cast = autocast(table.precision, device)
    found: list[Tensor | None] = [
        torch.empty(count, *draws.shape, dtype=torch.uint8) for _ in rescalers
    ]
    high = denoiser.noise.sigma_max
    for start in starts(draws, high, range(count), table.batch, device):
        encodings = Encodings(start.x)
        for k, rescaler in enumerate(rescalers):
            images = found[k]
            if images is None:
                continue
            model = denoiser.rescaled(rescaler, encodings) if rescaler else denoiser
            with cast:
                x0 = sampler.sample(model, start.x, start.cond, start.noise)
            if x0.isfinite().all():
                images[start.rows.start : start.rows.stop] = to_uint8(x0)
            else:
                found[k] = None
        yield Drawn(start.rows.stop * len(rescalers), count * len(rescalers))
    return found


def _score(plan: Plan, images: Tensor, reference: Reference, device: torch.device) -> float:
    metric = minimized(plan.recipe)
    values, _ = measure([metric], Images(images), reference, device)
    assert plan.recipe.search is not None
    return values[plan.recipe.search.minimize]
