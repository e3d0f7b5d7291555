"""Consistency distillation (Song, Dhariwal, Chen, Sutskever: Consistency Models, 2023,
algorithm 2)."""

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


class CD(Comparison):
    """Consistency distillation: the online network at sigma_{i+1} meets its EMA at the point where
    one step of the teacher's ODE solver arrives at sigma_i.

    Defaults are those of the official runs on ImageNet-64 and LSUN; the CIFAR-10 ones have
    num_sigmas = 18 and target_ema = 0. Their students start from the teacher
    (denoiser.init = "teacher").
    """

    needs: ClassVar[frozenset[str]] = frozenset({"target", "teacher", "boundary"})

    num_sigmas: int = Field(40, ge=2, le=10**6)
    """N, points of the grid."""
    end_scales: int | None = Field(None, ge=1, le=10**6)
    """s1, to let N(k) grow from s0 = num_sigmas to s1 + 1 as in consistency training."""
    target_ema: float = Field(0.95, ge=0, lt=1)
    """The target's decay; 0 = the online network itself."""
    adaptive_ema: bool = False
    """Let the decay follow N(k): mu(k) = exp(s0 ln(target_ema) / (N - 1))."""
    solver: Literal["heun", "euler"] = "heun"
    """How the teacher goes from sigma_{i+1} to sigma_i: two evaluations, or one."""

    @model_validator(mode="after")
    def _schedule_is_whole(self) -> CD:
        if self.end_scales is not None and self.end_scales < self.num_sigmas:
            raise ValueError(
                f"end_scales {self.end_scales} must not be below num_sigmas {self.num_sigmas}"
            )
        if self.adaptive_ema and not self.target_ema:
            raise ValueError("adaptive_ema needs a target_ema above 0")
        return self

    def phase(self, step: int, total: int) -> Phase:
        """N and mu, fixed unless told otherwise."""
        num_sigmas, mu = self.num_sigmas, self.target_ema
        if self.end_scales is not None:
            num_sigmas = adaptive_num_sigmas(step, total, self.num_sigmas, self.end_scales)
        if self.adaptive_ema:
            mu = adaptive_target_ema(num_sigmas, self.num_sigmas, mu)
        return Phase(step, num_sigmas, mu)

    def loss(self, models: Models, x0: Tensor, cond: Cond, phase: Phase, rng: Rng) -> Tensor:
        """d(f(x, sigma_{i+1}), f_target(solve(x, sigma_{i+1} -> sigma_i), sigma_i)), (B,), with
        x = x0 + sigma_{i+1} z."""
        import torch

        from cmkit import functional

        solve = getattr(functional, self.solver)
        sigmas = models.online.noise.sigmas(phase.num_sigmas, x0.device, x0.dtype)
        i = rng.integers(phase.num_sigmas - 1, len(x0))
        low, high = sigmas[i], sigmas[i + 1]
        x = x0 + functional.per_image(high, x0) * rng.normal_like(x0)
        with cmkit.shared_dropout(rng):
            online = models.online(x, high, cond)
        with torch.no_grad():
            x_low = solve(models.teacher, x, high, low, cond)
            with cmkit.shared_dropout(rng):
                target = models.target(x_low, low, cond)
        return self.compared(online, target, high, models.online.sigma_data)
