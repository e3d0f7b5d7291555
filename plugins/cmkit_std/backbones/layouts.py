"""What the layouts of other projects' weights share."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from cmkit import CheckpointError, Layout

EDM_BLOCK = {
    "norm1": "norm0",
    "conv1": "conv0",
    "film": "affine",
    "film_s": "affine_s",
    "norm2": "norm1",
    "conv2": "conv1",
    "shortcut": "skip",
}
"""Layers of a residual block here -> in EDM's UNetBlock; `affine_s` is sony/ctm's."""


def renamed(key: str, names: Mapping[str, str]) -> str:
    """`key` with every run of whole components, between dots, that is in `names` replaced."""
    pattern = "|".join(re.escape(name) for name in names)
    return re.sub(rf"(?<![^.])(?:{pattern})(?![^.])", lambda match: names[match[0]], key)


def regrouped(rows: Tensor, shape: tuple[int, int, int], order: tuple[int, int, int]) -> Tensor:
    """`rows` (a b c, ...) seen as (a, b, c, ...), with these three axes in another `order`.

    One of a, b, c is -1. Rows that they do not divide are those of another network, whose shapes
    will be refused: they come back as they are.
    """
    known = -math.prod(shape)
    if not known or len(rows) % known:
        return rows
    return rows.unflatten(0, shape).permute(*order, *range(3, rows.ndim + 2)).flatten(0, 2)


def from_edm_qkv(rows: Tensor, heads: int) -> Tensor:
    """Rows in EDM's order (heads, head width, three) in ours: (three, heads, head width)."""
    return regrouped(rows, (heads, -1, 3), (2, 0, 1))


def to_edm_qkv(rows: Tensor, heads: int) -> Tensor:
    """The inverse of `from_edm_qkv`."""
    return regrouped(rows, (3, heads, -1), (1, 2, 0))


def check_time_scale(given: float, known: float, project: str) -> None:
    """CheckpointError unless c_noise is scaled as `project` scales it: names and shapes do not
    tell, and other steps draw other pictures."""
    if given != known:
        raise CheckpointError(
            f"backbone.time_scale = {given}: {project} computes with {known:g}; give that, or"
            " weights of another project"
        )


def at_time_scale(layout: Layout, given: float, known: float, project: str) -> Layout:
    """`layout`, which converts no weights unless `check_time_scale` passes."""

    def read(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        check_time_scale(given, known, project)
        return layout.read(state)

    def write(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        check_time_scale(given, known, project)
        return layout.write(state)

    return replace(layout, read=read, write=write)
