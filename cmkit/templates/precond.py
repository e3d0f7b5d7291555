"""The scalings of a diffusion model that says the flow's velocity."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from cmkit import Precond

if TYPE_CHECKING:
    from torch import Tensor

    from cmkit import Scalings


class Mine(Precond):
    """Networks of rectified flow, which say v = z - x0 of x_t = (1 - t) x0 + t z and are told
    `steps` times t = sigma / (1 + sigma)."""

    steps: float = Field(1.0, gt=0, le=1e6)
    """What the network is told at time 1."""

    def scalings(self, sigma: Tensor, sigma_data: float, sigma_min: float) -> Scalings:
        """x0 = x_t - t v with x_t = x / (1 + sigma): c_skip = c_in = 1 - t, c_out = -t."""
        from cmkit import Scalings

        t = sigma / (1 + sigma)
        return Scalings(1 - t, -t, 1 - t, self.steps * t)
