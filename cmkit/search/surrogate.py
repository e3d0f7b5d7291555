"""The search by interpolation: for the same noise, images are smooth functions of the scales, so
those of a few cells, the nodes, give those of all others."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cmkit.denoiser import Encodings
from cmkit.errors import NonFiniteError
from cmkit.files import digest_of
from cmkit.kinds import Rescaler
from cmkit.measure import meter
from cmkit.recipe import minimized, with_values
from cmkit.sample import RepeatedDraws, Start, starts, to_uint8
from cmkit.search.cells import Cell
from cmkit.search.interpolation import Interpolation, interpolations
from cmkit.search.score import CellsDrawn, Scoring, drawn, encoder_rows, metered, scored
from cmkit.search.strategies import most_cells, place, trials

PILOT_RMS = 1 / 255
"""Half an 8-bit step of images in [-1, 1]: how far the first images of a cell may be off before
more nodes are taken."""
PILOT_IMAGES = 16
"""Least number of first images, where a cell has as many."""
RANDOM_CHECKS = 3
WINNERS = 5
"""Most cells that are drawn because their interpolated score is the best."""
GROUPS = 10
"""Of images, left out in turns for the standard error of a score."""
KEPT_BYTES = 2**30
"""Images of nodes that are kept for cells which are scored later; others are drawn again."""
METER_BYTES = 2**32
"""Meters at a time."""
BLOCK_BYTES = 2**26
"""Interpolated images at a time."""

Place = tuple[float, ...]


@dataclass(frozen=True)
class Interpolated:
    """How well the cells were interpolated from one set of nodes: the entry "surrogate" of the
    search's result, without pictures, and the first images of the nodes, uint8 (nodes, n, C, H, W).
    """

    index: int
    record: Mapping[str, Any]
    nodes: Tensor


@dataclass
class _State:
    """What is known of the cells so far."""

    scoring: Scoring
    draws: RepeatedDraws
    records: dict[Place, dict[str, Any]]
    firsts: dict[Place, Tensor] = field(default_factory=dict)
    """x0 of the first images of cells that were drawn."""

    @property
    def first_images(self) -> int:
        table = self.scoring.table
        return min(table.images, max(table.thumbnails, PILOT_IMAGES))

    def values(self, at: Place) -> dict[str, float]:
        return dict(zip(self.scoring.table.grid, at, strict=True))

    def rescaler(self, at: Place) -> Rescaler:
        return with_values(self.scoring.plan.recipe, self.values(at))

    def cell(self, at: Place, score: float | None, shown: Tensor, about: dict[str, Any]) -> Cell:
        """The event of a cell, which is remembered."""
        known, used = self.records.get(at), {r["index"] for r in self.records.values()}
        # The first that is free: that of a lost record, if there is one.
        index = known["index"] if known else next(k for k in itertools.count() if k not in used)
        self.records[at] = {"index": index, **self.values(at), "score": score, **about}
        return Cell(
            index,
            most_cells(self.scoring.plan.recipe),
            self.values(at),
            score,
            shown,
            self.scoring.table.images,
            about,
        )

    def first(self, places: Sequence[Place]) -> Iterator[CellsDrawn]:
        """Draw the first images of those places that have none."""
        scoring, new = self.scoring, [at for at in dict.fromkeys(places) if at not in self.firsts]
        rescalers, parts = [self.rescaler(at) for at in new], [list[Tensor]() for _ in new]
        order = list(itertools.chain(*encoder_rows(scoring.denoiser, rescalers)))
        std, count = scoring.denoiser.noise.start, self.first_images
        for start in starts(self.draws, std, range(count), scoring.table.batch, scoring.device):
            encodings = Encodings(start.x)
            for done, k in enumerate(order):
                yield CellsDrawn(start.rows.start * len(new) + done, count * len(new))
                parts[k].append(drawn(scoring, rescalers[k], start, encodings).float())
        self.firsts |= {at: torch.cat(part) for at, part in zip(new, parts, strict=True)}

    def rms(self, by: Interpolation, places: Sequence[Place]) -> list[float]:
        """How far the interpolated first images of these places are from the drawn ones."""
        if not places:
            return []
        nodes = torch.stack([self.firsts[at] for at in nodes_of(by)])
        mixed = (_weights(by, places, nodes.device) @ nodes.flatten(1)).unflatten(
            1, nodes.shape[1:]
        )
        errors = []
        for at, x0 in zip(places, mixed, strict=True):
            found, exact = (self.draws.pictures(x).clamp(-1, 1) for x in (x0, self.firsts[at]))
            error = float((found - exact).square().mean().sqrt())
            errors.append(error if math.isfinite(error) else math.inf)
        return errors


@torch.inference_mode()
def interpolate(
    scoring: Scoring,
    stored: Sequence[Mapping[str, Any]] = (),
    before: Sequence[Mapping[str, Any]] = (),
) -> Iterator[Cell | CellsDrawn | Interpolated]:
    """The cells of a search by interpolation, scored on the same noise and labels.

    `stored` are records of cells, of which later ones replace earlier ones; `before` are those of
    `Interpolated`. A pilot on the first images says with how many nodes it begins. Then cells are
    drawn that are no nodes: (1, 1, ..), three by lot, and the best until the best is a drawn one;
    where interpolated scores of these are off by more than the tolerance, all begins again with
    more nodes, if there are more. Raises NonFiniteError where a node's images are not finite.
    """
    recipe, levels = scoring.plan.recipe, tuple(interpolations(scoring.table))
    draws = scoring.draws("search")
    state = _State(scoring, draws, {place(recipe, r): dict(r) for r in stored})
    level, pilot, last = 0, list[dict[str, Any]](), len(levels) - 1
    if before:
        if before[-1]["held"] or before[-1]["index"] == last:
            return
        level, pilot = before[-1]["index"] + 1, before[-1]["pilot"]
    while not before:
        by, checks = levels[level], checks_of(scoring, levels[level])
        yield from state.first([*nodes_of(by), *checks])
        _require_finite(state, by)
        worst = max(state.rms(by, checks), default=0.0)
        pilot.append({"nodes": len(by.nodes), "rms": worst if math.isfinite(worst) else None})
        if worst <= PILOT_RMS or level == last:
            break
        level += 1
    while True:
        by = levels[level]
        yield from state.first(nodes_of(by))
        _require_finite(state, by)
        sweeps = yield from _cells(state, by)
        record = yield from _judge(state, by)
        drawn_nodes = (before[-1]["passes_of"]["nodes"] if before else 0) + sweeps * len(by.nodes)
        firsts = len(state.firsts) * state.first_images / scoring.table.images
        exact = sum(r.get("draws", 0) for r in state.records.values())
        firsts += before[-1]["passes_of"]["pilot"] if before else 0
        nfe = scoring.plan.nfe or 1
        passes = {"nodes": drawn_nodes * nfe, "checks": exact * nfe, "pilot": firsts * nfe}
        record |= {"pilot": pilot, "passes": sum(passes.values()), "passes_of": passes}
        record["refines"] = not record["held"] and level < last
        most = scoring.table.thumbnails
        shown = [draws.pictures(state.firsts[at][:most]) for at in nodes_of(by)]
        found = Interpolated(level, record, to_uint8(torch.stack(shown)).cpu())
        yield found
        if not record["refines"]:
            return
        before = [*before, {**record, "index": level}]
        level += 1
        state.firsts.clear()


def nodes_of(by: Interpolation) -> list[Place]:
    """The nodes as places of cells."""
    return [tuple(node) for node in by.nodes.tolist()]


def checks_of(scoring: Scoring, by: Interpolation) -> list[Place]:
    """Cells to draw besides the nodes, whatever their scores: (1, 1, ..) if it is inside the box,
    and three by lot."""
    recipe, nodes = scoring.plan.recipe, set(nodes_of(by))
    ones = (1.0,) * len(by.axes)
    chosen = [ones] if _inside(by, ones) and ones not in nodes else []
    _, pool = next(trials(recipe, {}))
    places = [at for at in (place(recipe, values) for values in pool) if at != ones]
    order = np.random.default_rng(recipe.seed).permutation(len(places))
    others = [at for at in (places[k] for k in order) if at not in nodes]
    return [*chosen, *others[:RANDOM_CHECKS]]


def _inside(by: Interpolation, at: Place) -> bool:
    return bool(((by.low <= at) & (at <= by.high)).all())


def _weights(by: Interpolation, places: Sequence[Place], device: torch.device) -> Tensor:
    return torch.from_numpy(by.weights(places)).to(device, torch.float32)


def _require_finite(state: _State, by: Interpolation) -> None:
    for at in nodes_of(by):
        _check_node(state, at, state.firsts[at])


def _check_node(state: _State, at: Place, x0: Tensor) -> None:
    if not x0.isfinite().all():
        values = ", ".join(f"{axis} = {value:g}" for axis, value in state.values(at).items())
        raise NonFiniteError(
            f"search: images at {values} hold NaN or infinity, and all others are interpolated"
            ' from them; try values nearer to 1, search.precision = "fp32" if it is not, or'
            ' method = "coordinate"'
        )


def _cells(state: _State, by: Interpolation) -> Generator[Cell | CellsDrawn, None, float]:
    """Score the cells that have no record of these nodes; how often each node was drawn for every
    image."""
    scoring, nodes = state.scoring, set(nodes_of(by))
    recipe, table, count = scoring.plan.recipe, scoring.table, len(by.nodes)
    scores = {
        at: r.get("predicted", r["score"])
        for at, r in state.records.items()
        if r.get("nodes") == count
    }
    ones, seen, size = (1.0,) * len(by.axes), set[Place](), _cells_at_a_time(state, by)
    many = math.prod(len(set(values)) for values in table.grid.values()) > most_cells(recipe)
    keep = many or most_cells(recipe) > size
    images, kept = _node_images(state, by, keep)
    digest = digest_of(json.dumps([table.images, by.nodes.tolist()]))
    sweeps = 0.0
    for axis, tried in trials(recipe, scores):
        # Those of earlier lists, not those with a score: the same products again after a stop.
        places = [at for at in dict.fromkeys(place(recipe, v) for v in tried) if at not in seen]
        seen.update(places)
        candidates = set(places)
        if axis is None and ones not in candidates and _inside(by, ones):
            places.append(ones)
        for first in range(0, len(places), size):
            chunk = places[first : first + size]
            sweeps += 1 - kept if sweeps else 1
            if all(at in scores for at in chunk):
                continue
            labels = [json.dumps(["interpolated", digest, at]) for at in chunk]
            sizes, mixed = (
                [table.images] * len(chunk),
                _mixed(_weights(by, chunk, scoring.device), images),
            )
            found = yield from metered(scoring, labels, sizes, mixed, state.draws, table.images)
            for at, (score, shown) in zip(chunk, found, strict=True):
                if at in scores:
                    continue
                scores[at] = score
                before = state.records.get(at, {})
                about: dict[str, Any] = {"exact": at in nodes, "nodes": count}
                if at not in candidates:
                    about["candidate"] = False
                about |= {key: before[key] for key in ("draws", "error") if key in before}
                if at not in nodes and before.get("exact"):
                    about |= {"exact": True, "predicted": score}
                    score = before["score"]
                yield state.cell(at, score, shown, about)
    return sweeps


def _cells_at_a_time(state: _State, by: Interpolation) -> int:
    """How many cells fit METER_BYTES, by the size of one meter that has seen all its images."""
    scoring, firsts = state.scoring, state.firsts[nodes_of(by)[0]]
    images = to_uint8(state.draws.pictures(firsts))
    count = scoring.table.images
    filled = meter(minimized(scoring.plan.recipe), count, scoring.reference, scoring.device)
    for first in range(0, count, len(images)):
        filled.add(images[: count - first])
    return max(1, METER_BYTES // max(1, sum(x.nbytes for x in filled.state().values())))


NodeImages = Callable[[Start], Generator[float, None, Tensor]]


def _node_images(state: _State, by: Interpolation, keep: bool) -> tuple[NodeImages, float]:
    """The images of the nodes (nodes, B, C, H, W) for a start, and what share of all is kept."""
    scoring, places, table = state.scoring, nodes_of(by), state.scoring.table
    rescalers = [state.rescaler(at) for at in places]
    order = list(itertools.chain(*encoder_rows(scoring.denoiser, rescalers)))
    batches = KEPT_BYTES // (4 * len(places) * table.batch * math.prod(state.draws.shape))
    kept: dict[int, Tensor] = {}

    def images(start: Start) -> Generator[float, None, Tensor]:
        first = start.rows.start
        if first in kept:
            return kept[first]
        encodings, found = Encodings(start.x), start.x.new_empty(len(places), *start.x.shape)
        for done, k in enumerate(order, 1):
            x0 = drawn(scoring, rescalers[k], start, encodings)
            _check_node(state, places[k], x0)
            found[k] = x0
            yield done / len(order)
        if keep and first < batches * table.batch:
            kept[first] = found
        return found

    return images, min(1.0, batches * table.batch / table.images) if keep else 0.0


def _mixed(
    weights: Tensor, images: NodeImages
) -> Callable[[Start, Sequence[int]], Iterator[tuple[int, Tensor] | float]]:
    """The drawing of cells that are `weights` (cells, nodes) of the nodes' images."""

    def drawing(start: Start, due: Sequence[int]) -> Iterator[tuple[int, Tensor] | float]:
        nodes = yield from images(start)
        flat, wanted = nodes.flatten(1), set(due)
        size = max(1, BLOCK_BYTES // flat[0].nbytes)
        for first in range(0, len(weights), size):
            block = weights[first : first + size]
            if wanted.isdisjoint(range(first, first + len(block))):
                continue
            x0 = (block @ flat).view(len(block), *nodes.shape[1:])
            yield from ((first + k, x0[k]) for k in range(len(block)) if first + k in wanted)

    return drawing


def _judge(state: _State, by: Interpolation) -> Generator[Cell | CellsDrawn, None, dict[str, Any]]:
    """Draw the cells that show how good the interpolation is; what is then known of it."""
    scoring, records, count = state.scoring, state.records, len(by.nodes)
    table = scoring.table
    new = [at for at in checks_of(scoring, by) if not records[at]["exact"]]
    rescalers = [state.rescaler(at) for at in new]
    if new:
        found = yield from scored(scoring, rescalers, state.draws, table.images)
        for at, (score, shown) in zip(new, found, strict=True):
            yield state.cell(at, score, shown, _exact(records[at]))

    def checked() -> list[Place]:
        return [at for at, r in records.items() if r["nodes"] == count and "predicted" in r]

    def best() -> Place | None:
        own = [
            at
            for at, r in records.items()
            if r["nodes"] == count and r.get("candidate", True) and r["score"] is not None
        ]
        return min(own, key=lambda at: (records[at]["score"], records[at]["index"]), default=None)

    for _ in range(WINNERS):
        winner = best()
        if winner is None:
            break
        told = table.tolerance is not None or "error" in records[winner]
        if records[winner]["exact"] and (told or not checked()):
            break
        score, error, shown = yield from _with_error(state, winner)
        about = _exact(records[winner]) | ({} if table.tolerance else {"error": error})
        yield state.cell(winner, score, shown, about)
    winner, places = best(), checked()
    yield from state.first(places)
    own = records[winner] if winner else {"exact": False}
    tolerance = table.tolerance or own.get("error")
    checks = [
        {
            "values": state.values(at),
            "rms": rms if math.isfinite(rms) else None,
            "predicted": records[at]["predicted"],
            "exact": records[at]["score"],
        }
        for at, rms in zip(places, state.rms(by, places), strict=True)
    ]
    return {
        "axes": list(by.axes),
        "low": by.low.tolist(),
        "high": by.high.tolist(),
        "exponents": by.exponents.tolist(),
        "matrix": (np.round(by.matrix, 10) + 0.0).tolist(),
        "nodes": [state.values(at) for at in nodes_of(by)],
        "rms_images": state.first_images,
        "checks": checks,
        "tolerance": tolerance,
        "held": own["exact"] and all(_difference(check) <= (tolerance or 0) for check in checks),
    }


def _exact(record: Mapping[str, Any]) -> dict[str, Any]:
    """What the record of a cell that has now been drawn says besides its score."""
    about = {key: record[key] for key in ("nodes", "candidate", "predicted") if key in record}
    if not record["exact"]:
        about["predicted"] = record["score"]
    return {**about, "exact": True, "draws": record.get("draws", 0) + 1}


def _difference(check: Mapping[str, Any]) -> float:
    """How far an interpolated score is from the exact one; infinite where one is no number."""
    if check["predicted"] is None or check["exact"] is None:
        return math.inf
    return abs(float(check["predicted"] - check["exact"]))


def _with_error(
    state: _State, at: Place
) -> Generator[CellsDrawn, None, tuple[float | None, float | None, Tensor]]:
    """The exact score of a cell, its standard error where the recipe has no tolerance, and its
    first images."""
    scoring, rescaler, images = state.scoring, state.rescaler(at), state.scoring.table.images
    groups = 0 if scoring.table.tolerance else min(GROUPS, images)
    sizes = [images, *(images - len(range(k, images, groups)) for k in range(groups))]

    def drawing(start: Start, due: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        x0 = drawn(scoring, rescaler, start, Encodings(start.x))
        own = torch.tensor(start.rows, device=x0.device)
        for k in due:
            yield k, x0[own % groups != k - 1] if k else x0

    labels = [json.dumps(["exact", images, at, groups, k]) for k in range(len(sizes))]
    found = yield from metered(scoring, labels, sizes, drawing, state.draws, images)
    (score, shown), *parts = found
    return score, jackknife([part for part, _ in parts]), shown


def jackknife(scores: Sequence[float | None]) -> float | None:
    """The standard error of a score by those without one of g groups of its images:
    sqrt((g - 1) / g sum_j (score_j - mean)^2) (Quenouille, 1949; Tukey, 1958); None where one is no
    number."""
    known = [score for score in scores if score is not None]
    if len(known) < max(2, len(scores)):
        return None
    return float(np.std(known)) * math.sqrt(len(known) - 1)
