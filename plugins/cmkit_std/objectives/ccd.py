"""Continuous-time consistency distillation (Song, Dhariwal, Chen, Sutskever: Consistency Models,
2023, appendix B.1)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import model_validator

import cmkit
from cmkit_std.objectives.comparison import Continuous

if TYPE_CHECKING:
    from torch import Tensor

    from cmkit import Cond, Models


class CCD(Continuous):
    """Consistency distillation without a grid: f must not change along the teacher's ODE.

    The derivative along it is taken by forward-mode differentiation, in float32. The published runs
    on CIFAR-10 start from the teacher (denoiser.init = "teacher") with a learning rate of 5e-6, and
    1e-3 without stop_gradient; the official code then takes the root of "l2", the paper does not.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"teacher", "boundary", "continuous"})

    stop_gradient: bool = True
    """The gradient is the limit of the discrete loss's, whose target is held fixed; otherwise the
    derivative along the ODE is itself made small ("l1" and "l2" only; twice the memory)."""

    @model_validator(mode="after")
    def _lpips_needs_stop_gradient(self) -> CCD:
        if self.distance == "lpips" and not self.stop_gradient:
            raise ValueError('distance "lpips" needs stop_gradient = true; or choose "l2"')
        return self

    @property
    def holds_target(self) -> bool:
        return self.stop_gradient

    def direction(self, models: Models, x: Tensor, sigma: Tensor, z: Tensor, cond: Cond) -> Tensor:
        """The teacher's slope (x - D(x, sigma)) / sigma (theorems 3 to 5)."""
        return cmkit.functional.slope(x, sigma, models.teacher(x, sigma, cond))
