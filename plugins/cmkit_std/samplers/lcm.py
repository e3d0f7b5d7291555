"""Sampling of latent consistency models (Luo et al.: Latent Consistency Models, 2023, algorithm 3;
the noise levels are those of huggingface/diffusers)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field, model_validator

from cmkit_std.samplers.steps import Draws, Walk, estimator, falling

if TYPE_CHECKING:
    from torch import Tensor

    from cmkit import Cond, Denoiser


class LCM(Walk):
    """Multistep consistency sampling at noise levels spread evenly over the grid of training. The
    fresh noise is sigma z, although the estimate already has noise of sigma_min."""

    needs: ClassVar[frozenset[str]] = frozenset()

    steps: int = Field(4, ge=1, le=10_000)
    """Noise levels, the first of them sigma_max."""
    grid: int = Field(50, ge=1, le=10_000)
    """Intervals of the grid that the levels are taken from; objective lcm crosses each in one
    step: num_sigmas / skip."""

    @model_validator(mode="after")
    def _grid_has_the_steps(self) -> LCM:
        if self.steps > self.grid:
            raise ValueError(f"steps {self.steps} must not be above grid {self.grid}")
        return self

    def sample(self, denoiser: Denoiser, x: Tensor, cond: Cond, noise: Draws) -> Tensor:
        """x0 = f(x, sigma_max); then x = x0 + sigma z, x0 = f(x, sigma)."""
        f = estimator(denoiser, self.clamp)
        levels = falling(denoiser.noise, self.grid + 1)
        first, *others = (levels[i] for i in skipped(self.grid, self.steps))
        x0 = f(x, first, cond)
        for k, sigma in enumerate(others, 1):
            x0 = f(x0 + sigma * noise(k), sigma, cond)
        return x0


def skipped(grid: int, steps: int) -> list[int]:
    """Indices of the levels that `steps` steps visit in a falling list of `grid`:
    floor(k (grid / steps)), in floating point as in diffusers, so that 15 may come out as 14."""
    return [int(k * (grid / steps)) for k in range(steps)]
