"""Your own pictures."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from cmkit import DataError, DataSpec
from cmkit.files import cached_digest
from cmkit_std.datasets.on_disk import Published, counted

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

    def open_picture(self, index: int) -> Path:
        """The file of picture `index`; DataError where it is no regular one."""
        file = self.files[index]
        if file.fault:
            raise DataError(f"{self.root / file.name}: {file.fault}")
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

    on_bad: Literal["error", "skip"] = "error"
    """What becomes of files that are no picture or a damaged one: an error, or they are left out,
    after all were decoded once, and listed."""

    def spec(self) -> DataSpec:
        """Shape and classes; opens every file, DataError names those that are no picture."""
        from cmkit_std.datasets.pictures import check

        folder = self._folder()
        check(folder, range(len(folder)))
        if self.reference_npz:
            from cmkit_std.datasets import reference_npz

            reference_npz.statistics(Path(self.reference_npz).expanduser(), self.channels)
        if not self.labels:
            return DataSpec(self.channels, self.resolution)
        names, counts = folder.classes, folder.counts()
        return DataSpec(self.channels, self.resolution, len(names), names, counts)

    def declared(self) -> DataSpec | None:
        """The same without the pictures, where they have no classes."""
        return None if self.labels else DataSpec(self.channels, self.resolution)

    def smallest(self, data: DataSpec | None = None) -> Mapping[str, Any]:
        """Where pictures have classes, two: the files alone say how many."""
        classes = 2 if self.labels else None
        return super().smallest(DataSpec(self.channels, self.resolution, classes))

    def faults(self) -> Iterator[str]:
        """What is wrong with each picture that cannot be decoded; reads them all."""
        from cmkit_std.datasets.pictures import undecodable

        return undecodable(self._folder(), self._shape)

    def left_out(self) -> tuple[str, ...]:
        """What is wrong with each picture that is left out."""
        if self.on_bad == "error":
            return ()
        from cmkit_std.datasets.pictures import judged

        return tuple(filter(None, judged(find(self.path, self.labels), self._shape)))

    def identity(self) -> dict[str, Any]:
        """How many pictures are used, how many are left out, and a digest of the contents."""
        bad = len(self.left_out())
        return {**super().identity(), **({"left_out": bad} if bad else {})}

    @property
    def _shape(self) -> tuple[int, int]:
        return self.channels, self.resolution

    def _folder(self) -> Folder:
        """The pictures that are used."""
        folder = find(self.path, self.labels)
        if self.on_bad == "error":
            return folder
        from cmkit_std.datasets.pictures import judged

        used = folder.only(i for i, bad in enumerate(judged(folder, self._shape)) if not bad)
        for label, name in enumerate(folder.classes or ("",)):
            if not any(file.label == label for file in used.files):
                raise DataError(f"{folder.root / name}: no sound picture in it; see on_bad")
        return used

    @property
    def _channels(self) -> int:
        return self.channels

    def _images(self) -> Decoder:
        from cmkit_std.datasets.pictures import Decoder

        folder = self._folder()
        labels = folder.labels() if self.labels else None
        return Decoder(folder, self._shape, labels, self.flip)


def find(path: str, labels: bool) -> Folder:
    """The pictures of `dataset.path`, in the order of their names, with classes if `labels`."""
    root = Path(path).expanduser()
    if not root.is_dir():
        raise DataError(f"dataset.path = {path!r}: no such folder")
    if not labels:
        return Folder(root, below(root, root, 0))
    loose = [entry.name for entry in _visible(root) if not _is_folder(entry)]
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
    files = [file for label, name in enumerate(names) for file in below(root, root / name, label)]
    shown = (os.fsencode(name).decode("utf-8", "backslashreplace") for name in names)
    return Folder(root, tuple(files), tuple(shown))


def below(root: Path, folder: Path, label: int) -> tuple[File, ...]:
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
