"""Write docs/reference.md, docs/api.json and the end of docs/plugins.md from the code, and
docs/python.ipynb from docs/python.md; with --check, fail when they are not current."""

from __future__ import annotations

import argparse
import inspect
import json
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

import cmkit
import cmkit.functional
import cmkit.testing
from cmkit.cli.commands import app
from cmkit.errors import CmkitError
from cmkit.plugins import KINDS, Hooks, discover
from cmkit.recipe import core_tables, fields, header, shipped
from cmkit.suite.suite import BudgetTable, SuiteTable

PAGE = Path(__file__).parent / "reference.md"
API = Path(__file__).parent / "api.json"
GUIDE = Path(__file__).parent / "plugins.md"
TUTORIAL = Path(__file__).parent / "python.md"
NOTEBOOK = TUTORIAL.with_suffix(".ipynb")
MARK = "<!-- From here on written from the code by `make docs`; do not edit. -->\n"
HEAD = """\
# Reference

Written from the code by `make docs`; do not edit. Every recipe, built-in part, table of
recipes and suites, command, hook, exit code and public Python name is here.
"""


def table(model: type) -> str:
    """The fields of a part as a Markdown table."""
    rows = [
        f"| `{f['key']}` | {_cell(f['type'])} | {_cell(f['default'])} | {_cell(f['meaning'])} |"
        for f in fields(model)
    ]
    if not rows:
        return "It has no keys.\n"
    return "\n".join(["| key | type | default | meaning |", "|---|---|---|---|", *rows]) + "\n"


def parts() -> str:
    """Every built-in part, by kind."""
    registry = discover()
    text = ["## Parts\n"]
    for kind in KINDS:
        text.append(f"### {kind}\n")
        for row in registry.rows:
            if row.kind != kind or row.plugin is None or row.dist != "cmkit":
                continue
            model = registry.load(kind, row.name)
            text.append(f"#### {kind} `{row.name}`\n\n{inspect.getdoc(model)}\n")
            if row.plugin.cite:
                text.append(f"Cite: {row.plugin.cite}\n")
            text.append(table(model))
    return "\n".join(text)


def tables() -> str:
    """The recipe tables that belong to no part."""
    text = ["## Recipe tables\n"]
    for name, model in core_tables().items():
        text.append(f"### `[{name}]`\n\n{inspect.getdoc(model)}\n\n{table(model)}")
    return "\n".join(text)


def suites() -> str:
    """The tables of a suite."""
    text = ["## Suites\n"]
    for name, model in (("keys of a suite", SuiteTable), ("`[budget]`", BudgetTable)):
        text.append(f"### {name}\n\n{inspect.getdoc(model)}\n\n{table(model)}")
    return "\n".join(text)


def recipes() -> str:
    """Every recipe that comes with cmkit: what it does, and published scores of its setting."""
    rows = []
    for file in shipped().values():
        text = file.read_text("utf-8")
        about = header(text).about.split(". ")[0].rstrip(".")
        scores = tomllib.loads(text).get("expected", {}).get("scores", {})
        shown = ", ".join(f"{name} {value:g}" for name, value in scores.items())
        rows.append(f"| `{file.stem}` | {_cell(about)} | {shown} |")
    heads = ["| recipe | what it does | published scores |", "|---|---|---|"]
    return "\n".join(["## Recipes\n", *heads, *rows, ""])


def commands() -> str:
    """Every command with its options."""
    text = ["## Commands\n"]
    text += _commands(typer.main.get_command(app), "cmkit")
    return "\n".join(text)


def _commands(command: object, path: str) -> list[str]:
    inner = getattr(command, "commands", {})
    text = [entry for name in sorted(inner) for entry in _commands(inner[name], f"{path} {name}")]
    if path == "cmkit":
        return text
    rows = [
        f"| `{' '.join(p.opts) if p.param_type_name == 'option' else p.name.upper()}` |"
        f" {_cell(getattr(p, 'help', '') or '')} |"
        for p in command.params
    ]
    about = " ".join((command.help or "").split())
    lines = "\n".join(["| argument | meaning |", "|---|---|", *rows]) + "\n" if rows else ""
    return [f"### `{path}`\n\n{about}\n\n{lines}", *text]


def hooks() -> str:
    """Every hook that a package may implement."""
    text = ["## Hooks\n"]
    for name, hook in vars(Hooks).items():
        if name.startswith("cmkit_"):
            signature = str(inspect.signature(hook)).replace("(self, ", "(").replace("(self)", "()")
            text.append(f"### `{name}{signature}`\n\n{inspect.getdoc(hook)}\n")
    return "\n".join(text)


def exit_codes() -> str:
    """What each exit code means."""
    rows = [
        f"| {error.exit_code} | {inspect.getdoc(error).splitlines()[0]} |"
        for error in CmkitError.__subclasses__()
        if error.exit_code != CmkitError.exit_code
    ]
    ends = ["| 70 | A bug in cmkit. |", "| 129, 130, 143 | Interrupted, everything saved. |"]
    return "\n".join(
        ["## Exit codes\n", "| code | meaning |", "|---|---|", "| 0 | Done. |", *rows, *ends, ""]
    )


def api() -> dict[str, str]:
    """Every public Python name with its signature; those of classes with their public members."""
    return {
        path: signature for name, thing in names() for path, signature in _signatures(name, thing)
    }


def names() -> Iterator[tuple[str, Any]]:
    """Every public Python name, and what it is."""
    checks = [name for name in vars(cmkit.testing) if name.startswith("check_")]
    homes = {
        "cmkit": cmkit.__all__,
        "cmkit.functional": cmkit.functional.__all__,
        "cmkit.testing": [*checks, "ProtocolError", "Verdict"],
    }
    for home, public in homes.items():
        for name in sorted(public):
            yield f"{home}.{name}", getattr(sys.modules[home], name)


def guide() -> str:
    """The authors' page: what is written by hand, and then the public names."""
    by_hand, _, _ = GUIDE.read_text("utf-8").partition(MARK)
    rows = [
        f"| `{name}` | {_cell(_first(thing))} |"
        for name, thing in names()
        if not isinstance(thing, int)
    ]
    head = f"## Public names, version {cmkit.api_version}\n"
    return "\n".join([by_hand + MARK, head, "| name | what it is |", "|---|---|", *rows, ""])


def _first(thing: Any) -> str:
    """The first paragraph about it; of a type's other name, the type."""
    if hasattr(thing, "__origin__"):
        return f"`{thing}`"
    return (inspect.getdoc(thing) or "").partition("\n\n")[0]


def _signatures(path: str, thing: Any) -> Iterator[tuple[str, str]]:
    if not inspect.isclass(thing) and not inspect.isroutine(thing):
        yield path, f" = {thing}" if isinstance(thing, int) else ""
        return
    if not inspect.isclass(thing):
        yield path, str(inspect.signature(thing))
        return
    yield path, f"({', '.join(base.__name__ for base in thing.__bases__)})"
    if thing.__module__.startswith("cmkit"):
        yield f"{path}.__init__", str(inspect.signature(thing))
    for member, value in sorted(vars(thing).items()):
        inner = getattr(value, "__func__", value)
        if member.startswith(("_", "model_")):
            continue
        if isinstance(inner, property):
            yield f"{path}.{member}", "property"
        elif inspect.isfunction(inner):
            yield f"{path}.{member}", str(inspect.signature(inner))


def public() -> str:
    """The public Python names as a section."""
    rows = [f"- `{path}{signature}`" for path, signature in api().items()]
    return "\n".join(["## Public Python names\n", *rows, ""])


def api_text() -> str:
    """`api()` as the text of its file."""
    return json.dumps(api(), indent=1) + "\n"


def notebook() -> str:
    """The page about Python as a notebook: its blocks of Python are the cells of code."""
    parts = re.split(r"^```python\n(.*?)^```$", TUTORIAL.read_text("utf-8"), flags=re.S | re.M)
    cells = []
    for k, part in enumerate(parts):
        cell = {"id": f"{k}", "metadata": {}, "source": part.strip().splitlines(keepends=True)}
        code = {"cell_type": "code", "execution_count": None, "outputs": []}
        cells.append(cell | (code if k % 2 else {"cell_type": "markdown"}))
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    book = {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(book, indent=1, ensure_ascii=False) + "\n"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def page() -> str:
    """The whole page."""
    sections = [HEAD, recipes(), parts(), tables(), suites(), commands(), hooks(), exit_codes()]
    sections.append(public())
    return "\n".join(section.strip() + "\n" for section in sections)


def main() -> None:
    """Write the page, or compare it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    made = {PAGE: page(), API: api_text(), GUIDE: guide(), NOTEBOOK: notebook()}
    for file, text in made.items():
        if not check:
            file.write_text(text, encoding="utf-8")
        elif not file.exists() or file.read_text(encoding="utf-8") != text:
            sys.exit(f"{file} is not current: run `make docs` and commit it")


if __name__ == "__main__":
    main()
