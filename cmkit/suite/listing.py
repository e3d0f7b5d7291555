"""The runs that there are, each as a line: how far it is, what it came to, what sets it apart."""

from __future__ import annotations

import dataclasses
import datetime
import os
import stat
import time
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cmkit import files
from cmkit.errors import CmkitError, RecipeError, did_you_mean
from cmkit.plugins import Registry
from cmkit.recipe.tables import PART_TABLES, STAGES, stage_class
from cmkit.runs.folder import RunFolder
from cmkit.runs.places import base_of, runs_below
from cmkit.runs.removal import dependents, every_run
from cmkit.suite.differing import differing
from cmkit.suite.runs import NOT_RECORDED, Run, data_words, directions, read_run

KEYS = ("age", "name", "score", "size", "state")
"""What lines are sorted by, beside their numbers."""


@dataclass(frozen=True)
class Listed:
    """A run, finished or not."""

    folder: RunFolder
    recipe: Mapping[str, Any]
    """As it was resolved; empty where it cannot be read."""
    state: str
    """"finished", "running", "stopped", or "damaged"."""
    at: str
    """The stage that is next, or what is damaged; "" of a finished run."""
    run: Run | None
    """What its report tells, once it is finished."""
    size: int
    """Bytes on the disk."""
    shared: int
    """Those of files that another run has as well."""
    begun: float
    """When, in seconds since the epoch."""
    differs: Mapping[str, str] = field(default_factory=dict)
    """What sets it apart from the runs of the same recipe name, by dotted keys of the recipe."""

    @property
    def name(self) -> str:
        """The name of its folder."""
        return self.folder.path.name

    @property
    def scores(self) -> Mapping[str, float]:
        """Its numbers, the recipe's first one first."""
        return self.run.scores if self.run else {}

    @property
    def state_text(self) -> str:
        """The state in a few words."""
        smoke = ", smoke" * bool(self.recipe.get("smoke"))
        return f"{self.state}{f': {self.at}' if self.at else ''}{smoke}"

    def document(self) -> dict[str, Any]:
        """The run as JSON."""
        began = datetime.datetime.fromtimestamp(self.begun, datetime.UTC)
        return {
            "name": self.name,
            "folder": str(self.folder.path),
            "state": self.state,
            "at": self.at,
            "smoke": bool(self.recipe.get("smoke")),
            "scores": dict(self.scores),
            "differs": dict(self.differs),
            "bytes": self.size,
            "shared_bytes": self.shared,
            "begun": began.isoformat(timespec="seconds"),
        }


def listing(places: Sequence[Path]) -> list[Listed]:
    """The runs in the folders `places`, the one that was begun last first, each with what sets it
    apart from those of the same recipe name."""
    found = [_read(RunFolder(path)) for path in runs_below(places)]
    by_name: dict[object, list[int]] = {}
    for n, one in enumerate(found):
        by_name.setdefault(one.recipe.get("name"), []).append(n)
    for numbers in by_name.values():
        own = [n for n in numbers if found[n].recipe]
        apart = differing([found[n].recipe for n in own])
        for n, differs in zip(own, apart, strict=True):
            found[n] = dataclasses.replace(found[n], differs=differs)
    return found


def sort(found: Sequence[Listed], by: str, registry: Registry) -> list[Listed]:
    """The runs by one of KEYS, the newest, largest or best first, or by one of their numbers;
    RecipeError for what none has."""
    runs = [one.run for one in found if one.run]
    numbers = dict.fromkeys(number for run in runs for number in run.scores)
    better = directions(runs, registry, [])
    if by not in (*KEYS, *numbers):
        raise RecipeError(f"--sort {by}: no such key{did_you_mean(by, [*KEYS, *numbers])}")

    def place(one: Listed) -> tuple[Any, ...]:
        if by in ("name", "state"):
            return getattr(one, by), one.name
        if by in ("age", "size"):
            return (-one.begun if by == "age" else -one.size,)
        number = next(iter(one.scores), "") if by == "score" else by
        if number not in one.scores:
            return ([*numbers, number].index(number), 1, 0.0)
        sign = -1 if better.get(number) == "higher" else 1
        return ([*numbers].index(number), 0, sign * one.scores[number])

    return sorted(found, key=place)


def suites_below(places: Sequence[Path]) -> Iterator[tuple[Path, int]]:
    """Folders in `places` that hold runs of their own, and how many: those of suites."""
    for place in places:
        inside = sorted(path for path in place.glob("*") if path.is_dir())
        yield from ((path, n) for path in inside if (n := len(runs_below([path]))))


def listed(folder: RunFolder) -> Listed:
    """The run in `folder` as a line of `listing` of the runs beside it."""
    own = folder.path.resolve()
    found = listing([folder.path.parent])
    return next((one for one in found if one.folder.path.resolve() == own), _read(folder))


def about(one: Listed) -> dict[str, Any]:
    """What there is to say of a run beside its line."""
    folder, recipe, run = one.folder, one.recipe, one.run
    try:
        stages, again = folder.status(), folder.measured()
    except CmkitError:  # which its state tells
        stages, again = {}, []
    tables = [(key, recipe[key]) for key in PART_TABLES if key in recipe]
    tables += [("metric", table) for table in recipe.get("metric", ())]
    others = every_run([folder])
    ema = recipe.get("train", {}).get("ema", ())
    averages = [*(f":ema-{decay:g}" for decay in ema), ":online"] if folder.steps() else []
    weights = [one.name] * folder.weights.exists()
    weights += [f"{one.name}{which}" for which in averages]
    weights += [f"{one.name}@{step}" for step in folder.steps()]
    weights += [f"{one.name}@best"] * folder.checkpoint("best").is_dir()
    same = [other for other in others if base_of(other.path.name) == base_of(one.name)]
    began = datetime.datetime.fromtimestamp(one.begun).astimezone()
    return {
        "begun_local": began.isoformat(" ", "minutes"),
        "parts": {kind: table["use"] for kind, table in tables if "use" in table},
        "siblings": [str(o.path) for o in same if o.path.resolve() != folder.path.resolve()],
        "stages": {
            stage_class(name).title: stages[name]["result"].get("line", "done")
            for name in STAGES
            if name in stages and name != "metric"
        },
        "measured": list(_measured(run)) if run else [],
        "measured_again": [{**r, "beside": data_words(r["data"])} for r in again],
        "weights": weights,
        "bytes_in": _bytes_in(folder),
        "read_by": [str(other.path) for other in dependents(folder, others)],
        "page": str(folder.page) if folder.page.exists() else None,
    }


def _measured(run: Run) -> Iterator[str]:
    """How the numbers of a run were measured, a sentence for those that were so alike."""
    found: dict[str, list[str]] = {}
    for number in run.scores:
        way = {k: v for k, v in run.measured(number).items() if v != NOT_RECORDED}
        words = run.beside(number)
        if words and "reference" in way:
            way["reference"] = f"{way['reference']} ({words})"
        text = ", ".join(f"{fact.replace('_', ' ')} {value}" for fact, value in way.items())
        found.setdefault(text, []).append(number)
    yield from (f"{', '.join(names)}: {text}" for text, names in found.items())


def _bytes_in(folder: RunFolder) -> dict[str, int]:
    """Bytes of what is in a run's folder, the largest first; small files together."""
    sizes = {
        path.name: bytes_of([path])[0] or path.lstat().st_size for path in folder.path.iterdir()
    }
    large = {name: size for name, size in sizes.items() if size >= sum(sizes.values()) / 20}
    ordered = dict(sorted(large.items(), key=lambda each: -each[1]))
    rest = sum(sizes.values()) - sum(ordered.values())
    return {**ordered, **({"the rest": rest} if rest else {})}


def _read(folder: RunFolder) -> Listed:
    recipe, run, state, at = dict[str, Any](), None, "damaged", ""
    try:
        with files.reading(folder.recipe):
            recipe = tomllib.loads(files.read_bytes(folder.recipe).decode())
        if folder.finished:
            run, state = read_run(folder.path), "finished"
        else:
            at = next_stage(folder, recipe)
            state = "running" if folder.holder() else "stopped"
    except CmkitError as error:
        at = str(error).removeprefix(f"{folder.path}/").partition(";")[0]
    size, shared = bytes_of([folder.path])
    begun = folder.recipe.stat().st_mtime if folder.recipe.exists() else time.time()
    return Listed(folder, recipe, state, at, run, size, shared, begun)


def next_stage(folder: RunFolder, recipe: Mapping[str, Any]) -> str:
    """The first stage that is not finished, with the step of the newest checkpoint."""
    done = folder.status()
    name = next((s for s in STAGES if recipe.get(s) and s not in done), None)
    if name is None:
        return "report"
    title, steps = stage_class(name).title, folder.steps()
    if name != "train":
        return title
    return f"{title}, step {steps[-1] if steps else 0:,} of {recipe['train']['steps']:,}"


def bytes_of(places: Sequence[Path]) -> tuple[int, int]:
    """Bytes on the disk of files and folders with all in them, each counted once; and those of
    files that have another name elsewhere, and stay when these go."""
    links: dict[tuple[int, int], list[os.stat_result]] = {}
    for path in (path for place in places for path in (place, *place.rglob("*"))):
        try:
            info = path.lstat()
        except FileNotFoundError:  # it is being written or removed at this moment
            continue
        links.setdefault((info.st_dev, info.st_ino), []).append(info)
    sizes = [(seen[0].st_blocks * 512, _stays(seen)) for seen in links.values()]
    return sum(size for size, _ in sizes), sum(size for size, stays in sizes if stays)


def _stays(seen: Sequence[os.stat_result]) -> bool:
    return not stat.S_ISDIR(seen[0].st_mode) and seen[0].st_nlink > len(seen)


def age(seconds: float) -> str:
    """A time in one unit: "3 min", "5 h", "12 days"."""
    for unit, length, most in (("s", 1, 60), ("min", 60, 60), ("h", 3600, 48)):
        if seconds < most * length:
            return f"{max(seconds, 0) / length:.0f} {unit}"
    return f"{seconds / 86_400:.0f} days"
