"""Sampling along average velocities (Geng et al.: Mean Flows for One-step Generative Modeling,
2025, algorithm 2)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING

from pydantic import Field

from cmkit import Sampler

if TYPE_CHECKING:
    from torch import Tensor

    from cmkit import Cond, Denoiser


class MeanFlowSampler(Sampler):
    """Jumps along average velocities, at equal distances in t = sigma / (1 + sigma); for networks
    that embed where they jump to, such as those of objective `meanflow`. Deterministic."""

    steps: int = Field(1, ge=1, le=1000)
    """Jumps from sigma_max to the data."""
    clamp: bool = True
    """Clamp each estimate to [-1, 1]; false for latents."""

    @property
    def nfe(self) -> int:
        return self.steps

    def sample(
        self, denoiser: Denoiser, x: Tensor, cond: Cond, noise: Callable[[int], Tensor]
    ) -> Tensor:
        """x_s = (s / sigma) x + (1 - s / sigma) x0_hat(x, sigma, s), which is
        x_r = x_t - (t - r) u; the last jump asks for s = sigma_min and gives x0_hat."""
        low, high = denoiser.noise.sigma_min, denoiser.noise.sigma_max
        top = high / (1 + high)
        times = [top * k / self.steps for k in range(self.steps, 0, -1)]
        inner = [max(t / (1 - t), low) for t in times[1:]]
        for sigma, s in pairwise([high, *inner, low]):
            now, then = x.new_full((len(x),), sigma), x.new_full((len(x),), s)
            x0 = denoiser(x, now, replace(cond, sigma_to=then))
            x0 = x0.clamp(-1, 1) if self.clamp else x0
            x = x0 + s / sigma * (x - x0)
        return x0
