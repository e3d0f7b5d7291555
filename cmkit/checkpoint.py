"""Checkpoints: folders of safetensors and JSON, with a manifest of SHA-256 digests.

A save survives a crash at any point: it stages in a hidden folder, fsyncs every file, writes the
manifest last, fsyncs the folder, renames it, fsyncs the parent, and only then deletes older ones.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from cmkit import files
from cmkit.errors import CheckpointError, ResourceError
from cmkit.tensors import read_safetensors, require_savable, safetensors_shapes, write_tensors

MANIFEST = "SHA256SUMS"
STATE = "state.json"

_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"
_MANIFEST = re.compile(rf"(?:[0-9a-f]{{64}}  {_NAME}\n)+")
_EMA = re.compile(r"ema-[\d.]+\.safetensors")
_STEP = re.compile(r"step-(\d{8,})")


def save_checkpoint(
    root: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    keep: int = 2,
) -> Path:
    """The folder `root/step-<step>`, durable once this returns; older ones but `keep` are deleted.

    Each entry of `tensors` becomes `<name>.safetensors`, and `state` goes to `state.json`. A step
    that is already there intact is not written again. Call it while holding `lock`.

    NonFiniteError names a tensor with NaN or infinity; ResourceError when the disk refuses.
    """
    if step < 0 or keep < 1:
        raise ValueError(f"step {step} must be at least 0, and keep {keep} at least 1")
    for name in tensors:
        if not re.fullmatch(_NAME, name):
            raise ValueError(f"{name!r} is no file name; use letters, digits, '.', '_' and '-'")
    final = root / f"step-{step:08d}"
    size = sum(require_savable(name, group) for name, group in tensors.items())
    text = files.to_json({"step": step, "state": dict(state)}, final / STATE)
    with files.writing(root):
        files.make_folder(root)
        files.sweep(root)
    if final.is_symlink() or not _intact(final):
        needed = len(text) + size + 4096 * (len(tensors) + 3)
        files.require_space(root, needed)
        with files.writing(final, needed):
            _stage_and_publish(final, tensors, text)
    with files.writing(root):
        files.sync_folder(root)
        _prune(root, final, keep)
    return final


def drop_checkpoints(root: Path) -> None:
    """Delete the folder `root` of checkpoints, if it is there. Call it while holding `lock`."""
    with files.writing(root), contextlib.suppress(FileNotFoundError):
        os.rename(root, root.with_name(f"{files.TEMPORARY}{root.name}"))
        files.sweep(root.parent)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose every byte agreed with its manifest when it was opened."""

    path: Path
    step: int
    state: Mapping[str, Any]

    @property
    def names(self) -> tuple[str, ...]:
        """What `tensors` can be asked for."""
        return tuple(sorted(file.stem for file in self.path.glob("[!.]*.safetensors")))

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors saved as `name`, on the CPU."""
        if name not in self.names:
            raise CheckpointError(f"{self.path}: holds no '{name}', only {', '.join(self.names)}")
        return read_safetensors(self.path / f"{name}.safetensors")


def latest_checkpoint(root: Path, warn: Callable[[str], None]) -> Checkpoint | None:
    """The newest intact checkpoint below `root`, None when there is none at all.

    Damaged ones are skipped, with a sentence to `warn`; CheckpointError when all are damaged. Call
    it while holding `lock`: it removes temporaries of saves that were killed.
    """
    with contextlib.suppress(OSError):
        files.sweep(root)
    return _newest(root, warn)


def verify(folder: Path) -> None:
    """Raise CheckpointError, naming the file, unless every byte agrees with SHA256SUMS."""
    manifest = folder / MANIFEST
    text = files.read_bytes(manifest).decode(errors="replace")
    if not _MANIFEST.fullmatch(text):
        raise CheckpointError(f"{manifest}: damaged; delete {folder} or restore it from a copy")
    digests = {line[66:]: line[:64] for line in text.splitlines()}
    with files.reading(folder):
        present = {name for name in os.listdir(folder) if not name.startswith(".")} - {MANIFEST}
    for name in sorted(present ^ digests.keys()):
        what = "not listed in" if name in present else "missing, but listed in"
        raise CheckpointError(f"{folder / name}: {what} {MANIFEST}; delete {folder}")
    for name, digest in digests.items():
        if files.sha256_of(folder / name) != digest:
            raise CheckpointError(
                f"{folder / name}: damaged, its SHA-256 is not that of {MANIFEST};"
                f" delete {folder} or restore it from a copy"
            )
    with files.reading(folder):
        _remember(folder)


def read_weights(path: Path, average: str | None = None) -> dict[str, Tensor]:
    """Tensors of a safetensors file, or of a checkpoint folder: see `weights_file`.

    Unlike `latest_checkpoint` this only reads, so a run may go on meanwhile. CheckpointError for
    what is damaged, and for any pickle.
    """
    if path.is_dir():
        verify(newest_folder(path))
    return read_safetensors(weights_file(path, average))


def read_shapes(path: Path, average: str | None = None) -> dict[str, Tensor]:
    """Names, types and shapes of `read_weights`, as tensors on the meta device.

    Nothing is verified, since only the head of the file is read.
    """
    return safetensors_shapes(weights_file(path, average))


def weights_file(path: Path, average: str | None = None) -> Path:
    """The file that `path` stands for: itself, or in a folder of a checkpoint, or of checkpoints,
    the newest's `average`, such as "ema-0.999" or "online"; by default the one that its training
    samples from, which its state names."""
    if not path.is_dir():
        return path
    folder = newest_folder(path)
    emas = [file for file in folder.glob("ema-*.safetensors") if _EMA.fullmatch(file.name)]
    if average is None:
        with contextlib.suppress(CheckpointError):
            average = files.read_json(folder / STATE)["state"].get("average")
    if average:
        file = folder / f"{average}.safetensors"
        if not file.is_file():
            known = ", ".join(sorted(each.stem for each in (*emas, folder / "online.safetensors")))
            raise CheckpointError(f"{folder}: holds no {average!r}; it has {known}")
        return file
    # A checkpoint of an earlier cmkit does not say: the slowest average.
    slowest = max(emas, key=lambda file: float(file.stem[4:]), default=None)
    return slowest or folder / "online.safetensors"


def newest_folder(path: Path) -> Path:
    """The checkpoint folder `path`, or the newest one in it."""
    with files.reading(path):
        steps = [] if (path / MANIFEST).exists() else _steps(path)
    return steps[0][1] if steps else path


def _stage_and_publish(
    final: Path, tensors: Mapping[str, Mapping[str, Tensor]], text: bytes
) -> None:
    stage = final.with_name(files.TEMPORARY + final.name)
    try:
        stage.mkdir()
        _stage(stage, tensors, text)
        if os.path.lexists(final):
            os.rename(final, final.with_name(f"{files.TEMPORARY}damaged-{final.name}"))
        os.rename(stage, final)
    except BaseException:
        shutil.rmtree(stage, ignore_errors=True)
        raise
    _remember(final)


def _stage(stage: Path, tensors: Mapping[str, Mapping[str, Tensor]], text: bytes) -> None:
    """Write a whole checkpoint to `stage`, manifest last, every byte of it fsynced."""
    groups = {f"{name}.safetensors": group for name, group in tensors.items()}
    digests = {name: write_tensors(stage / name, group) for name, group in groups.items()}
    digests[STATE] = files.write_file(stage / STATE, text)
    lines = (f"{digest}  {name}\n" for name, digest in sorted(digests.items()))
    files.write_file(stage / MANIFEST, "".join(lines).encode())
    files.sync_folder(stage)


def _prune(root: Path, newest: Path, keep: int) -> None:
    """Delete what is older than the `keep` newest intact checkpoints, of which `newest` is one.

    A folder loses its name before its first file, so that a half-deleted one never looks valid.
    """
    kept = 0
    for _, folder in _steps(root):
        if kept >= keep and folder != newest:
            os.rename(folder, folder.with_name(f"{files.TEMPORARY}pruned-{folder.name}"))
        elif folder == newest or _intact(folder):
            kept += 1
    files.sweep(root)


_verified: dict[Path, tuple[Any, ...]] = {}


def _fingerprint(folder: Path) -> tuple[Any, ...]:
    entries = sorted(
        (entry.name, entry.stat(follow_symlinks=False)) for entry in os.scandir(folder)
    )
    return tuple((name, at.st_ino, at.st_size, at.st_mtime_ns) for name, at in entries)


def _remember(folder: Path) -> None:
    """Note that `folder` is intact, so that pruning need not hash it until a file changes."""
    _verified[folder.absolute()] = _fingerprint(folder)


def _intact(folder: Path) -> bool:
    with contextlib.suppress(OSError, CheckpointError, ResourceError):
        if _verified.get(folder.absolute()) != _fingerprint(folder):
            verify(folder)
        return True
    return False


def _newest(root: Path, warn: Callable[[str], None]) -> Checkpoint | None:
    damage: list[CheckpointError] = []
    with files.reading(root):
        steps = _steps(root)
    for _, folder in steps:
        try:
            found = open_checkpoint(folder)
        except CheckpointError as error:
            damage.append(error)
            continue
        for fault in damage:
            warn(f"{fault}; going on from step {found.step}")
        return found
    if damage:
        raise CheckpointError(f"{damage[0]} (no intact checkpoint in {root})") from damage[0]
    return None


def open_checkpoint(folder: Path) -> Checkpoint:
    """The checkpoint in a folder; CheckpointError where it is damaged."""
    verify(folder)
    record = files.read_json(folder / STATE)
    with files.reading(folder / STATE):
        step, state, name = record["step"], dict(record["state"]), f"step-{record['step']:08d}"
    if _STEP.fullmatch(folder.name) and folder.name != name:
        raise CheckpointError(f"{folder}: holds step {step}; rename it to {name}")
    return Checkpoint(folder, step, state)


def _steps(root: Path) -> list[tuple[int, Path]]:
    """(step, folder) of each checkpoint below `root`, newest first; links are not followed."""
    found = []
    with contextlib.suppress(FileNotFoundError), os.scandir(root) as entries:
        for entry in entries:
            match = _STEP.fullmatch(entry.name)
            if match and entry.is_dir(follow_symlinks=False):
                found.append((int(match[1]), root / entry.name))
    return sorted(found, reverse=True)
