"""The magnitude-preserving U-Net of EDM2, configuration G (Karras, Aittala, Lehtinen, Hellsten,
Aila, Laine: Analyzing and Improving the Training Dynamics of Diffusion Models, 2023)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from cmkit import Backbone, DataSpec, Layout, Precond
from cmkit.errors import RecipeError
from cmkit_std.backbones.fitting import check_conditions, check_levels, unet_inputs, with_preset
from cmkit_std.backbones.published import check_published, published

if TYPE_CHECKING:
    from cmkit_std.backbones.edm2_network import EDM2UNet

PRESETS: dict[str, dict[str, Any]] = {
    size: {"channels": channels}
    for size, channels in {"xs": 128, "s": 192, "m": 256, "l": 320, "xl": 384}.items()
}
"""Sizes of EDM2's networks, which differ in width alone."""

_EDM2_FILES = (
    "img64-xs-0134217-0.110",
    "img64-xs-0134217-0.175",
    "img64-s-1073741-0.045",
    "img64-s-1073741-0.075",
    "img64-s-1073741-0.105",
    "img64-m-2147483-0.060",
    "img64-l-1073741-0.040",
    "img64-xl-0671088-0.040",
)
"""ImageNet-64, by size, thousands of training images, and relative width of their average."""


class EDM2(Backbone):
    """Convolutional U-Net of EDM2, in which weights and activations keep their magnitude.

    No biases, no norms with parameters: a filter acts at length 1, whatever its stored length, and
    training stores all of them anew at equal length before each step. As they cannot grow, the
    learning rate has to fall: see train.sqrt_decay.

    Embeds labels, the guidance weight of LCM, and the target noise level of CTM by a second path
    beside that of sigma; both start without effect, so that they can be added to trained weights.
    """

    accepts: ClassVar[frozenset[str]] = frozenset({"label", "guidance", "sigma_to"})
    published: ClassVar[dict[str, str]] = published("edm2", _EDM2_FILES)

    preset: Literal["xs", "s", "m", "l", "xl"] | None = None
    """A published size for ImageNet-64; fields given beside it win."""
    channels: int = Field(192, ge=4, le=2048)
    """Width of the first level, and number of waves of the noise level."""
    channel_mult: tuple[Annotated[int, Field(ge=1, le=16)], ...] = Field(
        (1, 2, 3, 4), min_length=1, max_length=10, strict=False
    )
    """Width of each level in multiples of `channels`; from level to level the picture is halved.
    The embedding is as wide as the widest level."""
    num_res_blocks: int = Field(3, ge=1, le=16)
    """Residual blocks a level in the encoder; the decoder has one more."""
    attention_resolutions: tuple[Annotated[int, Field(ge=1, le=8192)], ...] | None = Field(
        None, max_length=10, strict=False
    )
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
    gradient_checkpointing: bool = False
    """Recompute residual blocks in the backward pass: less memory, a third more time."""

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, given: Any) -> Any:
        return with_preset(given, PRESETS)

    @classmethod
    def known(cls) -> Iterator[tuple[EDM2, DataSpec, frozenset[str]]]:
        """The networks of the presets, with labels of ImageNet-64."""
        for size in PRESETS:
            options = cls.model_validate({"preset": size})
            yield options, DataSpec(3, 64, 1000), frozenset({"label"})

    def check_published(self, weights: str, precond: Precond) -> None:
        check_published(weights, self, precond)

    def layouts(self, data: DataSpec) -> tuple[Layout, ...]:
        """The layout of NVlabs/edm2, which locuslab/ect shares."""
        from cmkit_std.backbones.edm2_layouts import layout

        return (layout(self),)

    def build(self, data: DataSpec, conditions: frozenset[str]) -> EDM2UNet:
        """A fresh U-Net; RecipeError when the options do not fit each other or the data."""
        self._check(data, conditions)
        from cmkit_std.backbones.edm2_network import EDM2UNet

        return EDM2UNet(self, **unet_inputs(data, conditions))

    def levels(self, resolution: int) -> list[tuple[int, int]]:
        """(width in channels, side in pixels) of each level, the finest first."""
        return [(self.channels * m, resolution >> n) for n, m in enumerate(self.channel_mult)]

    def attends(self, side: int) -> bool:
        """Whether a level of `side` pixels has attention."""
        sides = self.attention_resolutions
        return side in ((8, 16) if sides is None else sides)

    def heads(self, width: int) -> int:
        """Attention heads of a level of `width` channels."""
        return width // self.num_head_channels

    def dropout_at(self, side: int) -> float:
        """Dropout of a level of `side` pixels."""
        finest = self.dropout_resolution
        return self.dropout if finest is None or side <= finest else 0.0

    def _check(self, data: DataSpec, conditions: frozenset[str]) -> None:
        check_conditions("edm2", self, data, conditions)
        check_levels(data.resolution, self.channel_mult, self.attention_resolutions)
        levels = self.levels(data.resolution)
        attend = [width for width, side in levels if self.attends(side)]
        for width in (*attend, levels[-1][0]):
            if width % self.num_head_channels:
                raise RecipeError(
                    f"backbone.num_head_channels = {self.num_head_channels}: does not divide the"
                    f" {width} channels of a level with attention; give a divisor of {width}"
                )
