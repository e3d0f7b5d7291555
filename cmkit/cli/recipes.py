"""The commands about the recipes that come with cmkit."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cmkit.cli import completion, printing
from cmkit.cli.parts import JsonOption
from cmkit.errors import RecipeError, did_you_mean

recipes_app = typer.Typer(help="The recipes that come with cmkit.", invoke_without_command=True)


@recipes_app.callback(epilog="Example: cmkit run digits_rescaled_ct")
def recipes(context: typer.Context, json: JsonOption = False) -> None:
    """List every recipe that comes with cmkit: what it is, and what it needs."""
    if context.invoked_subcommand:
        return
    from cmkit.recipe import header, shipped

    found = {name: header(file.read_text("utf-8")) for name, file in shipped().items()}
    if json:
        listed = [{"name": name, **vars(said)} for name, said in found.items()]
        printing.document({"schema": 1, "recipes": listed})
        return
    for name, said in found.items():
        printing.line(name)
        printing.paragraph(said.about, "  ")
        printing.paragraph(f"needs {said.needs}" if said.needs else "", "  ")


@recipes_app.command("copy", epilog="Example: cmkit recipes copy digits_rescaled_ct mine.toml")
def recipes_copy(
    name: Annotated[
        str,
        typer.Argument(help="As `recipes` lists it.", autocompletion=completion.shipped_recipes),
    ],
    file: Annotated[
        Path | None, typer.Argument(help="The new file; NAME.toml unless it is said.")
    ] = None,
) -> None:
    """Copy a recipe that comes with cmkit, to be changed."""
    from cmkit.files import new_file
    from cmkit.recipe import shipped

    known = shipped()
    if name not in known:
        raise RecipeError(f"recipes copy {name}: no such recipe{did_you_mean(name, known)}")
    target = file or Path(f"{name}.toml")
    if target.is_dir():
        target /= f"{name}.toml"
    if target.exists():
        raise RecipeError(f"{target}: exists already; name another file, or remove it")
    with new_file(target) as written:
        written.write(known[name].read_bytes())
    printing.line(f"{target}: written; cmkit run {target}")
