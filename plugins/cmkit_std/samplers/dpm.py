"""DPM-Solver-2 with churn, of openai/consistency_models and k-diffusion (Lu et al.: DPM-Solver,
2022)."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import TYPE_CHECKING

from pydantic import Field

from cmkit import Sampler
from cmkit_std.samplers.steps import Churn, estimate, falling

if TYPE_CHECKING:
    from torch import Tensor

    from cmkit import Cond, Denoiser


class DPM(Churn, Sampler):
    """Steps of second order by a midpoint; deterministic unless s_churn is above 0.
    For diffusion models, such as of denoiser.precond = "edm"."""

    mid_rho: float = Field(3.0, ge=1, le=100)
    """rho of the two-interval Karras grid whose middle is the midpoint; 1 = the arithmetic mean."""
    clamp: bool = True
    """Clamp each estimate to [-1, 1]; false for latents."""

    @property
    def nfe(self) -> int:
        return 2 * self.steps

    def sample(
        self, denoiser: Denoiser, x: Tensor, cond: Cond, noise: Callable[[int], Tensor]
    ) -> Tensor:
        """Each step takes the slope at its midpoint, also the last, to 0."""
        levels = [*falling(denoiser.noise, self.steps), 0.0]
        for k, (sigma, sigma_next) in enumerate(pairwise(levels), 1):
            x, sigma = self.churned(x, sigma, k, noise)
            x = self.midpoint_step(denoiser, x, sigma, sigma_next, cond)
        return x

    def midpoint_step(
        self, denoiser: Denoiser, x: Tensor, sigma: float, sigma_next: float, cond: Cond
    ) -> Tensor:
        """x at sigma_next, from x at sigma."""
        root = 1 / self.mid_rho
        middle = ((sigma**root + sigma_next**root) / 2) ** self.mid_rho
        x0 = estimate(denoiser, x, sigma, cond, self.clamp)
        x_middle = x0 + middle / sigma * (x - x0)
        x0_middle = estimate(denoiser, x_middle, middle, cond, self.clamp)
        return x + (sigma_next - sigma) * (x_middle - x0_middle) / middle
