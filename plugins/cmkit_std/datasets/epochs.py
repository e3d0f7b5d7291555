"""Which images a batch holds: a function of (seed, batch number) alone."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np


def batch_indices(n: int, size: int, seed: int, start: int = 0) -> Iterator[np.ndarray]:
    """Endless index arrays, (size,) int64 in 0 .. n - 1, from batch `start` on.

    Each epoch is one shuffle of all n images; batches run across the border of epochs, so every
    image is seen exactly once an epoch whatever the batch size.
    """
    from cmkit import permutation

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
