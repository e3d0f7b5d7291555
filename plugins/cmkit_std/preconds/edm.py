"""Column EDM of table 1 (Karras, Aittala, Aila, Laine: Elucidating the Design Space of
Diffusion-Based Generative Models, 2022)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import cmkit
from cmkit import Precond

if TYPE_CHECKING:
    from torch import Tensor


class EDM(Precond):
    """Diffusion models of EDM, its published "vp" and "ve" files among them: network input and
    target have unit variance, c_noise = ln(sigma) / 4."""

    def scalings(self, sigma: Tensor, sigma_data: float, sigma_min: float) -> cmkit.Scalings:
        """c_skip = sigma_data^2 / (sigma^2 + sigma_data^2),
        c_out = sigma sigma_data / sqrt(sigma^2 + sigma_data^2)."""
        return cmkit.edm_scalings(sigma, sigma_data, sigma_min)
