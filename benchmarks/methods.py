"""What each search of two numbers costs on trained models, and how good its winner is: the table of
`benchmarks/search.py --run`.

Every method scores the same cells on the same noise. A pass is a forward pass of one image through
the whole network; where cells share the encoder, one counts its share of the FLOPs. The winners of
all methods are then drawn on fresh noise, seed by seed the same for each, beside the grid's best.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from cmkit import Cond, Denoiser, Network, discover
from cmkit.device import pick_device
from cmkit.plan import Plan, for_sampling, plan
from cmkit.recipe import load, with_values
from cmkit.report.search import interpolation_text
from cmkit.runs.finished import trained
from cmkit.runs.folder import RunFolder
from cmkit.search import (
    Cell,
    Comparison,
    Interpolated,
    Scoring,
    best,
    confirm,
    interpolate,
    interval,
    search,
)

METHODS = {
    "grid": ("grid", False),
    "grid, shared encoder": ("grid", True),
    "coordinate": ("coordinate", False),
    "coordinate, shared encoder": ("coordinate", True),
    "surrogate": ("surrogate", False),
    "surrogate, shared encoder": ("surrogate", True),
}
HEADS = (
    "method",
    "passes",
    "fewer",
    "seconds",
    "faster",
    "winner",
    "fresh",
    "less the grid's best",
)


@dataclass
class Found:
    """What a method took and chose."""

    passes: float
    """An image."""
    seconds: float
    winner: dict[str, float]
    note: str = ""


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of the table alone."""
    parser.add_argument("--run", action="append", default=[], help="folder of a trained run")
    parser.add_argument("--images", type=int, default=500, help="a cell")
    parser.add_argument("--skip", type=float, nargs=2, default=(0.9, 1.1), metavar=("LOW", "HIGH"))
    parser.add_argument("--emb", type=float, nargs=2, default=(0.9, 1.1), metavar=("LOW", "HIGH"))
    parser.add_argument("--minimize", default="fid")
    parser.add_argument("--fresh-images", type=int, default=2000)
    parser.add_argument("--fresh-seeds", type=int, default=5)


def tables(options: argparse.Namespace) -> None:
    """Print a table for each run, and one of the means over all runs."""
    made = []
    for run in options.run:
        found = {name: searched(run, options, *how) for name, how in METHODS.items()}
        fresh = fresh_scores(run, options, [each.winner for each in found.values()])
        made.append(rows(found, fresh))
        print(
            f"\n{Path(run).name}: {options.images} images a cell, {options.cells} x"
            f" {options.cells} cells, {options.precision}, {torch.get_num_threads()} threads,"
            f" {options.fresh_seeds} fresh seeds of {options.fresh_images} images"
        )
        show([HEADS, *made[-1]])
        for name, each in found.items():
            if each.note:
                print(f"{name}: {each.note}")
    if len(made) > 1:
        print(f"\nMeans of {len(made)} runs")
        show([HEADS, *means(made)])


def planned(run: str, options: argparse.Namespace, method: str) -> tuple[Plan, Denoiser]:
    """The plan of a search of a trained run's model, and the model."""
    folder = RunFolder(Path(run))
    axes = ", ".join(
        f"{axis}={np.linspace(*getattr(options, axis), options.cells).round(6).tolist()}"
        for axis in ("skip", "emb")
    )
    keys = (
        f'method="{method}", images={options.images}, batch={options.batch},'
        f' minimize="{options.minimize}", precision="{options.precision}", rerank=0,'
        f" confirm_seeds={options.fresh_seeds}, confirm_images={options.fresh_images}"
    )
    sets = ['rescaler={use="global"}', f"search={{{keys}, grid={{{axes}}}}}"]
    made = plan(load(folder.recipe, sets, discover()))
    weights = replace(made, recipe=trained(made.recipe, folder))
    return made, for_sampling(weights, pick_device(options.device), options.precision)


def searched(run: str, options: argparse.Namespace, method: str, shared: bool) -> Found:
    """What a method takes for one model."""
    made, denoiser = planned(run, options, method)
    device, network = pick_device(options.device), denoiser.network
    if not shared:
        network.late = frozenset()
    scoring = Scoring(made, made.recipe.search, denoiser, made.recipe.dataset.reference(), device)
    warm_up(scoring)
    count = counted(network, made)
    cells: dict[int, dict[str, Any]] = {}
    note, began = "", time.perf_counter()
    for event in (interpolate if method == "surrogate" else search)(scoring):
        if isinstance(event, Cell):
            cells[event.index] = {**event.values, "score": event.score, **event.about}
        elif isinstance(event, Interpolated):
            note = interpolation_text(event.record, options.minimize)
            parts = (f"{n:.3g} {name}" for name, n in event.record["passes_of"].items())
            rms = max((check["rms"] for check in event.record["checks"]), default=0.0)
            note += f"; passes: {', '.join(parts)}; images within {rms:.1g} rms"
    seconds = time.perf_counter() - began
    (winner,) = best([c for c in cells.values() if c.get("candidate", True)], 1)
    values = {axis: winner[axis] for axis in ("skip", "emb")}
    return Found(count() / options.images, seconds, values, note)


def warm_up(scoring: Scoring) -> None:
    """Draw a few images, so that no method pays for what is read or built once."""
    few = replace(scoring, table=scoring.table.model_copy(update={"confirm_images": 32}))
    rescaler = with_values(scoring.plan.recipe, {"skip": 1.0})
    for _ in confirm(few, rescaler, [0]):
        pass


def counted(network: Network, made: Plan) -> Callable[[], float]:
    """How many passes of one image the network has taken since: those of its encoder and decoder
    alone as their shares of the FLOPs."""
    taken = {"forward": 0, "encode": 0, "decode": 0}
    inside: list[str] = []

    def count(name: str) -> None:
        inner = getattr(network, name)

        def call(first: Any, *rest: Any) -> Any:
            if not inside:
                taken[name] += images_of(first)
            inside.append(name)
            try:
                return inner(first, *rest)
            finally:
                inside.pop()

        setattr(network, name, call)

    held: list[int] = []

    def images_of(first: Any) -> int:
        if isinstance(first, torch.Tensor):
            held[:] = [len(first)]
        return held[0]  # of the encoding that is decoded

    share = encoder_share(network, made)
    for name in taken:
        count(name)
    return lambda: taken["forward"] + share * taken["encode"] + (1 - share) * taken["decode"]


def encoder_share(network: Network, made: Plan) -> float:
    """The part of a forward pass's FLOPs that `encode` takes."""
    if not network.late:
        return 0.0
    parameter, data = next(network.parameters()), made.data
    x = torch.zeros(1, data.channels, data.resolution, data.resolution).to(parameter)
    label = torch.zeros(1, dtype=torch.int64, device=x.device) if data.num_classes else None
    given = (x, x.new_zeros(1), Cond(label=label), {})
    counts = []
    for work in (network.encode, network):
        with FlopCounterMode(display=False) as counter, torch.inference_mode():
            work(*given)
        counts.append(counter.get_total_flops())
    return counts[0] / counts[1]


def fresh_scores(
    run: str, options: argparse.Namespace, winners: Sequence[dict[str, float]]
) -> dict[tuple[float, ...], list[float]]:
    """Scores of each distinct winner on fresh noise, seed by seed."""
    made, denoiser = planned(run, options, "grid")
    device = pick_device(options.device)
    scoring = Scoring(made, made.recipe.search, denoiser, made.recipe.dataset.reference(), device)
    found: dict[tuple[float, ...], list[float]] = {}
    for values in winners:
        at = tuple(values.values())
        if at not in found:
            rescaler = with_values(made.recipe, values)
            events = confirm(scoring, rescaler, range(options.fresh_seeds))
            found[at] = [event.rescaled for event in events if isinstance(event, Comparison)]
    return found


def rows(
    found: dict[str, Found], fresh: dict[tuple[float, ...], list[float]]
) -> list[tuple[Any, ...]]:
    """The lines of a table, numbers still numbers."""
    grid = found["grid"]
    of_grid = fresh[tuple(grid.winner.values())]
    made = []
    for name, each in found.items():
        own = fresh[tuple(each.winner.values())]
        less = interval([a - b for a, b in zip(own, of_grid, strict=True)])
        made.append(
            (
                name,
                each.passes,
                grid.passes / each.passes,
                each.seconds,
                grid.seconds / each.seconds,
                ", ".join(f"{value:g}" for value in each.winner.values()),
                statistics.fmean(own),
                "same" if each.winner == grid.winner
                else f"{less['mean']:+.3g} [{less['low']:+.3g}, {less['high']:+.3g}]",
            )
        )  # fmt: skip
    return made


def means(tables: Sequence[Sequence[tuple[Any, ...]]]) -> Iterator[tuple[Any, ...]]:
    """Means of the numbers over runs, and in how many the winner is the grid's."""
    for lines in zip(*tables, strict=True):
        passes, fewer, seconds, faster = (
            statistics.fmean(x) for x in list(zip(*lines, strict=True))[1:5]
        )
        same = sum(line[-1] == "same" for line in lines)
        fresh = statistics.fmean(line[6] for line in lines)
        yield (
            lines[0][0],
            passes,
            fewer,
            seconds,
            faster,
            f"same in {same} of {len(lines)}",
            fresh,
            "",
        )


def show(table: Sequence[Sequence[Any]]) -> None:
    """Print lines as a Markdown table."""
    for k, line in enumerate(table):
        texts = [f"{value:.3g}" if isinstance(value, float) else str(value) for value in line]
        print("| " + " | ".join(texts) + " |")
        if not k:
            print("|" + "---|" * len(line))
