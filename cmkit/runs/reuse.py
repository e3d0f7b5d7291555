"""Stages that other runs have done already: what a recipe shares with them, and what is new."""

from __future__ import annotations

import contextlib
import os
import shutil
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cmkit import files
from cmkit.errors import CmkitError, inline
from cmkit.plugins import Registry
from cmkit.recipe import Recipe, load, run_name, stage_keys, stage_tables
from cmkit.recipe.keys import Inputs
from cmkit.runs.folder import RunFolder

MOST = 1000
"""Other runs that are looked at, the newest."""


@dataclass(frozen=True)
class Outlook:
    """What becomes of a stage when its run starts: "finished", "begun", "that of", "goes on from"
    or "new", from which other run, and why."""

    stage: str
    title: str
    state: str
    origin: RunFolder | None = None
    why: str = ""

    def __str__(self) -> str:
        where = f" {self.origin.path}" if self.origin else ""
        return f"{self.title}: {self.state}{where}{f' ({self.why})' if self.why else ''}"

    def facts(self) -> dict[str, str | None]:
        """The outlook as JSON."""
        origin = str(self.origin.path) if self.origin else None
        return {"stage": self.stage, "state": self.state, "origin": origin, "why": self.why}


def outlook(
    recipe: Recipe, folder: RunFolder, keys: Mapping[str, str], inputs: Inputs, registry: Registry
) -> Iterator[Outlook]:
    """What becomes of each stage of a recipe that reads `inputs` in `folder`, by its keys."""
    own, others = folder.status(), list(_others(folder))
    new = ""
    for name, key in keys.items():
        title = recipe.stages[name].title
        if name in own:
            yield Outlook(name, title, "finished")
        elif origin := _finished(others, name, key):
            yield Outlook(name, title, "that of", origin)
        elif name == "train" and folder.steps():
            yield Outlook(name, title, "begun")
        elif name == "train" and (origin := _begun(recipe, key, inputs, others)):
            yield Outlook(name, title, "goes on from", origin)
        else:
            why = _why(recipe, name, folder, inputs, registry)
            yield Outlook(name, title, "new", None, why or (f"after new {new}" if new else ""))
            new = title


def reuse(folder: RunFolder, stage: str, key: str) -> dict[str, Any] | None:
    """The entry of status.json of another run's finished stage with this key, once its intact
    files are in `folder` as well; None where there is none."""
    for other in _others(folder):
        found = _status(other).get(stage, {})
        if found.get("key") != key or other.damage(stage, found):
            continue
        try:
            for name in found["files"]:
                _take(other, folder, name)
        except OSError:  # it is being removed at this moment
            continue
        if not folder.damage(stage, found):
            if stage == "train":
                _take_best(other, folder)
            return found
    return None


def reuse_checkpoint(recipe: Recipe, folder: RunFolder, key: str) -> None:
    """Copy the newest intact checkpoint of another run whose training this is the same as, or a
    longer one of the same bits, if there is one and `folder` has none."""
    other = _begun(recipe, key, folder.inputs()["inputs"], _others(folder))
    if other is None or folder.steps():
        return
    _take_best(other, folder)  # before the checkpoint, without which all of it is taken again
    with contextlib.suppress(CmkitError, OSError):
        _copy_checkpoint(other.checkpoints, folder.checkpoints)
        for name in ("log.jsonl", *(file for file in other.digests("train") if "shown" in file)):
            _take(other, folder, name)


def _take_best(other: RunFolder, folder: RunFolder) -> None:
    """Copy the checkpoint with the best score of another run, where it has one that is intact, in
    the place of the own one."""
    from cmkit.checkpoint import drop_checkpoints

    theirs, own = other.checkpoint("best"), folder.checkpoint("best")
    with contextlib.suppress(CmkitError, OSError):
        if theirs.is_dir():
            drop_checkpoints(own)
            _copy_checkpoint(theirs, own)


def _copy_checkpoint(theirs: Path, own: Path) -> None:
    """Copy the newest checkpoint of a folder to another; CheckpointError where it is damaged."""
    from cmkit.checkpoint import newest_folder, verify

    newest = newest_folder(theirs)
    verify(newest)
    files.make_folder(own)
    with files.new_folder(own / newest.name) as stage:
        for path in newest.iterdir():
            shutil.copyfile(path, stage / path.name)
    verify(own / newest.name)


def _take(other: RunFolder, folder: RunFolder, name: str) -> None:
    """Link or copy a file of another run."""
    target = folder.path / name
    files.make_folder(target.parent)
    target.unlink(missing_ok=True)
    if target.suffix != ".jsonl":  # logs are appended to: the other run's must not be
        with contextlib.suppress(OSError):
            os.link(other.path / name, target)
            return
    shutil.copyfile(other.path / name, target)


def _others(folder: RunFolder) -> list[RunFolder]:
    return [other for other in folder.siblings() if other.checked][:MOST]


def _status(folder: RunFolder) -> Mapping[str, dict[str, Any]]:
    try:
        return folder.status()
    except CmkitError:  # another run's damage is not this one's
        return {}


def _finished(others: list[RunFolder], stage: str, key: str) -> RunFolder | None:
    return next((o for o in others if _status(o).get(stage, {}).get("key") == key), None)


def _begun(recipe: Recipe, key: str, inputs: Inputs, others: list[RunFolder]) -> RunFolder | None:
    """Another run that has begun the training of this `key`, or a shorter one of the same steps."""
    assert recipe.train is not None
    found = None
    for other in others:
        with contextlib.suppress(CmkitError, KeyError, TypeError, ValueError):
            its = other.inputs()["keys"].get("train")
            if not its or not other.steps():
                continue
            if its == key:
                return other
            steps = tomllib.loads(files.read_bytes(other.recipe).decode())["train"]["steps"]
            shorter = _with_steps(recipe, steps)
            if found is None and steps < recipe.train.steps:
                same = its == stage_keys(shorter, inputs)["train"]
                found = other if same and _same_steps(shorter, recipe, other.steps()[-1]) else None
    return found


def _with_steps(recipe: Recipe, steps: int) -> Recipe:
    assert recipe.train is not None
    train = recipe.train.model_copy(update={"steps": steps})
    return replace(recipe, stages={**recipe.stages, "train": train})


def _same_steps(shorter: Recipe, longer: Recipe, steps: int) -> bool:
    """Whether the first `steps` of two trainings are the same, so that neither the schedule of the
    objective nor the learning rate depends on how many follow."""
    from cmkit.train import learning_rate

    objective, few, many = longer.objective, shorter.train, longer.train
    assert objective
    assert few
    assert many
    return all(
        learning_rate(few, step) == learning_rate(many, step)
        and objective.phase(step, few.steps) == objective.phase(step, many.steps)
        for step in range(steps)
    )


def _why(recipe: Recipe, stage: str, folder: RunFolder, inputs: Inputs, registry: Registry) -> str:
    """What a stage does not share with the run of this name that it is nearest to."""
    nearest: list[str] | None = None
    for other in _others(folder):
        if not other.path.name.startswith(f"{recipe.name}-"):
            continue
        try:
            its = load(other.recipe, [], registry)
            found = list(differences(stage_tables(its, stage), stage_tables(recipe, stage)))
        except (CmkitError, KeyError):  # without this stage, or of parts that are not here
            continue
        shown = [f"{said}, in {other.path} {was}" for said, was in found]
        with contextlib.suppress(CmkitError):
            saved = other.with_checkpoints().steps()
            if saved and len(found) == 1 and found[0][0].startswith("train.steps"):
                shown[0] += f"; --from {other.path} goes on from there"
            if stage == "train":
                shown += _read_otherwise(recipe, other, inputs)
        if nearest is None or len(shown) < len(nearest):
            nearest = shown
    return "; ".join((nearest or [])[:3])


def _read_otherwise(recipe: Recipe, other: RunFolder, inputs: Inputs) -> list[str]:
    """A sentence where another run's training read other data or weights than `inputs`."""
    from cmkit.runs.inputs import changes

    tables = stage_tables(recipe, "train")
    found = changes(other.inputs().get("inputs", {}), inputs) if other.checked else ()
    read = [(key, said) for table, key, said in found if table in tables]
    read.sort(key=lambda each: each[0] != "classes")  # names say more than numbers
    return [f"beside {other.path}, {said}" for _, said in read[:1]]


def differences(then: Any, now: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """(the value now, the value then) of each key that differs."""
    if isinstance(then, Mapping) and isinstance(now, Mapping):
        for key in dict.fromkeys((*then, *now)):
            inner = f"{path}.{key}" if path else str(key)
            yield from differences(then.get(key), now.get(key), inner)
    elif then != now:
        yield f"{path} = {_shown(now)}", _shown(then)


def _shown(value: Any) -> str:
    text = "the default" if value is None else inline(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def run_folder(recipe: Recipe, out: Path, registry: Registry) -> RunFolder:
    """Where a recipe's run lives: `<out>/<name>-<key>`, or where an earlier cmkit began it."""
    folder = RunFolder(out / run_name(recipe))
    if folder.recipe.exists():
        return folder
    for path in sorted(out.glob(f"{recipe.name}-*/recipe.toml")):
        old = RunFolder(path.parent)
        with contextlib.suppress(CmkitError):
            if not old.checked and run_name(load(path, [], registry)) == run_name(recipe):
                return old
    return folder
