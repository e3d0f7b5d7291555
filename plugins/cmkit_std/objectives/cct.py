"""Continuous-time consistency training (Song, Dhariwal, Chen, Sutskever: Consistency Models, 2023,
appendix B.2)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from cmkit_std.objectives.comparison import Continuous

if TYPE_CHECKING:
    from torch import Tensor

    from cmkit import Cond, Models


class CCT(Continuous):
    """Consistency training without a grid: on average over noise, f must not change as the noise
    on an image grows.

    The derivative is taken by forward-mode differentiation, in float32. The published runs on
    CIFAR-10 start from a diffusion model (denoiser.weights) with a learning rate of 5e-6.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"boundary", "continuous"})

    def direction(self, models: Models, x: Tensor, sigma: Tensor, z: Tensor, cond: Cond) -> Tensor:
        """z (theorem 6)."""
        return z
