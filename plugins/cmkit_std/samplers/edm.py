"""Stochastic second-order sampling (Karras, Aittala, Aila, Laine: Elucidating the Design Space of
Diffusion-Based Generative Models, 2022, algorithm 2)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from cmkit import Sampler
from cmkit_std.samplers.ablation import Ablation
from cmkit_std.samplers.steps import DIFFUSION, Churn, Draws, Steps

if TYPE_CHECKING:
    from torch import Tensor

    from cmkit import Cond, Denoiser


class EDM(Churn, Sampler):
    """The sampler of EDM: as `heun`, but estimates are not clamped and x is kept in float64;
    `ablation` has its variants. For diffusion models, such as of denoiser.precond = "edm"."""

    needs: ClassVar[frozenset[str]] = DIFFUSION

    steps: Steps = 18

    def sample(self, denoiser: Denoiser, x: Tensor, cond: Cond, noise: Draws) -> Tensor:
        """The walk of `ablation` with its defaults; the denoiser sees x in the type it came in."""
        walk = Ablation(
            steps=self.steps,
            s_churn=self.s_churn,
            s_min=self.s_tmin,
            s_max=self.s_tmax,
            s_noise=self.s_noise,
        )
        return walk.sample(denoiser, x, cond, noise)
