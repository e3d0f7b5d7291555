"""Whether every file of a run is what cmkit wrote."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path

from cmkit import checkpoint, files
from cmkit.errors import CmkitError
from cmkit.run.folder import RunFolder


def verify(folder: RunFolder) -> Iterator[tuple[str, str]]:
    """(file, what is wrong with it, "" = nothing) of each file of a run that has a digest."""
    yield _judged(folder, folder.recipe, folder.check_recipe)
    for name, read in (("inputs", folder.inputs), ("status", folder.status)):
        path = folder.path / f"{name}.json"
        if path.exists():
            yield _judged(folder, path, read)
        elif folder.begun:
            yield path.name, "missing" if folder.reported or name == "inputs" else ""
    if folder.reported:
        yield _judged(folder, folder.path / "report.json", folder.report)
    try:
        status = folder.status()
    except CmkitError:
        status = {}
    for stage, finished in status.items():
        damage = folder.damage(stage, finished)
        for name in finished.get("files", {}):
            yield name, damage.get(name, "")
    known = {name for finished in status.values() for name in finished.get("files", {})}
    for log in sorted(folder.path.rglob("*.jsonl")):
        name = str(log.relative_to(folder.path))
        if name not in known:
            lost = files.damaged_lines(log, folder.checked)
            yield name, f"{lost} damaged lines" if lost else ""
    for step in sorted(folder.checkpoints.glob("step-*")):
        yield _judged(folder, step, functools.partial(checkpoint.verify, step))


def _judged(folder: RunFolder, path: Path, read: Callable[[], object]) -> tuple[str, str]:
    name = str(path.relative_to(folder.path))
    try:
        read()
    except CmkitError as error:
        return name, str(error).removeprefix(f"{path}: ")
    return name, ""
