"""Your own pictures."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, model_validator

from cmkit import DataError, DataSpec
from cmkit_std.datasets import archives, folders
from cmkit_std.datasets.folders import Folder
from cmkit_std.datasets.on_disk import Published

if TYPE_CHECKING:
    from cmkit_std.datasets.pictures import Decoder


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
        return archives.find(root, labels)
    if not root.is_dir():
        raise DataError(f"dataset.path = {path!r}: no such folder or file")
    return folders.find(root, labels)
