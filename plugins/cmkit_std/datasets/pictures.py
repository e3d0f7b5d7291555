"""From encoded pictures (PNG, JPEG, ..) to training batches and to the reference of metrics."""

from __future__ import annotations

import functools
import hashlib
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset

from cmkit import Cond, DataError, Reference
from cmkit.pictures import FORMATS
from cmkit_std.datasets.pixels import pool, resident_batches, streamed_batches

MAX_PIXELS = 2**26
RESIDENT_BYTES = 2**31
MODES = frozenset({"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr"})

Shape = tuple[int, int]
"""Channels, and height = width."""


class Source(Protocol):
    """Encoded pictures by number; two are equal, and hash so, while no picture changed."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """How errors call picture `index`."""

    def open_picture(self, index: int) -> Path | BinaryIO:
        """What Pillow is to read picture `index` from."""

    def fingerprint(self) -> str:
        """What changes whenever a picture does."""


def check(source: Source, indices: Iterable[int]) -> None:
    """DataError for the first whose header is not that of a picture that can be used."""
    with pool() as threads, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow only warns of what `_open` refuses
        for _ in threads.map(lambda index: _open(source, index).close(), indices):
            pass


def batches(
    source: Source,
    shape: Shape,
    labels: np.ndarray | None,
    flip: bool,
    size: int,
    seed: int,
    device: torch.device,
    start: int,
) -> Iterator[tuple[Tensor, Cond]]:
    """Endless (x0, cond): gathered on the device if all pixels fit, else decoded ahead of time."""
    if _fits(source, shape):
        pixels = _decoded(source, shape)
        return resident_batches(pixels, labels, size, seed, device, start, flip)
    decoder = Decoder(source, shape)
    return streamed_batches(decoder.decode, len(source), labels, size, seed, device, start, flip)


def reference(source: Source, shape: Shape) -> Reference:
    """All pictures as they are decoded, with the SHA-256 of their fingerprint and shape."""
    digest = hashlib.sha256(f"{source.fingerprint()} {shape}".encode())
    return Reference(Decoder(source, shape), digest.hexdigest())


class Decoder(TorchDataset[Tensor]):
    """Pictures as uint8 (C, R, R), decoded when asked for, or once if they all fit in memory."""

    def __init__(self, source: Source, shape: Shape):
        self.source, self.shape = source, shape

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Tensor:
        kept = self._kept
        return torch.from_numpy(self.decode(index) if kept is None else kept[index])

    def __getitems__(self, indices: list[int]) -> list[Tensor]:
        """The same, many at once: torch's DataLoader asks for it."""
        if self._kept is not None:
            return [self[index] for index in indices]
        with pool() as threads:
            return [torch.from_numpy(image) for image in threads.map(self.decode, indices)]

    def decode(self, index: int) -> np.ndarray:
        """Picture `index`, (C, R, R) uint8."""
        return decode(self.source, index, self.shape)

    @functools.cached_property
    def _kept(self) -> np.ndarray | None:
        return _decoded(self.source, self.shape) if _fits(self.source, self.shape) else None


def decode(source: Source, index: int, shape: Shape) -> np.ndarray:
    """Picture `index` resized and cropped, (C, R, R) uint8; DataError when it is damaged."""
    channels, resolution = shape
    with _open(source, index) as image:
        try:
            image.load()
            picture = cropped(_flat(image, "RGB" if channels == 3 else "L"), resolution)
        except Exception as error:  # Pillow's decoders raise almost anything
            raise _damaged(source.name(index), error) from error
    return np.asarray(picture).reshape(resolution, resolution, channels).transpose(2, 0, 1).copy()


def cropped(image: Image.Image, resolution: int) -> Image.Image:
    """The middle square, (resolution, resolution): box halvings, then bicubic (ADM).

    ValueError for a strip so narrow that enlarging it would take more than MAX_PIXELS.
    """
    while min(image.size) >= 2 * resolution:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = resolution / min(image.size)
    size = (round(image.width * scale), round(image.height * scale))
    if size[0] * size[1] > MAX_PIXELS:
        raise ValueError(f"{image.width}x{image.height} is too narrow a strip")
    image = image.resize(size, Image.Resampling.BICUBIC)
    left, top = (image.width - resolution) // 2, (image.height - resolution) // 2
    return image.crop((left, top, left + resolution, top + resolution))


def _open(source: Source, index: int) -> Image.Image:
    """The picture's header only; DataError for no picture, too many pixels, or a strange mode."""
    stream = source.open_picture(index)
    try:
        image = Image.open(stream, formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(
            f"{source.name(index)}: {error}; at most {MAX_PIXELS} pixels: shrink it"
        ) from error
    except Exception as error:  # Pillow's readers raise almost anything
        name = source.name(index)
        if isinstance(error, UnidentifiedImageError):
            raise DataError(
                f"{name}: not a picture of {', '.join(FORMATS)}; convert it, or move it away"
            ) from error
        raise _damaged(name, error) from error
    fault = ""
    if image.width * image.height > MAX_PIXELS:
        fault = f"{image.width}x{image.height} pixels, more than {MAX_PIXELS} in all; shrink it"
    elif image.mode not in MODES:
        fault = f"mode {image.mode!r}, not 8 bits a channel; convert it to 8-bit RGB"
    if fault:
        image.close()
        raise DataError(f"{source.name(index)}: {fault}")
    return image


def _damaged(name: str, error: Exception) -> DataError:
    if isinstance(error, PermissionError):
        return DataError(f"{name}: {error.strerror}; give this user permission to read it")
    reason = str(error) or type(error).__name__
    return DataError(f"{name}: cannot be decoded ({reason}); replace it or move it away")


def _flat(image: Image.Image, mode: str) -> Image.Image:
    """The picture in `mode`, transparency laid on white."""
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert(mode)


def _fits(source: Source, shape: Shape) -> bool:
    channels, resolution = shape
    return len(source) * channels * resolution**2 <= RESIDENT_BYTES


@functools.lru_cache(maxsize=1)
def _decoded(source: Source, shape: Shape) -> np.ndarray:
    """All pictures, (N, C, R, R) uint8; decoded again when the source changed."""
    with pool() as threads:
        images = list(threads.map(lambda index: decode(source, index, shape), range(len(source))))
    return np.stack(images)
