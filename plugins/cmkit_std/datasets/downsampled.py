"""The `.npz` batches of downsampled ImageNet (Chrabaszcz, Loshchilov, Hutter, 2017), and their
pixels unpacked once into a file that can be mapped."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from cmkit import DataError, ResourceError
from cmkit.files import cache_folder, sync_folder
from cmkit_std.datasets.npz import Header, array, headers
from cmkit_std.datasets.on_disk import File

SHAPE = (3, 64, 64)
WIDTH = 3 * 64 * 64
CLASSES = 1000
NAMES = {"train": re.compile(r"train_data_batch_(\d+)\.npz"), "val": re.compile(r"val_data()\.npz")}


def find(folder: Path, split: str) -> tuple[File, ...]:
    """The batch files of a split in the order of their numbers, none if `folder` holds no batches.

    DataError when a number is missing, when only the other split is there, or only pickles are.
    """
    for pickled in (folder / "train_data_batch_1", folder / "val_data"):
        if pickled.is_file():
            raise DataError(f"{pickled}: a pickle, which is never opened; fetch the .npz files")
    names = sorted(path.name for path in folder.glob("*.npz"))
    numbered = {
        int(match[1] or 1): folder / name
        for name in names
        if (match := NAMES[split].fullmatch(name))
    }
    absent = set(range(1, max(numbered, default=1) + 1)) - set(numbered)
    if names and absent:
        first = "val_data" if split == "val" else f"train_data_batch_{min(absent)}"
        raise DataError(f"{folder / first}.npz: no such file; put it there, or set dataset.split")
    return tuple(File.at(numbered[number]) for number in sorted(numbered))


@functools.lru_cache(maxsize=2)
def labels(files: tuple[File, ...]) -> np.ndarray:
    """Classes 0 .. 999 of all pictures, (N,) int64, from headers and labels alone.

    DataError for arrays of another shape or type, or a label that is not one of 1 .. 1000.
    """
    return np.concatenate([_labels(file.path) for file in files])


def fingerprint(files: tuple[File, ...]) -> str:
    """SHA-256 of the shapes and of the CRC-32 that the files hold of their pixels."""
    digest = hashlib.sha256()
    for file in files:
        data = _data(file.path)
        digest.update(f"{data.shape} {data.crc}\n".encode())
    return digest.hexdigest()


def check_disk(files: tuple[File, ...]) -> None:
    """ResourceError when the pixels are not unpacked yet and would not fit on the disk."""
    cache = _cache(files)
    if cache.exists():
        return
    there = next(parent for parent in cache.parents if parent.is_dir())
    needed, free = len(labels(files)) * WIDTH, shutil.disk_usage(there).free
    if needed > free:
        raise ResourceError(
            f"{cache.parent}: {needed} bytes are needed to unpack {files[0].path.parent}, {free}"
            " are free; set XDG_CACHE_HOME to a folder on a larger disk"
        )


def pixels(files: tuple[File, ...]) -> Path:
    """A file of all pictures, uint8 (N, 3, 64, 64), for `np.load`; unpacked if it is not there.

    It appears under its name whole and synced to the disk, or not at all; of several processes one
    unpacks, a batch file at a time (1.6 GB of memory), and the others wait. DataError for damaged
    pixels, ResourceError for a full disk.
    """
    cache = _cache(files)
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        with _locked(cache.parent):
            if not cache.exists():
                check_disk(files)
                for old in cache.parent.glob("*.npy*"):
                    old.unlink()
                _unpack(files, cache)
    except OSError as error:
        raise ResourceError(
            f"{cache.parent}: cannot be written ({error.strerror}); set XDG_CACHE_HOME to a folder"
            " that can"
        ) from error
    return cache


def _unpack(files: tuple[File, ...], cache: Path) -> None:
    part = cache.with_suffix(".npy.part")
    header = {"descr": "|u1", "fortran_order": False, "shape": (len(labels(files)), *SHAPE)}
    try:
        with part.open("wb") as stream:
            np.lib.format.write_array_header_1_0(stream, header)
            for file in files:
                # written, not mapped: on a disk that fills up, a write through a map is a SIGBUS
                stream.write(np.ascontiguousarray(array(file.path, "data")).data)
            stream.flush()
            os.fsync(stream.fileno())
        part.rename(cache)
    finally:
        part.unlink(missing_ok=True)
    sync_folder(cache.parent)


def _cache(files: tuple[File, ...]) -> Path:
    """Where the pixels of these very files go: one folder for each set of paths."""
    paths = "\0".join(str(file.path.resolve()) for file in files)
    folder = hashlib.sha256(os.fsencode(paths)).hexdigest()[:16]
    return cache_folder("imagenet64") / folder / f"{fingerprint(files)[:16]}.npy"


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _data(path: Path) -> Header:
    """The header of `data`; DataError unless it is (N, 12288) uint8, and `labels` N integers."""
    arrays = headers(path)
    data, classes = arrays.get("data"), arrays.get("labels")
    if data is None or classes is None:
        raise DataError(
            f"{path}: holds {', '.join(sorted(arrays)) or 'nothing'}, not data and labels; name the"
            " folder of downsampled ImageNet"
        )
    if data.dtype != np.uint8 or data.shape[1:] != (WIDTH,) or not data.shape[0]:
        raise DataError(
            f"{path}: data is {data.dtype} {data.shape}, not uint8 (N, {WIDTH}); name the folder of"
            " the 64x64 pictures"
        )
    if classes.dtype.kind not in "iu" or classes.shape != data.shape[:1]:
        raise DataError(
            f"{path}: labels is {classes.dtype} {classes.shape}, not integers {data.shape[:1]};"
            " download it again"
        )
    return data


def _labels(path: Path) -> np.ndarray:
    _data(path)
    found = array(path, "labels")
    wrong = np.flatnonzero((found < 1) | (found > CLASSES))
    if len(wrong):
        raise DataError(
            f"{path}: label {found[wrong[0]]} of picture {wrong[0]} is not one of 1 .. {CLASSES};"
            " download it again"
        )
    return found.astype(np.int64) - 1
