"""Which images of a data set a batch holds, mirrored or not, and with which captions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cmkit.kinds import Pictures
from cmkit.rng import Rng, permutation

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Drawn:
    """A batch by the numbers of its images, as arrays (B,)."""

    index: np.ndarray
    """The images, int64."""
    mirrored: np.ndarray | None = None
    """Which of them are mirrored, bool; None = none ever."""
    label: np.ndarray | None = None
    """Their classes, int64."""
    caption: np.ndarray | None = None
    """The numbers of their captions, int64, -1 for the unconditional prompt."""


def drawn(pictures: Pictures, size: int, seed: int, start: int = 0) -> Iterator[Drawn]:
    """Endless batches of `size` images from batch `start` on, a function of (seed, batch).

    All that train on these images, or on what was computed of each, see the same.
    """
    labels, captions = (
        None if numbers is None else np.asarray(numbers, np.int64)
        for numbers in (pictures.labels, pictures.captions)
    )
    for batch, index in enumerate(batch_indices(len(pictures), size, seed, start), start):
        mirrored = None
        if pictures.flip:
            mirrored = Rng(seed, "data/flip", batch, CPU).integers(2, size).bool().numpy()
        caption = None if captions is None else captions[index]
        if caption is not None and pictures.empty:
            draws = Rng(seed, "data/empty", batch, CPU).uniform(size).numpy()
            caption = np.where(draws < pictures.empty, -1, caption)
        yield Drawn(index, mirrored, None if labels is None else labels[index], caption)


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


def to_x0(images: Tensor) -> Tensor:
    """uint8 -> float32 in [-1, 1]: u / 127.5 - 1."""
    return images.to(torch.float32, memory_format=torch.channels_last).div_(127.5).sub_(1)
