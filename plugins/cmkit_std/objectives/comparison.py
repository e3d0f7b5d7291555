"""What objectives share that compare two estimates, or one with itself at nearby noise levels."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

import cmkit
from cmkit import DataSpec, Objective, Phase
from cmkit.files import cached_sha256
from cmkit_std.objectives.weightings import Weighting, weighting

if TYPE_CHECKING:
    from torch import Tensor

    from cmkit import Cond, Models, Noise, Rng

Distance = Literal["l1", "l2", "l2-32", "lpips", "pseudo_huber"]
HuberC = Annotated[
    float | None,
    Field(ge=0, le=1e6, description="c of the pseudo-Huber distance; absent = 0.00054 sqrt(d)."),
]


class Compared(Objective):
    """An objective with a `distance`, which may be LPIPS."""

    distance: Distance = "lpips"
    """How the two estimates are compared; "l2-32" is l2 at 32 pixels."""
    weighting: Weighting = "uniform"
    """Weight of the loss by the higher of the noise levels."""
    lpips_net: Literal["vgg", "alex", "squeeze"] = "vgg"
    """Backbone of LPIPS."""
    lpips_weights: str | None = None
    """A .safetensors file of that backbone's weights; absent = torch.hub's folder."""

    def check(self, data: DataSpec) -> None:
        """Raise now if the distance lacks its weights."""
        self.identity()

    def smallest(self, data: DataSpec) -> Mapping[str, Any]:
        """l2 in place of LPIPS, which needs weights."""
        return {"distance": "l2", "lpips_weights": None} if self.distance == "lpips" else {}

    def identity(self) -> dict[str, Any]:
        """The SHA-256 of the weights of LPIPS, where it is the distance; raises as `check`."""
        if self.distance != "lpips":
            return {}
        from cmkit_std.objectives.distances import lpips_file

        return {"lpips_weights": cached_sha256(lpips_file(self.lpips_net, self.lpips_weights))}


class Comparison(Compared):
    """An objective that compares two estimates."""

    huber_c: HuberC = None

    def apart(self, a: Tensor, b: Tensor) -> Tensor:
        """d(a, b), (B,), of images (B, C, H, W)."""
        from cmkit_std.objectives.distances import distance

        return distance(self.distance, a, b, self.huber_c, self.lpips_net, self.lpips_weights)

    def compared(self, a: Tensor, b: Tensor, sigma: Tensor, sigma_data: float) -> Tensor:
        """lambda(sigma) d(a, b), (B,), of images (B, C, H, W) and noise levels sigma (B,)."""
        return self.apart(a, b) * weighting(self.weighting, sigma, sigma_data)


class Continuous(Compared):
    """An objective without a grid, the limit of one that compares estimates at its points."""

    distance: Literal["l1", "l2", "lpips"] = "l2"
    """How two nearby estimates are compared."""
    gap: Literal["none", "grid"] = "none"
    """Multiply the derivative by that of the Karras grid: then the loss is the limit of the
    discrete one. The published runs do not."""
    weighting: Weighting = "uniform"
    """Weight of the loss by sigma."""

    @property
    def holds_target(self) -> bool:
        """Whether the gradient is the limit of that of a loss whose target is held fixed."""
        return True

    @abstractmethod
    def direction(self, models: Models, x: Tensor, sigma: Tensor, z: Tensor, cond: Cond) -> Tensor:
        """dx / dsigma, like x, along which the estimate shall not change."""

    def phase(self, step: int, total: int) -> Phase:
        return Phase(step)

    def loss(self, models: Models, x0: Tensor, cond: Cond, phase: Phase, rng: Rng) -> Tensor:
        """Limit of d(f(x, sigma), f(x - direction dsigma, sigma - dsigma)), (B,), with
        x = x0 + sigma z (Consistency Models, theorems 3 to 6)."""
        import torch

        from cmkit.functional import derivative, per_image
        from cmkit_std.objectives.distances import distance, limit

        online = models.online
        sigma, gap = levels(online.noise, rng.uniform(len(x0)).to(x0.dtype))
        z = rng.normal_like(x0)
        x = x0 + per_image(sigma, x0) * z
        with torch.no_grad():
            along = (self.direction(models, x, sigma, z, cond), torch.ones_like(sigma))
        with torch.set_grad_enabled(not self.holds_target):
            _, v = derivative(lambda x, sigma: online(x, sigma, cond), (x, sigma), along, rng)
        if self.gap == "grid":
            v = v * per_image(gap, v)
        if self.holds_target:
            with cmkit.shared_dropout(rng):
                f = online(x, sigma, cond)
            d = limit(self.distance, f, v, self.lpips_net, self.lpips_weights)
        else:
            d = distance(self.distance, v, torch.zeros_like(v))
        return d * weighting(self.weighting, sigma, online.sigma_data)


def levels(noise: Noise, u: Tensor) -> tuple[Tensor, Tensor]:
    """(sigma, dsigma / du), (B,) each, of the Karras grid at fractions u (B,) in [0, 1].

    A grid of N points has gaps of dsigma / du / (N - 1).
    """
    low, high = noise.sigma_min ** (1 / noise.rho), noise.sigma_max ** (1 / noise.rho)
    sigma = noise.sigma_at(u)
    return sigma, noise.rho * (high - low) * sigma ** (1 - 1 / noise.rho)
