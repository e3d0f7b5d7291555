"""Your own pictures."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from cmkit import DataError, Dataset, DataSpec, Reference

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from cmkit import Cond


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

    def __len__(self) -> int:
        return len(self.files)

    def name(self, index: int) -> str:
        """The path of picture `index`."""
        return str(self.open_picture(index))

    def open_picture(self, index: int) -> Path:
        """The file of picture `index`."""
        return self.root / self.files[index].name

    def fingerprint(self) -> str:
        """SHA-256 of names and contents."""
        digest = hashlib.sha256()
        with ThreadPoolExecutor() as threads:
            contents = threads.map(self._sha256, range(len(self)))
            for file, content in zip(self.files, contents, strict=True):
                digest.update(os.fsencode(f"{file.name}\0{file.size}\0{content}\n"))
        return digest.hexdigest()

    def _sha256(self, index: int) -> str:
        with self.open_picture(index).open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()


class ImageFolder(Dataset):
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
    """Each folder in `path` is a class, numbered in the order of their names."""
    flip: bool = False
    """Mirror half of the training images, chosen anew each time; metrics see none mirrored."""

    reference_npz: str | None = None
    """A published reference file (guided-diffusion's or EDM's .npz) that metrics compare with,
    instead of the pictures."""

    def spec(self) -> DataSpec:
        """Shape and classes; opens every file, DataError names the first that is no picture."""
        from cmkit_std.datasets.pictures import check

        folder, classes = self._folder()
        check(folder, range(len(folder)))
        if self.reference_npz:
            from cmkit_std.datasets import reference_npz

            reference_npz.statistics(Path(self.reference_npz).expanduser(), self.channels)
        return DataSpec(self.channels, self.resolution, classes if self.labels else None)

    def declared(self) -> DataSpec | None:
        """The same without the pictures, where they have no classes."""
        return None if self.labels else DataSpec(self.channels, self.resolution)

    def batches(
        self, size: int, seed: int, device: torch.device, start: int = 0
    ) -> Iterator[tuple[Tensor, Cond]]:
        """Endless (x0 in [-1, 1], cond) from batch `start` on, a function of (seed, batch)."""
        import numpy as np

        from cmkit_std.datasets.pictures import batches

        folder, _ = self._folder()
        labels = np.array([file.label for file in folder.files]) if self.labels else None
        shape = (self.channels, self.resolution)
        return batches(folder, shape, labels, self.flip, size, seed, device, start)

    def reference(self) -> Reference:
        """The published statistics, or all pictures, resized and cropped, none mirrored."""
        if self.reference_npz:
            from cmkit_std.datasets import reference_npz

            return reference_npz.read(Path(self.reference_npz).expanduser(), self.channels)
        from cmkit_std.datasets.pictures import reference

        return reference(self._folder()[0], (self.channels, self.resolution))

    def _folder(self) -> tuple[Folder, int]:
        """(pictures in the order of their names, number of classes)."""
        root = Path(self.path).expanduser()
        if not root.is_dir():
            raise DataError(f"dataset.path = {self.path!r}: no such folder")
        if not self.labels:
            return Folder(root, _below(root, root, 0)), 0
        loose = [entry.name for entry in _visible(root) if not _is_folder(entry)]
        if loose:
            raise DataError(
                f"{root / loose[0]}: not in a folder of its class; move it, or read it with"
                " image_folder and dataset.labels = false"
            )
        names = sorted(entry.name for entry in _visible(root))
        if not names:
            raise DataError(f"{root}: no folder in it; each class needs one of its pictures")
        files = [
            file for label, name in enumerate(names) for file in _below(root, root / name, label)
        ]
        return Folder(root, tuple(files)), len(names)


def _below(root: Path, folder: Path, label: int) -> tuple[File, ...]:
    """Every visible file below `folder`, by name; DataError when there is none."""
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
    if not files:
        raise DataError(f"{folder}: no pictures in it; put some there, or remove the folder")
    return tuple(sorted(files, key=lambda file: file.name))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself, of which `_file` says so
        return False


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
