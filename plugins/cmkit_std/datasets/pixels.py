"""From uint8 images to training batches and to the reference of metrics."""

from __future__ import annotations

import functools
import hashlib
import os
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset

from cmkit import Cond, DataError
from cmkit.batches import Drawn, drawn, to_x0

BATCHES_AHEAD = 4

Labels = np.ndarray | list[int]
"""A number of each image, (N,)."""


class Images(TorchDataset[Tensor], ABC):
    """uint8 images (C, H, W) by number, as metrics take them, and training batches of them.

    They are `cmkit.kinds.Pictures`: `labels` are their classes, and `captions` the numbers of their
    captions, (N,) or None; `flip` mirrors half of the images of batches; `empty` is the probability
    with which a batch has the unconditional prompt in the place of a caption.
    """

    labels: Labels | None
    flip: bool
    captions: Labels | None = None
    empty: float = 0.0

    @functools.cached_property
    def held(self) -> np.ndarray | None:
        """All of them, (N, C, H, W), if they fit in memory."""
        return None

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def row(self, index: int) -> np.ndarray:
        """Image `index`, (C, H, W) uint8, in memory."""

    @abstractmethod
    def fingerprint(self) -> str:
        """What changes whenever an image does."""

    def __getitem__(self, index: int) -> Tensor:
        return torch.from_numpy(self.row(index))

    def __getitems__(self, indices: list[int]) -> list[Tensor]:
        """The same, many at once: torch's DataLoader asks for it."""
        if self.held is not None:
            return list(torch.from_numpy(self.held[indices]))
        with pool() as threads:
            return [torch.from_numpy(image) for image in threads.map(self.row, indices)]

    def batches(
        self, size: int, seed: int, device: torch.device, start: int = 0
    ) -> Iterator[tuple[Tensor, Cond]]:
        """Endless (x0 in [-1, 1], cond) from batch `start` on, a function of (seed, batch).

        Images in memory live on `device` and are gathered there: only numbers are copied to it, and
        the host does not wait for that. Others are read ahead in threads.
        """
        stream = drawn(self, size, seed, start)
        if self.held is None:
            batches = _ahead(self.row, stream, device)
        else:
            batches = _gathered(self.held, stream, device)
        for batch, images in batches:
            x0 = to_x0(images)
            if batch.mirrored is not None:
                mirrored = to_device(batch.mirrored, device).view(-1, 1, 1, 1)
                x0 = torch.where(mirrored, x0.flip(-1), x0)
            label, caption = (
                None if numbers is None else to_device(numbers, device)
                for numbers in (batch.label, batch.caption)
            )
            yield x0, Cond(label=label, caption=caption)


class Pixels(Images):
    """Images (N, C, H, W) held in memory."""

    def __init__(self, images: np.ndarray, labels: Labels | None = None, flip: bool = False):
        self.images, self.held, self.labels, self.flip = images, images, labels, flip

    def __len__(self) -> int:
        return len(self.images)

    def row(self, index: int) -> np.ndarray:
        return np.array(self.images[index])

    def fingerprint(self) -> str:
        """SHA-256 of their shape and bytes."""
        digest = hashlib.sha256(repr(self.images.shape).encode())
        digest.update(np.ascontiguousarray(self.images).data)
        return digest.hexdigest()


class Mapped(Pixels):
    """Images (N, C, H, W) in a `.npy` file, read from the disk when they are asked for; `digest` is
    their fingerprint.

    DataError for a damaged file. The file may be removed or replaced meanwhile: the operating
    system keeps the mapped one.
    """

    def __init__(
        self, file: Path, digest: str = "", labels: Labels | None = None, flip: bool = False
    ):
        try:
            super().__init__(np.load(file, mmap_mode="r", allow_pickle=False), labels, flip)
        except (OSError, ValueError, EOFError) as error:
            raise DataError(f"{file}: damaged ({error}); remove it, it is made again") from error
        self.file, self.digest, self.held = file, digest, None

    def __reduce__(self) -> tuple[type[Mapped], tuple[Path]]:
        """To another process the name of the file travels, not its pixels."""
        return Mapped, (self.file,)

    def fingerprint(self) -> str:
        return self.digest


def pool() -> ThreadPoolExecutor:
    """Threads to decode in: Pillow and file reads release the interpreter's lock."""
    return ThreadPoolExecutor(min(16, os.cpu_count() or 1), thread_name_prefix="decode")


def _gathered(
    images: np.ndarray, stream: Iterable[Drawn], device: torch.device
) -> Iterator[tuple[Drawn, Tensor]]:
    """Batches and their uint8 images (B, C, H, W) on `device`, where all images are."""
    pixels = torch.from_numpy(images).to(device)
    for batch in stream:
        yield batch, pixels[to_device(batch.index, device)]


def _ahead(
    image: Callable[[int], np.ndarray], stream: Iterable[Drawn], device: torch.device
) -> Iterator[tuple[Drawn, Tensor]]:
    """The same of images that are read in threads, which go on to the next batches."""
    threads = pool()
    waiting: deque[tuple[Drawn, list[Future[np.ndarray]]]] = deque()
    try:
        for batch in stream:
            waiting.append((batch, [threads.submit(image, int(i)) for i in batch.index]))
            if len(waiting) > BATCHES_AHEAD:
                due, futures = waiting.popleft()
                images = np.stack([future.result() for future in futures])
                yield due, to_device(images, device)
    finally:
        threads.shutdown(cancel_futures=True)


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """`array` on `device`, without waiting for it."""
    x = torch.from_numpy(array)
    return (x.pin_memory() if device.type == "cuda" else x).to(device, non_blocking=True)
