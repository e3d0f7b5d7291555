"""Improved consistency training (Song, Dhariwal: Improved Techniques for Training Consistency
Models, 2023)."""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field, model_validator

import cmkit
from cmkit import Objective, Phase
from cmkit_std.objectives.comparison import HuberC

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from cmkit import Cond, Models, Rng


class ICT(Objective):
    """Improved consistency training: no EMA target, pseudo-Huber distance on whole images, noise
    levels drawn from a discretised lognormal, N doubled in stages, weight 1 / (sigma_{i+1} -
    sigma_i)."""

    needs: ClassVar[frozenset[str]] = frozenset({"boundary"})

    start_scales: int = Field(10, ge=1, le=10**6)
    """s0, intervals of the grid at the start."""
    end_scales: int = Field(1280, ge=1, le=10**6)
    """s1, intervals of the grid at the end."""
    p_mean: float = Field(-1.1, ge=-20, le=20)
    """Mean of ln(sigma)."""
    p_std: float = Field(2.0, gt=0, le=20)
    """Standard deviation of ln(sigma)."""
    huber_c: HuberC = None

    @model_validator(mode="after")
    def _scales_grow(self) -> ICT:
        if self.end_scales < self.start_scales:
            raise ValueError(
                f"end_scales {self.end_scales} must not be below start_scales {self.start_scales}"
            )
        return self

    def phase(self, step: int, total: int) -> Phase:
        """N(k) = min(s0 2^floor(k / K'), s1) + 1, K' = floor(K / (log2 floor(s1 / s0) + 1))."""
        stages = math.log2(self.end_scales // self.start_scales) + 1
        doublings = step // max(math.floor(total / stages), 1)
        # 2^40 is above every s1: a late step must not build an integer of thousands of digits.
        scales = min(self.start_scales * 2 ** min(doublings, 40), self.end_scales)
        return Phase(step, scales + 1)

    def loss(self, models: Models, x0: Tensor, cond: Cond, phase: Phase, rng: Rng) -> Tensor:
        """d(f(x0 + sigma_{i+1} z), sg f(x0 + sigma_i z)) / (sigma_{i+1} - sigma_i), (B,).

        i is drawn by the mass of the lognormal law between sigma_i and sigma_{i+1}.
        """
        import torch

        from cmkit.functional import per_image, pseudo_huber

        noise, num_sigmas = models.online.noise, phase.num_sigmas
        sigmas = noise.sigmas(num_sigmas, x0.device, x0.dtype)
        mass = lognormal_mass(noise, num_sigmas, self.p_mean, self.p_std, x0.device)
        i = rng.choice(mass, len(x0))
        low, high = sigmas[i], sigmas[i + 1]
        z = rng.normal_like(x0)
        with cmkit.shared_dropout(rng):
            online = models.online(x0 + per_image(high, x0) * z, high, cond)
        with torch.no_grad(), cmkit.shared_dropout(rng):
            target = models.online(x0 + per_image(low, x0) * z, low, cond)
        return pseudo_huber(online, target, self.huber_c) / (high - low)


@functools.lru_cache(maxsize=64)
def lognormal_mass(
    noise: cmkit.Noise, num_sigmas: int, mean: float, std: float, device: torch.device
) -> Tensor:
    """Masses that p(i) is in proportion to, (N - 1,): erf differences (iCT, eq. 10)."""
    import torch

    # In float64: differences of erf lose up to 7e-4 of a small weight in float32.
    sigmas = noise.sigmas(num_sigmas, torch.device("cpu"), torch.float64)
    erf = torch.erf((sigmas.log() - mean) / (math.sqrt(2) * std))
    return (erf[1:] - erf[:-1]).to(device)
