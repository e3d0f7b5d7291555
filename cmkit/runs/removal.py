"""Removing runs: what depends on them, what they alone use, and away with it."""

from __future__ import annotations

import contextlib
import secrets
import shutil
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cmkit import files
from cmkit.errors import BusyError, CheckpointError, CmkitError, ResourceError
from cmkit.runs.folder import RunFolder
from cmkit.runs.places import chosen, roots, runs_below

REMOVED = f"{files.TEMPORARY}removed-"
"""How names of folders begin that are being deleted."""


@dataclass(frozen=True)
class Removal:
    """Runs that may go, and the folders and files of the user's cache that no other run uses."""

    runs: tuple[RunFolder, ...]
    caches: tuple[Path, ...]


def every_run(beside: Sequence[RunFolder] = ()) -> list[RunFolder]:
    """The runs in the folders where runs are found, in the folders of suites there, and in those
    that hold the runs `beside`."""
    places = dict.fromkeys([*(folder.path.parent for folder in beside), *roots()])
    inner = [path for place in places for path in place.glob("*") if path.is_dir()]
    return [RunFolder(path) for path in runs_below([*places, *inner])]


def dependents(folder: RunFolder, others: Sequence[RunFolder]) -> list[RunFolder]:
    """Those of `others` that read weights or scales of this run: to go on, or to be drawn from."""
    own = folder.path.resolve()
    return [o for o in others if o.path.resolve() != own and _reads(o, own)]


def removal(folders: Sequence[RunFolder]) -> Removal:
    """What goes with these runs. BusyError where another process holds one, CheckpointError where
    runs that stay depend on one, or one is a link."""
    every = every_run(folders)
    going = {folder.path.resolve() for folder in folders}
    staying = [folder for folder in every if folder.path.resolve() not in going]
    for folder in folders:
        if folder.path.is_symlink():
            raise CheckpointError(
                f"{folder.path}: is a link to {folder.path.resolve()}; name that, or remove the"
                " link"
            )
        if holder := folder.holder():
            raise BusyError(f"{folder.path}: in use by {holder}; stop it, or wait for it")
        if found := dependents(folder, staying):
            names = ", ".join(str(other.path) for other in found)
            raise CheckpointError(
                f"{folder.path}: is read by {names}; remove {'it' if len(found) == 1 else 'them'}"
                " first, or in the same command"
            )
    used = {path for folder in staying for path in _caches(folder)}
    own = dict.fromkeys(path for folder in folders for path in _caches(folder))
    return Removal(tuple(folders), tuple(p for p in own if p not in used and p.exists()))


def remove(found: Removal) -> Iterator[str]:
    """Remove the runs, then the caches; sentences about what could not be.

    A run is renamed before it is deleted, so that it is there whole or not at all. BusyError where
    another process has begun to use one since; those before it are gone.
    """
    for folder in found.runs:
        sweep(folder.path.parent)
        with folder.held():
            gone = _renamed(folder.path)
        _delete(gone)
    for path in found.caches:
        if path.is_dir():
            try:
                with files.lock(path):
                    gone = _renamed(path)
            except BusyError as error:
                yield f"left: {error}"
                continue
            _delete(gone)
        else:
            path.unlink(missing_ok=True)


def sweep(place: Path) -> None:
    """Delete what removals that were killed have left in a folder."""
    for path in place.glob(f"{REMOVED}*"):
        shutil.rmtree(path, ignore_errors=True)  # another process may be at it


def _renamed(path: Path) -> Path:
    gone = path.with_name(f"{REMOVED}{path.name}-{secrets.token_hex(4)}")
    with files.writing(path):
        path.rename(gone)
        files.sync_folder(path.parent)
    return gone


def _delete(path: Path) -> None:
    try:
        shutil.rmtree(path)
    except FileNotFoundError:  # another process swept it
        shutil.rmtree(path, ignore_errors=True)
    except OSError as error:
        raise ResourceError(
            f"{error.filename or path}: cannot be deleted: {error.strerror}; delete {path} yourself"
        ) from error


def _caches(folder: RunFolder) -> Iterator[Path]:
    """What a run has in the user's cache that runs share: latents and features of prompts, and how
    much each of its samples counts in a comparison."""
    try:
        status = folder.status()
    except CmkitError:  # damaged, and what is lost is made again
        return
    for name in status.get("cache", {}).get("result", {}).get("folders", ()):
        yield files.cache_folder("latents") / Path(name).name
    if key := status.get("metric", {}).get("key"):
        yield files.cache_folder("influences") / f"{key}.json"


def _reads(other: RunFolder, own: Path) -> bool:
    """Whether a run still needs what lies in the folder `own`."""
    try:
        with files.reading(other.recipe):
            recipe = tomllib.loads(files.read_bytes(other.recipe).decode())
        done, home = other.status(), Path(other.inputs().get("home", "."))
    except CmkitError:  # of a damaged run nothing is known
        return False
    trained = "train" in recipe and "train" in done
    for table, said in recipe.items():
        # A finished training needs neither its start nor its teacher, unless it is an adapter.
        spent = table == "train" or (table in ("denoiser", "teacher") and "adapter" not in recipe)
        if trained and spent:
            continue
        if any(own.name in text and _names(text, own, home) for text in _texts(said)):
            return True
    return False


def _texts(value: Any) -> Iterator[str]:
    """Every text in a table."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list):
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(inner)


def _names(text: str, own: Path, home: Path) -> bool:
    """Whether a text of a recipe that was begun in `home` names the run in the folder `own`."""
    with contextlib.suppress(CheckpointError):
        text = chosen(text)[0]
    if text.startswith("run:"):
        return text[4:] == own.name
    path = (home / Path(text.removeprefix("path:")).expanduser()).resolve()
    return path == own or own in path.parents
