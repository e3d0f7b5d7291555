"""Sampling in several steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from pydantic import Field

from cmkit import Sampler

if TYPE_CHECKING:
    from torch import Tensor

    from cmkit import Cond, Denoiser


class Mine(Sampler):
    """One step from sigma_max, then one from each lower point of a grid, with fresh noise."""

    steps: int = Field(2, ge=1, le=1000)
    """Evaluations of the denoiser."""

    @property
    def nfe(self) -> int:
        return self.steps

    def sample(
        self, denoiser: Denoiser, x: Tensor, cond: Cond, noise: Callable[[int], Tensor]
    ) -> Tensor:
        """x0 = f(x, sigma); then x = x0 + sqrt(sigma^2 - sigma_min^2) z at the next lower sigma."""
        high, *lower = denoiser.noise.sigmas(self.steps + 1).flip(0).tolist()[:-1]
        x0 = _estimate(denoiser, x, high, cond)
        for k, sigma in enumerate(lower, 1):
            x = x0 + (sigma**2 - denoiser.noise.sigma_min**2) ** 0.5 * noise(k)
            x0 = _estimate(denoiser, x, sigma, cond)
        return x0


def _estimate(denoiser: Denoiser, x: Tensor, sigma: float, cond: Cond) -> Tensor:
    return denoiser(x, x.new_full((len(x),), sigma), cond).clamp(-1, 1)
