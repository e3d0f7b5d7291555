"""Options of a backbone: presets, and whether they fit the data and the conditions."""

from __future__ import annotations

import pkgutil
from collections.abc import Collection, Mapping
from typing import Annotated, Any, ClassVar

from pydantic import Field, model_validator

import cmkit
from cmkit import Backbone, DataSpec, Precond, RecipeError
from cmkit_std.backbones.published import check_published

Channels = Annotated[int, Field(ge=4, le=2048)]
Widths = Annotated[
    tuple[Annotated[int, Field(ge=1, le=16)], ...],
    Field(min_length=1, max_length=10, strict=False),
]
Sides = Annotated[
    tuple[Annotated[int, Field(ge=1, le=8192)], ...] | None, Field(max_length=10, strict=False)
]
Blocks = Annotated[
    int,
    Field(
        ge=1,
        le=16,
        description="Residual blocks a level in the encoder; the decoder has one more.",
    ),
]


class Options(Backbone):
    """A backbone that builds `network`, "module:Class", if its options fit each other, the data and
    the conditions; the field `preset` names one of the sets `presets` of options."""

    accepts: ClassVar[frozenset[str]] = frozenset({"label", "guidance", "sigma_to"})
    network: ClassVar[str]
    presets: ClassVar[Mapping[str, Mapping[str, Any]]]

    preset: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, given: Any) -> Any:
        """A table's keys over those of the preset that it names."""
        if not isinstance(given, dict) or not isinstance(given.get("preset"), str):
            return given
        return {**cls.presets.get(given["preset"], {}), **given}

    def check(self, data: DataSpec) -> None:
        """RecipeError when the options do not fit each other or the data."""

    def check_published(self, weights: str, precond: Precond) -> None:
        check_published(weights, self, precond)

    def build(self, data: DataSpec, conditions: frozenset[str]) -> cmkit.Network:
        """A fresh network; RecipeError for options that do not fit, for a condition that is not
        embedded, and for labels of data without classes."""
        if unknown := conditions - self.accepts:
            raise RecipeError(
                f"backbone: {type(self).__name__.lower()} cannot embed"
                f" {', '.join(sorted(unknown))}; it accepts {', '.join(sorted(self.accepts))};"
                " choose another backbone"
            )
        if "label" in conditions and not data.num_classes:
            raise RecipeError(
                "backbone: cannot embed labels, num_classes of the data set is"
                f" {data.num_classes}; choose a data set with classes, or leave the labels out"
            )
        self.check(data)
        return pkgutil.resolve_name(self.network)(self, data, conditions)


class UNetOptions(Options):
    """What the U-Nets' options have in common."""

    attends_at: ClassVar[Collection[int]]
    """Sides of the levels with attention where no `attention_resolutions` are given."""

    channels: Channels
    channel_mult: Widths
    num_res_blocks: Blocks
    attention_resolutions: Sides = None
    dropout: float = Field(0.0, ge=0, lt=1)
    """Probability with which an activation of a residual block is dropped in training."""
    gradient_checkpointing: bool = False
    """Recompute residual blocks in the backward pass: less memory, a third more time."""

    def levels(self, resolution: int) -> list[tuple[int, int]]:
        """(width in channels, side in pixels) of each level, the finest first."""
        return [(self.channels * m, resolution >> n) for n, m in enumerate(self.channel_mult)]

    def attends(self, side: int) -> bool:
        """Whether a level of `side` pixels has attention."""
        sides = self.attention_resolutions
        return side in (self.attends_at if sides is None else sides)

    def smallest(self, data: DataSpec) -> Mapping[str, Any]:
        """The first and the last level, with a block and 8 channels to a multiple of one, and the
        attention that they have."""
        mult = [*self.channel_mult[:1], *self.channel_mult[1:][-1:]][: 2 - data.resolution % 2]
        halves = [data.resolution >> n for n in range(len(mult))]
        sides = self.attention_resolutions
        kept = None if sides is None else [side for side in halves if side in sides]
        small = {"channels": 8, "channel_mult": mult, "num_res_blocks": 1}
        return {"preset": None, **small, "attention_resolutions": kept}

    def check_divides(self, name: str, width: int, level: str = "a level with attention") -> None:
        """RecipeError when the option `name`, if given, does not divide a level's `width`."""
        if (given := getattr(self, name)) and width % given:
            raise RecipeError(
                f"backbone.{name} = {given}: does not divide the {width} channels of {level}; give"
                f" a divisor of {width}"
            )

    def check(self, data: DataSpec) -> None:
        """RecipeError unless pictures can be halved for every level, and attention has its levels;
        subclasses check more."""
        halvings = len(self.channel_mult) - 1
        if data.resolution % 2**halvings:
            possible = (data.resolution & -data.resolution).bit_length()
            raise RecipeError(
                f"backbone.channel_mult = {list(self.channel_mult)}: its {halvings + 1} levels need"
                f" pictures divisible by {2**halvings}, not of {data.resolution} pixels; give at"
                f" most {possible} levels, or another dataset.resolution"
            )
        sides = [side for _, side in self.levels(data.resolution)]
        given = self.attention_resolutions or ()
        if missing := sorted(set(given) - set(sides)):
            raise RecipeError(
                f"backbone.attention_resolutions = {list(given)}: no level has"
                f" {', '.join(map(str, missing))} pixels; choose among {', '.join(map(str, sides))}"
            )
