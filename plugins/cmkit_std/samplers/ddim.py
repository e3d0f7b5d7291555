"""Denoising diffusion implicit models (Song, Meng, Ermon: Denoising Diffusion Implicit Models,
2020, equation 12), on the sigma axis."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import TYPE_CHECKING

from pydantic import Field

from cmkit_std.samplers.ancestral import ancestral_step
from cmkit_std.samplers.steps import Clamp, Steps, Walk, estimator

if TYPE_CHECKING:
    from torch import Tensor

    from cmkit import Cond, Denoiser


class DDIM(Walk):
    """Steps down the sigma grid that put back a share of fresh noise: none with eta = 0, which is
    sampler `euler`, all that DDPM has with eta = 1, which is `ancestral`.
    For diffusion models, such as of denoiser.precond = "edm"."""

    steps: Steps = 50
    eta: float = Field(0.0, ge=0, le=1)
    """Share of the fresh noise."""
    clamp: Clamp = True

    def sample(
        self, denoiser: Denoiser, x: Tensor, cond: Cond, noise: Callable[[int], Tensor]
    ) -> Tensor:
        """x0_hat + sqrt(sigma'^2 - up^2) (x - x0_hat) / sigma + up z, with
        up = eta sigma' sqrt(1 - (sigma' / sigma)^2); no noise after the last step."""
        from cmkit.functional import euler

        denoise = estimator(denoiser, self.clamp)
        for k, (sigma, sigma_next) in enumerate(pairwise(self.levels(denoiser.noise)), 1):
            up = self.eta * ancestral_step(sigma, sigma_next)[1]
            x = euler(denoise, x, sigma, math.sqrt(sigma_next**2 - up**2), cond)
            if up > 0:
                x = x + up * noise(k)
        return x
