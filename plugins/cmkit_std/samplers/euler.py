"""Euler's method on the probability-flow ODE (Karras et al.: Elucidating the Design Space of
Diffusion-Based Generative Models, 2022, equation 1 with s = 1)."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import TYPE_CHECKING

from cmkit_std.samplers.steps import Clamp, Walk, estimator

if TYPE_CHECKING:
    from torch import Tensor

    from cmkit import Cond, Denoiser


class Euler(Walk):
    """Steps of first order down the sigma grid; deterministic. In this parametrization it is DDIM.
    For diffusion models, such as of denoiser.precond = "edm"."""

    clamp: Clamp = True

    def sample(
        self, denoiser: Denoiser, x: Tensor, cond: Cond, noise: Callable[[int], Tensor]
    ) -> Tensor:
        """x + (sigma' - sigma) (x - x0_hat) / sigma; the last step gives x0_hat."""
        from cmkit.functional import euler

        denoise = estimator(denoiser, self.clamp)
        for sigma, sigma_next in pairwise(self.levels(denoiser.noise)):
            x = euler(denoise, x, sigma, sigma_next, cond)
        return x
