"""Random draws that depend on (seed, purpose, index) alone."""

from __future__ import annotations

import bisect
import contextlib
import functools
import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

GOLDEN = 0x9E3779B97F4A7C15
"""The golden ratio's fraction, 0.618.., of 2^64."""


class Rng:
    """Random draws on `device` that depend on (seed, purpose, index) and their order alone."""

    def __init__(self, seed: int, purpose: str, index: int, device: torch.device):
        key = _key(seed, purpose, index)
        self.device, self._drawn_for = device, (seed, purpose, index)
        self.dropout_seed = key[1]
        self._generator = torch.Generator(device).manual_seed(key[0])

    @functools.cached_property
    def host(self) -> Rng:
        """Draws on the CPU, for numbers that Python needs: a GPU's would have to be awaited."""
        cpu, (seed, purpose, index) = torch.device("cpu"), self._drawn_for
        return self if self.device == cpu else Rng(seed, f"{purpose}/host", index, cpu)

    def normal_like(self, x: Tensor) -> Tensor:
        """Standard normal draws of the shape, type and device of x."""
        return torch.empty_like(x).normal_(generator=self._generator)

    def uniform(self, n: int) -> Tensor:
        """Draws from [0, 1), (n,) float32."""
        return torch.rand(n, generator=self._generator, device=self.device)

    def integers(self, high: int, n: int) -> Tensor:
        """Draws from {0, .., high - 1}, (n,) int64."""
        return torch.randint(high, (n,), generator=self._generator, device=self.device)

    def choice(self, weights: Tensor, n: int) -> Tensor:
        """Indices drawn with replacement in proportion to `weights` (k,), (n,) int64."""
        return torch.multinomial(weights, n, replacement=True, generator=self._generator)


@contextlib.contextmanager
def shared_dropout(rng: Rng) -> Iterator[None]:
    """Inside, dropout masks are those of every other such block of the same `rng`.

    The default generators of the CPU and of the rng's device are seeded, and put back afterwards.
    """
    devices = [rng.device] if rng.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(rng.dropout_seed)
        yield


def image_noise(
    seed: int, purpose: str, indices: Iterable[int], draw: int, shape: tuple[int, ...]
) -> Tensor:
    """Standard normal draws, (B, *shape) float32 on the CPU, each row by its image's own index.

    Philox keyed by (seed, purpose, index, draw): a row is the same whatever the batch size.
    """
    purpose = f"{purpose}/{draw}"
    rows = [_philox(seed, purpose, i).standard_normal(shape, np.float32) for i in indices]
    return torch.from_numpy(np.stack(rows))


def image_labels(
    seed: int, purpose: str, indices: Iterable[int], num_classes: int, counts: Sequence[int] = ()
) -> Tensor:
    """Class labels, (B,) int64 on the CPU, each by its image's own index: uniform, or in the
    proportions of `counts`, the images of each class.

    Those are stratified: image k has the class at (u + k phi) mod 1 of the cumulative shares, phi
    the golden ratio and u drawn by (seed, purpose), in exact arithmetic of 64 bits. Of the first n
    images a class has n times its share, mostly give or take 1, at worst 4 of a thousand and 8 of
    ten million (measured, over all shares and u): this discrepancy grows as log n.
    """
    if not counts:
        draws = [_philox(seed, f"{purpose}/label", i).integers(num_classes) for i in indices]
        return torch.tensor(draws, dtype=torch.int64)
    total, first = sum(counts), _key(seed, f"{purpose}/labels", 0)[0] << 1
    ends = [(end << 64) // total for end in itertools.accumulate(counts)]
    at = ((first + i * GOLDEN) % 2**64 for i in indices)
    return torch.tensor([bisect.bisect_right(ends, place) for place in at], dtype=torch.int64)


def permutation(seed: int, purpose: str, index: int, n: int) -> np.ndarray:
    """A shuffle of 0 .. n - 1 for epoch `index`, (n,) int64."""
    return _philox(seed, purpose, index).permutation(n)


def _philox(seed: int, purpose: str, index: int) -> np.random.Generator:
    return np.random.Generator(
        np.random.Philox(key=np.array(_key(seed, purpose, index), np.uint64))
    )


def _key(seed: int, purpose: str, index: int) -> tuple[int, int]:
    """128 bits of BLAKE2 over the three, as two 63-bit numbers."""
    digest = hashlib.blake2b(f"{seed}/{purpose}/{index}".encode(), digest_size=16).digest()
    low, high = int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")
    return low >> 1, high >> 1
