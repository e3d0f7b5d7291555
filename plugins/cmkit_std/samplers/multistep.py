"""Multistep consistency sampling (Consistency Models, 2023, algorithm 1)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from cmkit import RecipeError, Sampler
from cmkit_std.samplers.steps import Clamp, Draws, Sigmas, between

if TYPE_CHECKING:
    from torch import Tensor

    from cmkit import Cond, Denoiser, Noise, Precond, Scheduler


class Multistep(Sampler):
    """One step from sigma_max, then one for each further noise level, with fresh noise before it.

    An empty list is one-step sampling. Models of objective `ctm` have sampler `gamma` for this.
    """

    sigmas: Sigmas = ()
    """Noise levels after the first step, falling; [0.821] makes two steps."""
    clamp: Clamp = True

    @property
    def nfe(self) -> int:
        return 1 + len(self.sigmas)

    def sample(self, denoiser: Denoiser, x: Tensor, cond: Cond, noise: Draws) -> Tensor:
        """x0 = f(x, sigma_max); then x = x0 + sqrt(sigma^2 - sigma_min^2) z, x0 = f(x, sigma)."""

        def estimate(x: Tensor, sigma: float) -> Tensor:
            x0 = denoiser(x, x.new_full((len(x),), sigma), cond)
            return denoiser.clamp(x0) if self.clamp else x0

        sigmas, low = between(self.sigmas, denoiser.noise), denoiser.noise.sigma_min
        x0 = estimate(x, denoiser.noise.sigma_max)
        for k, sigma in enumerate(sigmas, 1):
            x0 = estimate(x0 + math.sqrt(sigma**2 - low**2) * noise(k), sigma)
        return x0

    def scheduler(self, precond: Precond, noise: Noise, sigma_data: float) -> Scheduler:
        """CMStochasticIterativeScheduler, of models with precond `consistency`."""
        from cmkit_std.preconds.consistency import Consistency
        from cmkit_std.samplers.diffusers import consistency_scheduler

        if not isinstance(precond, Consistency):
            raise RecipeError(
                "diffusers' CMStochasticIterativeScheduler draws from models of denoiser.precond ="
                ' "consistency" alone; set that where the network was trained so'
            )
        sigmas = between(self.sigmas, noise)
        return consistency_scheduler(sigmas, self.clamp, noise, sigma_data)
