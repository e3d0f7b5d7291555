"""DPM-Solver-2 with churn, as openai/consistency_models runs it (Lu et al.: DPM-Solver, 2022).

Not k-diffusion's `sample_dpm_2` of today, whose midpoint is the geometric mean, which ours tends to
as mid_rho grows, and whose last step, to 0, is Euler's."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

from pydantic import Field

from cmkit_std.samplers.steps import Churn, Draws, Walk, estimator

if TYPE_CHECKING:
    from torch import Tensor

    from cmkit import Cond, Denoiser


class DPM(Churn, Walk):
    """Steps of second order by a midpoint; deterministic unless s_churn is above 0.
    For diffusion models, such as of denoiser.precond = "edm"."""

    mid_rho: float = Field(3.0, ge=1, le=10)
    """rho of the two-interval Karras grid whose middle is the midpoint; 1 = the arithmetic mean.
    Rounding grows as 2^mid_rho in the last step, whose midpoint is sigma_min / 2^mid_rho."""

    @property
    def nfe(self) -> int:
        return 2 * self.steps

    def sample(self, denoiser: Denoiser, x: Tensor, cond: Cond, noise: Draws) -> Tensor:
        """Each step takes the slope at its midpoint, also the last, to 0."""
        for k, (sigma, sigma_next) in enumerate(pairwise(self.levels(denoiser.noise)), 1):
            x, sigma = self.churned(x, sigma, k, noise)
            x = self.midpoint_step(denoiser, x, sigma, sigma_next, cond)
        return x

    def midpoint_step(
        self, denoiser: Denoiser, x: Tensor, sigma: float, sigma_next: float, cond: Cond
    ) -> Tensor:
        """x at sigma_next, from x at sigma."""
        from cmkit.functional import euler, slope

        denoise, root = estimator(denoiser, self.clamp), 1 / self.mid_rho
        middle = ((sigma**root + sigma_next**root) / 2) ** self.mid_rho
        x_middle = euler(denoise, x, sigma, middle, cond)
        return x + (sigma_next - sigma) * slope(x_middle, middle, denoise(x_middle, middle, cond))
