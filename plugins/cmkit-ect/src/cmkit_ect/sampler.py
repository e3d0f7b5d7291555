"""Sampling of easy consistency tuning (Geng, Pokle, Luo, Lin, Kolter: Consistency Models Made Easy,
2024)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

from pydantic import Field, model_validator

from cmkit import RecipeError, Sampler

if TYPE_CHECKING:
    from torch import Tensor

    from cmkit import Cond, Denoiser


class ECTSampler(Sampler):
    """One step from sigma_max, then one for each further noise level, with fresh noise before it.

    The identity of the model is at noise level 0, so that the fresh noise is the whole sigma z.
    """

    sigmas: tuple[Annotated[float, Field(gt=0, le=10_000)], ...] = Field((), max_length=1000)
    """Noise levels after the first step, falling; [0.821] makes two steps."""

    @model_validator(mode="after")
    def _sigmas_fall(self) -> ECTSampler:
        if any(b >= a for a, b in zip(self.sigmas, self.sigmas[1:], strict=False)):
            raise ValueError(f"sigmas {list(self.sigmas)} must fall")
        return self

    @property
    def nfe(self) -> int:
        return 1 + len(self.sigmas)

    def sample(
        self, denoiser: Denoiser, x: Tensor, cond: Cond, noise: Callable[[int], Tensor]
    ) -> Tensor:
        """x0 = f(x, sigma_max); then x0 = f(x0 + sigma z, sigma) for each further sigma."""
        high = denoiser.noise.sigma_max
        if self.sigmas and self.sigmas[0] >= high:
            raise RecipeError(
                f"sampler.sigmas = {list(self.sigmas)}: must lie below sigma_max {high}"
            )
        x0 = denoiser(x, x.new_full((len(x),), high), cond)
        for k, sigma in enumerate(self.sigmas, 1):
            x0 = denoiser(x0 + sigma * noise(k), x.new_full((len(x),), sigma), cond)
        return x0
