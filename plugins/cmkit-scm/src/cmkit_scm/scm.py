"""Continuous-time consistency models (Lu, Song: Simplifying, Stabilizing and Scaling
Continuous-Time Consistency Models, 2024)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from pydantic import Field

import cmkit
from cmkit import Companion, DataSpec, Objective, Phase

if TYPE_CHECKING:
    from torch import Tensor

    from cmkit import Cond, Models, Rng


class SCM(Objective):
    """Continuous-time consistency training (sCT), or distillation (sCD) with `distil`: the network
    moves along the tangent of its own consistency function, found by a Jacobian-vector product.

    TrigFlow sees x_t = cos(t) x0 + sin(t) sigma_data z and f = cos(t) x_t - sigma_data sin(t) F'.
    With tan(t) = sigma / sigma_data its x_t is cos(t) (x0 + sigma z), and cos(t)^2 and
    sigma_data sin(t) are c_skip and c_out of EDM, so that f is the denoiser of
    denoiser.precond = "edm" with F' = -F: a diffusion model's weights are an exact start
    (denoiser.init = "teacher"), and samplers of consistency models take the result as it is.

    The tangent is taken through ln(sigma) / 4, which backbone `adm` multiplies by its `time_scale`
    before it takes sinusoids: choose a small one, such as 4.
    """

    distil: bool = False
    """Follow the recipe's [teacher] (sCD) instead of single noisy images (sCT)."""
    p_mean: float = Field(-1.0, ge=-20, le=20)
    """Mean of ln(sigma)."""
    p_std: float = Field(1.4, gt=0, le=20)
    """Standard deviation of ln(sigma)."""
    warmup: int = Field(10_000, ge=0, le=10**9)
    """H, steps over which the unstable term of the tangent comes in; 0 = it is there at once."""
    c: float = Field(0.1, ge=0, le=1e6)
    """Of the normalised tangent g / (|g| + c), with |g| the root mean square of an image."""
    prior: Literal["uniform", "inverse_sigma"] = "uniform"
    """Weight of a noise level beside 1 / sigma, which g = cos(t) df/dt holds already."""
    learned_weight: bool = True
    """Learn the weight exp(w(sigma)) that makes every noise level's loss 1 on average."""
    derivative: Literal["forward", "difference"] = "forward"
    """The Jacobian-vector product: forward-mode differentiation, or central differences for a
    backbone that lacks it."""

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"edm", "teacher"} if self.distil else {"edm"})

    def companions(self, data: DataSpec) -> Mapping[str, Companion]:
        """w, where it is learned."""
        if not self.learned_weight:
            return {}
        from cmkit_scm.weight import LogWeight

        return {"weight": Companion(LogWeight())}

    def phase(self, step: int, total: int) -> Phase:
        """r = min(1, k / H) in the log."""
        return Phase(step, log={"tangent": self.tangent_share(step)})

    def tangent_share(self, step: int) -> float:
        """r, the share of the unstable term at `step`."""
        return min(1.0, step / self.warmup) if self.warmup else 1.0

    def loss(self, models: Models, x0: Tensor, cond: Cond, phase: Phase, rng: Rng) -> Tensor:
        """exp(w) |F' - sg(F' + g / (|g| + c))|^2 / D - w, (B,), with g and w of algorithm 1.

        ln(sigma) ~ N(p_mean, p_std^2).
        """
        import torch

        from cmkit.functional import l2, lognormal_sigma, per_image, slope
        from cmkit_scm import trigflow

        online = models.online
        sigma = lognormal_sigma(x0, self.p_mean, self.p_std, rng)
        sigma = sigma.clamp(online.noise.sigma_min, online.noise.sigma_max)
        z = rng.normal_like(x0)
        x = x0 + per_image(sigma, x0) * z
        with torch.no_grad():
            dx = z
            if self.distil:
                assert models.teacher is not None
                dx = slope(x, sigma, models.teacher(x, sigma, cond))
            share = self.tangent_share(phase.step)
            g = trigflow.tangent(online, x, sigma, dx, cond, share, self.derivative, rng)
            size = g.square().flatten(1).mean(1).sqrt()
            g = g / (per_image(size, g) + self.c)
        with cmkit.shared_dropout(rng):
            f = trigflow.network(online, x, sigma, cond)
        loss = l2(f - f.detach(), g)
        loss = loss / sigma if self.prior == "inverse_sigma" else loss
        if not self.learned_weight:
            return models.total(matching=loss)
        w = models.companions["weight"](sigma)
        return models.total(matching=w.exp() * loss, log_weight=-w)
