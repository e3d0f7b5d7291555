"""Options of backbone `dit`, and whether they fit."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field

from cmkit import DataSpec
from cmkit.errors import RecipeError
from cmkit_std.backbones.fitting import Options

_SIZES = {"s": (384, 12, 6), "b": (768, 12, 12), "l": (1024, 24, 16), "xl": (1152, 28, 16)}
PRESETS: dict[str, dict[str, Any]] = {
    f"dit-{size}-{patch}": {
        "patch_size": patch,
        "width": width,
        "depth": depth,
        "num_heads": heads,
        "learn_sigma": True,
        "null_class": True,
    }
    for size, (width, depth, heads) in _SIZES.items()
    for patch in (2, 4, 8)
}
"""Sizes of the published family (table 1), with what its checkpoints hold beside them."""


class DiTOptions(Options):
    """Fields of `DiT`."""

    presets: ClassVar = PRESETS

    preset: Literal[*PRESETS] | None = None
    """Sizes of a published network; fields given beside it win."""
    patch_size: int = Field(2, ge=1, le=256)
    """Side of a patch in pixels; must divide the resolution."""
    width: int = Field(384, ge=4, le=8192)
    """Features a patch; a multiple of `num_heads` and of 4."""
    depth: int = Field(12, ge=1, le=256)
    """Transformer blocks."""
    num_heads: int = Field(6, ge=1, le=256)
    """Attention heads."""
    mlp_ratio: float = Field(4.0, gt=0, le=64)
    """Hidden features of a block's perceptron in multiples of `width`."""
    learn_sigma: bool = False
    """With a second half of output channels, the variances that official weights predict; unused
    here."""
    null_class: bool = False
    """One row more in the table of labels, for no class; an absent label then means it. Guidance
    needs it, and objective.label_dropout trains it."""
    time_scale: float = Field(1000.0, gt=0, le=1e6)
    """Factor of c_noise, such as ln(sigma) / 4, before its sinusoids; official weights need 1, with
    precond discrete, whose c_noise are the steps 0 to 999 that they saw."""
    gradient_checkpointing: bool = False
    """Recompute blocks in the backward pass: less memory, a third more time."""

    def smallest(self, data: DataSpec) -> Mapping[str, Any]:
        patch = math.gcd(self.patch_size, data.resolution)
        small = {"width": 16, "depth": 2, "num_heads": 2}
        return {"preset": None, "patch_size": patch, **small}

    def check(self, data: DataSpec) -> None:
        if data.resolution % self.patch_size:
            fitting = _divisors(data.resolution, self.patch_size)
            raise RecipeError(
                f"backbone.patch_size = {self.patch_size}: does not divide pictures of"
                f" {data.resolution} pixels; give {fitting}, or another dataset.resolution"
            )
        if self.width % self.num_heads:
            raise RecipeError(
                f"backbone.num_heads = {self.num_heads}: does not divide width = {self.width};"
                f" give {_divisors(self.width, self.num_heads)}, or another width"
            )
        if self.width % 4:
            raise RecipeError(
                f"backbone.width = {self.width}: positions are a sine and a cosine of two"
                f" coordinates; give a multiple of 4, such as {-(-self.width // 4) * 4}"
            )


def _divisors(n: int, near: int) -> str:
    """The divisors of n next to `near`, in words."""
    divisors = [d for d in range(1, n + 1) if n % d == 0]
    below = [d for d in divisors if d < near][-1:]
    above = [d for d in divisors if d > near][:1]
    return " or ".join(map(str, below + above))
