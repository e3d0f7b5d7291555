"""Pictures in a folder, or in one folder a class."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from cmkit import DataError
from cmkit.files import cached_digest
from cmkit_std.datasets.on_disk import counted

LISTED = 2**35
"""Bytes of pictures beyond which their contents are not read to tell whether they changed."""
LOOSE = "not in a folder of its class; move it, or set dataset.labels = false"


@dataclass(frozen=True)
class File:
    """A picture: its path below the folder, its class, and size and time to notice a change."""

    name: str
    label: int
    size: int
    mtime_ns: int
    fault: str = ""
    """Why it cannot be opened, for one that is no regular file."""


@dataclass(frozen=True)
class Folder:
    """The pictures of a folder, as `pictures` takes them."""

    root: Path
    files: tuple[File, ...]
    classes: tuple[str, ...] = ()
    """Names of the classes, by number."""

    def __len__(self) -> int:
        return len(self.files)

    def name(self, index: int) -> str:
        """The path of picture `index`."""
        return str(self.root / self.files[index].name)

    def open_picture(self, index: int) -> Path | BinaryIO:
        """The file of picture `index`; DataError where it is no regular one."""
        file = self.files[index]
        if file.fault:
            raise DataError(f"{self.name(index)}: {file.fault}")
        return self.root / file.name

    @property
    def place(self) -> str:
        """The folder, links resolved."""
        return str(self.root.resolve())

    def key(self, index: int) -> str:
        """Name, size and time of picture `index`; "" of what is no regular file."""
        file = self.files[index]
        return "" if file.fault else f"{file.name}\0{file.size}\0{file.mtime_ns}"

    def only(self, indices: Iterable[int]) -> Folder:
        """Those of `indices`."""
        return replace(self, files=tuple(self.files[index] for index in indices))

    def counts(self) -> tuple[int, ...]:
        """How many pictures each class has."""
        return counted(self.labels(), len(self.classes))

    def empty(self) -> list[str]:
        """The classes without a picture; "" where there are no classes, and no picture."""
        counts = self.counts() if self.classes else (len(self),)
        return [name for name, n in zip(self.classes or ("",), counts, strict=True) if not n]

    def labels(self) -> list[int]:
        """Classes of the pictures, (N,)."""
        return [file.label for file in self.files]

    def fingerprint(self) -> str:
        """SHA-256 of names and contents, computed anew when a file's name, size or time changes; of
        more than LISTED bytes that of names, sizes and times."""
        listing = "".join(f"{f.name}\0{f.size}\0{f.mtime_ns}\n" for f in self.files)
        if sum(file.size for file in self.files) > LISTED:
            return hashlib.sha256(os.fsencode(listing)).hexdigest()
        return cached_digest(f"{self.place}\n{listing}", self._contents)

    def _contents(self) -> str:
        digest = hashlib.sha256()
        with ThreadPoolExecutor() as threads:
            contents = threads.map(self._sha256, range(len(self)))
            for file, content in zip(self.files, contents, strict=True):
                digest.update(os.fsencode(f"{file.name}\0{file.size}\0{content}\n"))
        return digest.hexdigest()

    def _sha256(self, index: int) -> str:
        found = self.open_picture(index)
        with found.open("rb") if isinstance(found, Path) else found as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()  # type: ignore[arg-type]


def find(root: Path, labels: bool) -> Folder:
    """The pictures of a folder, in the order of their names, with classes if `labels`."""
    if not labels:
        return Folder(root, below(root, root, 0))
    entries = _visible(root)
    names = numbered(entry.name for entry in entries if _is_folder(entry))
    if not names:
        raise DataError(f"{root}: no folder in it; each class needs one of its pictures")
    every = [_below(root, root / name, label) for label, name in enumerate(names)]
    if empty := [name for name, files in zip(names, every, strict=True) if not files]:
        raise DataError(
            f"{root}: no pictures in {', '.join(empty)}; put some there, or remove the folders"
        )
    loose = [_file(root, entry, 0) for entry in entries if not _is_folder(entry)]
    loose = [replace(file, fault=file.fault or LOOSE) for file in loose]
    files = [file for own in every for file in own] + sorted(loose, key=lambda file: file.name)
    return Folder(root, tuple(files), printable(names))


def numbered(names: Iterable[str]) -> list[str]:
    """Names of classes in the order of their numbers: as numbers, where all are, else as texts."""
    found = sorted(names)
    whole = all(name.isascii() and name.isdigit() for name in found)
    return sorted(found, key=int) if whole else found


def printable(names: Iterable[str]) -> tuple[str, ...]:
    """Names in which bytes that are no UTF-8 are escaped."""
    return tuple(os.fsencode(name).decode("utf-8", "backslashreplace") for name in names)


def below(root: Path, folder: Path, label: int) -> tuple[File, ...]:
    """Every visible file below `folder`, by name; DataError when there is none."""
    if not (files := _below(root, folder, label)):
        raise DataError(f"{folder}: no pictures in it; put some there, or remove the folder")
    return files


def _below(root: Path, folder: Path, label: int) -> tuple[File, ...]:
    files = []
    pending = [(folder, (folder.resolve(),))]
    while pending:
        current, above = pending.pop()
        for entry in _visible(current):
            if not _is_folder(entry):
                files.append(_file(root, entry, label))
                continue
            inner = Path(entry.path)
            if entry.is_symlink() and inner.resolve() in above:
                raise DataError(f"{inner}: a link to a folder that it is in itself; remove it")
            pending.append((inner, (*above, inner.resolve())))
    return tuple(sorted(files, key=lambda file: file.name))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself, of which `_file` says so
        return False


def _file(root: Path, entry: os.DirEntry[str], label: int) -> File:
    name = Path(entry.path).relative_to(root).as_posix()
    try:
        info = entry.stat()
    except OSError as error:
        return File(name, label, 0, 0, f"cannot be read ({error.strerror}); remove it")
    fault = "" if stat.S_ISREG(info.st_mode) else "no regular file; remove it"
    return File(name, label, info.st_size, info.st_mtime_ns, fault)


def _visible(folder: Path) -> list[os.DirEntry[str]]:
    try:
        return [entry for entry in os.scandir(folder) if not entry.name.startswith(".")]
    except OSError as error:
        raise DataError(f"{folder}: cannot be listed ({error.strerror})") from error
