"""Denoising diffusion implicit models (Song, Meng, Ermon: Denoising Diffusion Implicit Models,
2020, equation 12), on the sigma axis."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from pydantic import Field

from cmkit import RecipeError
from cmkit_std.samplers.ancestral import ancestral_step
from cmkit_std.samplers.steps import Steps, Walk

if TYPE_CHECKING:
    from cmkit import Noise, Precond, Scheduler


class DDIM(Walk):
    """Steps down the sigma grid that put back a share of fresh noise: none with eta = 0, which is
    sampler `euler`, all that DDPM has with eta = 1, which is `ancestral`.
    For diffusion models, such as of denoiser.precond = "edm"."""

    steps: Steps = 50
    eta: float = Field(0.0, ge=0, le=1)
    """Share of the fresh noise."""

    def split(self, sigma: float, sigma_next: float) -> tuple[float, float]:
        """sigma_up = eta sigma' sqrt(1 - (sigma' / sigma)^2), and sqrt(sigma'^2 - sigma_up^2)."""
        up = self.eta * ancestral_step(sigma, sigma_next)[1]
        return math.sqrt(sigma_next**2 - up**2), up

    def scheduler(self, precond: Precond, noise: Noise, sigma_data: float) -> Scheduler:
        """EulerDiscreteScheduler, of models with precond `discrete`."""
        from cmkit_std.samplers.diffusers import euler_scheduler

        if self.eta:
            raise RecipeError(
                f"sampler.eta = {self.eta:g}: diffusers draws its fresh noise otherwise; set"
                " sampler.eta = 0.0"
            )
        return euler_scheduler(self.steps, precond, noise)
