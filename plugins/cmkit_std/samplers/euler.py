"""Euler's method on the probability-flow ODE (Karras et al.: Elucidating the Design Space of
Diffusion-Based Generative Models, 2022, equation 1 with s = 1)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cmkit_std.samplers.steps import Walk

if TYPE_CHECKING:
    from cmkit import Noise, Precond, Scheduler


class Euler(Walk):
    """Steps of first order down the sigma grid; deterministic. In this parametrization it is DDIM.
    For diffusion models, such as of denoiser.precond = "edm"."""

    def scheduler(self, precond: Precond, noise: Noise, sigma_data: float) -> Scheduler:
        """EulerDiscreteScheduler, of models with precond `discrete`."""
        from cmkit_std.samplers.diffusers import euler_scheduler

        return euler_scheduler(self.steps, precond, noise)
