"""How much noise each step of a discrete diffusion model adds, in plain numbers."""

from __future__ import annotations

import functools
import itertools
import math
import operator
from dataclasses import dataclass
from typing import Literal

Spacing = Literal["scaled_linear", "linear", "cosine"]


@dataclass(frozen=True)
class Schedule:
    """The steps of a schedule; the defaults are those of latent diffusion."""

    beta_start: float = 0.00085
    beta_end: float = 0.012
    steps: int = 1000
    spacing: Spacing = "scaled_linear"
    """What rises evenly: the square root of beta, or beta; or the cosine schedule, without ends."""

    def betas(self) -> list[float]:
        """Variances of the added noise, one a step."""
        if self.spacing == "cosine":
            kept = [1.0, *self.alphas_cumprod()]
            return [1 - after / before for before, after in itertools.pairwise(kept)]
        power = 0.5 if self.spacing == "scaled_linear" else 1.0
        low, high = self.beta_start**power, self.beta_end**power
        rise = (high - low) / (self.steps - 1)
        return [(low + k * rise) ** (1 / power) for k in range(self.steps)]

    @functools.cache  # noqa: B019 - few schedules, and equal ones share it
    def alphas_cumprod(self) -> tuple[float, ...]:
        """alpha_t^2, falling, one a step."""
        if self.spacing == "cosine":
            return tuple(1 / (1 + sigma**2) for sigma in self.sigmas())
        return tuple(itertools.accumulate((1 - beta for beta in self.betas()), operator.mul))

    @functools.cache  # noqa: B019
    def sigmas(self) -> tuple[float, ...]:
        """sigma_t = sqrt(1 / alpha_t^2 - 1), rising, one a step."""
        if self.spacing == "cosine":
            return Cosine(self.steps).sigmas()[1:]
        return tuple(math.sqrt(1 / kept - 1) for kept in self.alphas_cumprod())


@dataclass(frozen=True)
class Cosine:
    """The cosine schedule and its clean end."""

    steps: int = 1000
    c_1: float = 0.001
    c_2: float = 0.008

    @functools.cache  # noqa: B019
    def sigmas(self) -> tuple[float, ...]:
        """Noise levels, rising from 0, steps + 1 of them (EDM, table 1).

        u_{j-1} = sqrt((u_j^2 + 1) / max(a_{j-1} / a_j, c_1) - 1), from u_steps = 0 upwards, with
        a_j = sin^2(pi j / (2 steps (1 + c_2))).
        """
        last = self.steps
        angles = (0.5 * math.pi * j / last / (1 + self.c_2) for j in range(last + 1))
        a = [math.sin(angle) ** 2 for angle in angles]
        u = [0.0]
        for j in range(last, 0, -1):
            u.append(math.sqrt((u[-1] ** 2 + 1) / max(a[j - 1] / a[j], self.c_1) - 1))
        return tuple(u)
