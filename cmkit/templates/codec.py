"""Latents that lose nothing."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from pydantic import Field

from cmkit import Codec, DataSpec, RecipeError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from cmkit import Coder


class Mine(Codec):
    """Squares of pixels as channels of one (space to depth)."""

    factor: int = Field(2, ge=1, le=64)
    """Width and height of a square."""

    def spec(self, data: DataSpec) -> DataSpec:
        if data.resolution % self.factor:
            near = max(1, round(data.resolution / self.factor)) * self.factor
            raise RecipeError(
                f"codec.factor = {self.factor}: resolution {data.resolution} is not divisible by"
                f" it; set dataset.resolution = {near}"
            )
        channels, resolution = data.channels * self.factor**2, data.resolution // self.factor
        return replace(data, channels=channels, resolution=resolution)

    def load(self, device: torch.device) -> Coder:
        """A codec with weights loads them here, on `device`, and lets none require a gradient."""
        return _Squares(self.factor)


class _Squares:
    def __init__(self, factor: int):
        self.factor = factor

    def encode(self, x0: Tensor) -> tuple[Tensor, Tensor | None]:
        """Latents (B, C * factor^2, H / factor, W / factor), which are not drawn."""
        from torch.nn.functional import pixel_unshuffle

        return pixel_unshuffle(x0.float(), self.factor), None

    def decode(self, latents: Tensor) -> Tensor:
        from torch.nn.functional import pixel_shuffle

        return pixel_shuffle(latents.float(), self.factor)
