"""Euler's method on the probability-flow ODE (Karras et al.: Elucidating the Design Space of
Diffusion-Based Generative Models, 2022, equation 1 with s = 1)."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import TYPE_CHECKING

from pydantic import Field

from cmkit import Sampler
from cmkit_std.samplers.steps import estimate, falling

if TYPE_CHECKING:
    from torch import Tensor

    from cmkit import Cond, Denoiser


class Euler(Sampler):
    """Steps of first order down the sigma grid; deterministic. In this parametrization it is DDIM.
    For diffusion models, such as of denoiser.precond = "edm"."""

    steps: int = Field(40, ge=2, le=10_000)
    """Points of the sigma grid; the last step goes from sigma_min to 0."""
    clamp: bool = True
    """Clamp each estimate to [-1, 1]; false for latents."""

    @property
    def nfe(self) -> int:
        return self.steps

    def sample(
        self, denoiser: Denoiser, x: Tensor, cond: Cond, noise: Callable[[int], Tensor]
    ) -> Tensor:
        """x + (sigma' - sigma) (x - x0_hat) / sigma, written so that sigma' = 0 gives x0_hat."""
        for sigma, sigma_next in pairwise([*falling(denoiser.noise, self.steps), 0.0]):
            x0 = estimate(denoiser, x, sigma, cond, self.clamp)
            x = x0 + sigma_next / sigma * (x - x0)
        return x
