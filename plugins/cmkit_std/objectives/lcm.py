"""Latent consistency distillation (Luo, Tan, Huang, Li, Zhao: Latent Consistency Models, 2023,
algorithm 1), of pictures or latents alike."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, model_validator

import cmkit
from cmkit import Objective, Phase, RecipeError

if TYPE_CHECKING:
    from torch import Tensor

    from cmkit import Cond, Models, Network, Rng


class LCM(Objective):
    """Latent consistency distillation: as `cd`, but the teacher is guided by a weight w that the
    student embeds, and its solver skips grid points. On this axis its DDIM step is Euler's.

    Of prompts the teacher is guided away from the unconditional one; of labels it must know what
    none is: a backbone with null_class = true, trained with objective.label_dropout. Student:
    denoiser.init = "teacher". Sample with denoiser.guidance = w and sampler `lcm`; with
    embed_guidance = false, whose student guides by itself, without guidance.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"target", "teacher", "guidance", "boundary"})

    num_sigmas: int = Field(1000, ge=2, le=10**6)
    """N, points of the grid."""
    skip: int = Field(20, ge=1, le=10**6)
    """k, intervals of the grid that the teacher's solver crosses in one step; fewer where the grid
    ends, as in the official code, so that every level has a target."""
    solver: Literal["euler", "heun"] = "euler"
    """How the teacher goes down: one step of Euler (DDIM), or of Heun."""
    w_min: float = Field(5.0, ge=-1, le=1000)
    """Lowest w of x0_hat + w (x0_hat - x0_hat of no label or prompt), the usual guidance scale
    less 1. The defaults are those of text-to-image; class labels want less, 0 to 4."""
    w_max: float = Field(15.0, ge=-1, le=1000)
    """Highest w."""
    distance: Literal["huber", "l2"] = "huber"
    """How the two estimates are compared; "huber" is taken of each number by itself."""
    huber_c: float = Field(0.001, ge=0, le=1e6)
    """c of that distance."""
    target_ema: float = Field(0.95, ge=0, lt=1)
    """The target's decay; 0 = the online network itself, without a copy."""
    embed_guidance: bool = True
    """Whether the student is told w. False leaves it a network like its teacher, as LoRA needs,
    which guides by the mean of w; LCM-LoRA was made with w_min = w_max = 6.5, a scale of 7.5."""

    @model_validator(mode="after")
    def _ranges_are_in_order(self) -> LCM:
        if self.w_min > self.w_max:
            raise ValueError(f"w_min {self.w_min} must not be above w_max {self.w_max}")
        if self.skip >= self.num_sigmas:
            raise ValueError(f"skip {self.skip} must be below num_sigmas {self.num_sigmas}")
        return self

    def needed(self) -> frozenset[str]:
        spare = {"guidance": self.embed_guidance, "target": self.target_ema > 0}
        return frozenset(name for name in self.needs if spare.get(name, True))

    def guided_by(self) -> tuple[float, float] | None:
        return (self.w_min, self.w_max) if self.embed_guidance else None

    def check_networks(self, online: Network, teacher: Network | None) -> None:
        if teacher is not None and teacher.null_label is None and not teacher.prompted:
            raise RecipeError(
                "its teacher reads no prompts, and has no null class to guide away from; train one"
                " with its backbone's null_class = true and objective.label_dropout = 0.1"
            )

    def phase(self, step: int, total: int) -> Phase:
        return Phase(step, self.num_sigmas, self.target_ema)

    def loss(self, models: Models, x0: Tensor, cond: Cond, phase: Phase, rng: Rng) -> Tensor:
        """d(f(x, sigma_i, w), f_target(solve(x, sigma_i -> sigma_{i-k}, w), sigma_{i-k}, w)), (B,),
        with x = x0 + sigma_i z and w ~ U[w_min, w_max] of each image."""
        import torch

        from cmkit import functional
        from cmkit_std.objectives.distances import huber

        solve = getattr(functional, self.solver)
        sigmas = models.online.noise.sigmas(phase.num_sigmas, x0.device, x0.dtype)
        i = 1 + rng.integers(phase.num_sigmas - 1, len(x0))
        low, high = sigmas[(i - self.skip).clamp(min=0)], sigmas[i]
        x = x0 + functional.per_image(high, x0) * rng.normal_like(x0)
        w = self.w_min + (self.w_max - self.w_min) * rng.uniform(len(x0)).to(x0.dtype)
        cond = replace(cond, guidance=w)
        with cmkit.shared_dropout(rng):
            online = models.online(x, high, cond)
        with torch.no_grad():
            x_low = solve(cmkit.Guided(models.teacher), x, high, low, cond)
            with cmkit.shared_dropout(rng):
                target = models.target(x_low, low, cond)
        if self.distance == "l2":
            return functional.l2(online, target)
        return huber(online, target, self.huber_c)
