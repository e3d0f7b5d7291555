"""The command that compares the rows of a suite."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from cmkit.cli import printing
from cmkit.cli.compare import equation, lost, show_results
from cmkit.cli.parts import DeviceOption, JsonOption
from cmkit.errors import RecipeError
from cmkit.runs.places import make_out
from cmkit.stop import StopSignal

if TYPE_CHECKING:
    from cmkit.plugins import Registry
    from cmkit.suite.cells import Cell, Cost
    from cmkit.suite.cost import Costs
    from cmkit.suite.suite import Suite
    from cmkit.suite.work import SuiteFolder


def bench(
    suite: Annotated[
        str, typer.Argument(help="A suite file, or the name of one that comes with cmkit.")
    ],
    check: Annotated[
        bool, typer.Option("--check", help="Print the cells, what they share and what they cost.")
    ] = False,
    smoke: Annotated[
        bool,
        typer.Option(
            "--smoke",
            help="Try the suite: every row and value once, shrunk, on invented data and weights."
            " Its numbers mean nothing.",
        ),
    ] = False,
    where: Annotated[
        list[str],
        typer.Option(
            metavar="KEY=VALUE",
            help="Do the cells alone that are so, and what they need: row, seed, an axis, or a key"
            " of the recipe, such as row=ict.",
        ),
    ] = [],  # noqa: B006
    yes: Annotated[bool, typer.Option("--yes", help="Take more than 200 cells.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the suite's runs; runs/NAME of the suite.")
    ] = None,
    jobs: Annotated[int, typer.Option("--jobs", "-j", min=1, help="Cells at once.")] = 1,
    submit: Annotated[
        int, typer.Option(min=0, help="Workers to submit to a cluster, instead of working here.")
    ] = 0,
    cluster: Annotated[
        Literal["slurm", "local"], typer.Option(help="Where to: Slurm, or processes here.")
    ] = "slurm",
    job: Annotated[
        list[str],
        typer.Option(help="KEY=VALUE for submitit, such as timeout_min=600, slurm_partition=gpu."),
    ] = [],  # noqa: B006
    device: DeviceOption = "auto",
    json: JsonOption = False,
) -> None:
    """Compare variants of a recipe: run each cell of a suite, doing what they share once.

    Any number of such commands, on one machine or on several with a common folder, share the work.
    """
    from cmkit.plugins import discover
    from cmkit.recipe import SUITES, find_recipe
    from cmkit.suite.cells import MOST, cells
    from cmkit.suite.groups import selected
    from cmkit.suite.suite import load_suite
    from cmkit.suite.work import SuiteFolder

    loaded, registry = load_suite(find_recipe(suite, homes=SUITES)), discover()
    folder = SuiteFolder(out or Path("runs") / f"{loaded.name}{'-smoke' * smoke}")
    wanted = dict(map(equation, where))
    most = loaded.count() if yes or wanted else MOST
    found = cells(loaded, registry, most)
    if smoke:
        found = _smoked(loaded, found, folder, registry)
    elif loaded.measured and (cost := _cost(loaded, folder, registry, device, jobs, check)):
        found = cells(loaded, registry, most, cost)
    chosen = selected(found, wanted) if wanted else found
    if check:
        _check(loaded, chosen, folder, json)
    elif submit:
        words = [suite, *["--yes"] * yes, *["--smoke"] * smoke, "--out", str(folder.path)]
        words += ["--jobs", str(jobs), "--device", device]
        words += [word for each in where for word in ("--where", each)]
        _submit(words, folder, submit, cluster, job, json)
    else:
        _run(loaded, found, chosen, folder, jobs, device, json)


def _smoked(
    suite: Suite, whole: Sequence[Cell], folder: SuiteFolder, registry: Registry
) -> list[Cell]:
    """Some cells of the first seed, shrunk, with their invented weights written; raises what is at
    fault with the cells as they are."""
    from cmkit.smoke import check_whole, smoke, write_weights
    from cmkit.suite.cells import cells
    from cmkit.suite.groups import covering

    for cell in {cell.row: cell for cell in whole}.values():
        check_whole(cell.recipe)
    table = suite.table.model_copy(update={"seeds": suite.table.seeds[:1]})
    found = covering(
        cells(
            replace(suite, table=table),
            registry,
            len(whole),
            shrink=lambda recipe: smoke(recipe, folder.path, registry),
        )
    )
    for cell in found:
        write_weights(cell.recipe)
    return found


def _cost(
    suite: Suite, folder: SuiteFolder, registry: Registry, device: str, jobs: int, check: bool
) -> Cost | None:
    """What a training step costs in the suite's budget; None where it is yet to be measured."""
    assert suite.table.budget is not None
    if suite.table.budget.unit == "evaluations":
        from cmkit.suite.cost import per_step  # the suite is known to be sound before torch

        return per_step
    if check and not folder.seconds.exists():
        return None
    from cmkit.device import pick_device
    from cmkit.suite.pace import Pace

    make_out(folder.path)
    return Pace(folder.seconds, registry, pick_device(device), jobs)


def _submit(
    words: Sequence[str],
    folder: SuiteFolder,
    workers: int,
    cluster: str,
    said: Sequence[str],
    json: bool,
) -> None:
    """Submit workers, and say what they are called."""
    from cmkit.suite.cluster import submit

    pairs = [each.partition("=") for each in said]
    if bad := [key for key, sign, _ in pairs if not key or not sign]:
        raise RecipeError(f"--job {bad[0]}: expected KEY=VALUE, such as slurm_partition=gpu")
    options = {key: value for key, _, value in pairs}
    names = [job.job_id for job in submit(words, folder.path, workers, cluster, options)]
    if json:
        printing.document({"schema": 1, "jobs": names, "logs": str(folder.path / "jobs")})
        return
    printing.line(f"{workers} workers submitted: {', '.join(names)}; logs in {folder.path}/jobs")
    printing.line("the same command without --submit joins them, and shows the table at the end")


def _run(
    suite: Suite,
    cells: Sequence[Cell],
    chosen: Sequence[Cell],
    folder: SuiteFolder,
    jobs: int,
    device: str,
    json: bool,
) -> None:
    """Carry the chosen cells out, and show each as it ends; then print and keep the results."""
    from cmkit.cli.display import Display
    from cmkit.runs.events import StageStarted
    from cmkit.suite.cost import costs
    from cmkit.suite.work import Worker

    trainings = costs(cell for cell in cells if cell.name == cell.group)  # refuses bad rows first
    stop = StopSignal()
    stop.listen()
    failed = []
    with Display(None, quiet=json) as display:
        before = sum(map(folder.finished, chosen))
        display.show(StageStarted("cells", before, len(chosen)))
        for event in Worker(chosen, folder, device, stop, jobs).work():
            display.say(f"[{event.done}/{event.total}] {event.text}")
            if event.done > before:
                display.advance(event.done)
            failed += [event.cell] * event.failed
    show_results(suite, cells, trainings, folder, device, json)
    if failed:
        raise lost(failed, folder)


def _check(suite: Suite, cells: Sequence[Cell], folder: SuiteFolder, json: bool) -> None:
    """Print the cells of a suite, the graph of what they share, and costs."""
    from cmkit.suite.cost import costs

    found = costs(cells)
    budget = suite.table.budget
    known = not (budget and budget.unit == "seconds") or folder.seconds.exists()
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
        printing.line(
            "steps, and the keys in names, follow from the time of a step, measured first"
        )


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
        samples = [c.name for c in first if c.group == cell.name and c is not cell]
        starts = [c.name for c in first if c.group == c.name and cell.name in c.needs]
        lines += [f"{cell.name} trains"] * bool(samples or starts)
        lines += [f"  -> {name} samples it" for name in samples]
        lines += [f"  -> {name} starts from it" for name in starts]
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
        rows.append([cell.recipe.name.removesuffix(f"-s{cell.seed}"), *of_network, *numbers])
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
