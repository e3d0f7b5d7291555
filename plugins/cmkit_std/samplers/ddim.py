"""Denoising diffusion implicit models (Song, Meng, Ermon: Denoising Diffusion Implicit Models,
2020, equation 12), on the sigma axis."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import TYPE_CHECKING

from pydantic import Field

from cmkit import Sampler
from cmkit_std.samplers.ancestral import ancestral_step
from cmkit_std.samplers.steps import estimate, falling

if TYPE_CHECKING:
    from torch import Tensor

    from cmkit import Cond, Denoiser


class DDIM(Sampler):
    """Steps down the sigma grid that put back a share of fresh noise: none with eta = 0, which is
    sampler `euler`, all that DDPM has with eta = 1, which is `ancestral`.
    For diffusion models, such as of denoiser.precond = "edm"."""

    steps: int = Field(50, ge=2, le=10_000)
    """Points of the sigma grid; the last step goes from sigma_min to 0."""
    eta: float = Field(0.0, ge=0, le=1)
    """Share of the fresh noise."""
    clamp: bool = True
    """Clamp each estimate to [-1, 1]; false for latents."""

    @property
    def nfe(self) -> int:
        return self.steps

    def sample(
        self, denoiser: Denoiser, x: Tensor, cond: Cond, noise: Callable[[int], Tensor]
    ) -> Tensor:
        """x0_hat + sqrt(sigma'^2 - up^2) (x - x0_hat) / sigma + up z, with
        up = eta sigma' sqrt(1 - (sigma' / sigma)^2); no noise after the last step."""
        levels = [*falling(denoiser.noise, self.steps), 0.0]
        for k, (sigma, sigma_next) in enumerate(pairwise(levels), 1):
            x0 = estimate(denoiser, x, sigma, cond, self.clamp)
            up = self.eta * ancestral_step(sigma, sigma_next)[1]
            x = x0 + math.sqrt(sigma_next**2 - up**2) / sigma * (x - x0)
            if up > 0:
                x = x + up * noise(k)
        return x
