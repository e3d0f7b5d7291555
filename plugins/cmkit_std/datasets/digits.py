"""The handwritten digits of the UCI repository (Alpaydin and Kaynak, 1998), shipped by
scikit-learn."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from cmkit import DataError, DataSpec
from cmkit_std.datasets.on_disk import OnDisk, counted

if TYPE_CHECKING:
    from cmkit_std.datasets.pixels import Pixels


class Digits(OnDisk):
    """1,797 scanned handwritten digits, 8x8 in 17 grey levels, found inside scikit-learn.

    Every fifth image of each class, in the order of the file, is "test" (355 images); the other
    1,442 are "train". The same people wrote in both. Nothing is downloaded and nothing flipped.
    """

    split: Literal["train", "test", "all"] = "train"
    """Which part of the images."""
    labels: bool = True
    """Give the digit as a class label."""
    inverted: bool = False
    """Dark digits on light, such as for a trained model to be tuned to."""

    def spec(self) -> DataSpec:
        """One channel, 8x8, ten classes; DataError when scikit-learn's file is not there."""
        _, labels = digits(self.split)
        if not self.labels:
            return DataSpec(channels=1, resolution=8)
        return DataSpec(1, 8, 10, tuple("0123456789"), counted(labels, 10))

    def declared(self) -> DataSpec:
        """The same without the file, but for the numbers of images."""
        return DataSpec(1, 8, 10, tuple("0123456789")) if self.labels else DataSpec(1, 8)

    def smallest(self, data: DataSpec | None = None) -> Mapping[str, Any]:
        """None: they are at hand."""
        return {}

    def heldout(self) -> Digits | None:
        """Of "train" the test split."""
        return self.model_copy(update={"split": "test"}) if self.split == "train" else None

    def _images(self) -> Pixels:
        from cmkit_std.datasets.pixels import Pixels

        images, labels = digits(self.split)
        drawn = 255 - images if self.inverted else images
        return Pixels(drawn, labels if self.labels else None)


def digits(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, 1, 8, 8) uint8, grey level v of 0 .. 16 as round(255 v / 16), and labels (N,)."""
    images, labels = _read(_file())
    held_out = np.zeros(len(labels), dtype=bool)
    for digit in range(10):
        held_out[np.flatnonzero(labels == digit)[4::5]] = True
    chosen = {"train": ~held_out, "test": held_out, "all": slice(None)}[split]
    return images[chosen], labels[chosen]


def _file() -> Path:
    """scikit-learn's own copy, without the three seconds that importing scikit-learn takes."""
    package = importlib.util.find_spec("sklearn")
    folders = package.submodule_search_locations if package else None
    file = Path(folders[0] if folders else "sklearn") / "datasets" / "data" / "digits.csv.gz"
    if not file.is_file():
        raise DataError(f"dataset digits: {file}: no such file; pip install scikit-learn")
    return file


@functools.lru_cache(maxsize=1)
def _read(file: Path) -> tuple[np.ndarray, np.ndarray]:
    try:
        table = np.loadtxt(file, delimiter=",")
    except (OSError, EOFError, ValueError) as error:
        raise DataError(f"{file}: damaged ({error}); reinstall scikit-learn") from error
    images = np.round(table[:, :64] * (255 / 16)).astype(np.uint8).reshape(-1, 1, 8, 8)
    return images, table[:, 64].astype(np.int64)
