"""Options of a distance between two estimates, and the distance with its weight."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from cmkit import DataSpec, Part
from cmkit_std.objectives.weightings import Weighting, weighting

if TYPE_CHECKING:
    from torch import Tensor

Distance = Literal["l1", "l2", "l2-32", "lpips", "pseudo_huber"]
HuberC = Annotated[
    float | None,
    Field(ge=0, le=1e6, description="c of the pseudo-Huber distance; absent = 0.00054 sqrt(d)."),
]
LpipsNet = Annotated[Literal["vgg", "alex", "squeeze"], Field(description="Backbone of LPIPS.")]
LpipsWeights = Annotated[
    str | None,
    Field(
        description="A .safetensors file of that backbone's weights; absent = torch.hub's folder."
    ),
]


class Comparison(Part):
    """Fields of objectives that compare two estimates."""

    distance: Distance = "lpips"
    """How the two estimates are compared; "l2-32" is l2 at 32 pixels."""
    weighting: Weighting = "uniform"
    """Weight of the loss by the higher of the noise levels."""
    huber_c: HuberC = None
    lpips_net: LpipsNet = "vgg"
    lpips_weights: LpipsWeights = None

    def check(self, data: DataSpec) -> None:
        check_distance(self)

    def compared(self, a: Tensor, b: Tensor, sigma: Tensor, sigma_data: float) -> Tensor:
        """lambda(sigma) d(a, b), (B,), of images (B, C, H, W) and noise levels sigma (B,)."""
        from cmkit_std.objectives.distances import distance

        d = distance(self.distance, a, b, self.huber_c, self.lpips_net, self.lpips_weights)
        return d * weighting(self.weighting, sigma, sigma_data)


def check_distance(options: Any) -> None:
    """Raise now if the distance that an objective's `options` name lacks its weights."""
    if options.distance == "lpips":
        from cmkit_std.objectives.distances import check_lpips

        check_lpips(options.lpips_net, options.lpips_weights)
