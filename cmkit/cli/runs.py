"""The commands about runs: listing, showing and removing them."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cmkit.cli import completion, printing
from cmkit.cli.parts import JsonOption
from cmkit.errors import CheckpointError, RecipeError
from cmkit.runs.folder import RunFolder
from cmkit.runs.places import RUNS, roots, run_place

if TYPE_CHECKING:
    from cmkit.runs.removal import Removal
    from cmkit.suite.listing import Listed

RunsArgument = Annotated[
    list[str],
    typer.Argument(
        metavar="RUN...",
        help="By name (NAME-KEY, NAME, how it begins, NAME@latest) or folder.",
        autocompletion=completion.runs,
    ),
]
MOST = 3
"""Differences of a run that the table has; `runs show` has all."""

RunArgument = Annotated[
    str,
    typer.Argument(
        metavar="RUN",
        help="By name (NAME-KEY, NAME, how it begins, NAME@latest) or folder.",
        autocompletion=completion.runs,
    ),
]

runs_app = typer.Typer(
    help="The runs that there are: list, show and remove them.", invoke_without_command=True
)


def folder_of(text: str) -> RunFolder:
    """The folder of the run that a user names; CheckpointError where there is none."""
    folder = RunFolder.at(run_place(text))
    if not folder.recipe.is_file():
        raise CheckpointError(
            f"{text}: no run folder, it has no recipe.toml; `cmkit runs` lists them"
        )
    return folder


@runs_app.callback(epilog="Example: cmkit runs --sort fid")
def runs(
    context: typer.Context,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of runs; absent = runs and the folders of CMKIT_RUNS."),
    ] = None,
    sort: Annotated[
        str,
        typer.Option(metavar="KEY", help="age, name, score, size, state, or a number such as fid."),
    ] = "age",
    json: JsonOption = False,
) -> None:
    """List the runs: how far each is, its score, what sets it apart from the others of its name,
    its size on the disk, and how long ago it was begun."""
    token = RUNS.set(out)
    context.call_on_close(lambda: RUNS.reset(token))
    if context.invoked_subcommand:
        return
    from cmkit.plugins import discover
    from cmkit.suite import listing

    places = [out] if out else roots()
    if out and not out.is_dir():
        raise RecipeError(f"--out {out}: no such folder")
    found = listing.sort(listing.listing(places), sort, discover())
    suites = list(listing.suites_below(places))
    if json:
        inner = [{"folder": str(path), "runs": count} for path, count in suites]
        listed = [one.document() for one in found]
        printing.document({"schema": 1, "runs": listed, "suites": inner})
        return
    where = ", ".join(map(str, places))
    if not found:
        printing.line(f"no runs in {where}; `cmkit run RECIPE` begins one")
    else:
        heads = ("run", "state", "score", "what differs", "size", "age")
        printing.table(heads, [_row(one) for one in found])
        total, _ = listing.bytes_of([one.folder.path for one in found])
        several = "run" if len(found) == 1 else "runs"
        printing.line(f"{len(found)} {several} in {where}, {printing.size(total)}")
    for path, count in suites:
        printing.line(f"{path}: {count} runs more; cmkit runs --out {path}")


def _row(one: Listed) -> list[str]:
    from cmkit.suite.listing import age

    apart = [f"{key} {value}" for key, value in one.differs.items()]
    more = f", {len(apart) - MOST} more" * (len(apart) > MOST)
    score = next((f"{name} {_number(value)}" for name, value in one.scores.items()), "")
    differs, old = ", ".join(apart[:MOST]) + more, age(time.time() - one.begun)
    return [one.name, one.state_text, score, differs, printing.size(one.size), old]


def _number(value: float) -> str:
    from cmkit.report.figures import score

    return score(value)


@runs_app.command("show", epilog="Example: cmkit runs show digits@latest")
def runs_show(run: RunArgument, json: JsonOption = False) -> None:
    """Show one run: its parts, stages, scores and how they were measured, the weights that it
    keeps, what sets it apart, where its bytes are, and which runs read it."""
    from cmkit.suite import listing

    one = listing.listed(folder_of(run))
    about = listing.about(one)
    if json:
        printing.document({"schema": 1, **one.document(), **about})
        return
    for name, value in _shown(one, about):
        if value:
            printing.line(f"{name:<14} {value}")


def _shown(one: Listed, about: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(heading, text) of each line about a run."""
    from cmkit.suite.listing import age

    yield "run", str(one.folder.path)
    yield "state", one.state_text
    yield "begun", f"{about['begun_local']}, {age(time.time() - one.begun)} ago"
    yield "parts", ", ".join(f"{kind} {use}" for kind, use in about["parts"].items())
    siblings = len(about["siblings"])
    apart = ", ".join(f"{key} {value}" for key, value in one.differs.items())
    yield (
        "what differs",
        f"{apart or 'nothing'} (beside {siblings} more of its name)" * bool(siblings),
    )
    yield from ((title, line) for title, line in about["stages"].items())
    yield "scores", ", ".join(f"{name} {_number(value)}" for name, value in one.scores.items())
    yield from (("measured", how) for how in about["measured"])
    for record in about["measured_again"]:
        numbers = ", ".join(f"{name} {_number(v)}" for name, v in record["values"].items())
        yield "measured again", f"{numbers}, of {record['of']} beside {record['beside']}"
    yield "weights", ", ".join(about["weights"])
    where = ", ".join(f"{name} {printing.size(n)}" for name, n in about["bytes_in"].items())
    shared = f"; {printing.size(one.shared)} of it shared with other runs" * bool(one.shared)
    yield "size", f"{printing.size(one.size)}: {where}{shared}"
    yield "read by", ", ".join(about["read_by"])
    yield "page", about["page"] or ""


@runs_app.command("rm", epilog="Example: cmkit runs rm digits-1a2b3c4d --yes")
def runs_rm(
    runs: RunsArgument,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    json: JsonOption = False,
) -> None:
    """Remove runs, and what they alone use of the cache: latents and features of prompts. Files
    that other runs share with them stay there.

    A run that another process holds is refused, and one whose weights or scales another run reads:
    for a training that is not finished yet, or to be drawn from."""
    from cmkit.runs.removal import removal, remove
    from cmkit.suite.listing import bytes_of

    folders = list({folder.path.resolve(): folder for folder in map(folder_of, runs)}.values())
    found = removal(folders)
    size, stays = bytes_of([*(folder.path for folder in folders), *found.caches])
    freed = size - stays
    if not yes:
        _ask(found, freed)
    left = list(remove(found))
    names = [str(folder.path) for folder in folders]
    if json:
        caches = [str(path) for path in found.caches]
        printing.document(
            {"schema": 1, "removed": names, "caches": caches, "freed_bytes": freed, "left": left}
        )
        return
    for name in names:
        printing.line(f"{name}: removed")
    for text in left:
        printing.line(text)
    printing.line(f"{printing.size(freed)} freed")


def _ask(found: Removal, freed: int) -> None:
    """Ask whether to go on; RecipeError where nobody answers, Exit where the answer is no."""
    for folder in found.runs:
        printing.aside(f"{folder.path}")
    for path in found.caches:
        printing.aside(f"{path} (cache, used by no other run)")
    print(f"remove them and free {printing.size(freed)}? [y/N] ", end="", file=sys.stderr)
    sys.stderr.flush()
    answer = sys.stdin.readline() if sys.stdin else ""
    if not answer:
        printing.aside("")
        raise RecipeError("runs rm: nobody answers here; say --yes to remove without asking")
    if answer.strip().lower() not in ("y", "yes"):
        printing.aside("nothing is removed")
        raise typer.Exit(1)
