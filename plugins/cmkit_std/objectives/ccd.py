"""Continuous-time consistency distillation (Song, Dhariwal, Chen, Sutskever: Consistency Models,
2023, appendix B.1)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import model_validator

import cmkit
from cmkit import DataSpec, Objective, Phase
from cmkit_std.objectives.comparison import LpipsNet, LpipsWeights, check_distance
from cmkit_std.objectives.weightings import Weighting, weighting

if TYPE_CHECKING:
    from torch import Tensor

    from cmkit import Cond, Models, Rng


class CCD(Objective):
    """Consistency distillation without a grid: f must not change along the teacher's ODE.

    The derivative along it is taken by forward-mode differentiation, in float32. The published runs
    on CIFAR-10 start from the teacher (denoiser.init = "teacher") with a learning rate of 5e-6, and
    1e-3 without stop_gradient; the official code then takes the root of "l2", the paper does not.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"teacher", "boundary", "continuous"})

    distance: Literal["l1", "l2", "lpips"] = "l2"
    """How two nearby estimates are compared."""
    stop_gradient: bool = True
    """The gradient is the limit of the discrete loss's, whose target is held fixed; otherwise the
    derivative along the ODE is itself made small ("l1" and "l2" only; twice the memory)."""
    gap: Literal["none", "grid"] = "none"
    """Multiply the derivative by that of the Karras grid: then the loss is the limit of the
    discrete one. The published runs do not."""
    weighting: Weighting = "uniform"
    """Weight of the loss by sigma."""
    lpips_net: LpipsNet = "vgg"
    lpips_weights: LpipsWeights = None

    @model_validator(mode="after")
    def _lpips_needs_stop_gradient(self) -> CCD:
        if self.distance == "lpips" and not self.stop_gradient:
            raise ValueError('distance "lpips" needs stop_gradient = true; or choose "l2"')
        return self

    def check(self, data: DataSpec) -> None:
        check_distance(self)

    def phase(self, step: int, total: int) -> Phase:
        return Phase(step)

    def loss(self, models: Models, x0: Tensor, cond: Cond, phase: Phase, rng: Rng) -> Tensor:
        """Limit of d(f(x, sigma), f(x - slope dsigma, sigma - dsigma)), (B,), with x = x0 + sigma z
        and the teacher's slope (x - D(x, sigma)) / sigma (theorems 3 to 5)."""
        import torch

        from cmkit.functional import derivative, per_image, slope
        from cmkit_std.objectives.distances import distance
        from cmkit_std.objectives.limits import levels, limit

        assert models.teacher is not None
        online = models.online
        sigma, gap = levels(online.noise, rng.uniform(len(x0)).to(x0.dtype))
        x = x0 + per_image(sigma, x0) * rng.normal_like(x0)
        with torch.no_grad():
            dx = slope(x, sigma, models.teacher(x, sigma, cond))
        at, along = (x, sigma), (dx, torch.ones_like(sigma))
        with torch.set_grad_enabled(not self.stop_gradient):
            _, v = derivative(lambda x, sigma: online(x, sigma, cond), at, along, rng)
        if self.gap == "grid":
            v = v * per_image(gap, v)
        if self.stop_gradient:
            with cmkit.shared_dropout(rng):
                f = online(x, sigma, cond)
            d = limit(self.distance, f, v, self.lpips_net, self.lpips_weights)
        else:
            d = distance(self.distance, v, torch.zeros_like(v))
        return d * weighting(self.weighting, sigma, online.sigma_data)
