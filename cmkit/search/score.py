"""The score of cells: images drawn together, handed to the metric as they come."""

from __future__ import annotations

import itertools
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
from cmkit.latents.coding import Coding
from cmkit.measure import meter
from cmkit.plan import Plan
from cmkit.recipe import SearchTable, minimized
from cmkit.sample import Draws, RepeatedDraws, Start, starts, to_uint8
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
class Rungs:
    """Numbers of images of successive halving, and what is kept of the cells between them."""

    images: tuple[int, ...]
    """Of a cell, rising; without halving one number."""
    kept: dict[str, tuple[int, dict[str, Tensor]]]
    """(images drawn, tensors as in `PartialCells`) by label."""

    @classmethod
    def of(cls, scoring: Scoring) -> Rungs:
        """The rungs of a search, with what an earlier start has drawn."""
        images, begun = scoring.table.rung_images, scoring.begun
        if begun is None or len(images) == 1:
            return cls(images, {})
        pairs = zip(begun.labels, begun.drawn, strict=True)
        return cls(images, {label: (drawn, begun.of(label)) for label, drawn in pairs})


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
    prompts: Sequence[str] = ()
    """What images are drawn from, in turns."""
    coding: Coding | None = None

    def draws(self, purpose: str) -> RepeatedDraws:
        """Noise, labels and prompts of the images of cells."""
        plan, rule = self.plan, self.plan.label_rule
        return RepeatedDraws(
            plan.space, plan.recipe.seed, purpose, (), rule, self.prompts, self.coding
        )


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


def label_of(draws: Draws, count: int, rescaler: Rescaler | None) -> str:
    """What tells a cell that is being drawn from others: its noise, images and scales."""
    return json.dumps([draws.purpose, count, rescaler and rescaler.model_dump(mode="json")])


def scored(
    scoring: Scoring,
    rescalers: Sequence[Rescaler | None],
    draws: Draws,
    count: int,
    rungs: Rungs | None = None,
) -> Generator[CellsDrawn, None, list[tuple[float | None, Tensor]]]:
    """Score of `count` images of each rescaler, None where it is not finite, and its first images,
    uint8 (n, C, H, W). `rungs` are as of `metered`."""

    def drawing(start: Start, due: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        encodings = Encodings(start.x)
        for k in due:
            yield k, drawn(scoring, rescalers[k], start, encodings)

    rungs = rungs or Rungs((count,), {})
    labels = [label_of(draws, rungs.images[-1], rescaler) for rescaler in rescalers]
    sizes = [count] * len(rescalers)
    return (yield from metered(scoring, labels, sizes, drawing, draws, count, rungs))


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
    rungs: Rungs | None = None,
) -> Generator[CellsDrawn, None, list[tuple[float | None, Tensor]]]:
    """What `scored` returns, of cells with these labels, whose meters get `sizes` images of those
    that `drawing` gives for `count` starts: as they are drawn, and only the first are kept.

    Where `count` is one of `rungs`, cells go on from what is kept of them there, and unless it is
    the last they are kept there again. No batch goes across a rung, so that the bits of a score
    are the same wherever its cell was interrupted.
    """
    table, device, begun = scoring.table, scoring.device, scoring.begun
    metric, rungs = minimized(scoring.plan.recipe), rungs or Rungs((count,), {})
    cells = []
    for label, size in zip(labels, sizes, strict=True):
        taken = meter(metric, size, scoring.reference, device)
        cells.append(cell := _Drawing(label, taken, count, count < rungs.images[-1], device))
        if label in rungs.kept:
            cell.go_on(*rungs.kept[label])
        elif begun and label in begun.labels:
            cell.go_on(begun.drawn[begun.labels.index(label)], begun.of(label))

    def unfinished() -> PartialCells | None:
        kept = rungs.kept | {cell.label: (cell.drawn, cell.state()) for cell in cells if cell.drawn}
        if not kept:
            return None
        tensors = {
            f"{place}/{name}": value
            for place, (_, state) in enumerate(kept.values())
            for name, value in state.items()
        }
        return PartialCells(tuple(kept), tuple(n for n, _ in kept.values()), tensors)

    def so_far(ahead: int = 0) -> CellsDrawn:
        return CellsDrawn(sum(cell.drawn for cell in cells) + ahead, total, unfinished)

    least = min(cell.drawn for cell in cells)
    edges = [least, *(images for images in rungs.images if least < images < count), count]
    spans = itertools.starmap(range, itertools.pairwise(edges))
    std, total = scoring.denoiser.noise.start, count * len(cells)
    for start in itertools.chain.from_iterable(
        starts(draws, std, span, table.batch, device) for span in spans
    ):
        yield so_far()
        rows = start.rows
        # Others were drawn before an error came to one.
        due = [k for k, cell in enumerate(cells) if cell.drawn <= rows.start]
        for found in drawing(start, due):
            if isinstance(found, float):
                yield so_far(int(found * len(due) * len(rows)))
                continue
            k, x0 = found
            cell = cells[k]
            cell.drawn = 0  # an error from here on leaves the meter half way
            cell.finite &= x0.isfinite().all()
            images = to_uint8(draws.pictures(x0))
            if len(images):
                cell.meter.add(images)
            if rows.start < table.thumbnails:
                cell.thumbnails.append(images[: table.thumbnails - rows.start].cpu())
            if rows.stop == count and cell.finite:
                cell.score = _value(cell.meter, table.minimize.removeprefix(metric.prefix))
            cell.drawn = rows.stop
    for cell in cells:
        rungs.kept.pop(cell.label, None)
        if cell.goes_on:
            rungs.kept[cell.label] = count, cell.state()
    scores = (cell.score if math.isfinite(cell.score) else None for cell in cells)
    return list(zip(scores, (torch.cat(cell.thumbnails) for cell in cells), strict=True))


class _Drawing:
    """A cell while its first `count` images are drawn, which `goes_on` to more of them or not."""

    def __init__(self, label: str, meter: Meter, count: int, goes_on: bool, device: torch.device):
        self.label, self.meter, self.count, self.goes_on = label, meter, count, goes_on
        self.finite = torch.ones((), dtype=torch.bool, device=device)
        self.thumbnails: list[Tensor] = []
        self.drawn, self.score = 0, math.nan

    def state(self) -> dict[str, Tensor]:
        """The state of the meter and what else `go_on` needs, of a whole cell its score instead."""
        thumbnails = torch.cat(self.thumbnails).contiguous()  # a network may give channels last
        own = {"finite": self.finite.cpu(), "thumbnails": thumbnails}
        if self.drawn == self.count:
            own["score"] = torch.tensor(self.score, dtype=torch.float64)
        return own if self.drawn == self.count and not self.goes_on else own | self.meter.state()

    def go_on(self, drawn: int, state: Mapping[str, Tensor]) -> None:
        """Take up what `state` gave after so many images, unless it is of no use here."""
        own = {"finite", "thumbnails", "score"}
        if drawn > self.count:
            return
        if drawn < self.count or self.goes_on:
            try:
                self.meter.restore({name: state[name] for name in state if name not in own})
            except ValueError:  # a number that has to know from the start how many there will be
                return
        if drawn == self.count:
            self.score = state["score"].item()
        self.finite &= state["finite"].to(self.finite.device)
        self.thumbnails, self.drawn = [state["thumbnails"]], drawn


def _value(taken: Meter, key: str) -> float:
    """The number `key`, NaN where there is none."""
    try:
        return taken.values()[key]
    except NonFiniteError:
        return math.nan
