"""Where the parts of a `UNet` stand, for layouts that name them by level and kind."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple

from cmkit_std.backbones.adm.options import ADMOptions


def is_qkv(key: str) -> bool:
    """Whether a key of a `UNet` is of the projection to queries, keys and values."""
    return key.endswith((".qkv.weight", ".qkv.bias"))


class Place(NamedTuple):
    """Where a part of a `UNet` stands: its name in the state dict, and its number `i` among those
    of its kind in its level."""

    key: str
    part: Literal["encoder", "middle", "decoder"]
    kind: Literal["block", "attention", "resample"]
    level: int
    i: int


def places(options: ADMOptions, resolution: int) -> Iterator[Place]:
    """The residual blocks, attentions and changes of resolution of a `UNet`, in forward order."""
    levels = options.levels(resolution)
    last, stage = len(levels) - 1, 1
    for level, (_, side) in enumerate(levels):
        for i in range(options.num_res_blocks):
            yield Place(f"encoder.{stage}.0", "encoder", "block", level, i)
            if options.attends(side):
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
        for i in range(options.num_res_blocks + 1):
            yield Place(f"decoder.{stage}.0", "decoder", "block", level, i)
            if options.attends(side):
                yield Place(f"decoder.{stage}.1", "decoder", "attention", level, i)
            if level and i == options.num_res_blocks:
                layer = 2 if options.attends(side) else 1
                yield Place(f"decoder.{stage}.{layer}", "decoder", "resample", level, 0)
            stage += 1


def head_widths(options: ADMOptions, resolution: int) -> list[int]:
    """Different widths, in channels, of the attention heads of a `UNet`, rising."""
    levels = options.levels(resolution)
    found = set()
    for place in places(options, resolution):
        if place.kind == "attention":
            width = levels[place.level][0]
            found.add(width // max(1, options.heads(width, place.part == "decoder")))
    return sorted(found)
