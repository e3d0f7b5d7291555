"""uint8 images as training and metrics take them; the torch half of the data sets."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset

from cmkit import Cond, Reference, Rng
from cmkit_std.datasets.epochs import batch_indices


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


def reference(images: np.ndarray) -> Reference:
    """All of `images`, uint8 (N, C, H, W), with the SHA-256 of their shape and bytes."""
    digest = hashlib.sha256(repr(images.shape).encode())
    digest.update(np.ascontiguousarray(images).data)
    return Reference(Pixels(images), digest.hexdigest())


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

    Only the indices travel, without a wait: the host never synchronises with the device.
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
