"""What samplers share: the sigma grid, the walk down it, the estimate, churn."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import AfterValidator, Field, model_validator

import cmkit
from cmkit import DataSpec, Part, RecipeError, Sampler

if TYPE_CHECKING:
    from torch import Tensor

    from cmkit import Cond, Denoiser, Noise
    from cmkit.functional import Denoise

Steps = Annotated[
    int,
    Field(
        ge=2,
        le=10_000,
        description="Points of the sigma grid; the last step goes from sigma_min to 0.",
    ),
]
Draws = Callable[[int], "Tensor"]
"""noise(k), k >= 1: the k-th draw of fresh noise z, of the images' shape."""
Clamp = Annotated[
    bool,
    Field(description="Clamp each estimate to [-1, 1]; latents, which have no bounds, never are."),
]


def _must_fall(sigmas: tuple[float, ...]) -> tuple[float, ...]:
    if any(b >= a for a, b in pairwise(sigmas)):
        raise ValueError(f"sigmas {list(sigmas)} must fall")
    return sigmas


Sigmas = Annotated[
    tuple[Annotated[float, Field(gt=0, le=10_000)], ...],
    Field(max_length=1000),
    AfterValidator(_must_fall),
]
"""Falling noise levels."""


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


def estimator(denoiser: Denoiser, clamp: bool) -> Denoise:
    """The function (x, sigma, cond) -> x0_hat of images x (B, C, H, W) at one noise level sigma.

    Of a trajectory model, x0_hat is the jump from sigma to sigma.
    """
    from cmkit_std.trajectory import denoised

    def estimate(x: Tensor, sigma: float, cond: Cond) -> Tensor:
        x0 = denoised(denoiser, x, x.new_full((len(x),), sigma), cond)
        return denoiser.clamp(x0) if clamp else x0

    return estimate


DIFFUSION = frozenset({"diffusion"})
"""`needs` of a sampler that takes (x - D) / sigma of estimates D of x0 for the slope of the ODE."""


class Walk(Sampler):
    """Euler steps down the sigma grid to sigma_min, and then to 0; subclasses may add fresh noise
    after each."""

    needs: ClassVar[frozenset[str]] = DIFFUSION

    steps: Steps = 40
    clamp: Clamp = True

    @property
    def nfe(self) -> int:
        return self.steps

    def smallest(self, data: DataSpec) -> Mapping[str, Any]:
        return {"steps": min(self.steps, 2)}

    def levels(self, noise: Noise) -> list[float]:
        """The noise levels between the steps, falling to 0, steps + 1 of them."""
        return [*falling(noise, self.steps), 0.0]

    def split(self, sigma: float, sigma_next: float) -> tuple[float, float]:
        """(sigma_down, sigma_up): where the step from sigma ends, and the deviation of the noise
        that leads from there to sigma_next, if any."""
        return sigma_next, 0.0

    def sample(self, denoiser: Denoiser, x: Tensor, cond: Cond, noise: Draws) -> Tensor:
        """x0_hat + sigma_down / sigma (x - x0_hat) + sigma_up z for each step."""
        denoise = estimator(denoiser, self.clamp)
        for k, (sigma, sigma_next) in enumerate(pairwise(self.levels(denoiser.noise)), 1):
            down, up = self.split(sigma, sigma_next)
            x = cmkit.functional.euler(denoise, x, sigma, down, cond)
            if up > 0:
                x = x + up * noise(k)
        return x


class Churn(Part):
    """Fields of a walk of second order, each step of which first goes back up to sigma (1 + gamma)
    with fresh noise."""

    steps: Steps = 40
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

    @property
    def nfe(self) -> int:
        """Two evaluations a step, but one for the last."""
        return 2 * self.steps - 1

    def smallest(self, data: DataSpec) -> Mapping[str, Any]:
        return {"steps": min(self.steps, 2)}

    def churned(self, x: Tensor, sigma: float, k: int, noise: Draws) -> tuple[Tensor, float]:
        """(x, sigma) after the k-th draw of noise (EDM, algorithm 2, lines 4 to 6)."""
        top = math.inf if self.s_tmax is None else self.s_tmax
        if self.s_churn == 0 or not self.s_tmin <= sigma <= top:
            return x, sigma
        gamma = min(self.s_churn / self.steps, math.sqrt(2) - 1)
        missing = sigma * math.sqrt(gamma * (2 + gamma))  # sqrt(sigma_hat^2 - sigma^2)
        return x + missing * self.s_noise * noise(k), sigma * (1 + gamma)
