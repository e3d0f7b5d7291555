"""Fashion-MNIST (Xiao, Rasul, Vollgraf, 2017), from IDX files on this disk."""

from __future__ import annotations

import functools
import gzip
import math
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Literal, cast

import numpy as np

from cmkit import DataError, DataSpec
from cmkit_std.datasets.on_disk import File, OnDisk, counted

if TYPE_CHECKING:
    from cmkit_std.datasets.pixels import Pixels

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
CLASSES = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)
BEGINNINGS = ((9, 0, 0, 3, 0), (9, 2, 1, 1, 6))
"""The first labels of both files, by which they are told from MNIST's, whose classes are others."""
MAX_BYTES = 2**30
PREFIXES = {"train": ("train",), "test": ("t10k",), "all": ("train", "t10k")}


class FashionMNIST(OnDisk):
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
        labels = self._images().labels
        if labels is None:
            return DataSpec(channels=1, resolution=self.resolution)
        names = CLASSES if tuple(labels[:5]) in BEGINNINGS else ()
        return DataSpec(1, self.resolution, 10, names, counted(labels, 10))

    def declared(self) -> DataSpec:
        """The same without the files, but for names and numbers of the classes."""
        return DataSpec(1, self.resolution, 10 if self.labels else None)

    def heldout(self) -> FashionMNIST | None:
        """Of "train" the test split."""
        return self.model_copy(update={"split": "test"}) if self.split == "train" else None

    def _images(self) -> Pixels:
        from cmkit_std.datasets.pixels import Pixels

        folder = Path(self.path).expanduser() if self.path else DEBIAN
        files = [
            File.at(_find(folder, f"{prefix}-{kind}"))
            for prefix in PREFIXES[self.split]
            for kind in ("images-idx3-ubyte", "labels-idx1-ubyte")
        ]
        images, labels = _load(tuple(files), self.resolution)
        return Pixels(images, labels if self.labels else None)


def _find(folder: Path, name: str) -> Path:
    for file in (folder / name, folder / f"{name}.gz"):
        if file.is_file():
            return file
    raise DataError(
        f"{folder / name}[.gz]: no such file; apt-get install dataset-fashion-mnist, or name the"
        " folder of the IDX files in dataset.path"
    )


@functools.lru_cache(maxsize=2)
def _load(files: tuple[File, ...], resolution: int) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, 1, R, R) and labels (N,), uint8; read again only when a size or time changed."""
    pairs = [_pair(a.path, b.path) for a, b in zip(files[::2], files[1::2], strict=True)]
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


def read_idx(file: Path, axes: int) -> np.ndarray:
    """The uint8 array, with `axes` axes, of an IDX file, gzipped iff it is named .gz:
    two zero bytes, a type, the number of axes, their sizes, the bytes.

    Raises DataError for any byte too few, too many or wrong. Never holds more than the header
    announces, and never more than 1 GiB, whatever the file expands to.
    """
    try:
        with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as stream:
            return _read(cast(BinaryIO, stream), file, axes)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{file}: cannot be read ({error}); fetch it again") from error


def _read(stream: BinaryIO, file: Path, axes: int) -> np.ndarray:
    header = stream.read(4 + 4 * axes)
    magic = bytes([0, 0, 0x08, axes])  # uint8
    if header[:4] != magic:
        raise DataError(
            f"{file}: starts with {header[:4].hex() or 'nothing'}, not with {magic.hex()}; not an"
            f" IDX file of {axes}-dimensional bytes: fetch it again"
        )
    if len(header) < 4 + 4 * axes:
        raise DataError(f"{file}: truncated inside its header; fetch it again")
    shape = tuple(int(n) for n in np.frombuffer(header, ">u4", offset=4))
    size = math.prod(shape)
    if not 0 < size <= MAX_BYTES:
        raise DataError(f"{file}: its header announces {shape}, {size} bytes; fetch it again")
    body = stream.read(size + 1)
    if len(body) != size:
        fault = "trailing bytes" if len(body) > size else f"truncated to {len(body)}"
        raise DataError(f"{file}: its header announces {size} bytes, but {fault}; fetch it again")
    return np.frombuffer(body, np.uint8).reshape(shape).copy()
