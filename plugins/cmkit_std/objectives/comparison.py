"""What objectives that compare two estimates share: the distance, and weights by noise level."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from cmkit import DataSpec, Part
from cmkit_std.objectives.weightings import Weighting, weighting

if TYPE_CHECKING:
    from torch import Tensor


class Comparison(Part):
    """Options of a distance, of the weights of noise levels, and both applied."""

    distance: Literal["l1", "l2", "l2-32", "lpips", "pseudo_huber"] = "lpips"
    """How the two estimates are compared; "l2-32" is l2 at 32 pixels."""
    weighting: Weighting = "uniform"
    """Weight of the loss by the higher of the noise levels."""
    huber_c: float | None = Field(None, ge=0, le=1e6)
    """c of the pseudo-Huber distance; absent = 0.00054 sqrt(d)."""
    lpips_net: Literal["vgg", "alex", "squeeze"] = "vgg"
    """Backbone of LPIPS."""
    lpips_weights: str | None = None
    """A .safetensors file of that backbone's weights; absent = torch.hub's folder."""

    def check(self, data: DataSpec) -> None:
        """Raise now if the distance lacks its weights."""
        if self.distance == "lpips":
            from cmkit_std.objectives.distances import check_lpips

            check_lpips(self.lpips_net, self.lpips_weights)

    def compared(self, a: Tensor, b: Tensor, sigma: Tensor, sigma_data: float) -> Tensor:
        """lambda(sigma) d(a, b), (B,), of images (B, C, H, W) and noise levels sigma (B,)."""
        from cmkit_std.objectives.distances import distance

        d = distance(self.distance, a, b, self.huber_c, self.lpips_net, self.lpips_weights)
        return d * weighting(self.weighting, sigma, sigma_data)
