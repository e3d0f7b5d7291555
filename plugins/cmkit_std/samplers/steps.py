"""What samplers share that walk down the sigma grid: the grid, the estimate, churn."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

from pydantic import Field, model_validator

from cmkit import Sampler
from cmkit.errors import RecipeError

if TYPE_CHECKING:
    from torch import Tensor

    from cmkit import Cond, Denoiser, Noise

Steps = Annotated[
    int,
    Field(
        ge=2,
        le=10_000,
        description="Points of the sigma grid; the last step goes from sigma_min to 0.",
    ),
]
Clamp = Annotated[bool, Field(description="Clamp each estimate to [-1, 1]; false for latents.")]


def falling(noise: Noise, n: int) -> list[float]:
    """The Karras grid of n points from sigma_max down to sigma_min, in float64."""
    import torch

    return noise.sigmas(n, dtype=torch.float64).flip(0).tolist()


def between(sigmas: tuple[float, ...], noise: Noise) -> list[float]:
    """The falling `sigmas` of a recipe; RecipeError unless sigma_min < sigmas < sigma_max."""
    low, high = noise.sigma_min, noise.sigma_max
    if sigmas and not (sigmas[0] < high and sigmas[-1] > low):
        raise RecipeError(
            f"sampler.sigmas = {list(sigmas)}: must lie between sigma_min {low} and"
            f" sigma_max {high}"
        )
    return list(sigmas)


def estimator(denoiser: Denoiser, clamp: bool) -> Callable[[Tensor, float, Cond], Tensor]:
    """The function (x, sigma, cond) -> x0_hat of images x (B, C, H, W) at one noise level sigma.

    A trajectory model gives its estimate as a diffusion model, a jump to where it stands.
    """
    from cmkit_std.trajectory import denoised

    def estimate(x: Tensor, sigma: float, cond: Cond) -> Tensor:
        x0 = denoised(denoiser, x, x.new_full((len(x),), sigma), cond)
        return x0.clamp(-1, 1) if clamp else x0

    return estimate


class Walk(Sampler):
    """A sampler that visits the sigma grid from sigma_max to sigma_min, and then 0."""

    steps: Steps = 40

    @property
    def nfe(self) -> int:
        return self.steps

    def levels(self, noise: Noise) -> list[float]:
        """The noise levels between the steps, falling to 0, steps + 1 of them."""
        return [*falling(noise, self.steps), 0.0]


class Churn(Walk):
    """A walk that first goes back up to sigma (1 + gamma) with fresh noise at each step."""

    s_churn: float = Field(0.0, ge=0, le=1e6)
    """Noise to add over the whole walk: gamma = min(s_churn / steps, sqrt(2) - 1); 0 = none."""
    s_tmin: float = Field(0.0, ge=0, le=1e6)
    """Lowest sigma at which noise is added."""
    s_tmax: float | None = Field(None, ge=0, le=1e6)
    """Highest sigma at which noise is added; absent = no bound."""
    s_noise: float = Field(1.0, ge=0, le=100)
    """Standard deviation of the added noise, over what sigma asks for."""

    @model_validator(mode="after")
    def _bounds_are_in_order(self) -> Churn:
        if self.s_tmax is not None and self.s_tmin > self.s_tmax:
            raise ValueError(f"s_tmin {self.s_tmin} must not be above s_tmax {self.s_tmax}")
        return self

    def churned(
        self, x: Tensor, sigma: float, k: int, noise: Callable[[int], Tensor]
    ) -> tuple[Tensor, float]:
        """(x, sigma) after the k-th draw of noise (EDM, algorithm 2, lines 4 to 6)."""
        top = math.inf if self.s_tmax is None else self.s_tmax
        if self.s_churn == 0 or not self.s_tmin <= sigma <= top:
            return x, sigma
        gamma = min(self.s_churn / self.steps, math.sqrt(2) - 1)
        missing = sigma * math.sqrt(gamma * (2 + gamma))  # sqrt(sigma_hat^2 - sigma^2)
        return x + missing * self.s_noise * noise(k), sigma * (1 + gamma)
