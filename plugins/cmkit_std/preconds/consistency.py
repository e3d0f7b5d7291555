"""The scalings of consistency models (Song, Dhariwal, Chen, Sutskever: Consistency Models, 2023,
appendix C)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import cmkit
from cmkit import Precond

if TYPE_CHECKING:
    from torch import Tensor


class Consistency(Precond):
    """Consistency models of EDM's networks: f(x, sigma_min) = x, bit for bit."""

    def scalings(self, sigma: Tensor, sigma_data: float, sigma_min: float) -> cmkit.Scalings:
        """c_skip = sigma_data^2 / ((sigma - sigma_min)^2 + sigma_data^2),
        c_out = sigma_data (sigma - sigma_min) / sqrt(sigma^2 + sigma_data^2)."""
        return cmkit.consistency_scalings(sigma, sigma_data, sigma_min)
