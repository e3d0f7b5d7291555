"""What a shell completes arguments by. Nothing here imports torch."""

from __future__ import annotations

from pathlib import Path

import typer


def shipped_recipes(incomplete: str) -> list[str]:
    """Names of recipes that come with cmkit."""
    from cmkit.recipe import shipped

    return [name for name in shipped() if name.startswith(incomplete)]


def recipes(incomplete: str) -> list[str]:
    """Names of recipes that come with cmkit, and recipe files and folders here."""
    return [*shipped_recipes(incomplete), *_paths(incomplete, "*.toml")]


def runs(incomplete: str) -> list[str]:
    """Names of runs, their recipes' names, NAME@latest, and folders here."""
    from cmkit.runs.places import run_names

    base, at, _ = incomplete.partition("@")
    names = run_names()
    found = [f"{base}@latest"] if at and base in names else names
    return [*(name for name in found if name.startswith(incomplete)), *_paths(incomplete)]


def sources(incomplete: str) -> list[str]:
    """What images are drawn from: runs and recipes."""
    return list(dict.fromkeys([*runs(incomplete), *recipes(incomplete)]))


def kinds(incomplete: str) -> list[str]:
    """Kinds of parts."""
    from cmkit.plugins import KINDS

    return [kind for kind in KINDS if kind.startswith(incomplete)]


def parts(context: typer.Context, incomplete: str) -> list[str]:
    """Names of the installed parts of the kind that was named before."""
    from cmkit.plugins import discover

    kind = context.params.get("kind") or ""
    return [name for name in discover().names(kind) if name.startswith(incomplete)]


def packages(incomplete: str) -> list[str]:
    """Packages that offer parts."""
    from cmkit.plugins import discover

    names = dict.fromkeys(row.dist for row in discover().rows)
    return [name for name in names if name.startswith(incomplete)]


def _paths(incomplete: str, files: str = "") -> list[str]:
    """Folders whose path begins so, each with "/", and what else is called like `files` there."""
    home, slash, name = incomplete.rpartition("/")
    place = Path(f"{home}/" if slash else ".").expanduser()
    found = []
    for path in sorted(place.glob("*")) if place.is_dir() else ():
        if path.name.startswith(name) and not path.name.startswith("."):
            text = f"{home}{slash}{path.name}"
            if path.is_dir():
                found.append(f"{text}/")
            elif files and path.match(files):
                found.append(text)
    return found
