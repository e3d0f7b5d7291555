"""Sampling of latent consistency models (Luo et al.: Latent Consistency Models, 2023, algorithm 3;
the noise levels are those of huggingface/diffusers)."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field, model_validator

from cmkit import RecipeError
from cmkit_std.samplers.steps import Draws, Walk, estimator, falling

if TYPE_CHECKING:
    from torch import Tensor

    from cmkit import Cond, Denoiser, Noise, Precond, Scheduler


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

    def scheduler(self, precond: Precond, noise: Noise, sigma_data: float) -> Scheduler:
        """LCMScheduler; a model without timestep_scaling gets one at which nothing is seen of x."""
        from cmkit_std.samplers.diffusers import discrete_scheduler

        found = discrete_scheduler(precond, noise, "LCMScheduler")
        if (total := found.config["num_train_timesteps"]) % self.grid:
            near = min((n for n in range(1, total + 1) if total % n == 0), key=self._from_grid)
            raise RecipeError(
                f"sampler.grid = {self.grid} does not divide the {total} steps, and diffusers'"
                f" LCMScheduler takes other ones then; set sampler.grid = {near}"
            )
        scaling = getattr(precond, "timestep_scaling", None)
        more = {"original_inference_steps": self.grid, "timestep_scaling": scaling or 1e6}
        config = {**found.config, **more}
        return replace(found, config=config, call={"num_inference_steps": self.steps})

    def _from_grid(self, other: int) -> int:
        return abs(other - self.grid)


def skipped(grid: int, steps: int) -> list[int]:
    """Indices of the levels that `steps` steps visit in a falling list of `grid`:
    floor(k (grid / steps)), in floating point as in diffusers, so that 15 may come out as 14."""
    return [int(k * (grid / steps)) for k in range(steps)]
