"""Progressive distillation (Salimans, Ho: Progressive Distillation for Fast Sampling of Diffusion
Models, 2022), on the noise levels of EDM as openai/consistency_models has it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

import cmkit
from cmkit import DataSpec, Phase
from cmkit_std.objectives.comparison import Comparison, Distance
from cmkit_std.objectives.schedules import halving_num_steps
from cmkit_std.objectives.weightings import Weighting

if TYPE_CHECKING:
    from torch import Tensor

    from cmkit import Cond, Models, Rng


class PD(Comparison):
    """Progressive distillation: one Euler step of the student makes two of its teacher. When the
    number of steps is halved the student becomes the teacher.

    The student stays a diffusion model (denoiser.precond = "edm") and samples with `num_steps`
    Euler steps; it should start from the teacher (denoiser.init = "teacher").
    """

    needs: ClassVar[frozenset[str]] = frozenset({"teacher", "diffusion"})

    start_scales: int = Field(64, ge=2, le=10**6)
    """Euler steps of the first student; its teacher takes twice as many."""
    round_steps: int = Field(50_000, ge=1, le=10**9)
    """Training steps a round; the round of 2 Euler steps takes twice as many, that of 1 the
    rest."""
    distance: Distance = "l2"
    """How the two estimates are compared; "l2-32" is l2 at 32 pixels."""
    weighting: Weighting = "truncated-snr"
    """Weight of the loss by the noise level that the student starts from."""

    def smallest(self, data: DataSpec) -> Mapping[str, Any]:
        return {**super().smallest(data), "round_steps": 1}

    def phase(self, step: int, total: int) -> Phase:
        """2n + 1 noise levels for n Euler steps; a round ends where n falls."""
        steps = halving_num_steps(step, self.start_scales, self.round_steps)
        after = halving_num_steps(step + 1, self.start_scales, self.round_steps)
        ends = after < steps and step + 1 < total
        return Phase(step, 2 * steps + 1, renew_teacher=ends, log={"num_steps": steps})

    def loss(self, models: Models, x0: Tensor, cond: Cond, phase: Phase, rng: Rng) -> Tensor:
        """d(D(x, sigma''), x0_hat), (B,), with x = x0 + sigma'' z, where x0_hat is the estimate
        with which one Euler step from x arrives where two of the teacher do, from sigma'' over
        sigma' to sigma."""
        import torch

        from cmkit.functional import euler, per_image

        sigmas = models.online.noise.sigmas(phase.num_sigmas, x0.device, x0.dtype)
        i = 2 * rng.integers(phase.num_sigmas // 2, len(x0))
        low, middle, high = sigmas[i], sigmas[i + 1], sigmas[i + 2]
        x = x0 + per_image(high, x0) * rng.normal_like(x0)
        with cmkit.shared_dropout(rng):
            student = models.online(x, high, cond)
        with torch.no_grad():
            x_middle = euler(models.teacher, x, high, middle, cond)
            x_low = euler(models.teacher, x_middle, middle, low, cond)
            x0_hat = x - per_image(high / (low - high), x) * (x_low - x)
        return self.compared(student, x0_hat, high, models.online.sigma_data)
