"""Your own pictures."""

from __future__ import annotations

import hashlib
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from cmkit import DataError, DataSpec
from cmkit.files import cached_digest
from cmkit_std.datasets.on_disk import Published

if TYPE_CHECKING:
    from cmkit_std.datasets.pictures import Decoder


LISTED = 2**35
"""Bytes of pictures beyond which their contents are not read to tell whether they changed."""


@dataclass(frozen=True)
class File:
    """A picture: its path below the folder, its class, and size and time to notice a change."""

    name: str
    label: int
    size: int
    mtime_ns: int


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
        return str(self.open_picture(index))

    def open_picture(self, index: int) -> Path:
        """The file of picture `index`."""
        return self.root / self.files[index].name

    def labels(self) -> list[int]:
        """Classes of the pictures, (N,)."""
        return [file.label for file in self.files]

    def fingerprint(self) -> str:
        """SHA-256 of names and contents, computed anew when a file's name, size or time changes; of
        more than LISTED bytes that of names, sizes and times."""
        listing = "".join(f"{f.name}\0{f.size}\0{f.mtime_ns}\n" for f in self.files)
        if sum(file.size for file in self.files) > LISTED:
            return hashlib.sha256(os.fsencode(listing)).hexdigest()
        return cached_digest(f"{self.root.resolve()}\n{listing}", self._contents)

    def _contents(self) -> str:
        digest = hashlib.sha256()
        with ThreadPoolExecutor() as threads:
            contents = threads.map(self._sha256, range(len(self)))
            for file, content in zip(self.files, contents, strict=True):
                digest.update(os.fsencode(f"{file.name}\0{file.size}\0{content}\n"))
        return digest.hexdigest()

    def _sha256(self, index: int) -> str:
        with self.open_picture(index).open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()


class ImageFolder(Published):
    """Pictures (PNG, JPEG, WebP, BMP, TIFF, GIF, PPM) in a folder, or in one folder a class.

    Every file below `path` must be a picture, hidden ones (.name) aside. Each is halved by box
    averaging while twice too large, resized by bicubic interpolation and cropped in the middle, as
    ADM does (Dhariwal and Nichol, 2021). Transparent pictures are laid on white; EXIF orientation
    is ignored, as ADM does; 16-bit pictures are refused. Up to 2 GiB of pixels are decoded once
    and kept, larger sets are decoded as they are needed.
    """

    path: str
    """The folder."""
    resolution: int = Field(ge=4, le=4096)
    """Height and width after resizing and cropping."""
    channels: Literal[1, 3] = 3
    """3 for RGB, 1 for grey."""
    labels: bool = False
    """Each folder in `path` is a class, numbered in the order of their names, or, where all names
    are numbers, of these."""

    def spec(self) -> DataSpec:
        """Shape and classes; opens every file, DataError names the first that is no picture."""
        from cmkit_std.datasets.pictures import check

        folder = find(self.path, self.labels)
        check(folder, range(len(folder)))
        if self.reference_npz:
            from cmkit_std.datasets import reference_npz

            reference_npz.statistics(Path(self.reference_npz).expanduser(), self.channels)
        classes = len(folder.classes) if self.labels else None
        return DataSpec(self.channels, self.resolution, classes)

    def identity(self) -> dict[str, Any]:
        """As of any files on this disk, with the names of the classes."""
        folder = find(self.path, self.labels)
        return {**({"classes": list(folder.classes)} if self.labels else {}), **super().identity()}

    @property
    def _channels(self) -> int:
        return self.channels

    def _images(self) -> Decoder:
        from cmkit_std.datasets.pictures import Decoder

        folder = find(self.path, self.labels)
        labels = folder.labels() if self.labels else None
        return Decoder(folder, (self.channels, self.resolution), labels, self.flip)


def find(path: str, labels: bool) -> Folder:
    """The pictures of `dataset.path`, in the order of their names, with classes if `labels`."""
    root = Path(path).expanduser()
    if not root.is_dir():
        raise DataError(f"dataset.path = {path!r}: no such folder")
    if not labels:
        return Folder(root, _below(root, root, 0))
    loose = [entry.name for entry in _visible(root) if not entry.is_dir()]
    if loose:
        raise DataError(
            f"{root / loose[0]}: not in a folder of its class; move it, or read it with"
            " image_folder and dataset.labels = false"
        )
    names = sorted(entry.name for entry in _visible(root))
    if all(name.isascii() and name.isdigit() for name in names):
        names.sort(key=int)
    if not names:
        raise DataError(f"{root}: no folder in it; each class needs one of its pictures")
    files = [file for label, name in enumerate(names) for file in _below(root, root / name, label)]
    return Folder(root, tuple(files), tuple(names))


def _below(root: Path, folder: Path, label: int) -> tuple[File, ...]:
    """Every visible file below `folder`, by name; DataError when there is none."""
    files = []
    pending = [folder]
    while pending:
        for entry in _visible(pending.pop()):
            if entry.is_dir():
                pending.append(Path(entry.path))
            else:
                files.append(_file(root, entry, label))
    if not files:
        raise DataError(f"{folder}: no pictures in it; put some there, or remove the folder")
    return tuple(sorted(files, key=lambda file: file.name))


def _file(root: Path, entry: os.DirEntry[str], label: int) -> File:
    try:
        info = entry.stat()
    except OSError as error:
        raise DataError(f"{entry.path}: cannot be read ({error.strerror}); remove it") from error
    if not stat.S_ISREG(info.st_mode):
        raise DataError(f"{entry.path}: no regular file; remove it")
    name = Path(entry.path).relative_to(root).as_posix()
    return File(name, label, info.st_size, info.st_mtime_ns)


def _visible(folder: Path) -> list[os.DirEntry[str]]:
    try:
        return [entry for entry in os.scandir(folder) if not entry.name.startswith(".")]
    except OSError as error:
        raise DataError(f"{folder}: cannot be listed ({error.strerror})") from error
