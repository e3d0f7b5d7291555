"""CIFAR-10 (Krizhevsky: Learning Multiple Layers of Features from Tiny Images, 2009), from files on
this disk."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from cmkit import DataError, Dataset, DataSpec, Reference

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from cmkit import Cond

FILES = {
    "train": tuple(f"data_batch_{n}.bin" for n in range(1, 6)),
    "test": ("test_batch.bin",),
}
IMAGES = 10_000
RECORD = 1 + 3 * 32 * 32
"""Bytes of one image: its label, then its red, green and blue planes, row by row."""


class CIFAR10(Dataset):
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
    flip: bool = False
    """Mirror half of the training images, chosen anew each time; metrics see none mirrored."""
    reference_npz: str | None = None
    """A published reference file (EDM's .npz) that metrics compare with, instead of the images."""

    def spec(self) -> DataSpec:
        """Three channels, ten classes; reads every file whole, DataError when one is not right."""
        self._arrays()
        if self.reference_npz:
            from cmkit_std.datasets import reference_npz

            reference_npz.check(Path(self.reference_npz).expanduser(), 3)
        return self.declared()

    def declared(self) -> DataSpec:
        """The same, without the files."""
        return DataSpec(channels=3, resolution=32, num_classes=10 if self.labels else None)

    def batches(
        self, size: int, seed: int, device: torch.device, start: int = 0
    ) -> Iterator[tuple[Tensor, Cond]]:
        """Endless (x0 in [-1, 1], cond) from batch `start` on, a function of (seed, batch)."""
        from cmkit_std.datasets.pixels import resident_batches

        images, labels = self._arrays()
        return resident_batches(
            images, labels if self.labels else None, size, seed, device, start, self.flip
        )

    def reference(self) -> Reference:
        """The published statistics, or the images of the split, none mirrored."""
        from cmkit_std.datasets.pixels import reference

        if self.reference_npz:
            from cmkit_std.datasets import reference_npz

            return reference_npz.read(Path(self.reference_npz).expanduser(), 3)
        return reference(self._arrays()[0])

    def _arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """Images (N, 3, 32, 32) uint8 and labels (N,) uint8."""
        folder = Path(self.path).expanduser()
        files = tuple(folder / name for name in FILES[self.split])
        for file in files:
            if not file.is_file():
                raise DataError(_missing(file))
        return _load(tuple((file, file.stat().st_mtime_ns) for file in files))


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
def _load(stamps: tuple[tuple[Path, int], ...]) -> tuple[np.ndarray, np.ndarray]:
    """All files, read again only when the time of one changed."""
    records = np.concatenate([_records(file) for file, _ in stamps])
    return np.ascontiguousarray(records[:, 1:]).reshape(-1, 3, 32, 32), records[:, 0].copy()


def _records(file: Path) -> np.ndarray:
    """The images of a file with their labels, (10,000, 3,073) uint8."""
    size = file.stat().st_size
    if size != IMAGES * RECORD:
        raise DataError(
            f"{file}: {size} bytes, not the {IMAGES * RECORD} of {IMAGES} images; fetch it again"
        )
    try:
        records = np.fromfile(file, np.uint8).reshape(-1, RECORD)
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: cannot be read ({error}); fetch it again") from error
    if records[:, 0].max() > 9:
        index = int(records[:, 0].argmax())
        raise DataError(
            f"{file}: label {records[index, 0]} of image {index} is not one of 0 .. 9; fetch it"
            " again"
        )
    return records
