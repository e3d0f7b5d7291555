"""The score of cells: images drawn together, handed to the metric as they come."""

from __future__ import annotations

import json
import math
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
from cmkit.plan import Plan
from cmkit.recipe import SearchTable, minimized
from cmkit.sample import Draws, Start, starts, to_uint8
from cmkit.values import Reference


@dataclass(frozen=True)
class PartialCells:
    """Cells that are drawn together, as far as they are."""

    labels: tuple[str, ...]
    """Noise, number of images and scales of each cell."""
    drawn: tuple[int, ...]
    """Images of each cell so far."""
    tensors: Mapping[str, Tensor]
    """States of the meters by "k/name" for the cell `labels[k]`, of whole cells their scores."""

    def of(self, label: str) -> dict[str, Tensor]:
        """The tensors of one cell, by name."""
        prefix = f"{self.labels.index(label)}/"
        found = (name for name in self.tensors if name.startswith(prefix))
        return {name.removeprefix(prefix): self.tensors[name] for name in found}


@dataclass(frozen=True)
class CellsDrawn:
    """Images of the next cells drawn so far; the caller may stop here, and keep `unfinished`, which
    holds as well once an error came."""

    done: int
    total: int
    unfinished: Callable[[], PartialCells | None] | None = None


@dataclass(frozen=True)
class Scoring:
    """What the cells of a search are scored with."""

    plan: Plan
    table: SearchTable
    denoiser: Denoiser
    reference: Reference
    device: torch.device
    begun: PartialCells | None = None
    """Cells that an earlier start was drawing, to go on with."""


def encoder_rows(denoiser: Denoiser, every: Sequence[Rescaler]) -> list[list[int]]:
    """Places of the rescalers whose early scales at sigma_max are equal; without late sites each
    is a row of its own."""
    sigma, network = torch.full((1,), denoiser.noise.sigma_max), denoiser.network
    rows: dict[Any, list[int]] = {}
    for index, rescaler in enumerate(every):
        scales = rescaler.bind(network.sites)(sigma).items()
        early = tuple((s, *v.flatten().tolist()) for s, v in scales if s not in network.late)
        rows.setdefault(early if network.late else index, []).append(index)
    return list(rows.values())


Drawing = Callable[[Start, Sequence[int]], Iterator[tuple[int, Tensor] | float]]
"""x0 of a batch for those of the cells that are due, each with its cell, and between them how much
of the batch's work is done."""


@torch.inference_mode()
def scored(
    scoring: Scoring, rescalers: Sequence[Rescaler | None], draws: Draws, count: int
) -> Generator[CellsDrawn, None, list[tuple[float | None, Tensor]]]:
    """Score of `count` images of each rescaler, None where it is not finite, and its first images,
    uint8 (n, C, H, W). Images go to the metric as they are drawn, and only the first are kept."""

    def drawing(start: Start, due: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        encodings = Encodings(start.x)
        for k in due:
            yield k, drawn(scoring, rescalers[k], start, encodings)

    labels = [
        json.dumps([draws.purpose, count, rescaler and rescaler.model_dump(mode="json")])
        for rescaler in rescalers
    ]
    sizes = [count] * len(rescalers)
    return (yield from metered(scoring, labels, sizes, drawing, draws, count))


def drawn(
    scoring: Scoring, rescaler: Rescaler | None, start: Start, encodings: Encodings
) -> Tensor:
    """x0 (B, C, H, W) of one batch."""
    sampler, denoiser = scoring.plan.recipe.sampler, scoring.denoiser
    assert sampler is not None
    model = denoiser.rescaled(rescaler, encodings) if rescaler else denoiser
    with autocast(scoring.table.precision, scoring.device):
        return sampler.sample(model, start.x, start.cond, start.noise)


@torch.inference_mode()
def metered(
    scoring: Scoring,
    labels: Sequence[str],
    sizes: Sequence[int],
    drawing: Drawing,
    draws: Draws,
    count: int,
) -> Generator[CellsDrawn, None, list[tuple[float | None, Tensor]]]:
    """What `scored` returns, of cells with these labels, whose meters get `sizes` images of those
    that `drawing` gives for `count` starts."""
    recipe, table, device, begun = scoring.plan.recipe, scoring.table, scoring.device, scoring.begun
    metric = minimized(recipe)
    meters = [meter(metric, size, scoring.reference, device) for size in sizes]
    finite = torch.ones(len(labels), dtype=torch.bool, device=device)
    thumbnails: list[list[Tensor]] = [[] for _ in labels]
    done, scores = [0] * len(labels), [math.nan] * len(labels)
    for k, label in enumerate(labels):
        if begun and label in begun.labels:
            state = begun.of(label)
            finite[k] = state.pop("finite")
            thumbnails[k].append(state.pop("thumbnails"))
            done[k] = begun.drawn[begun.labels.index(label)]
            if done[k] == count:
                scores[k] = state["score"].item()
            else:
                meters[k].restore(state)

    def unfinished() -> PartialCells | None:
        kept = [k for k, images in enumerate(done) if images]
        tensors: dict[str, Tensor] = {}
        for place, k in enumerate(kept):
            own = {"finite": finite[k].cpu(), "thumbnails": torch.cat(thumbnails[k])}
            score = {"score": torch.tensor(scores[k], dtype=torch.float64)}
            own |= score if done[k] == count else meters[k].state()
            tensors |= {f"{place}/{name}": value for name, value in own.items()}
        found = (tuple(labels[k] for k in kept), tuple(done[k] for k in kept), tensors)
        return PartialCells(*found) if kept else None

    indices, total = range(min(done), count), count * len(labels)
    for start in starts(draws, scoring.denoiser.noise.sigma_max, indices, table.batch, device):
        yield CellsDrawn(sum(done), total, unfinished)
        rows = start.rows
        # Others were drawn before an error came to one.
        due = [k for k, images in enumerate(done) if images <= rows.start]
        for found in drawing(start, due):
            if isinstance(found, float):
                ahead = int(found * len(due) * len(rows))
                yield CellsDrawn(sum(done) + ahead, total, unfinished)
                continue
            k, x0 = found
            done[k] = 0  # an error from here on leaves the meter half way
            finite[k] &= x0.isfinite().all()
            images = to_uint8(x0)
            if len(images):
                meters[k].add(images)
            if rows.start < table.thumbnails:
                thumbnails[k].append(images[: table.thumbnails - rows.start].cpu())
            if rows.stop == count and finite[k]:
                scores[k] = _value(meters[k], table.minimize)
            done[k] = rows.stop
    result = (score if math.isfinite(score) else None for score in scores)
    return list(zip(result, map(torch.cat, thumbnails), strict=True))


def _value(taken: Meter, key: str) -> float:
    """The number `key`, NaN where there is none."""
    try:
        return taken.values()[key]
    except NonFiniteError:
        return math.nan
