"""Variance exploding: column VE of table 1 of EDM (Karras, Aittala, Aila, Laine, 2022), after Song,
Sohl-Dickstein, Kingma, Kumar, Ermon, Poole: Score-Based Generative Modeling through SDEs, 2020."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

import cmkit
from cmkit import Precond

if TYPE_CHECKING:
    from torch import Tensor


class VE(Precond):
    """Variance-exploding diffusion models: the network says -z of x0 + sigma z, and is told
    ln(sigma / 2). EDM's own "ve" files are of precond edm."""

    low: float = Field(0.02, gt=0, le=1)
    """Lowest noise level of training."""
    high: float = Field(100.0, gt=1, le=1e6)
    """Highest noise level of training."""

    @property
    def levels(self) -> tuple[float, float]:
        return self.low, self.high

    known = levels

    def scalings(self, sigma: Tensor, sigma_data: float, sigma_min: float) -> cmkit.Scalings:
        """c_skip = 1, c_out = sigma, c_in = 1, c_noise = ln(sigma / 2)."""
        one = sigma.new_ones(sigma.shape)
        return cmkit.Scalings(one, sigma, one, (0.5 * sigma + 1e-44).log())
