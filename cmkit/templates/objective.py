"""Consistency training with a robust distance."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from cmkit import Objective, Phase

if TYPE_CHECKING:
    from torch import Tensor

    from cmkit import Cond, Models, Rng


class Mine(Objective):
    """Consistency training with the distance log(1 + d^2 / (2 c^2)), on a fixed grid."""

    needs: ClassVar[frozenset[str]] = frozenset({"boundary"})

    num_sigmas: int = Field(40, ge=2, le=10_000)
    """N, points of the sigma grid."""
    c: float = Field(0.03, gt=0, le=1e6)
    """Differences below c count as small."""

    def phase(self, step: int, total: int) -> Phase:
        return Phase(step, self.num_sigmas)

    def loss(self, models: Models, x0: Tensor, cond: Cond, phase: Phase, rng: Rng) -> Tensor:
        """Distance of f(x0 + sigma_{i+1} z, sigma_{i+1}) to f(x0 + sigma_i z, sigma_i), (B,)."""
        import torch

        from cmkit import shared_dropout
        from cmkit.functional import l2, per_image

        sigmas = models.online.noise.sigmas(self.num_sigmas, x0.device)
        i = rng.integers(self.num_sigmas - 1, len(x0))
        low, high = sigmas[i], sigmas[i + 1]
        z = rng.normal_like(x0)
        with shared_dropout(rng):
            online = models.online(x0 + per_image(high, x0) * z, high, cond)
        with torch.no_grad(), shared_dropout(rng):
            target = models.online(x0 + per_image(low, x0) * z, low, cond)
        return torch.log1p(l2(online, target) / (2 * self.c**2))
