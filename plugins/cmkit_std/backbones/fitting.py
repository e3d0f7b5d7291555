"""Options of a backbone: presets, and whether they fit the data and the conditions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from pydantic import model_validator

from cmkit import Backbone, DataSpec, Part
from cmkit.errors import RecipeError


class Options(Part):
    """Options of a backbone; the field `preset` names one of the sets `presets` of them."""

    presets: ClassVar[Mapping[str, Mapping[str, Any]]]

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, given: Any) -> Any:
        """A table's keys over those of the preset that it names."""
        if not isinstance(given, dict) or not isinstance(given.get("preset"), str):
            return given
        return {**cls.presets.get(given["preset"], {}), **given}


class UNetOptions(Options):
    """Options of a U-Net, with fields `channels` and `channel_mult`."""

    def levels(self, resolution: int) -> list[tuple[int, int]]:
        """(width in channels, side in pixels) of each level, the finest first."""
        return [(self.channels * m, resolution >> n) for n, m in enumerate(self.channel_mult)]


def check_conditions(
    name: str, backbone: Backbone, data: DataSpec, conditions: frozenset[str]
) -> None:
    """RecipeError for a condition that the backbone does not embed, and for labels of data without
    classes."""
    if unknown := conditions - backbone.accepts:
        raise RecipeError(
            f"backbone: {name} cannot embed {', '.join(sorted(unknown))}; it accepts"
            f" {', '.join(sorted(backbone.accepts))}; choose another backbone"
        )
    if "label" in conditions and not data.num_classes:
        raise RecipeError(
            "backbone: cannot embed labels, num_classes of the data set is"
            f" {data.num_classes}; choose a data set with classes, or leave the labels out"
        )


def check_levels(
    resolution: int, channel_mult: Sequence[int], attention_resolutions: Sequence[int] | None
) -> None:
    """RecipeError unless pictures can be halved for every level, and attention has its levels."""
    halvings = len(channel_mult) - 1
    if resolution % 2**halvings:
        possible = (resolution & -resolution).bit_length()
        raise RecipeError(
            f"backbone.channel_mult = {list(channel_mult)}: its {halvings + 1} levels need"
            f" pictures divisible by {2**halvings}, not of {resolution} pixels; give at most"
            f" {possible} levels, or another dataset.resolution"
        )
    sides = [resolution >> n for n in range(halvings + 1)]
    if missing := sorted(set(attention_resolutions or ()) - set(sides)):
        raise RecipeError(
            f"backbone.attention_resolutions = {list(attention_resolutions or ())}: no"
            f" level has {', '.join(map(str, missing))} pixels; choose among"
            f" {', '.join(map(str, sides))}"
        )
