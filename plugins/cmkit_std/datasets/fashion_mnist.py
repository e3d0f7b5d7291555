"""Fashion-MNIST (Xiao, Rasul, Vollgraf, 2017), from IDX files on this disk."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from cmkit import DataError, Dataset, DataSpec, Reference
from cmkit_std.datasets.idx import read_idx

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from cmkit import Cond

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
PREFIXES = {"train": ("train",), "test": ("t10k",), "all": ("train", "t10k")}


class FashionMNIST(Dataset):
    """70,000 grey pictures of clothing, 28x28, ten classes, in the IDX files of MNIST.

    MNIST's own files, which have the same names, can be read as well. Nothing is downloaded.
    """

    path: str | None = None
    """Folder of the four IDX files, gzipped or not; by default that of Debian's package
    dataset-fashion-mnist."""
    split: Literal["train", "test", "all"] = "train"
    """60,000, 10,000 or 70,000 images."""
    labels: bool = True
    """Give the kind of clothing as a class label."""
    resolution: Literal[28, 32] = 32
    """32 adds a black border of two pixels, so that networks can halve the image five times."""

    def spec(self) -> DataSpec:
        """One channel, ten classes; reads every file whole, DataError when one is not right."""
        self._arrays()
        return self.declared()

    def declared(self) -> DataSpec:
        """The same, without the files."""
        return DataSpec(
            channels=1, resolution=self.resolution, num_classes=10 if self.labels else None
        )

    def batches(
        self, size: int, seed: int, device: torch.device, start: int = 0
    ) -> Iterator[tuple[Tensor, Cond]]:
        """Endless (x0 in [-1, 1], cond) from batch `start` on, a function of (seed, batch)."""
        from cmkit_std.datasets.pixels import resident_batches

        images, labels = self._arrays()
        return resident_batches(
            images, labels if self.labels else None, size, seed, device, start=start
        )

    def reference(self) -> Reference:
        """The images of the split."""
        from cmkit_std.datasets.pixels import reference

        return reference(self._arrays()[0])

    def _arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """Images (N, 1, R, R) uint8 and labels (N,) uint8."""
        folder = Path(self.path).expanduser() if self.path else DEBIAN
        files = [
            _find(folder, f"{prefix}-{kind}")
            for prefix in PREFIXES[self.split]
            for kind in ("images-idx3-ubyte", "labels-idx1-ubyte")
        ]
        stamps = tuple((file, file.stat().st_size, file.stat().st_mtime_ns) for file in files)
        return _load(stamps, self.resolution)


def _find(folder: Path, name: str) -> Path:
    for file in (folder / name, folder / f"{name}.gz"):
        if file.is_file():
            return file
    raise DataError(
        f"{folder / name}[.gz]: no such file; apt-get install dataset-fashion-mnist, or name the"
        " folder of the IDX files in dataset.path"
    )


@functools.lru_cache(maxsize=2)
def _load(
    stamps: tuple[tuple[Path, int, int], ...], resolution: int
) -> tuple[np.ndarray, np.ndarray]:
    """All files, read again only when the size or time of one changed."""
    files = [file for file, _, _ in stamps]
    pairs = [_pair(*pair) for pair in zip(files[::2], files[1::2], strict=True)]
    images = np.concatenate([images for images, _ in pairs])
    border = (resolution - 28) // 2
    padded = np.pad(images[:, None], ((0, 0), (0, 0), (border, border), (border, border)))
    return padded, np.concatenate([labels for _, labels in pairs])


def _pair(images_file: Path, labels_file: Path) -> tuple[np.ndarray, np.ndarray]:
    images, labels = read_idx(images_file, 3), read_idx(labels_file, 1)
    if images.shape[1:] != (28, 28):
        height, width = images.shape[1:]
        raise DataError(f"{images_file}: images of {height}x{width}, not 28x28; fetch it again")
    if len(images) != len(labels):
        raise DataError(
            f"{labels_file}: {len(labels)} labels for {len(images)} images of {images_file.name};"
            " fetch both again"
        )
    if labels.max() > 9:
        raise DataError(
            f"{labels_file}: label {labels.max()} of image {labels.argmax()} is not one of 0 .. 9;"
            " fetch it again"
        )
    return images, labels
