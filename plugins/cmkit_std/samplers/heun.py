"""Heun's method with churn, as openai/consistency_models runs it (Karras et al.: Elucidating the
Design Space of Diffusion-Based Generative Models, 2022, algorithm 2)."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import TYPE_CHECKING

from cmkit import Sampler
from cmkit_std.samplers.steps import Churn, estimate, falling

if TYPE_CHECKING:
    from torch import Tensor

    from cmkit import Cond, Denoiser


class Heun(Churn, Sampler):
    """Steps of second order down the sigma grid; deterministic unless s_churn is above 0.
    For diffusion models, such as of denoiser.precond = "edm"."""

    clamp: bool = True
    """Clamp each estimate to [-1, 1]; false for latents."""

    @property
    def nfe(self) -> int:
        return 2 * self.steps - 1

    def sample(
        self, denoiser: Denoiser, x: Tensor, cond: Cond, noise: Callable[[int], Tensor]
    ) -> Tensor:
        """The slope is the mean of those at both ends; the last step, to 0, is Euler's."""
        levels = [*falling(denoiser.noise, self.steps), 0.0]
        for k, (sigma, sigma_next) in enumerate(pairwise(levels), 1):
            x, sigma = self.churned(x, sigma, k, noise)
            slope = (x - estimate(denoiser, x, sigma, cond, self.clamp)) / sigma
            x_next = x + (sigma_next - sigma) * slope
            if sigma_next > 0:
                x0_next = estimate(denoiser, x_next, sigma_next, cond, self.clamp)
                slope_next = (x_next - x0_next) / sigma_next
                x_next = x + (sigma_next - sigma) * (slope + slope_next) / 2
            x = x_next
        return x
