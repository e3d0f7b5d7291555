"""Improved DDPM's cosine schedule: column iDDPM of table 1 of EDM (Karras, Aittala, Aila, Laine,
2022), after Nichol, Dhariwal: Improved Denoising Diffusion Probabilistic Models, 2021."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

import cmkit
from cmkit import Precond
from cmkit_std.preconds.schedule import Cosine

if TYPE_CHECKING:
    from torch import Tensor


class IDDPM(Precond):
    """Diffusion models that know the steps of a cosine schedule, at any noise level, as EDM calls
    them: the network says z, and is told the nearest step. Sampling starts at the step `first`.

    Of guided-diffusion's networks, precond discrete walks down the very steps.
    """

    steps: int = Field(1000, ge=2, le=100_000)
    """M, steps of the schedule."""
    c_1: float = Field(0.001, gt=0, lt=1)
    """Least share of the signal's variance that a step leaves."""
    c_2: float = Field(0.008, ge=0, lt=1)
    """Offset of the schedule's time."""
    first: int = Field(8, ge=0, le=100_000)
    """Steps from the top that sampling leaves out, unless told another sigma_max."""

    @property
    def schedule(self) -> Cosine:
        """Its noise levels, in plain numbers."""
        return Cosine(self.steps, self.c_1, self.c_2)

    @property
    def levels(self) -> tuple[float, float]:
        rising = self.schedule.sigmas()
        return rising[1], rising[max(-1 - self.first, 2 - len(rising))]

    @property
    def known(self) -> tuple[float, float]:
        rising = self.schedule.sigmas()
        return rising[1], rising[-1]

    def scalings(self, sigma: Tensor, sigma_data: float, sigma_min: float) -> cmkit.Scalings:
        """c_skip = 1, c_out = -sigma, c_in = 1 / sqrt(1 + sigma^2), c_noise = M - 1 - argmin_j
        |u_j - sigma|, with the levels u_0 .. u_M = 0 falling."""
        from cmkit_std.discrete import nearest

        c_noise = (nearest(self.schedule, sigma) - 1).to(sigma.dtype)
        return cmkit.Scalings(sigma.new_ones(sigma.shape), -sigma, (1 + sigma**2).rsqrt(), c_noise)
