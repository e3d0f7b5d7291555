"""From uint8 images to training batches and to the reference of metrics."""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset

from cmkit import Cond, DataError, Reference, Rng, permutation

BATCHES_AHEAD = 4


class Pixels(TorchDataset[Tensor]):
    """uint8 images (N, C, H, W) held in memory."""

    def __init__(self, images: np.ndarray):
        self.images = torch.from_numpy(images)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.images[index]

    def __getitems__(self, indices: list[int]) -> list[Tensor]:
        """The same, many at once: torch's DataLoader asks for it."""
        return list(self.images[indices])


class Mapped(TorchDataset[Tensor]):
    """uint8 images (N, C, H, W) in a `.npy` file, read from the disk when they are asked for.

    DataError for a damaged file. The file may be removed or replaced meanwhile: the operating
    system keeps the mapped one.
    """

    def __init__(self, file: Path):
        self.file = file
        try:
            self.images = np.load(file, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise DataError(f"{file}: damaged ({error}); remove it, it is made again") from error

    def __reduce__(self) -> tuple[type[Mapped], tuple[Path]]:
        """To another process the name of the file travels, not its pixels."""
        return Mapped, (self.file,)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return torch.from_numpy(self.row(index))

    def row(self, index: int) -> np.ndarray:
        """Image `index`, (C, H, W) uint8, in memory."""
        return np.array(self.images[index])


def reference(images: np.ndarray) -> Reference:
    """All of `images`, uint8 (N, C, H, W), with the SHA-256 of their shape and bytes."""
    digest = hashlib.sha256(repr(images.shape).encode())
    digest.update(np.ascontiguousarray(images).data)
    return Reference(Pixels(images), digest.hexdigest())


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


def resident_batches(
    images: np.ndarray,
    labels: np.ndarray | None,
    size: int,
    seed: int,
    device: torch.device,
    start: int = 0,
    flip: bool = False,
) -> Iterator[tuple[Tensor, Cond]]:
    """Endless (x0, cond) of uint8 images (N, C, H, W) that live on `device` and are gathered there.

    Only indices are copied to the device, and the host does not wait for it.
    """
    pixels = torch.from_numpy(images).to(device)
    classes = None if labels is None else torch.from_numpy(labels.astype(np.int64)).to(device)
    indices = batch_indices(len(images), size, seed, start)
    for batch, chosen in enumerate(indices, start):
        index = to_device(torch.from_numpy(chosen), device)
        x0 = to_x0(pixels[index])
        if flip:
            x0 = flipped(x0, seed, batch)
        yield x0, Cond(label=None if classes is None else classes[index])


def streamed_batches(
    image: Callable[[int], np.ndarray],
    count: int,
    labels: np.ndarray | None,
    size: int,
    seed: int,
    device: torch.device,
    start: int = 0,
    flip: bool = False,
) -> Iterator[tuple[Tensor, Cond]]:
    """The same batches of image(0) .. image(count - 1), uint8 (C, H, W), read ahead in threads."""
    stream = _ahead(image, batch_indices(count, size, seed, start))
    for batch, (chosen, images) in enumerate(stream, start):
        x0 = to_x0(to_device(images, device))
        if flip:
            x0 = flipped(x0, seed, batch)
        label = None
        if labels is not None:
            label = to_device(torch.from_numpy(labels[chosen].astype(np.int64)), device)
        yield x0, Cond(label=label)


def pool() -> ThreadPoolExecutor:
    """Threads to decode in: Pillow and file reads release the interpreter's lock."""
    return ThreadPoolExecutor(min(16, os.cpu_count() or 1), thread_name_prefix="decode")


def _ahead(
    image: Callable[[int], np.ndarray], indices: Iterable[np.ndarray]
) -> Iterator[tuple[np.ndarray, Tensor]]:
    """(indices, uint8 images (B, C, H, W)), while the next batches are read in threads."""
    threads = pool()
    waiting: deque[tuple[np.ndarray, list[Future[np.ndarray]]]] = deque()
    try:
        for chosen in indices:
            waiting.append((chosen, [threads.submit(image, int(i)) for i in chosen]))
            if len(waiting) > BATCHES_AHEAD:
                due, futures = waiting.popleft()
                yield due, torch.from_numpy(np.stack([future.result() for future in futures]))
    finally:
        threads.shutdown(cancel_futures=True)


def to_x0(images: Tensor) -> Tensor:
    """uint8 -> float32 in [-1, 1]: u / 127.5 - 1."""
    return images.to(torch.float32, memory_format=torch.channels_last).div_(127.5).sub_(1)


def flipped(x0: Tensor, seed: int, batch: int) -> Tensor:
    """x0 with about half of its images mirrored, chosen by (seed, batch number)."""
    coins = Rng(seed, "data/flip", batch, torch.device("cpu")).integers(2, len(x0)).bool()
    mirrored = to_device(coins, x0.device).view(-1, 1, 1, 1)
    return torch.where(mirrored, x0.flip(-1), x0)


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """x (on the CPU) on `device`, without waiting for it."""
    if device.type == "cuda":
        x = x.pin_memory()
    return x.to(device, non_blocking=True)
