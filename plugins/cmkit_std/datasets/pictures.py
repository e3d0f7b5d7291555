"""Decoding pictures in threads, ahead of training; the torch half of `image_folder`."""

from __future__ import annotations

import functools
import hashlib
import os
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset

from cmkit import Cond, DataError, Reference
from cmkit_std.datasets.epochs import batch_indices
from cmkit_std.datasets.pixels import flipped, resident_batches, to_device, to_x0

if TYPE_CHECKING:
    from cmkit_std.datasets.image_folder import File

MAX_PIXELS = 2**26
RESIDENT_BYTES = 2**31
BATCHES_AHEAD = 4
MODES = frozenset({"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr"})

Shape = tuple[int, int]
"""Channels, and height = width."""


def check(root: Path, files: Sequence[File]) -> None:
    """DataError for the first file whose header is not that of a picture that can be used."""
    with _pool() as pool, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow only warns of what `_open` refuses
        for _ in pool.map(lambda file: _open(root / file.name).close(), files):
            pass


def batches(
    root: Path,
    files: tuple[File, ...],
    shape: Shape,
    labels: bool,
    flip: bool,
    size: int,
    seed: int,
    device: torch.device,
    start: int,
) -> Iterator[tuple[Tensor, Cond]]:
    """Endless (x0, cond): gathered on the device if all pixels fit, else decoded ahead of time."""
    classes = np.array([file.label for file in files], np.int64) if labels else None
    if _fits(files, shape):
        pixels = _decoded(root, files, shape)
        yield from resident_batches(pixels, classes, size, seed, device, start, flip)
        return
    indices = batch_indices(len(files), size, seed, start)
    stream = _ahead(Decoder(root, files, shape), indices)
    for batch, (chosen, images) in enumerate(stream, start):
        x0 = to_x0(to_device(images, device))
        if flip:
            x0 = flipped(x0, seed, batch)
        label = None
        if classes is not None:
            label = to_device(torch.from_numpy(classes[chosen]), device)
        yield x0, Cond(label=label)


def reference(root: Path, files: tuple[File, ...], shape: Shape) -> Reference:
    """All pictures as they are decoded, with the SHA-256 of names, contents and shape."""
    digest = hashlib.sha256(repr(shape).encode())
    with _pool() as pool:
        contents = pool.map(lambda file: _sha256(root / file.name), files)
        for file, content in zip(files, contents, strict=True):
            digest.update(os.fsencode(f"{file.name}\0{file.size}\0{content}\n"))
    return Reference(Decoder(root, files, shape), digest.hexdigest())


class Decoder(TorchDataset[Tensor]):
    """Pictures as uint8 (C, R, R), decoded when asked for, or once if they all fit in memory."""

    def __init__(self, root: Path, files: tuple[File, ...], shape: Shape):
        self.root, self.files, self.shape = root, files, shape

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor:
        kept = self._kept
        return torch.from_numpy(self.decode(index) if kept is None else kept[index])

    def __getitems__(self, indices: list[int]) -> list[Tensor]:
        """The same, many at once: torch's DataLoader asks for it."""
        if self._kept is not None:
            return [self[index] for index in indices]
        with _pool() as pool:
            return [torch.from_numpy(image) for image in pool.map(self.decode, indices)]

    def decode(self, index: int) -> np.ndarray:
        """Picture `index` from its file, (C, R, R) uint8."""
        return decode(self.root / self.files[index].name, self.shape)

    @functools.cached_property
    def _kept(self) -> np.ndarray | None:
        fits = _fits(self.files, self.shape)
        return _decoded(self.root, self.files, self.shape) if fits else None


def decode(file: Path, shape: Shape) -> np.ndarray:
    """The picture resized and cropped, (C, R, R) uint8; DataError when it is damaged."""
    channels, resolution = shape
    with _open(file) as image:
        try:
            image.load()
            picture = cropped(_flat(image, "RGB" if channels == 3 else "L"), resolution)
        except Exception as error:  # Pillow's decoders raise almost anything
            raise _damaged(file, error) from error
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


def _open(file: Path) -> Image.Image:
    """The picture's header only; DataError for no picture, too many pixels, or a strange mode."""
    try:
        image = Image.open(file)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(f"{file}: {error}; at most {MAX_PIXELS} pixels: shrink it") from error
    except Exception as error:  # Pillow's readers raise almost anything
        if isinstance(error, UnidentifiedImageError):
            raise DataError(f"{file}: not a picture that Pillow knows; move it away") from error
        raise _damaged(file, error) from error
    fault = ""
    if image.width * image.height > MAX_PIXELS:
        fault = f"{image.width}x{image.height} pixels, more than {MAX_PIXELS} in all; shrink it"
    elif image.mode not in MODES:
        fault = f"mode {image.mode!r}, not 8 bits a channel; convert it to 8-bit RGB"
    if fault:
        image.close()
        raise DataError(f"{file}: {fault}")
    return image


def _damaged(file: Path, error: Exception) -> DataError:
    reason = str(error) or type(error).__name__
    return DataError(f"{file}: cannot be decoded ({reason}); replace it or move it away")


def _flat(image: Image.Image, mode: str) -> Image.Image:
    """The picture in `mode`, transparency laid on white."""
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert(mode)


def _ahead(decoder: Decoder, indices: Iterable[np.ndarray]) -> Iterator[tuple[np.ndarray, Tensor]]:
    """(indices, uint8 images (B, C, R, R)), while the next batches are decoded in threads."""
    pool = _pool()
    waiting: deque[tuple[np.ndarray, list[Future[np.ndarray]]]] = deque()
    try:
        for chosen in indices:
            waiting.append((chosen, [pool.submit(decoder.decode, int(i)) for i in chosen]))
            if len(waiting) > BATCHES_AHEAD:
                due, futures = waiting.popleft()
                yield due, torch.from_numpy(np.stack([future.result() for future in futures]))
    finally:
        pool.shutdown(cancel_futures=True)


def _fits(files: Sequence[File], shape: Shape) -> bool:
    channels, resolution = shape
    return len(files) * channels * resolution**2 <= RESIDENT_BYTES


@functools.lru_cache(maxsize=1)
def _decoded(root: Path, files: tuple[File, ...], shape: Shape) -> np.ndarray:
    """All pictures, (N, C, R, R) uint8; decoded again when a file's size or time changed."""
    with _pool() as pool:
        images = list(pool.map(lambda file: decode(root / file.name, shape), files))
    return np.stack(images)


def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(min(16, os.cpu_count() or 1), thread_name_prefix="decode")


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
