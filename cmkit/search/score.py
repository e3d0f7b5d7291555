"""The score of cells: images drawn together, handed to the metric as they come."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Generator, Mapping, Sequence
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
from cmkit.sample import Draws, starts, to_uint8
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


@torch.inference_mode()
def scored(
    scoring: Scoring, rescalers: Sequence[Rescaler | None], draws: Draws, count: int
) -> Generator[CellsDrawn, None, list[tuple[float | None, Tensor]]]:
    """Score of `count` images of each rescaler, None where it is not finite, and its first images,
    uint8 (n, C, H, W). Images go to the metric as they are drawn, and only the first are kept."""
    recipe, table, denoiser = scoring.plan.recipe, scoring.table, scoring.denoiser
    device, begun, sampler = scoring.device, scoring.begun, recipe.sampler
    assert sampler is not None
    cast, metric = autocast(table.precision, device), minimized(recipe)
    meters = [meter(metric, count, scoring.reference, device) for _ in rescalers]
    finite = torch.ones(len(rescalers), dtype=torch.bool, device=device)
    thumbnails: list[list[Tensor]] = [[] for _ in rescalers]
    labels = tuple(
        json.dumps([draws.purpose, count, rescaler and rescaler.model_dump(mode="json")])
        for rescaler in rescalers
    )
    drawn, scores = [0] * len(rescalers), [math.nan] * len(rescalers)
    for k, label in enumerate(labels):
        if begun and label in begun.labels:
            state = begun.of(label)
            finite[k] = state.pop("finite")
            thumbnails[k].append(state.pop("thumbnails"))
            drawn[k] = begun.drawn[begun.labels.index(label)]
            if drawn[k] == count:
                scores[k] = state["score"].item()
            else:
                meters[k].restore(state)

    def unfinished() -> PartialCells | None:
        kept = [k for k, images in enumerate(drawn) if images]
        tensors: dict[str, Tensor] = {}
        for place, k in enumerate(kept):
            own = {"finite": finite[k].cpu(), "thumbnails": torch.cat(thumbnails[k])}
            score = {"score": torch.tensor(scores[k], dtype=torch.float64)}
            own |= score if drawn[k] == count else meters[k].state()
            tensors |= {f"{place}/{name}": value for name, value in own.items()}
        found = (tuple(labels[k] for k in kept), tuple(drawn[k] for k in kept), tensors)
        return PartialCells(*found) if kept else None

    indices, total = range(min(drawn), count), count * len(rescalers)
    for start in starts(draws, denoiser.noise.sigma_max, indices, table.batch, device):
        yield CellsDrawn(sum(drawn), total, unfinished)
        rows, encodings = start.rows, Encodings(start.x)
        for k, rescaler in enumerate(rescalers):
            if drawn[k] > rows.start:  # before an error came to another cell
                continue
            model = denoiser.rescaled(rescaler, encodings) if rescaler else denoiser
            with cast:
                x0 = sampler.sample(model, start.x, start.cond, start.noise)
            drawn[k] = 0  # an error from here on leaves the meter half way
            finite[k] &= x0.isfinite().all()
            images = to_uint8(x0)
            meters[k].add(images)
            if rows.start < table.thumbnails:
                thumbnails[k].append(images[: table.thumbnails - rows.start].cpu())
            if rows.stop == count and finite[k]:
                scores[k] = _value(meters[k], table.minimize.removeprefix(metric.prefix))
            drawn[k] = rows.stop
    found = (score if math.isfinite(score) else None for score in scores)
    return list(zip(found, map(torch.cat, thumbnails), strict=True))


def _value(taken: Meter, key: str) -> float:
    """The number `key`, NaN where there is none."""
    try:
        return taken.values()[key]
    except NonFiniteError:
        return math.nan
