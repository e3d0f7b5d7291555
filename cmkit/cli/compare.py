"""The command that shows what is finished side by side, and the end of that which runs a suite."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from cmkit.cli import completion, printing
from cmkit.cli.parts import JsonOption
from cmkit.errors import CmkitError, RecipeError
from cmkit.runs.places import roots, run_place

if TYPE_CHECKING:
    from cmkit.suite.cells import Cell
    from cmkit.suite.cost import Costs
    from cmkit.suite.suite import Suite
    from cmkit.suite.work import SuiteFolder


def compare(
    sources: Annotated[
        list[str],
        typer.Argument(
            help="Runs, by name or folder, suite files, or folders of suites.",
            autocompletion=completion.runs,
        ),
    ],
    sort: Annotated[
        str | None,
        typer.Option(
            metavar="NUMBER|KEY",
            help="Put the best lines in a number first, or sort by row, or by a key in which the"
            " recipes differ, such as train.lr.",
        ),
    ] = None,
    where: Annotated[
        list[str],
        typer.Option(
            metavar="KEY=VALUE",
            help="Show the lines that are so: row, seed, an axis, or a key of the recipe, such as"
            " objective=ict.",
        ),
    ] = [],  # noqa: B006
    baseline: Annotated[
        str | None,
        typer.Option(
            metavar="ROW|AXIS=VALUE",
            help="The row that others are compared with; or a value of an axis, such as"
            " rescaling=off: each line is compared with that of its own row there.",
        ),
    ] = None,
    format: Annotated[
        Literal["table", "csv", "markdown", "latex"],
        typer.Option(help="LaTeX is for the package booktabs."),
    ] = "table",
    out: Annotated[
        Path | None, typer.Option(help="Folder of a suite's runs, where it is not runs/NAME.")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Print the scores of suites and runs side by side, with intervals, and beside those that
    others published; of runs also what differs between their recipes.

    Numbers of other pictures, of other counts of images or by other extractors stand in columns
    apart. Runs that are not finished are left out, with a note."""
    from cmkit.plugins import discover
    from cmkit.suite import tables
    from cmkit.suite.collect import gather, results
    from cmkit.suite.groups import baseline_of
    from cmkit.suite.noise import SameNoise

    registry = discover()
    gathered = gather([_place(source) for source in sources], registry, out)
    if baseline:
        gathered.baseline = baseline_of(baseline, gathered.groups)
    same_noise = SameNoise(registry, tell=printing.aside)
    found = results(gathered, same_noise, dict(map(equation, where)))
    found = tables.sort(found, sort) if sort else found
    if json:
        runs = [run.document() for g in gathered.groups for run in g.runs.values()]
        printing.document({**found.document(), "runs": runs, "caveats": found.notes})
    elif format == "csv":
        for line in tables.to_csv(found).splitlines():
            printing.line(line)
    else:
        write = {"markdown": tables.to_markdown, "latex": tables.to_latex, "table": tables.to_text}
        for line in write[format](found):
            printing.line(line)


def _place(source: str) -> Path:
    """The folder or file that a source names: a path, a folder where runs are, or a run."""
    inside = [root / source for root in roots() if (root / source).is_dir()]
    if Path(source).exists() or not inside:
        return Path(run_place(source))
    return inside[0]


def equation(text: str) -> tuple[str, str]:
    """Key and value of --where KEY=VALUE."""
    key, equals, value = text.partition("=")
    if not equals:
        raise RecipeError(f"--where {text}: expected KEY=VALUE, such as objective=ict")
    return key.strip(), value.strip().strip('"')


def show_results(
    suite: Suite,
    cells: Sequence[Cell],
    trainings: Mapping[str, Costs],
    folder: SuiteFolder,
    device: str,
    json: bool,
) -> None:
    """Print the results of a suite, and write results.json and the page."""
    from cmkit.plugins import discover
    from cmkit.suite.collect import collect, keep
    from cmkit.suite.noise import SameNoise
    from cmkit.suite.page import write_page
    from cmkit.suite.tables import to_text

    found = collect(suite, cells, folder, SameNoise(discover(), device), trainings)
    keep(found, folder)
    page = write_page(found, folder)
    if json:
        printing.document({**found.document(), "page": str(page)})
        return
    for line in to_text(found):
        printing.line(line)
    printing.line(f"page: {page}")


def lost(failed: Sequence[Cell], folder: SuiteFolder) -> CmkitError:
    """The error of a suite with cells that failed: the exit code is that of the first."""
    first = folder.failure(failed[0]) or {"code": 70, "reason": "its record is gone"}
    code = int(first["code"])
    more = f" and {len(failed) - 1} more" if len(failed) > 1 else ""
    error = CmkitError(f"{failed[0].recipe.name}{more} failed: {first['reason']}; the rest is done")
    error.exit_code = 128 - code if code < 0 else code
    return error
