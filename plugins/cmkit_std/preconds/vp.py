"""Variance preserving: column VP of table 1 of EDM (Karras, Aittala, Aila, Laine, 2022), after
Song, Sohl-Dickstein, Kingma, Kumar, Ermon, Poole: Score-Based Generative Modeling through SDEs,
2020."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pydantic import Field

import cmkit
from cmkit import Precond

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Betas:
    """The noise level at each time, where the rate of noise is beta_min + beta_d t."""

    beta_d: float
    beta_min: float

    def sigma(self, t: Tensor) -> Tensor:
        """Noise levels at times t: sqrt(exp(beta_d t^2 / 2 + beta_min t) - 1)."""
        return (0.5 * self.beta_d * t**2 + self.beta_min * t).expm1().sqrt()

    def slope(self, t: Tensor) -> Tensor:
        """d sigma / d t at times t."""
        sigma = self.sigma(t)
        return 0.5 * (self.beta_min + self.beta_d * t) * (sigma + 1 / sigma)

    def time(self, sigma: Tensor) -> Tensor:
        """The times at which the noise levels are sigma; without cancellation at small ones."""
        log = (sigma**2).log1p()
        return 2 * log / ((self.beta_min**2 + 2 * self.beta_d * log).sqrt() + self.beta_min)


class VP(Precond):
    """Variance-preserving diffusion models in continuous time: the network says z of
    x_vp = (x0 + sigma z) / sqrt(1 + sigma^2), and is told the time, in (0, 1], as a step."""

    beta_d: float = Field(19.9, gt=0, le=100)
    """Rise of the rate of noise beta from time 0 to 1."""
    beta_min: float = Field(0.1, gt=0, le=100)
    """Rate of noise at time 0."""
    steps: int = Field(1000, ge=2, le=10**6)
    """M, steps that the times are told in: c_noise = (M - 1) t."""
    epsilon: float = Field(1e-5, gt=0, lt=1)
    """Lowest time of training."""

    @property
    def betas(self) -> Betas:
        """Noise levels by time."""
        return Betas(self.beta_d, self.beta_min)

    @property
    def levels(self) -> tuple[float, float]:
        low, high = (
            math.sqrt(math.expm1(0.5 * self.beta_d * t**2 + self.beta_min * t))
            for t in (self.epsilon, 1)
        )
        return low, high

    known = levels

    def scalings(self, sigma: Tensor, sigma_data: float, sigma_min: float) -> cmkit.Scalings:
        """c_skip = 1, c_out = -sigma, c_in = 1 / sqrt(1 + sigma^2), c_noise = (M - 1) t(sigma)."""
        c_noise = (self.steps - 1) * self.betas.time(sigma)
        return cmkit.Scalings(sigma.new_ones(sigma.shape), -sigma, (1 + sigma**2).rsqrt(), c_noise)
