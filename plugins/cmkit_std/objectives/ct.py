"""Consistency training (Song, Dhariwal, Chen, Sutskever: Consistency Models, 2023, algorithm 3)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, model_validator

import cmkit
from cmkit import Phase
from cmkit_std.objectives.comparison import Comparison
from cmkit_std.objectives.schedules import adaptive_num_sigmas, adaptive_target_ema

if TYPE_CHECKING:
    from torch import Tensor

    from cmkit import Cond, Models, Rng


class CT(Comparison):
    """Consistency training: the online network at sigma_{i+1} meets its EMA at sigma_i on the same
    image and noise, on a grid whose number of points grows with the step.

    Defaults are those of the official LSUN runs; ImageNet-64 uses end_scales = 200. The official
    code computes mu from N - 1 where the paper prints N: `mu_denominator` chooses. The published
    runs started from a diffusion model (denoiser.weights), those of the paper from nothing.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"target", "boundary"})

    start_scales: int = Field(2, ge=1, le=10**6)
    """s0 of N(k)."""
    end_scales: int = Field(150, ge=1, le=10**6)
    """s1 of N(k)."""
    num_sigmas: int | None = Field(None, ge=2, le=10**6)
    """Points of the grid throughout; absent = N(k)."""
    start_ema: float = Field(0.95, gt=0, lt=1)
    """mu0, the target's decay that mu(k) starts from."""
    mu_denominator: Literal["n_minus_1", "n"] = "n_minus_1"
    """mu(k) = exp(s0 ln(mu0) / (N - 1)) as the official code, or / N as the paper."""
    target_ema: float | None = Field(None, ge=0, lt=1)
    """The target's decay throughout; absent = mu(k)."""

    @model_validator(mode="after")
    def _scales_grow(self) -> CT:
        if self.end_scales < self.start_scales:
            raise ValueError(
                f"end_scales {self.end_scales} must not be below start_scales {self.start_scales}"
            )
        return self

    def phase(self, step: int, total: int) -> Phase:
        """N(k) and mu(k) of the paper's appendix C, unless they are fixed."""
        num_sigmas = self.num_sigmas or adaptive_num_sigmas(
            step, total, self.start_scales, self.end_scales
        )
        mu = self.target_ema
        if mu is None:
            mu = adaptive_target_ema(
                num_sigmas, self.start_scales, self.start_ema, self.mu_denominator
            )
        return Phase(step, num_sigmas, mu)

    def loss(self, models: Models, x0: Tensor, cond: Cond, phase: Phase, rng: Rng) -> Tensor:
        """d(f(x0 + sigma_{i+1} z, sigma_{i+1}), f_target(x0 + sigma_i z, sigma_i)), (B,)."""
        import torch

        from cmkit.functional import per_image

        sigmas = models.online.noise.sigmas(phase.num_sigmas, x0.device, x0.dtype)
        i = rng.integers(phase.num_sigmas - 1, len(x0))
        low, high = sigmas[i], sigmas[i + 1]
        z = rng.normal_like(x0)
        with cmkit.shared_dropout(rng):
            online = models.online(x0 + per_image(high, x0) * z, high, cond)
        with torch.no_grad(), cmkit.shared_dropout(rng):
            target = models.target(x0 + per_image(low, x0) * z, low, cond)
        return self.compared(online, target, high, models.online.sigma_data)
