"""Continuous-time consistency training (Song, Dhariwal, Chen, Sutskever: Consistency Models, 2023,
appendix B.2)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

import cmkit
from cmkit import DataSpec, Objective, Phase
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
    lpips_net: Literal["vgg", "alex", "squeeze"] = "vgg"
    """Backbone of LPIPS."""
    lpips_weights: str | None = None
    """A .safetensors file of that backbone's weights; absent = torch.hub's folder."""

    def check(self, data: DataSpec) -> None:
        if self.distance == "lpips":
            from cmkit_std.objectives.distances import check_lpips

            check_lpips(self.lpips_net, self.lpips_weights)

    def phase(self, step: int, total: int) -> Phase:
        return Phase(step)

    def loss(self, models: Models, x0: Tensor, cond: Cond, phase: Phase, rng: Rng) -> Tensor:
        """Limit of d(f(x0 + sigma z, sigma), f(x0 + (sigma - dsigma) z, sigma - dsigma)), (B,)
        (theorem 6)."""
        import torch

        from cmkit_std.objectives.limits import levels, limit, tangent

        online = models.online
        sigma, gap = levels(online.noise, rng.uniform(len(x0)).to(x0.dtype))
        z = rng.normal_like(x0)
        x = x0 + sigma.view(-1, 1, 1, 1) * z
        with torch.no_grad():
            v = tangent(online, x, sigma, z, cond, rng)
        if self.gap == "grid":
            v = v * gap.view(-1, 1, 1, 1)
        with cmkit.shared_dropout(rng):
            f = online(x, sigma, cond)
        d = limit(self.distance, f, v, self.lpips_net, self.lpips_weights)
        return d * weighting(self.weighting, sigma, online.sigma_data)
