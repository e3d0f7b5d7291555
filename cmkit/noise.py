"""The noise axis: the Karras grid of noise levels."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Noise:
    """Noise levels: standard deviations of the Gaussian noise added to data in [-1, 1]."""

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0

    @property
    def start(self) -> float:
        """Standard deviation of what sampling starts from."""
        return self.sigma_max

    def sigmas(
        self, n: int, device: torch.device | None = None, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """Karras grid, (n,), rising from sigma_min to sigma_max (EDM eq. 5, order reversed)."""
        return _karras(self, n, device or torch.device("cpu"), dtype)

    def sigma_at(self, u: Tensor) -> Tensor:
        """Karras grid at fractions u in [0, 1] of the way from sigma_min to sigma_max."""
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        sigma: Tensor = (low + u * (high - low)) ** self.rho
        return sigma


@functools.lru_cache(maxsize=64)
def _karras(noise: Noise, n: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    if n < 2:
        raise ValueError(f"a sigma grid needs at least 2 points, not {n}")
    grid = noise.sigma_at(torch.linspace(0, 1, n, dtype=torch.float64))
    grid[0], grid[-1] = noise.sigma_min, noise.sigma_max
    return grid.to(device=device, dtype=dtype)
