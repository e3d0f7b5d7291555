"""The recipes and suites that come with cmkit, and finding one by its name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cmkit.errors import RecipeError, nearest

RECIPES = ("recipes",)
SUITES = ("suites", "benchmarks/suites")
"""Where they are, seen from the installed package or from the checkout."""
_FIELD = re.compile(r"(Needs|Cost|Expected):")


@dataclass(frozen=True)
class Header:
    """What the comment at the head of a recipe says, "" where it says nothing."""

    about: str
    needs: str = ""
    cost: str = ""
    expected: str = ""


def shipped(homes: Sequence[str] = RECIPES) -> dict[str, Path]:
    """The files of the recipes that come with cmkit, by name; with `homes` = SUITES the suites."""
    home = Path(__file__).parent.parent
    folders = (parent / each for each in homes for parent in (home, home.parent))
    folder = next(filter(Path.is_dir, folders), home)
    return {file.stem: file for file in sorted(folder.glob("*.toml"))}


def find_recipe(
    name: str,
    folder: Path = Path(),
    homes: Sequence[str] = RECIPES,
    others: Iterable[str] = (),
) -> Path:
    """The recipe file `name`, as seen from `folder`, or the shipped recipe of that bare name; with
    `homes` = SUITES the suite.

    RecipeError with the nearest name where a bare name is neither; `others` are names that could
    have been meant as well. A path need not be there.
    """
    path = folder / name
    if path.exists():
        return path
    known = shipped(homes)
    if Path(name).name != name or ":" in name or path.suffix == ".toml":
        stem = Path(name).stem
        if stem in known and path.suffix == ".toml":
            raise RecipeError(
                f"{path}: no such file; {stem!r} comes with cmkit: say its bare name, or get a file"
                f" with `cmkit recipes copy {stem}`"
            )
        return path
    if name in known:
        return known[name]
    which = "suite" if homes == SUITES else "recipe"
    listed = "" if homes == SUITES else "; `cmkit recipes` lists them"
    others = [*others]
    near = nearest(name, [*known, *others])
    either = "file or run" if others else "file"
    raise RecipeError(
        f"{name}: no such {either}, and no {which} that comes with cmkit{near or listed}"
    )


def header(text: str) -> Header:
    """What the comment at the head of a recipe's text says; its first line is the command."""
    comment = text.partition("\n\n")[0].splitlines()[2:]
    words = " ".join(line.removeprefix("#").strip() for line in comment)
    about, *rest = _FIELD.split(words)
    said = {key.lower(): value.strip() for key, value in zip(rest[::2], rest[1::2], strict=True)}
    return Header(about.strip(), **said)
