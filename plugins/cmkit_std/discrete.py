"""Discrete variance-preserving models, such as those of latent diffusion, on the project's sigma
axis (Luo et al.: Latent Consistency Models, 2023; huggingface/diffusers).

Such a network knows whole steps t of x_vp = alpha_t x0 + sqrt(1 - alpha_t^2) z, where alpha_t^2 is
`alphas_cumprod`. With x = x_vp / alpha_t its noise level is sigma_t = sqrt(1 / alpha_t^2 - 1), a
DDIM step is an Euler step, and `lcm`, `cd` and every sampler take it as it is:
FormulatedDenoiser(network, Discrete(..), DiscreteNoise.of(Discrete(..))).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from cmkit import Noise, RecipeError
from cmkit_std.formulations import Scalings


@dataclass(frozen=True)
class Schedule:
    """How much noise each step adds; the defaults are those of latent diffusion."""

    beta_start: float = 0.00085
    beta_end: float = 0.012
    steps: int = 1000
    spacing: Literal["scaled_linear", "linear"] = "scaled_linear"
    """What rises evenly: the square root of beta, or beta."""

    def betas(self) -> Tensor:
        """Variances of the added noise, (steps,) float64."""
        power = 0.5 if self.spacing == "scaled_linear" else 1.0
        low, high = self.beta_start**power, self.beta_end**power
        return torch.linspace(low, high, self.steps, dtype=torch.float64) ** (1 / power)

    def alphas_cumprod(self) -> Tensor:
        """alpha_t^2, falling, (steps,) float64."""
        return _alphas_cumprod(self)

    def sigmas(self) -> Tensor:
        """sigma_t, rising, (steps,) float64."""
        return (1 / self.alphas_cumprod() - 1).sqrt()


@functools.cache
def _alphas_cumprod(schedule: Schedule) -> Tensor:
    return torch.cumprod(1 - schedule.betas(), 0)


def zero_terminal_snr(alphas_cumprod: Tensor) -> Tensor:
    """alpha_t^2, (steps,), of alpha_t moved and stretched so that the last is 0 and the first stays
    (Lin, Liu, Li, Yang: Common Diffusion Noise Schedules and Sample Steps are Flawed, 2023,
    algorithm 1). Its last step has no finite sigma, and so no place on our axis."""
    alpha = alphas_cumprod.sqrt()
    moved: Tensor = (alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])
    return moved**2


def lcm_boundary(
    t: Tensor, timestep_scaling: float = 10.0, sigma_data: float = 0.5
) -> tuple[Tensor, Tensor]:
    """(c_skip, c_out) of x_vp and of the estimate at whole steps t, s = timestep_scaling t:
    sigma_data^2 / (s^2 + sigma_data^2) and s / sqrt(s^2 + sigma_data^2).

    The official code, unlike its paper, scales t and has no factor sigma_data in c_out.
    """
    s = timestep_scaling * t
    square = s**2 + sigma_data**2
    return sigma_data**2 / square, s / square.sqrt()


@dataclass(frozen=True)
class Discrete:
    """The column of a network that knows the steps of `schedule`; see `formulations.Column`."""

    schedule: Schedule = field(default_factory=Schedule)
    prediction: Literal["epsilon", "v_prediction", "sample"] = "epsilon"
    """What the network estimates: the noise z, v = alpha z - sqrt(1 - alpha^2) x0, or x0."""
    timestep_scaling: float | None = None
    """Of `lcm_boundary`, for a consistency model: at t = 0 it returns x_vp. None = no boundary."""

    @property
    def sigma_min(self) -> float:
        return float(self.schedule.sigmas()[0])

    @property
    def sigma_max(self) -> float:
        return float(self.schedule.sigmas()[-1])

    def step(self, sigma: Tensor) -> Tensor:
        """The whole step whose noise level is nearest to each sigma (B,), (B,) int64."""
        levels = self.schedule.sigmas().to(sigma.device)
        return (sigma[:, None] - levels).abs().argmin(1)

    def rounded(self, sigma: Tensor) -> Tensor:
        return self.schedule.sigmas().to(sigma)[self.step(sigma)]

    def scalings(self, sigma: Tensor) -> Scalings:
        t = self.step(sigma).to(sigma.dtype)
        alpha = (1 + sigma**2).rsqrt()
        match self.prediction:
            case "epsilon":
                c_skip, c_out = torch.ones_like(sigma), -sigma
            case "v_prediction":
                c_skip, c_out = alpha**2, -alpha * sigma
            case "sample":
                c_skip, c_out = torch.zeros_like(sigma), torch.ones_like(sigma)
        if self.timestep_scaling is not None:
            near, far = lcm_boundary(t, self.timestep_scaling)
            c_skip, c_out = near * alpha + far * c_skip, far * c_out
        return Scalings(c_skip, c_out, alpha, t)


@dataclass(frozen=True)
class DiscreteNoise(Noise):
    """The noise levels of a schedule: a grid of its own steps instead of Karras's."""

    schedule: Schedule = field(default_factory=Schedule)

    @classmethod
    def of(cls, column: Discrete) -> DiscreteNoise:
        """The axis of the networks of `column`."""
        return cls(column.sigma_min, column.sigma_max, schedule=column.schedule)

    def steps(self, n: int) -> Tensor:
        """Steps of a grid of n points, (n,) int64: all of them, or 0 and then the last of each of
        n - 1 equal parts, LCM's 0, 19, 39, .., 999 for n = 51."""
        total = self.schedule.steps
        if n == total:
            return torch.arange(total)
        if n < 2 or total % (n - 1):
            raise RecipeError(
                f"a grid of {n} points: {total} steps do not divide into {n - 1} parts; give"
                f" {total}, or 1 more than a divisor of it, such as 51"
            )
        ends = torch.arange(1, n) * (total // (n - 1)) - 1
        return torch.cat([ends.new_zeros(1), ends])

    def sigmas(
        self, n: int, device: torch.device | None = None, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """Levels of `steps(n)`, (n,), rising from sigma_min to sigma_max."""
        return self.schedule.sigmas()[self.steps(n)].to(device=device, dtype=dtype)

    def sigma_at(self, u: Tensor) -> Tensor:
        """The level of the step nearest to fractions u in [0, 1] of the way."""
        levels = self.schedule.sigmas().to(u)
        return levels[(u * (len(levels) - 1)).round().long()]
