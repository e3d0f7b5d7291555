"""Sampling of progressively distilled models (Salimans, Ho: Progressive Distillation for Fast
Sampling of Diffusion Models, 2022), as openai/consistency_models does it."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import TYPE_CHECKING

from pydantic import Field

from cmkit_std.samplers.steps import Clamp, Walk, estimator, falling

if TYPE_CHECKING:
    from torch import Tensor

    from cmkit import Cond, Denoiser


class ProgDist(Walk):
    """DDIM steps over the intervals of a sigma grid of steps + 1 points, ending at sigma_min: the
    very steps that each stage of progressive distillation halves."""

    steps: int = Field(1, ge=1, le=10_000)
    """Intervals of the sigma grid, each one evaluation."""
    clamp: Clamp = True

    def sample(
        self, denoiser: Denoiser, x: Tensor, cond: Cond, noise: Callable[[int], Tensor]
    ) -> Tensor:
        """x0_hat + sigma' / sigma (x - x0_hat) for each interval; no step to 0 follows."""
        from cmkit.functional import euler

        denoise = estimator(denoiser, self.clamp)
        for sigma, sigma_next in pairwise(falling(denoiser.noise, self.steps + 1)):
            x = euler(denoise, x, sigma, sigma_next, cond)
        return x
