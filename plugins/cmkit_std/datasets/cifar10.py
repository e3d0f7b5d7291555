"""CIFAR-10 (Krizhevsky: Learning Multiple Layers of Features from Tiny Images, 2009), from files on
this disk."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from cmkit import DataError, DataSpec
from cmkit_std.datasets.on_disk import File, Published, counted

if TYPE_CHECKING:
    from cmkit_std.datasets.pixels import Pixels

FILES = {
    "train": tuple(f"data_batch_{n}.bin" for n in range(1, 6)),
    "test": ("test_batch.bin",),
}
CLASSES = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)
IMAGES = 10_000
RECORD = 1 + 3 * 32 * 32
"""Bytes of one image: its label, then its red, green and blue planes, row by row."""


class CIFAR10(Published):
    """60,000 photographs of 10 classes, 3x32x32, in the binary version of the archive.

    `path` is the folder cifar-10-batches-bin, of the files data_batch_1.bin to data_batch_5.bin and
    test_batch.bin. The Python version is of pickles, which can run code, and is refused. Nothing is
    downloaded.
    """

    path: str
    """The folder."""
    split: Literal["train", "test"] = "train"
    """50,000 or 10,000 images."""
    labels: bool = True
    """Give the kind of thing as a class label."""

    def spec(self) -> DataSpec:
        """Three channels, ten classes; reads every file whole, DataError when one is not right."""
        labels = self._images().labels
        self._check_published()
        if labels is None:
            return DataSpec(channels=3, resolution=32)
        return DataSpec(3, 32, 10, CLASSES, counted(labels, 10))

    def declared(self) -> DataSpec:
        """The same without the files, but for the numbers of images."""
        return DataSpec(3, 32, 10, CLASSES) if self.labels else DataSpec(3, 32)

    def heldout(self) -> CIFAR10 | None:
        """Of "train" the test split."""
        test = {"split": "test", "reference_npz": None}
        return self.model_copy(update=test) if self.split == "train" else None

    def _images(self) -> Pixels:
        from cmkit_std.datasets.pixels import Pixels

        files = tuple(self._root / name for name in FILES[self.split])
        for file in files:
            if not file.is_file():
                raise DataError(_missing(file))
        images, labels = _load(tuple(map(File.at, files)))
        return Pixels(images, labels if self.labels else None, self.flip)


def _missing(file: Path) -> str:
    if file.with_suffix("").is_file():
        return (
            f"{file}: no such file, but the pickles of the Python version, which are not read;"
            " fetch cifar-10-binary.tar.gz"
        )
    return (
        f"{file}: no such file; unpack cifar-10-binary.tar.gz and name its folder"
        " cifar-10-batches-bin in dataset.path"
    )


@functools.lru_cache(maxsize=2)
def _load(files: tuple[File, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, 3, 32, 32) and labels (N,), uint8; read again only when a size or time changed."""
    records = np.concatenate([_records(file) for file in files])
    return np.ascontiguousarray(records[:, 1:]).reshape(-1, 3, 32, 32), records[:, 0].copy()


def _records(file: File) -> np.ndarray:
    """The images of a file with their labels, (10,000, 3,073) uint8."""
    path, due = file.path, IMAGES * RECORD
    if file.size != due:
        raise DataError(
            f"{path}: {file.size} bytes, not the {due} of {IMAGES} images; fetch it again"
        )
    try:
        records = np.fromfile(path, np.uint8).reshape(-1, RECORD)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error}); fetch it again") from error
    labels = records[:, 0]
    if labels.max() > 9:
        raise DataError(
            f"{path}: label {labels.max()} of image {labels.argmax()} is not one of 0 .. 9;"
            " fetch it again"
        )
    return records
