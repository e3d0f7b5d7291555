"""Where runs are, and how a user names one and its weights. Imports no torch."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Literal

from cmkit.errors import CheckpointError, RecipeError, ResourceError, nearest

RUNS: ContextVar[Path | None] = ContextVar("RUNS", default=None)
"""The folder that --out names, where runs are found by their names."""
NAMED = 10
"""Runs that an error names."""
_CHOSEN = re.compile(r"(.+?)(?:@(\d{1,18}|best))?(?::(online|ema-[\d.]+))?")
_CALLED = re.compile(
    r"(run:)?([A-Za-z0-9][\w.-]*|(?=@latest))(@latest)?((?:@(?:\d{1,18}|best))?(?::(?:online|ema-[\d.]+))?)"
)
_KEYED = re.compile(r"(.+)-[0-9a-f]{8}")


def roots() -> list[Path]:
    """The folders in which a run is found by its name: --out, those of CMKIT_RUNS, runs."""
    said = os.environ.get("CMKIT_RUNS", "")
    out = RUNS.get()
    named = [out] if out else []
    return [*named, *map(Path, filter(None, said.split(os.pathsep))), Path("runs")]


def named(name: str) -> Path:
    """The folder of the run NAME-KEY below --out, or below the folders of CMKIT_RUNS, or below
    runs; CheckpointError where it is in none."""
    if found := _at(name):
        return found
    raise CheckpointError(
        f"run:{name}: no such run in {', '.join(map(str, roots()))}"
        f"{nearest(name, [run.name for run in runs_below(roots())])}; name the folder of runs with"
        " --out or CMKIT_RUNS"
    )


def _at(name: str) -> Path | None:
    """The first of `roots` that holds a run of exactly this name, with it."""
    places = (root / name for root in roots())
    return next((place for place in places if (place / "recipe.toml").is_file()), None)


def runs_below(folders: Iterable[Path]) -> list[Path]:
    """The folders of runs in `folders`, each once, the one that was begun last first."""
    found: dict[Path, tuple[int, Path]] = {}
    for recipe in (path for folder in folders for path in folder.glob("*/recipe.toml")):
        run = recipe.parent
        if not run.name.startswith("."):
            with contextlib.suppress(OSError):  # it is being removed at this moment
                found.setdefault(run.resolve(), (recipe.stat().st_mtime_ns, run))
    return [run for _, run in sorted(found.values(), reverse=True)]


def base_of(name: str) -> str:
    """The name of its recipe in that of a run, NAME-KEY."""
    match = _KEYED.fullmatch(name)
    return match[1] if match else name


def find_run(text: str) -> str | None:
    """`text` with its folder in the place of a run's name, "@STEP:AVERAGE" behind it as it was.

    The name is NAME-KEY, NAME, or how either begins; with "@latest" it is the run of these that was
    begun last. None for a path, and where no run is called so; RecipeError where several are.
    """
    match = None if Path(text).exists() else _CALLED.fullmatch(text)
    if match is None or text.endswith(".toml"):
        return None
    name, latest, weights = match[2], match[3], match[4]
    if not latest and (place := _at(name)):
        return f"{place}{weights}"
    found = _called(name, runs_below(roots()))
    if len(found) > 1 and not latest:
        listed = ", ".join(path.name for path in found[:NAMED])
        more = f" and {len(found) - NAMED} more" * (len(found) > NAMED)
        raise RecipeError(
            f"{text}: {len(found)} runs are called so: {listed}{more}; say more of the name, or"
            f" {name}@latest, which is {found[0].name}"
        )
    if not found and (match[1] or latest):
        raise no_run(text)
    return f"{found[0]}{weights}" if found else None


def _called(name: str, runs: Sequence[Path]) -> list[Path]:
    """The runs of a recipe of this name, or where there are none those whose names begin so."""
    own = [run for run in runs if base_of(run.name) == name]
    return own or [run for run in runs if run.name.startswith(name)]


def run_place(text: str) -> str:
    """What `find_run` finds, or `text` where it is a path; CheckpointError for a mere name that no
    run has."""
    found = find_run(text)
    if found is None and _CALLED.fullmatch(text) and not Path(text).exists():
        raise no_run(text)
    return found or text


def no_run(text: str) -> CheckpointError:
    """The error that no run is called so, with the nearest name."""
    match = _CALLED.fullmatch(text)
    where = ", ".join(map(str, roots()))
    near = nearest(match[2] if match else text, run_names())
    return CheckpointError(
        f"{text}: no such file or folder, and no run of that name in {where}"
        f"{near or '; `cmkit runs` lists them'}"
    )


def run_names() -> list[str]:
    """The names that runs may be called by: NAME and NAME-KEY."""
    names = [run.name for run in runs_below(roots())]
    return list(dict.fromkeys([*map(base_of, names), *names]))


def chosen(name: str) -> tuple[str, int | Literal["best"] | None, str | None]:
    """(place, step, average) of "RUN@STEP:AVERAGE", of which the last two may be left out; STEP may
    be "best"."""
    match = None if Path(name).exists() else _CHOSEN.fullmatch(name)
    if match is None:
        return name, None, None
    place = re.split(r"[@:]", match[1])[0]
    if place != match[1] and (Path(place) / "recipe.toml").is_file():
        raise CheckpointError(f"{name}: say weights of a run as RUN@STEP:AVERAGE, or a part of it")
    place, step, average = match.groups()
    if step == "best":
        return place, "best", average
    return place, None if step is None else int(step), average


def make_out(path: Path) -> None:
    """Make the folder `path` that --out names, or one in it; ResourceError where it cannot be."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ResourceError(
            f"{path}: cannot be made: {error.strerror}; name another place with --out"
        ) from error
