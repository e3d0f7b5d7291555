"""Whether the options of a backbone fit the data and the conditions: one place for all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cmkit import Backbone, DataSpec
from cmkit.errors import CheckpointError, RecipeError


def with_preset(given: Any, presets: Mapping[str, Mapping[str, Any]]) -> Any:
    """A table's keys over those of the preset that it names; anything else as it is."""
    if not isinstance(given, dict) or not isinstance(given.get("preset"), str):
        return given
    return {**presets.get(given["preset"], {}), **given}


def unet_inputs(data: DataSpec, conditions: frozenset[str]) -> dict[str, Any]:
    """What a U-Net's constructor is told of the data and the conditions."""
    return {
        "in_channels": data.channels,
        "out_channels": data.channels,
        "resolution": data.resolution,
        "num_classes": data.num_classes if "label" in conditions else None,
        "guidance": "guidance" in conditions,
        "sigma_to": "sigma_to" in conditions,
    }


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


def check_time_scale(given: float, known: float, project: str) -> None:
    """CheckpointError unless c_noise is scaled as `project` scales it: names and shapes do not
    tell, and other steps draw other pictures."""
    if given != known:
        raise CheckpointError(
            f"backbone.time_scale = {given}: {project} computes with {known:g}; give that, or"
            " weights of another project"
        )
