"""Whether every file of a run is what cmkit wrote."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path

from cmkit import checkpoint, files
from cmkit.errors import CmkitError
from cmkit.runs.folder import RunFolder


def verify(folder: RunFolder) -> Iterator[tuple[str, str]]:
    """(file, what is wrong with it, "" = nothing) of each file of a run that has a digest."""
    inputs, status = folder.path / "inputs.json", folder.path / "status.json"
    fault = "" if folder.earlier else "missing"
    name, fault = (
        _judged(folder, inputs, folder.inputs) if inputs.exists() else (inputs.name, fault)
    )
    yield name, fault
    if not fault:  # it holds the recipe's digest
        yield _judged(folder, folder.recipe, folder.check_recipe)
    if status.exists():
        yield _judged(folder, status, folder.status)
    elif folder.reported:
        yield status.name, "missing"
    if folder.reported:
        yield _judged(folder, folder.path / "report.json", folder.report)
    try:
        stages = folder.status()
    except CmkitError:
        stages = {}
    for stage, finished in stages.items():
        damage = folder.damage(stage, finished)
        for name in finished.get("files", {}):
            yield name, damage.get(name, "")
    known = {name for finished in stages.values() for name in finished.get("files", {})}
    for log in sorted(folder.path.rglob("*.jsonl")):
        name = str(log.relative_to(folder.path))
        if name not in known:
            lost = files.damaged_lines(log, folder.checked)
            yield name, f"{lost} damaged lines" if lost else ""
    kept = [*map(folder.checkpoint, folder.steps())]
    if (best := folder.checkpoint("best")).is_dir():
        kept.append(checkpoint.newest_folder(best))
    for path in kept:
        yield _judged(folder, path, functools.partial(checkpoint.verify, path))


def _judged(folder: RunFolder, path: Path, read: Callable[[], object]) -> tuple[str, str]:
    name = str(path.relative_to(folder.path))
    try:
        read()
    except CmkitError as error:
        return name, str(error).removeprefix(f"{path}: ")
    return name, ""
