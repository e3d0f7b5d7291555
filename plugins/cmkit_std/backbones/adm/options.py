"""Options of backbone `adm`, and what follows from them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, ClassVar, Literal, NamedTuple

from pydantic import Field

from cmkit import DataSpec
from cmkit.errors import RecipeError
from cmkit_std.backbones.fitting import Blocks, Channels, Sides, UNetOptions, Widths

_OPENAI = {"num_head_channels": 64, "resblock_updown": True}
PRESETS: dict[str, dict[str, Any]] = {
    "openai-imagenet64": {
        **_OPENAI,
        "channels": 192,
        "channel_mult": [1, 2, 3, 4],
        "num_res_blocks": 3,
        "use_scale_shift_norm": True,
    },
    "openai-lsun256": {
        **_OPENAI,
        "channels": 256,
        "channel_mult": [1, 1, 2, 2, 4, 4],
        "num_res_blocks": 2,
        "use_scale_shift_norm": False,
    },
}
_GUIDED = {"use_scale_shift_norm": True, "time_scale": 1.0, "learn_sigma": True}
PRESETS |= {
    "guided-diffusion-64": {
        **PRESETS["openai-imagenet64"],
        **_GUIDED,
        "new_attention_order": True,
    },
    "guided-diffusion-128": {
        **PRESETS["openai-lsun256"],
        **_GUIDED,
        "channel_mult": [1, 1, 2, 3, 4],
        "num_head_channels": None,
        "num_heads": 4,
    },
    "guided-diffusion-256": {**PRESETS["openai-lsun256"], **_GUIDED},
}
"""Sizes of the published checkpoints (openai/consistency_models, scripts/launch.sh;
openai/guided-diffusion, README)."""


class Place(NamedTuple):
    """Where a part of a `UNet` stands: its name in the state dict, and its number `i` among those
    of its kind in its level."""

    key: str
    part: Literal["encoder", "middle", "decoder"]
    kind: Literal["block", "attention", "resample"]
    level: int
    i: int


class ADMOptions(UNetOptions):
    """Fields of `ADM`."""

    presets: ClassVar = PRESETS
    attends_at: ClassVar = range(8, 33)

    preset: Literal[*PRESETS] | None = None
    """Sizes of a published network; fields given beside it win."""
    channels: Channels = 128
    """Width of the first level; the embedding is four times as wide."""
    channel_mult: Widths = (1, 2, 2)
    """Width of each level in multiples of `channels`; from level to level the picture is halved."""
    num_res_blocks: Blocks = 2
    attention_resolutions: Sides = None
    """Sides, in pixels, of the levels with attention; absent = all of 8 to 32 pixels."""
    num_heads: int = Field(4, ge=1, le=256)
    """Attention heads, unless `num_head_channels` is given."""
    num_head_channels: int | None = Field(None, ge=1, le=1024)
    """Width of an attention head; the number of heads then follows from a level's width."""
    num_heads_upsample: int | None = Field(None, ge=1, le=256)
    """Attention heads in the decoder; absent = `num_heads`."""
    use_scale_shift_norm: bool = True
    """The embedding scales and shifts the normalised features; otherwise it is added to them."""
    resblock_updown: bool = False
    """Change the resolution inside residual blocks; otherwise between them."""
    conv_resample: bool = True
    """With a convolution at changes of resolution; unused with `resblock_updown`."""
    norm_groups: int = Field(32, ge=1, le=2048)
    """Groups of GroupNorm, 32 in the official networks; must divide each level's width."""
    norm_channels: int = Field(1, ge=1, le=2048)
    """Channels a group at least, 4 in EDM's networks; narrower levels then have fewer groups."""
    time_scale: float = Field(1000.0, gt=0, le=1e6)
    """Factor of c_noise, such as ln(sigma) / 4, before its sinusoids; weights trained by EDM's code
    need 1, and so do those of guided-diffusion, whose c_noise (precond discrete) are steps."""
    learn_sigma: bool | None = None
    """With a second half of output channels, the variances that guided-diffusion's weights predict;
    unused here. Absent = without."""
    new_attention_order: bool | None = None
    """Whether weights in guided-diffusion's layout were trained with its flag of this name, which
    nothing in them tells; those of 64 pixels were."""
    null_class: bool = False
    """One row more in the table of labels, for no class; an absent label then means it. Guidance
    needs it, and objective.label_dropout trains it."""
    patch_size: int = Field(1, ge=1, le=64)
    """Side of the squares of pixels that the network sees as one with so many more channels, and
    gives back so: its levels, and `attention_resolutions`, count squares. 4 makes 32x32 pixels 8x8
    squares. No other project's weights have it."""
    label_sigma_to: bool = False
    """Add a label's embedding to that of CTM's target noise level too, as CTM on EDM's network."""

    def seen(self, data: DataSpec) -> DataSpec:
        """Channels and side of the squares of `data`; RecipeError where they do not divide it."""
        if data.resolution % (side := self.patch_size):
            raise RecipeError(
                f"backbone.patch_size = {side}: does not divide pictures of {data.resolution}"
                f" pixels; give {math.gcd(side, data.resolution)}, or another dataset.resolution"
            )
        channels, resolution = data.channels * side**2, data.resolution // side
        return replace(data, channels=channels, resolution=resolution)

    def heads(self, width: int, decoder: bool = False) -> int:
        """Attention heads of a level of `width` channels."""
        if self.num_head_channels:
            return width // self.num_head_channels
        return (self.num_heads_upsample if decoder else None) or self.num_heads

    def groups(self, width: int) -> int:
        """Groups of a GroupNorm of `width` channels."""
        return min(self.norm_groups, width // self.norm_channels)

    def places(self, resolution: int) -> Iterator[Place]:
        """Residual blocks, attentions and changes of resolution of a `UNet`, in forward order."""
        levels = self.levels(resolution)
        last, stage = len(levels) - 1, 1
        for level, (_, side) in enumerate(levels):
            for i in range(self.num_res_blocks):
                yield Place(f"encoder.{stage}.0", "encoder", "block", level, i)
                if self.attends(side):
                    yield Place(f"encoder.{stage}.1", "encoder", "attention", level, i)
                stage += 1
            if level < last:
                yield Place(f"encoder.{stage}.0", "encoder", "resample", level, 0)
                stage += 1
        yield Place("middle.0", "middle", "block", last, 0)
        yield Place("middle.1", "middle", "attention", last, 0)
        yield Place("middle.2", "middle", "block", last, 1)
        stage = 0
        for level, (_, side) in reversed(list(enumerate(levels))):
            for i in range(self.num_res_blocks + 1):
                yield Place(f"decoder.{stage}.0", "decoder", "block", level, i)
                if self.attends(side):
                    yield Place(f"decoder.{stage}.1", "decoder", "attention", level, i)
                if level and i == self.num_res_blocks:
                    layer = 2 if self.attends(side) else 1
                    yield Place(f"decoder.{stage}.{layer}", "decoder", "resample", level, 0)
                stage += 1

    def head_widths(self, resolution: int) -> list[int]:
        """Different widths, in channels, of the attention heads of a `UNet`, rising."""
        levels = self.levels(resolution)
        found = set()
        for place in self.places(resolution):
            if place.kind == "attention":
                width = levels[place.level][0]
                found.add(width // max(1, self.heads(width, place.part == "decoder")))
        return sorted(found)

    def smallest(self, data: DataSpec) -> Mapping[str, Any]:
        counts = ("num_heads", "num_heads_upsample", "num_head_channels", "norm_channels")
        fitting = {key: math.gcd(given, 8) for key in counts if (given := getattr(self, key))}
        fitting |= {"patch_size": math.gcd(self.patch_size, data.resolution), "norm_groups": 4}
        small = self.model_copy(update=fitting)
        return {**super(ADMOptions, small).smallest(small.seen(data)), **fitting}

    def check(self, data: DataSpec) -> None:
        super().check(data)
        for width, side in self.levels(data.resolution):
            self._check_norm(width)
            # The middle block, of the last level's width, always attends.
            if self.attends(side) or side == data.resolution >> len(self.channel_mult) - 1:
                heads = ("num_heads", "num_heads_upsample")
                for name in ("num_head_channels",) if self.num_head_channels else heads:
                    self.check_divides(name, width)

    def _check_norm(self, width: int) -> None:
        if width % self.norm_groups:
            fitting = max(n for n in range(1, self.norm_groups) if self.channels % n == 0)
            above = -(-self.channels // self.norm_groups) * self.norm_groups
            raise RecipeError(
                f"backbone.channels = {self.channels}: a level of {width} channels does not divide"
                f" into norm_groups = {self.norm_groups}; give channels = {above}, or"
                f" norm_groups = {fitting}"
            )
        self.check_divides("norm_channels", width, "a level")
        if self.groups(width) == width and not self.use_scale_shift_norm:
            raise RecipeError(
                f"backbone.norm_groups = {self.norm_groups}: with one channel a group ({width}"
                " channels) the norm removes an added embedding; give use_scale_shift_norm = true,"
                " or fewer norm_groups"
            )
