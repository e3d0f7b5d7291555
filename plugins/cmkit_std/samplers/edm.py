"""Stochastic second-order sampling (Karras, Aittala, Aila, Laine: Elucidating the Design Space of
Diffusion-Based Generative Models, 2022, algorithm 2)."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import TYPE_CHECKING

from pydantic import Field

from cmkit.kinds import Sampler
from cmkit_std.samplers.steps import Churn, estimate, falling

if TYPE_CHECKING:
    from torch import Tensor

    from cmkit import Cond, Denoiser


class EDM(Churn, Sampler):
    """The sampler of EDM: as `heun`, but estimates are not clamped and x is kept in float64.
    For diffusion models: denoiser.precond = "edm"."""

    steps: int = Field(18, ge=2, le=10_000)
    """Points of the sigma grid; the last step goes from sigma_min to 0."""

    @property
    def nfe(self) -> int:
        return 2 * self.steps - 1

    def sample(
        self, denoiser: Denoiser, x: Tensor, cond: Cond, noise: Callable[[int], Tensor]
    ) -> Tensor:
        """Heun's rule in float64; the denoiser sees x in the type that it came in."""
        dtype = x.dtype
        levels = [*falling(denoiser.noise, self.steps), 0.0]
        x = x.double()
        for k, (sigma, sigma_next) in enumerate(pairwise(levels), 1):
            x, sigma = self.churned(x, sigma, k, noise)
            slope = (x - estimate(denoiser, x.to(dtype), sigma, cond, False)) / sigma
            x_next = x + (sigma_next - sigma) * slope
            if sigma_next > 0:
                x0_next = estimate(denoiser, x_next.to(dtype), sigma_next, cond, False)
                slope_next = (x_next - x0_next) / sigma_next
                x_next = x + (sigma_next - sigma) * (slope + slope_next) / 2
            x = x_next
        return x.to(dtype)
