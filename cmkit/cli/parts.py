"""The commands about parts: listing, showing, checking and writing them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from cmkit.cli import completion, printing
from cmkit.errors import PluginError, RecipeError, did_you_mean

DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
SetOption = Annotated[
    list[str],
    typer.Option("--set", metavar="TABLE.KEY=VALUE", help="Change a value, written as in TOML."),
]
KindArgument = Annotated[
    str,
    typer.Argument(help="backbone, objective, sampler, ...", autocompletion=completion.kinds),
]

plugins_app = typer.Typer(
    help="The parts that installed packages offer.", invoke_without_command=True
)


@plugins_app.callback()
def plugins(context: typer.Context, json: JsonOption = False) -> None:
    """List every part with its origin; a broken one with its reason."""
    if context.invoked_subcommand:
        return
    from cmkit.plugins import discover, public_rows

    rows = list(public_rows(discover()))
    if json:
        printing.document({"schema": 1, "plugins": rows})
        return
    heads = ("kind", "name", "package", "what it is")
    lines = []
    for row in rows:
        about = f"BROKEN: {row['broken']}" if row["broken"] else row["summary"]
        lines.append((row["kind"], row["name"], f"{row['package']} {row['version']}", about))
    printing.table(heads, lines)


@plugins_app.command("show")
def plugins_show(
    kind: KindArgument,
    name: Annotated[
        str, typer.Argument(help="Its name in recipes.", autocompletion=completion.parts)
    ],
    json: JsonOption = False,
) -> None:
    """Show one part: its fields with types, defaults and meaning, and what to cite."""
    from cmkit.plugins import KINDS, discover
    from cmkit.recipe import fields

    if kind not in KINDS:
        raise RecipeError(f"plugins show {kind}: no such kind{did_you_mean(kind, KINDS)}")
    registry = discover()
    row = registry.find(kind, name)
    model = registry.load(kind, name)
    assert row.plugin is not None
    described: dict[str, Any] = {
        "kind": kind,
        "name": name,
        "package": row.dist,
        "version": row.version,
        "summary": row.plugin.summary,
        "cite": row.plugin.cite,
        "help": " ".join((model.__doc__ or "").split()),
        "fields": list(fields(model)),
    }
    if json:
        printing.document(described)
        return
    printing.line(f"{kind} {name} ({row.dist} {row.version})")
    printing.line(described["help"])
    heads = ("key", "type", "default", "meaning")
    printing.table(heads, [[entry[head] for head in heads] for entry in described["fields"]])
    if row.plugin.cite:
        printing.line(f"cite: {row.plugin.cite}")


@plugins_app.command("check")
def plugins_check(
    package: Annotated[
        str,
        typer.Argument(
            help="An installed package, as `plugins` lists it.", autocompletion=completion.packages
        ),
    ],
    json: JsonOption = False,
) -> None:
    """Hold a package's manifest and parts to the laws of their kinds; exit code 9 if one fails."""
    from cmkit.testing import check_package

    verdicts = list(check_package(package))
    if json:
        printing.document({"schema": 1, "package": package, "parts": [vars(v) for v in verdicts]})
    else:
        heads = ("kind", "name", "outcome", "why")
        printing.table(heads, [(v.kind, v.name, v.outcome, v.detail) for v in verdicts])
    failed = [f"{v.kind} {v.name}" for v in verdicts if v.outcome == "fail"]
    if failed:
        raise PluginError(f"{package}: {', '.join(failed)} failed; see the table")


def new(
    kind: KindArgument,
    name: Annotated[str, typer.Argument(help="The part's name in recipes, such as cauchy.")],
    out: Annotated[Path, typer.Option(help="Parent of the new folder.")] = Path("."),
) -> None:
    """Write a package with one part of your own, which passes its own tests: start from there."""
    from cmkit.new import new

    folder = new(kind, name, out)
    printing.line(f"{folder}: written; now `pip install -e {folder}` and `pytest {folder}`")
