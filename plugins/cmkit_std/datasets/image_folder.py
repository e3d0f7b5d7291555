"""Your own pictures."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, Self

from pydantic import Field, model_validator

from cmkit import DataError, DataSpec
from cmkit.files import cached_digest
from cmkit_std.datasets.on_disk import Published, counted

if TYPE_CHECKING:
    from cmkit_std.datasets.pictures import Decoder


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


class ImageFolder(Published):
    """Your own pictures (PNG, JPEG, WebP, BMP, TIFF, GIF, PPM): a folder, or one folder a class, or
    a zip or tar of either.

    Every file below `path` must be a picture, hidden ones (.name) aside. Each is turned upright,
    halved by box averaging while twice too large, resized by bicubic interpolation until its
    shorter side fits, and cropped in the middle to a square, as ADM does (Dhariwal and Nichol,
    2021). Of 16 bits a channel the upper 8 are taken; transparent pictures are laid on white;
    palettes, grey and CMYK become RGB (or grey) by Pillow's formulas, without colour profiles; of
    an animation the first picture is used. Up to 2 GiB of pixels are decoded once and kept, larger
    sets are decoded as they are needed.

    An archive is read by index and not unpacked; a tar must not be compressed. Its pictures are
    those of the folder that it was made of, bit for bit, a folder that holds all others aside.
    """

    path: str
    """The folder, the zip or the tar."""
    resolution: int = Field(ge=4, le=4096)
    """Height and width after resizing and cropping."""
    channels: Literal[1, 3] = 3
    """3 for RGB, 1 for grey."""
    labels: bool = False
    """Each folder in `path` is a class, numbered in the order of their names, or, where all names
    are numbers, of these."""
    orientation: Literal["upright", "stored"] = "upright"
    """"upright" turns pictures as their EXIF says; "stored" leaves them as they lie in the file, as
    ADM does. A TIFF is always upright."""

    on_bad: Literal["error", "skip"] = "error"
    """What becomes of files that are no picture or a damaged one: an error, or they are left out,
    after all were decoded once, and listed."""

    validation: float = Field(0.0, ge=0, lt=1)
    """Share of the pictures that is held out, for metrics with heldout = true: those whose name
    below `path` has a low SHA-256, so that further pictures move none of them."""
    split: Literal["train", "validation"] = "train"
    """The pictures of training, or those that are held out."""

    @model_validator(mode="after")
    def _split(self) -> Self:
        if self.split == "validation" and not self.validation:
            raise ValueError('split = "validation" needs validation, the share that is held out')
        return self

    def spec(self) -> DataSpec:
        """Shape and classes; opens every file, DataError names those that are no picture."""
        from cmkit_std.datasets.pictures import check

        sound = self._sound()
        check(sound, range(len(sound)))
        folder = self._part(sound)
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

        return undecodable(self._sound(), self._shape)

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

    def heldout(self) -> ImageFolder | None:
        """The pictures that `validation` holds out."""
        if not self.validation or self.split == "validation":
            return None
        return self.model_copy(update={"split": "validation", "reference_npz": None})

    def _sound(self) -> Folder:
        """The pictures without those that are left out."""
        folder = find(self.path, self.labels)
        if self.on_bad == "error":
            return folder
        from cmkit_std.datasets.pictures import judged

        used = folder.only(i for i, bad in enumerate(judged(folder, self._shape)) if not bad)
        if empty := used.empty():
            raise DataError(f"{folder.root / empty[0]}: no sound picture in it; see on_bad")
        return used

    def _part(self, sound: Folder) -> Folder:
        """Those of `split`."""
        if not self.validation:
            return sound
        held = self.split == "validation"
        low = [fraction(file.name) < self.validation for file in sound.files]
        part = sound.only(i for i, is_low in enumerate(low) if is_low == held)
        if not len(part) or (not held and part.empty()):
            where = f"class {part.empty()[0]!r}" if len(part) else str(sound.root)
            raise DataError(
                f"dataset.validation = {self.validation:g}: of {where}, {len(sound)} pictures in"
                f" all, none is left to {'hold out' if held else 'train on'}; change it, or add"
                " pictures"
            )
        return part

    @property
    def _channels(self) -> int:
        return self.channels

    def _images(self) -> Decoder:
        from cmkit_std.datasets.pictures import Decoder

        folder = self._part(self._sound())
        labels = folder.labels() if self.labels else None
        upright = self.orientation == "upright"
        return Decoder(folder, self._shape, labels, self.flip, upright)


def fraction(name: str) -> float:
    """A number from 0 to 1 that follows from a picture's name alone, by its SHA-256."""
    return int.from_bytes(hashlib.sha256(os.fsencode(name)).digest()[:8]) / 2**64


def find(path: str, labels: bool) -> Folder:
    """The pictures of `dataset.path`, in the order of their names, with classes if `labels`."""
    root = Path(path).expanduser()
    if root.is_file():
        from cmkit_std.datasets import archives

        return archives.find(root, labels)
    if not root.is_dir():
        raise DataError(f"dataset.path = {path!r}: no such folder or file")
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
