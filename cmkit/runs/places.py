"""Where runs are, and how a user names one and its weights. Imports no torch."""

from __future__ import annotations

import os
import re
from contextvars import ContextVar
from pathlib import Path

from cmkit.errors import CheckpointError, ResourceError

RUNS: ContextVar[Path | None] = ContextVar("RUNS", default=None)
"""The folder that --out names, where runs are found by their names."""
_CHOSEN = re.compile(r"(.+?)(?:@(\d{1,18}))?(?::(online|ema-[\d.]+))?")


def roots() -> list[Path]:
    """The folders in which a run is found by its name: --out, those of CMKIT_RUNS, runs."""
    said = os.environ.get("CMKIT_RUNS", "")
    out = RUNS.get()
    named = [out] if out else []
    return [*named, *map(Path, filter(None, said.split(os.pathsep))), Path("runs")]


def chosen(name: str) -> tuple[str, int | None, str | None]:
    """(place, step, average) of "RUN@STEP:AVERAGE", of which the last two may be left out."""
    match = None if Path(name).exists() else _CHOSEN.fullmatch(name)
    if match is None:
        return name, None, None
    place = re.split(r"[@:]", match[1])[0]
    if place != match[1] and (Path(place) / "recipe.toml").is_file():
        raise CheckpointError(f"{name}: say weights of a run as RUN@STEP:AVERAGE, or a part of it")
    place, step, average = match.groups()
    return place, None if step is None else int(step), average


def make_out(path: Path) -> None:
    """Make the folder `path` that --out names, or one in it; ResourceError where it cannot be."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ResourceError(
            f"{path}: cannot be made: {error.strerror}; name another place with --out"
        ) from error
