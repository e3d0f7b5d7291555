"""A rescaling that depends on the noise level."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from pydantic import Field

from cmkit import RecipeError, Rescaler

if TYPE_CHECKING:
    from torch import Tensor

    from cmkit import Scales


class Mine(Rescaler):
    """Scales every encoder-decoder connection, at high noise levels only."""

    skip: float = Field(0.9, ge=-100, le=100)
    """Scale of the connections above `threshold`; it is 1 below."""
    threshold: float = Field(1.0, gt=0, le=1e4)
    """The noise level."""

    def bind(self, sites: tuple[str, ...]) -> Callable[[Tensor], Scales]:
        """RecipeError when there is nothing to scale."""
        skips = [site for site in sites if site.startswith("skip.")]
        if self.skip != 1 and not skips:
            raise RecipeError(
                f"rescaler.skip = {self.skip}: the backbone has no 'skip' sites;"
                f" it has {', '.join(sites) or 'none'}"
            )

        def scales(sigma: Tensor) -> Scales:
            high = (sigma > self.threshold).to(sigma.dtype)
            return dict.fromkeys(skips, 1 + (self.skip - 1) * high)

        return scales
