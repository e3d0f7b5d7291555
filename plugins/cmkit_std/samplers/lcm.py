"""Sampling of latent consistency models (Luo et al.: Latent Consistency Models, 2023, algorithm 3;
the noise levels are those of huggingface/diffusers)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from pydantic import Field, model_validator

from cmkit import Sampler
from cmkit_std.samplers.steps import estimate, falling

if TYPE_CHECKING:
    from torch import Tensor

    from cmkit import Cond, Denoiser


class LCM(Sampler):
    """As `multistep`, at noise levels that are spread evenly over the grid of training, and with
    sigma z for the fresh noise, although the estimate already holds sigma_min of it."""

    steps: int = Field(4, ge=1, le=10_000)
    """Noise levels, the first of them sigma_max."""
    grid: int = Field(50, ge=1, le=10_000)
    """Intervals of the grid that the levels are taken from; objective lcm crosses each in one
    step: num_sigmas / skip."""
    clamp: bool = True
    """Clamp each estimate to [-1, 1]; false for latents."""

    @model_validator(mode="after")
    def _grid_has_the_steps(self) -> LCM:
        if self.steps > self.grid:
            raise ValueError(f"steps {self.steps} must not be above grid {self.grid}")
        return self

    @property
    def nfe(self) -> int:
        return self.steps

    def sample(
        self, denoiser: Denoiser, x: Tensor, cond: Cond, noise: Callable[[int], Tensor]
    ) -> Tensor:
        """x0 = f(x, sigma_max); then x = x0 + sigma z, x0 = f(x, sigma)."""
        levels = falling(denoiser.noise, self.grid + 1)
        first, *others = (levels[i] for i in skipped(self.grid, self.steps))
        x0 = estimate(denoiser, x, first, cond, self.clamp)
        for k, sigma in enumerate(others, 1):
            x0 = estimate(denoiser, x0 + sigma * noise(k), sigma, cond, self.clamp)
        return x0


def skipped(grid: int, steps: int) -> list[int]:
    """Which of a falling list of `grid` levels `steps` steps visit: floor(k (grid / steps)), whose
    rounding, as in diffusers, now and then takes 14 for 15."""
    return [int(k * (grid / steps)) for k in range(steps)]
