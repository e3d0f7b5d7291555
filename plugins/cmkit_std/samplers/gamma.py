"""Gamma sampling of consistency trajectory models (Kim et al.: Consistency Trajectory Models:
Learning Probability Flow ODE Trajectory of Diffusion, 2023, algorithm 3)."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import TYPE_CHECKING

from pydantic import Field, model_validator

from cmkit import Sampler
from cmkit_std.samplers.steps import Draws, Sigmas, between, falling

if TYPE_CHECKING:
    from torch import Tensor

    from cmkit import Cond, Denoiser, Noise


class Gamma(Sampler):
    """Each step jumps below the next noise level, and fresh noise leads back up to it: not at all
    with gamma = 0, from sigma_min with gamma = 1. For models of objective `ctm`.

    As sony/ctm: the jump ends at s = sqrt(1 - gamma^2) (sigma' - sigma_min) + sigma_min; the paper
    has sqrt(1 - gamma^2) sigma'.
    """

    gamma: float = Field(0.0, ge=0, le=1)
    """0 = deterministic long jumps, 1 = those of multistep consistency sampling."""
    steps: int | None = Field(None, ge=1, le=10_000)
    """Jumps between the points of a Karras grid; absent = 1, or as many as `sigmas` ask for."""
    sigmas: Sigmas = ()
    """Noise levels between the jumps, falling, instead of `steps`."""
    clamp: bool = True
    """Clamp to [-1, 1] wherever a jump ends at sigma_min; false for latents."""

    @model_validator(mode="after")
    def _levels_are_said_once(self) -> Gamma:
        if self.steps is not None and self.sigmas:
            raise ValueError("steps and sigmas both say the noise levels: give one of them")
        return self

    @property
    def nfe(self) -> int:
        return self.steps or 1 + len(self.sigmas)

    def sample(self, denoiser: Denoiser, x: Tensor, cond: Cond, noise: Draws) -> Tensor:
        """x = G(x, sigma, s); then x + sqrt(sigma'^2 - s^2) z, if a jump follows."""
        from cmkit_std.trajectory import jump

        low = denoiser.noise.sigma_min
        for k, (sigma, sigma_next) in enumerate(pairwise(self.levels(denoiser.noise)), 1):
            s = math.sqrt(1 - self.gamma**2) * (sigma_next - low) + low
            x = jump(denoiser, x, x.new_full((len(x),), sigma), x.new_full((len(x),), s), cond)
            if self.clamp and s == low:
                x = denoiser.clamp(x)
            if self.gamma and k < self.nfe:
                x = x + math.sqrt(sigma_next**2 - s**2) * noise(k)
        return x

    def levels(self, noise: Noise) -> list[float]:
        """Noise levels from sigma_max down to sigma_min, nfe + 1 of them."""
        if not self.sigmas:
            return falling(noise, self.nfe + 1)
        return [noise.sigma_max, *between(self.sigmas, noise), noise.sigma_min]
