"""Options of backbone `edm2`, and what follows from them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field

from cmkit import DataSpec
from cmkit_std.backbones.fitting import Blocks, Channels, Sides, UNetOptions, Widths

PRESETS: dict[str, dict[str, Any]] = {
    size: {"channels": channels}
    for size, channels in {"xs": 128, "s": 192, "m": 256, "l": 320, "xl": 384}.items()
}
"""Sizes of EDM2's networks, which differ in width alone."""


class EDM2Options(UNetOptions):
    """Fields of `EDM2`."""

    presets: ClassVar = PRESETS
    attends_at: ClassVar = (8, 16)

    preset: Literal[*PRESETS] | None = None
    """A published size for ImageNet-64; fields given beside it win."""
    channels: Channels = 192
    """Width of the first level, and number of waves of the noise level."""
    channel_mult: Widths = (1, 2, 3, 4)
    """Width of each level in multiples of `channels`; from level to level the picture is halved.
    The embedding is as wide as the widest level."""
    num_res_blocks: Blocks = 3
    attention_resolutions: Sides = None
    """Sides, in pixels, of the levels with attention; absent = those of 8 and 16 pixels. The
    decoder begins with attention in any case."""
    num_head_channels: int = Field(64, ge=1, le=1024)
    """Width of an attention head."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Probability with which an activation of a residual block is dropped in training; on
    ImageNet-64 EDM2 takes 0.1 from size m on, ECT 0.4 for s and 0.5 for larger ones."""
    dropout_resolution: int | None = Field(None, ge=1, le=8192)
    """Side, in pixels, of the finest level with dropout, 16 in ECT; absent = the first."""
    null_class: bool = False
    """With a class more, for none: zeros in the place of a label's vector, so that it takes no
    weights. Guidance needs it, and objective.label_dropout trains it."""

    def heads(self, width: int) -> int:
        """Attention heads of a level of `width` channels."""
        return width // self.num_head_channels

    def dropout_at(self, side: int) -> float:
        """Dropout of a level of `side` pixels."""
        finest = self.dropout_resolution
        return self.dropout if finest is None or side <= finest else 0.0

    def smallest(self, data: DataSpec) -> Mapping[str, Any]:
        return {**super().smallest(data), "num_head_channels": 8}

    def check(self, data: DataSpec) -> None:
        super().check(data)
        levels = self.levels(data.resolution)
        attend = [width for width, side in levels if self.attends(side)]
        for width in (*attend, levels[-1][0]):
            self.check_divides("num_head_channels", width)
