"""The command that compares the rows of a suite."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cmkit.cli import printing
from cmkit.cli.compare import lost, show_results
from cmkit.cli.parts import DeviceOption, JsonOption
from cmkit.stop import StopSignal

if TYPE_CHECKING:
    from cmkit.suite.cells import Cell
    from cmkit.suite.cost import Costs
    from cmkit.suite.suite import Suite
    from cmkit.suite.work import SuiteFolder


def bench(
    suite: Annotated[Path, typer.Argument(help="A suite file.")],
    check: Annotated[
        bool, typer.Option("--check", help="Print the cells, what they share and what they cost.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Take more than 200 cells.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the suite's runs; runs/NAME of the suite.")
    ] = None,
    jobs: Annotated[int, typer.Option("--jobs", "-j", min=1, help="Cells at once.")] = 1,
    device: DeviceOption = "auto",
    json: JsonOption = False,
) -> None:
    """Compare variants of a recipe: run each cell of a suite, doing what they share once."""
    from cmkit.plugins import discover
    from cmkit.suite.cells import MOST, cells
    from cmkit.suite.suite import load_suite
    from cmkit.suite.work import SuiteFolder

    loaded, registry = load_suite(suite), discover()
    most = loaded.count() if yes else MOST
    found = cells(loaded, registry, most)
    budget = loaded.table.budget
    if budget and budget.unit == "evaluations":
        from cmkit.suite.cost import per_step  # the suite is known to be sound before torch

        found = cells(loaded, registry, most, per_step)
    if check:
        _check(loaded, found, json)
    else:
        folder = SuiteFolder(out or Path("runs") / loaded.name)
        _run(loaded, found, folder, jobs, device, json)


def _run(
    suite: Suite, cells: Sequence[Cell], folder: SuiteFolder, jobs: int, device: str, json: bool
) -> None:
    """Carry the cells out, and show each as it ends; then print the results, and keep them."""
    from cmkit.cli.display import Display
    from cmkit.run.events import StageStarted
    from cmkit.suite.work import Worker

    stop = StopSignal()
    stop.listen()
    failed = []
    with Display(None, quiet=json) as display:
        display.show(StageStarted("cells", 0, len(cells)))
        for event in Worker(cells, folder, device, stop, jobs).work():
            display.say(f"[{event.done}/{event.total}] {event.text}")
            display.advance(event.done)
            failed += [event.cell] * event.failed
    show_results(suite, cells, folder, device, json)
    if failed:
        raise lost(failed, folder)


def _check(suite: Suite, cells: Sequence[Cell], json: bool) -> None:
    """Print the cells of a suite, the graph of what they share, and costs."""
    from cmkit.suite.cost import costs

    found = costs(cells)
    budget = suite.table.budget
    known = not (budget and budget.unit == "seconds")
    if json:
        printing.document(_document(suite, cells, found, known))
        return
    axes = [axis for axis in suite.axes if any(axis in cell.axis for cell in cells)]
    rows = [
        [cell.name, cell.row, *values, str(cell.seed), "; ".join(shared(cell))]
        for cell in cells
        for values in [[cell.axis.get(axis, "") for axis in axes]]
    ]
    printing.table(["cell", "row", *axes, "seed", "shares"], rows)
    printing.line("")
    for line in graph(cells):
        printing.line(line)
    printing.line("")
    printing.table(*_costs_table(cells, found, known))
    if budget:
        paid = ", of which a row's teacher is paid" if budget.teacher else ""
        printing.line(f"budget: {budget.amount:,.12g} {budget.unit} a training{paid}")
    if not known:
        printing.line("steps follow from seconds a step, measured when the suite is run")


def shared(cell: Cell) -> list[str]:
    """What a cell takes from others, in words."""
    own = [f"training of {cell.group}"] if cell.group != cell.name else []
    table = cell.recipe.teacher
    teacher = table.table.weights if table else ""
    start = cell.recipe.denoiser.weights or ""
    for kind, weights in (("teacher", teacher), ("start", start)):
        name = weights.removeprefix("run:")
        own += [f"{kind} {name}"] if name in cell.needs else []
    return own


def graph(cells: Sequence[Cell]) -> list[str]:
    """A line for each cell whose training others use, and below it one for each of these; for the
    first seed, as other seeds share in the same way."""
    lines = []
    first = [cell for cell in cells if cell.seed == cells[0].seed]
    for cell in first:
        users = [other for other in first if cell.name in other.needs]
        if users:
            lines.append(f"{cell.name} trains")
        for user in users:
            how = "samples it" if user.group == cell.name else "starts from it"
            lines.append(f"  -> {user.name} {how}")
    if lines and len(cells) > len(first):
        lines.append("and so on for each seed")
    return lines or ["no cell needs another"]


def _costs_table(
    cells: Sequence[Cell], found: Mapping[str, Costs], known: bool
) -> tuple[list[str], list[list[str]]]:
    """Costs of the cells of the first seed, and of all seeds together."""
    heads = ["cost of a seed", "parameters", "nfe", "steps", "images", "evaluations", "search"]
    keys = ("steps", "images", "trained", "searched", "sampled", "gflop")
    first = [cell for cell in cells if cell.seed == cells[0].seed]
    rows = []
    for cell in first:
        cost = found[cell.name]
        numbers = _numbers([getattr(cost, key) for key in keys], known)
        of_network = [printing.human(cost.parameters), str(cost.nfe or "")]
        rows.append(["-".join([cell.row, *cell.axis.values()]), *of_network, *numbers])
    totals = [sum(getattr(found[cell.name], key) for cell in cells) for key in keys]
    seeds = len(cells) // len(first)
    rows.append([f"all, {seeds} seed{'s' * (seeds > 1)}", "", "", *_numbers(totals, known)])
    return [*heads, "sampling", "gflop"], rows


def _numbers(values: Sequence[float], known: bool) -> list[str]:
    """Numbers of the table, "" for 0 and, where steps are not known, "?" for what follows."""
    *training, searched, sampled, gflop = (f"{value:,.0f}" if value else "" for value in values)
    if not known:
        training, gflop = ["?" if text else "" for text in training], "?"
    return [*training, searched, sampled, gflop]


def _document(
    suite: Suite, cells: Sequence[Cell], found: Mapping[str, Costs], known: bool
) -> dict[str, Any]:
    budget = suite.table.budget
    listed = [
        {
            "name": cell.name,
            "row": cell.row,
            "axis": dict(cell.axis),
            "seed": cell.seed,
            "group": cell.group,
            "needs": list(cell.needs),
            "cost": {**asdict(found[cell.name]), "gflop": found[cell.name].gflop},
        }
        for cell in cells
    ]
    return {
        "schema": 1,
        "suite": suite.name,
        "baseline": suite.table.baseline,
        "budget": budget and budget.model_dump(exclude_none=True),
        "steps_known": known,
        "rows": {row.name: row.note for row in suite.rows.values()},
        "cells": listed,
    }
