"""Columns VP, VE and iDDPM of table 1 of EDM (Karras, Aittala, Aila, Laine: Elucidating the Design
Space of Diffusion-Based Generative Models, 2022), beside EDM's own law of training noise.

Networks that were trained under these columns take another c_noise than ln(sigma) / 4; a
`FormulatedDenoiser` calls them. EDM's published weights, its "vp" and "ve" files included, are of
column EDM, which is `cmkit.Denoiser` with precond "edm".
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from cmkit import Cond, Denoiser, Network, Noise
from cmkit.denoiser import NO_COND


class Scalings(NamedTuple):
    """Coefficients of D(x, sigma) = c_skip x + c_out F(c_in x, c_noise), (B,) each."""

    c_skip: Tensor
    c_out: Tensor
    c_in: Tensor
    c_noise: Tensor


class Column(Protocol):
    """How a network was trained."""

    @property
    def sigma_min(self) -> float:
        """Lowest noise level of training."""

    @property
    def sigma_max(self) -> float:
        """Highest noise level of training."""

    def scalings(self, sigma: Tensor) -> Scalings:
        """Coefficients at noise levels sigma (B,)."""

    def rounded(self, sigma: Tensor) -> Tensor:
        """The nearest noise levels, (B,), that the network knows."""


@dataclass(frozen=True)
class VP:
    """Variance preserving: a network that knows times t in (0, 1], or M = 1000 steps of them."""

    beta_d: float = 19.9
    beta_min: float = 0.1
    steps: int = 1000
    epsilon: float = 1e-5
    """Lowest time of training."""

    @property
    def sigma_min(self) -> float:
        return float(self.sigma(torch.tensor(self.epsilon, dtype=torch.float64)))

    @property
    def sigma_max(self) -> float:
        return float(self.sigma(torch.tensor(1.0, dtype=torch.float64)))

    def sigma(self, t: Tensor) -> Tensor:
        """Noise levels at times t: sqrt(exp(beta_d t^2 / 2 + beta_min t) - 1)."""
        return torch.expm1(0.5 * self.beta_d * t**2 + self.beta_min * t).sqrt()

    def slope(self, t: Tensor) -> Tensor:
        """d sigma / d t at times t."""
        sigma = self.sigma(t)
        return 0.5 * (self.beta_min + self.beta_d * t) * (sigma + 1 / sigma)

    def time(self, sigma: Tensor) -> Tensor:
        """The times at which the noise levels are sigma; without cancellation at small ones."""
        log = torch.log1p(sigma**2)
        return 2 * log / ((self.beta_min**2 + 2 * self.beta_d * log).sqrt() + self.beta_min)

    def scalings(self, sigma: Tensor) -> Scalings:
        c_noise = (self.steps - 1) * self.time(sigma)
        return Scalings(torch.ones_like(sigma), -sigma, (1 + sigma**2).rsqrt(), c_noise)

    def rounded(self, sigma: Tensor) -> Tensor:
        return sigma

    def drawn(self, u: Tensor) -> Tensor:
        """Noise levels of training from uniform draws u."""
        return self.sigma(1 + u * (self.epsilon - 1))

    def weight(self, sigma: Tensor) -> Tensor:
        """Weight of the squared error of x0_hat."""
        return sigma**-2


@dataclass(frozen=True)
class VE:
    """Variance exploding: noise levels uniform in ln(sigma)."""

    sigma_min: float = 0.02
    sigma_max: float = 100.0

    def scalings(self, sigma: Tensor) -> Scalings:
        one = torch.ones_like(sigma)
        return Scalings(one, sigma, one, torch.log(0.5 * sigma))

    def rounded(self, sigma: Tensor) -> Tensor:
        return sigma

    def drawn(self, u: Tensor) -> Tensor:
        """Noise levels of training from uniform draws u."""
        return self.sigma_min * (self.sigma_max / self.sigma_min) ** u

    def weight(self, sigma: Tensor) -> Tensor:
        """Weight of the squared error of x0_hat."""
        return sigma**-2


@dataclass(frozen=True)
class IDDPM:
    """Improved DDPM's cosine schedule: a network that knows `steps` noise levels."""

    c_1: float = 0.001
    c_2: float = 0.008
    steps: int = 1000

    @property
    def sigma_min(self) -> float:
        return float(self.levels(torch.device("cpu"))[-2])

    @property
    def sigma_max(self) -> float:
        return float(self.levels(torch.device("cpu"))[0])

    def levels(self, device: torch.device) -> Tensor:
        """The noise levels, falling to 0 at the last, (steps + 1,) float64."""
        return _cosine_levels(self.c_1, self.c_2, self.steps).to(device)

    def scalings(self, sigma: Tensor) -> Scalings:
        c_noise = (self.steps - 1 - self._nearest(sigma)).to(sigma.dtype)
        return Scalings(torch.ones_like(sigma), -sigma, (1 + sigma**2).rsqrt(), c_noise)

    def rounded(self, sigma: Tensor) -> Tensor:
        return self.levels(sigma.device)[self._nearest(sigma)].to(sigma.dtype)

    def time(self, sigma: Tensor) -> Tensor:
        """Times in [0, 1] at which the cosine schedule, unclipped, has the noise levels sigma:
        1 / (1 + sigma^2) = cos^2(a (t + c_2)) / cos^2(a c_2), a = pi / (2 (1 + c_2))."""
        a = 0.5 * math.pi / (1 + self.c_2)
        return torch.arccos(math.cos(a * self.c_2) * (1 + sigma**2).rsqrt()) / a - self.c_2

    def _nearest(self, sigma: Tensor) -> Tensor:
        return (sigma[:, None] - self.levels(sigma.device)).abs().argmin(1)


@functools.cache
def _cosine_levels(c_1: float, c_2: float, steps: int) -> Tensor:
    """u_{j-1} = sqrt((u_j^2 + 1) / max(a_{j-1} / a_j, c_1) - 1), from u_steps = 0 upwards, with
    a_j = sin^2(pi j / (2 steps (1 + c_2)))."""
    a = [math.sin(0.5 * math.pi * j / steps / (1 + c_2)) ** 2 for j in range(steps + 1)]
    u = [0.0]
    for j in range(steps, 0, -1):
        u.append(math.sqrt((u[-1] ** 2 + 1) / max(a[j - 1] / a[j], c_1) - 1))
    return torch.tensor(u[::-1], dtype=torch.float64)


@dataclass(frozen=True)
class LogNormal:
    """Column EDM's law of training noise: ln(sigma) ~ N(mean, std^2)."""

    mean: float = -1.2
    std: float = 1.2
    sigma_data: float = 0.5

    def drawn(self, z: Tensor) -> Tensor:
        """Noise levels of training from standard normal draws z."""
        return (self.mean + self.std * z).exp()

    def weight(self, sigma: Tensor) -> Tensor:
        """Weight of the squared error of x0_hat: 1 / c_out^2."""
        return (sigma**2 + self.sigma_data**2) / (sigma * self.sigma_data) ** 2


class FormulatedDenoiser(Denoiser):
    """The denoiser of a network that was trained under another column than EDM's."""

    def __init__(self, network: Network, column: Column, noise: Noise | None = None):
        own = Noise(column.sigma_min, column.sigma_max)
        super().__init__(network, noise or own, precond="edm")
        self.column = column

    def forward(self, x: Tensor, sigma: Tensor, cond: Cond = NO_COND) -> Tensor:
        """x0_hat, (B, C, H, W), of noisy images x (B, C, H, W) with noise levels sigma (B,)."""
        scales = self._scales(sigma) if self._scales else {}
        c_skip, c_out, c_in, c_noise = self.column.scalings(sigma)
        f = self.network(c_in.view(-1, 1, 1, 1) * x, c_noise, cond, scales)
        return c_skip.view(-1, 1, 1, 1) * x + c_out.view(-1, 1, 1, 1) * f.to(x.dtype)
