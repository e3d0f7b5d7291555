"""Continuous-time consistency training (Song, Dhariwal, Chen, Sutskever: Consistency Models, 2023,
appendix B.2)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

import cmkit
from cmkit import DataSpec, Objective, Phase
from cmkit_std.objectives.comparison import LpipsNet, LpipsWeights, check_distance
from cmkit_std.objectives.weightings import Weighting, weighting

if TYPE_CHECKING:
    from torch import Tensor

    from cmkit import Cond, Models, Rng


class CCT(Objective):
    """Consistency training without a grid: on average over noise, f must not change as the noise
    on an image grows.

    The derivative is taken by forward-mode differentiation, in float32. The published runs on
    CIFAR-10 start from a diffusion model (denoiser.weights) with a learning rate of 5e-6.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"boundary", "continuous"})

    distance: Literal["l1", "l2", "lpips"] = "l2"
    """How two nearby estimates are compared."""
    gap: Literal["none", "grid"] = "none"
    """Multiply the derivative by that of the Karras grid: then the loss is the limit of the
    discrete one. The published runs do not."""
    weighting: Weighting = "uniform"
    """Weight of the loss by sigma."""
    lpips_net: LpipsNet = "vgg"
    lpips_weights: LpipsWeights = None

    def check(self, data: DataSpec) -> None:
        check_distance(self)

    def phase(self, step: int, total: int) -> Phase:
        return Phase(step)

    def loss(self, models: Models, x0: Tensor, cond: Cond, phase: Phase, rng: Rng) -> Tensor:
        """Limit of d(f(x0 + sigma z, sigma), f(x0 + (sigma - dsigma) z, sigma - dsigma)), (B,)
        (theorem 6)."""
        import torch

        from cmkit.functional import derivative, per_image
        from cmkit_std.objectives.limits import levels, limit

        online = models.online
        sigma, gap = levels(online.noise, rng.uniform(len(x0)).to(x0.dtype))
        z = rng.normal_like(x0)
        x = x0 + per_image(sigma, x0) * z
        at, along = (x, sigma), (z, torch.ones_like(sigma))
        with torch.no_grad():
            _, v = derivative(lambda x, sigma: online(x, sigma, cond), at, along, rng)
        if self.gap == "grid":
            v = v * per_image(gap, v)
        with cmkit.shared_dropout(rng):
            f = online(x, sigma, cond)
        d = limit(self.distance, f, v, self.lpips_net, self.lpips_weights)
        return d * weighting(self.weighting, sigma, online.sigma_data)
