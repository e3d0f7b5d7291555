"""Heun's method with churn, as openai/consistency_models runs it (Karras et al.: Elucidating the
Design Space of Diffusion-Based Generative Models, 2022, algorithm 2)."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

from cmkit_std.samplers.steps import Churn, Draws, Walk, estimator

if TYPE_CHECKING:
    from torch import Tensor

    from cmkit import Cond, Denoiser


class Heun(Churn, Walk):
    """Steps of second order down the sigma grid; deterministic unless s_churn is above 0.
    For diffusion models, such as of denoiser.precond = "edm"."""

    def sample(self, denoiser: Denoiser, x: Tensor, cond: Cond, noise: Draws) -> Tensor:
        """The slope is the mean of those at both ends; the last step, to 0, is Euler's."""
        from cmkit.functional import euler, heun

        denoise = estimator(denoiser, self.clamp)
        for k, (sigma, sigma_next) in enumerate(pairwise(self.levels(denoiser.noise)), 1):
            x, sigma = self.churned(x, sigma, k, noise)
            step = heun if sigma_next > 0 else euler
            x = step(denoise, x, sigma, sigma_next, cond)
        return x
