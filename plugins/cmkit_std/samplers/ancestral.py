"""Ancestral sampling with Euler steps, of openai/consistency_models and k-diffusion."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import TYPE_CHECKING

from cmkit_std.samplers.steps import Clamp, Walk, estimator

if TYPE_CHECKING:
    from torch import Tensor

    from cmkit import Cond, Denoiser


class Ancestral(Walk):
    """Each Euler step goes below the next noise level, and fresh noise leads back up to it.
    For diffusion models, such as of denoiser.precond = "edm"."""

    clamp: Clamp = True

    def sample(
        self, denoiser: Denoiser, x: Tensor, cond: Cond, noise: Callable[[int], Tensor]
    ) -> Tensor:
        """x0_hat + sigma_down / sigma (x - x0_hat) + sigma_up z; no noise after the last step."""
        from cmkit.functional import euler

        denoise = estimator(denoiser, self.clamp)
        for k, (sigma, sigma_next) in enumerate(pairwise(self.levels(denoiser.noise)), 1):
            down, up = ancestral_step(sigma, sigma_next)
            x = euler(denoise, x, sigma, down, cond)
            if up > 0:
                x = x + up * noise(k)
        return x


def ancestral_step(sigma: float, sigma_next: float) -> tuple[float, float]:
    """(sigma_down, sigma_up): sigma_down^2 + sigma_up^2 = sigma_next^2, and sigma_up is the
    posterior deviation of x at sigma_next given x0 and x at sigma (DDPM, eq. 7)."""
    ratio = sigma_next / sigma
    return sigma_next * ratio, sigma_next * math.sqrt(1 - ratio**2)
