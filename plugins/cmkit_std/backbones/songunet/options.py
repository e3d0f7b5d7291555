"""Options of backbone `songunet`, and what follows from them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator

from cmkit import DataSpec
from cmkit.errors import RecipeError
from cmkit_std.backbones.fitting import Blocks, Channels, Sides, UNetOptions, Widths

_CIFAR10 = {
    "channels": 128,
    "channel_mult": [2, 2, 2],
    "num_res_blocks": 4,
    "attention_resolutions": [16],
    "decoder_type": "standard",
}
PRESETS: dict[str, dict[str, Any]] = {
    "ddpmpp": {
        **_CIFAR10,
        "embedding_type": "positional",
        "channel_mult_noise": 1,
        "encoder_type": "standard",
        "resample_filter": [1, 1],
    },
    "ncsnpp": {
        **_CIFAR10,
        "embedding_type": "fourier",
        "channel_mult_noise": 2,
        "encoder_type": "residual",
        "resample_filter": [1, 3, 3, 1],
    },
}
"""Sizes of EDM's networks for CIFAR-10 (EDM, table 7)."""


class SongUNetOptions(UNetOptions):
    """Fields of `SongUNet`."""

    presets: ClassVar = PRESETS
    attends_at: ClassVar = (16,)

    preset: Literal[*PRESETS] | None = None
    """A published architecture with its sizes for CIFAR-10; fields given beside it win."""
    channels: Channels = 128
    """Width that the others are multiples of."""
    channel_mult: Widths = (2, 2, 2)
    """Width of each level in multiples of `channels`; from level to level the picture is halved."""
    channel_mult_emb: int = Field(4, ge=1, le=64)
    """Width of the embedding in multiples of `channels`."""
    channel_mult_noise: int = Field(1, ge=1, le=64)
    """Number of sinusoids of the noise level, in multiples of `channels`; NCSN++ has 2."""
    num_res_blocks: Blocks = 4
    attention_resolutions: Sides = None
    """Sides, in pixels, of the levels with attention; absent = that of 16 pixels, if there is one.
    The coarsest level of the decoder begins with attention in any case."""
    embedding_type: Literal["positional", "fourier"] = "positional"
    """Sinusoids of the noise level: of fixed frequencies (DDPM++), or of random ones (NCSN++)."""
    fourier_scale: float = Field(16.0, gt=0, le=1e4)
    """Standard deviation of the random frequencies; iCT and ECT take 0.02. Loaded weights bring
    their own frequencies."""
    encoder_type: Literal["standard", "skip", "residual"] = "standard"
    """How coarse levels see the input: not, as a smaller picture that is added, or as a chain of
    such pictures with weights between them (NCSN++)."""
    decoder_type: Literal["standard", "skip"] = "standard"
    """Output of the finest level, or the sum of every level's picture."""
    resample_filter: tuple[Annotated[int, Field(ge=1, le=1000)], ...] = Field(
        (1, 1), min_length=2, max_length=16, strict=False
    )
    """Taps, of even number, of the filter at changes of resolution; NCSN++ has [1, 3, 3, 1]."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Probability with which an activation of a residual block is dropped in training; on CIFAR-10
    EDM takes 0.13, ECT 0.2, iCT 0.3."""
    null_class: bool = False
    """With a class more, for none: zeros in the place of a label's vector, which are what EDM's
    label_dropout leaves, so that it takes no weights. Guidance needs it, and
    objective.label_dropout trains it."""
    augment_dim: int = Field(0, ge=0, le=1024)
    """Width of EDM's augmentation labels: 9 in its published weights. They embed as zeros here."""

    @field_validator("resample_filter")
    @classmethod
    def _taps_are_even(cls, taps: tuple[int, ...]) -> tuple[int, ...]:
        if len(taps) % 2:
            raise ValueError(f"resample_filter {list(taps)} must have an even number of taps")
        return taps

    def check(self, data: DataSpec) -> None:
        super().check(data)
        for width in self._normed():
            if width % norm_groups(width):
                raise RecipeError(
                    f"backbone.channels = {self.channels}: {width} channels in a norm do not divide"
                    f" into {norm_groups(width)} groups; give channels ="
                    f" {-(-self.channels // 32) * 32}"
                )

    def _normed(self) -> Iterator[int]:
        """The width of every tensor that a norm sees."""
        widths = [self.channels * m for m in self.channel_mult]
        last = self.channels
        skips = [last]
        for level, width in enumerate(widths):
            skips += [last] * bool(level) + [width] * self.num_res_blocks
            yield from (last, width)
            last = width
        for width in reversed(widths):
            for _ in range(self.num_res_blocks + 1):
                yield last + skips.pop()
                last = width


def norm_groups(channels: int) -> int:
    """Groups of a GroupNorm of `channels`: 32, but at least 4 channels a group."""
    return max(1, min(32, channels // 4))
