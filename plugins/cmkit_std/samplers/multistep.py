"""Multistep consistency sampling (Consistency Models, 2023, algorithm 1)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

from pydantic import Field, model_validator

from cmkit import Sampler
from cmkit_std.samplers.steps import Clamp, between

if TYPE_CHECKING:
    from torch import Tensor

    from cmkit import Cond, Denoiser


class Multistep(Sampler):
    """One step from sigma_max, then one for each further noise level, with fresh noise before it.

    An empty list is one-step sampling. Models of objective `ctm` have sampler `gamma` for this.
    """

    sigmas: tuple[Annotated[float, Field(gt=0, le=10_000)], ...] = Field((), max_length=1000)
    """Noise levels after the first step, falling; [0.821] makes two steps."""
    clamp: Clamp = True

    @model_validator(mode="after")
    def _sigmas_fall(self) -> Multistep:
        if any(b >= a for a, b in zip(self.sigmas, self.sigmas[1:], strict=False)):
            raise ValueError(f"sigmas {list(self.sigmas)} must fall")
        return self

    @property
    def nfe(self) -> int:
        return 1 + len(self.sigmas)

    def sample(
        self, denoiser: Denoiser, x: Tensor, cond: Cond, noise: Callable[[int], Tensor]
    ) -> Tensor:
        """x0 = f(x, sigma_max); then x = x0 + sqrt(sigma^2 - sigma_min^2) z, x0 = f(x, sigma)."""
        low, high = denoiser.noise.sigma_min, denoiser.noise.sigma_max
        sigmas = between(self.sigmas, denoiser.noise)
        x0 = self.estimate(denoiser, x, high, cond)
        for k, sigma in enumerate(sigmas, 1):
            x = x0 + math.sqrt(sigma**2 - low**2) * noise(k)
            x0 = self.estimate(denoiser, x, sigma, cond)
        return x0

    def estimate(self, denoiser: Denoiser, x: Tensor, sigma: float, cond: Cond) -> Tensor:
        """f, (B, C, H, W), of images x (B, C, H, W) that are all at noise level sigma."""
        x0 = denoiser(x, x.new_full((len(x),), sigma), cond)
        return x0.clamp(-1, 1) if self.clamp else x0
