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

from cmkit import Cond, DataError, Rng, permutation

BATCHES_AHEAD = 4

Labels = np.ndarray | list[int]
"""The class of each image, (N,)."""


class Images(TorchDataset[Tensor], ABC):
    """uint8 images (C, H, W) by number, as metrics take them, and training batches of them.

    `labels` are their classes, (N,) or None; `flip` mirrors half of the images of batches.
    """

    labels: Labels | None
    flip: bool

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

        Images in memory live on `device` and are gathered there: only indices are copied to it, and
        the host does not wait for that. Others are read ahead in threads.
        """
        labels = None
        if self.labels is not None:
            labels = torch.as_tensor(self.labels, dtype=torch.int64).to(device)
        indices = batch_indices(len(self), size, seed, start)
        if self.held is None:
            stream = _ahead(self.row, indices, device)
        else:
            stream = _gathered(self.held, indices, device)
        for batch, (index, images) in enumerate(stream, start):
            x0 = to_x0(images)
            if self.flip:
                x0 = flipped(x0, seed, batch)
            yield x0, Cond(label=None if labels is None else labels[index])


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


def batch_indices(n: int, size: int, seed: int, start: int = 0) -> Iterator[np.ndarray]:
    """Endless index arrays, (size,) int64 in 0 .. n - 1, from batch `start` on.

    Each epoch is one shuffle of all n images; batches run across the border of epochs, so every
    image is seen exactly once an epoch whatever the batch size.
    """
    epoch, offset = divmod(start * size, n)
    order = permutation(seed, "data", epoch, n)
    while True:
        taken: list[np.ndarray] = []
        missing = size
        while missing:
            if offset == n:
                epoch, offset = epoch + 1, 0
                order = permutation(seed, "data", epoch, n)
            part = order[offset : offset + missing]
            taken.append(part)
            offset += len(part)
            missing -= len(part)
        yield np.concatenate(taken)


def pool() -> ThreadPoolExecutor:
    """Threads to decode in: Pillow and file reads release the interpreter's lock."""
    return ThreadPoolExecutor(min(16, os.cpu_count() or 1), thread_name_prefix="decode")


def _gathered(
    images: np.ndarray, indices: Iterable[np.ndarray], device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """(indices, uint8 images (B, C, H, W)), both on `device`, where all images are."""
    pixels = torch.from_numpy(images).to(device)
    for chosen in indices:
        index = to_device(chosen, device)
        yield index, pixels[index]


def _ahead(
    image: Callable[[int], np.ndarray], indices: Iterable[np.ndarray], device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """The same of images that are read in threads, which go on to the next batches."""
    threads = pool()
    waiting: deque[tuple[np.ndarray, list[Future[np.ndarray]]]] = deque()
    try:
        for chosen in indices:
            waiting.append((chosen, [threads.submit(image, int(i)) for i in chosen]))
            if len(waiting) > BATCHES_AHEAD:
                due, futures = waiting.popleft()
                images = np.stack([future.result() for future in futures])
                yield to_device(due, device), to_device(images, device)
    finally:
        threads.shutdown(cancel_futures=True)


def to_x0(images: Tensor) -> Tensor:
    """uint8 -> float32 in [-1, 1]: u / 127.5 - 1."""
    return images.to(torch.float32, memory_format=torch.channels_last).div_(127.5).sub_(1)


def flipped(x0: Tensor, seed: int, batch: int) -> Tensor:
    """x0 with about half of its images mirrored, chosen by (seed, batch number)."""
    coins = Rng(seed, "data/flip", batch, torch.device("cpu")).integers(2, len(x0)).bool()
    mirrored = to_device(coins.numpy(), x0.device).view(-1, 1, 1, 1)
    return torch.where(mirrored, x0.flip(-1), x0)


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """`array` on `device`, without waiting for it."""
    x = torch.from_numpy(array)
    return (x.pin_memory() if device.type == "cuda" else x).to(device, non_blocking=True)
