"""Consistency training (Song, Dhariwal, Chen, Sutskever: Consistency Models, 2023, algorithm 3)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, model_validator

import cmkit
from cmkit.kinds import DataSpec, Objective, Phase
from cmkit_std.objectives.schedules import growing, rising_ema

if TYPE_CHECKING:
    from torch import Tensor

    from cmkit import Cond, Models, Rng


class CT(Objective):
    """Consistency training: the online network at sigma_{i+1} meets its EMA at sigma_i on the same
    image and noise, on a grid whose number of points grows with the step.

    Defaults are those of the official LSUN runs; ImageNet-64 uses end_scales = 200. The official
    code computes mu from N - 1 where the paper prints N: `mu_denominator` chooses.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"target"})

    start_scales: int = Field(2, ge=1, le=10**6)
    """s0 of N(k)."""
    end_scales: int = Field(150, ge=1, le=10**6)
    """s1 of N(k)."""
    start_ema: float = Field(0.95, gt=0, lt=1)
    """mu0, the target's decay that mu(k) starts from."""
    mu_denominator: Literal["n_minus_1", "n"] = "n_minus_1"
    """mu(k) = exp(s0 ln(mu0) / (N - 1)) as the official code, or / N as the paper."""
    distance: Literal["l1", "l2", "lpips", "pseudo_huber"] = "lpips"
    """How the two estimates are compared."""
    huber_c: float | None = Field(None, ge=0, le=1e6)
    """c of the pseudo-Huber distance; absent = 0.00054 sqrt(d)."""
    lpips_net: Literal["vgg", "alex", "squeeze"] = "vgg"
    """Backbone of LPIPS."""
    lpips_weights: str | None = None
    """A .safetensors file of that backbone's weights; absent = torch.hub's folder."""

    @model_validator(mode="after")
    def _scales_grow(self) -> CT:
        if self.end_scales < self.start_scales:
            raise ValueError(
                f"end_scales {self.end_scales} must not be below start_scales {self.start_scales}"
            )
        return self

    def check(self, data: DataSpec) -> None:
        if self.distance == "lpips":
            from cmkit_std.objectives.distances import check_lpips

            check_lpips(self.lpips_net, self.lpips_weights)

    def phase(self, step: int, total: int) -> Phase:
        """N(k) and mu(k), with k < K (Consistency Models, appendix C)."""
        num_sigmas = growing(step, total, self.start_scales, self.end_scales)
        denominator = num_sigmas - 1 if self.mu_denominator == "n_minus_1" else num_sigmas
        mu = rising_ema(self.start_ema, self.start_scales, denominator)
        return Phase(step, num_sigmas, mu)

    def loss(self, models: Models, x0: Tensor, cond: Cond, phase: Phase, rng: Rng) -> Tensor:
        """d(f(x0 + sigma_{i+1} z, sigma_{i+1}), f_target(x0 + sigma_i z, sigma_i)), (B,)."""
        import torch

        sigmas = models.online.noise.sigmas(phase.num_sigmas, x0.device)
        i = rng.integers(phase.num_sigmas - 1, len(x0))
        low, high = sigmas[i], sigmas[i + 1]
        z = rng.normal_like(x0)
        with cmkit.shared_dropout(rng):
            online = models.online(x0 + high.view(-1, 1, 1, 1) * z, high, cond)
        with torch.no_grad(), cmkit.shared_dropout(rng):
            target = models.target(x0 + low.view(-1, 1, 1, 1) * z, low, cond)
        return self.compare(online, target)

    def compare(self, a: Tensor, b: Tensor) -> Tensor:
        """The chosen distance of each pair of images, (B,)."""
        from cmkit_std.objectives import distances

        match self.distance:
            case "lpips":
                return distances.lpips(a, b, self.lpips_net, self.lpips_weights)
            case "pseudo_huber":
                return distances.pseudo_huber(a, b, self.huber_c)
            case name:
                return getattr(distances, name)(a, b)
