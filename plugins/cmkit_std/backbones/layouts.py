"""What the layouts of other projects' weights share."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import replace

from torch import Tensor

from cmkit import CheckpointError, Layout
from cmkit_std.backbones.fitting import Options

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


Conversion = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]


def renamings(names: Mapping[str, str]) -> tuple[Conversion, Conversion]:
    """(read, write) between our names and another project's, whose components differ by `names`.

    No copies. Unknown names stay as they are.
    """
    own_names = {theirs: own for own, theirs in names.items()}
    return (
        lambda state: {renamed(key, own_names): tensor for key, tensor in state.items()},
        lambda state: {renamed(key, names): tensor for key, tensor in state.items()},
    )


def renamed(key: str, names: Mapping[str, str]) -> str:
    """`key` with every run of whole components, between dots, that is in `names` replaced."""
    pattern = "|".join(re.escape(name) for name in names)
    return re.sub(rf"(?<![^.])(?:{pattern})(?![^.])", lambda match: names[match[0]], key)


def moved(key: str, modules: Mapping[str, str]) -> str:
    """`key` with its module replaced, if that is in `modules`."""
    module, _, leaf = key.rpartition(".")
    return f"{modules[module]}.{leaf}" if module in modules else key


def check_places(state: Mapping[str, Tensor], modules: Mapping[str, str], project: str) -> None:
    """CheckpointError when the `project` has no place, in `modules`, for some of our weights."""
    if alien := [key for key in state if key.rpartition(".")[0] not in modules]:
        more = f", nor for {len(alien) - 1} others" if len(alien) > 1 else ""
        raise CheckpointError(
            f"{alien[0]}: {project} has no place for it{more}; keep these weights in another layout"
        )


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


def is_qkv(key: str) -> bool:
    """Whether a key of ours is of a projection to queries, keys and values."""
    return key.endswith((".qkv.weight", ".qkv.bias"))


def check_option(options: Options, name: str, needed: float, project: str) -> None:
    """CheckpointError unless the option `name` is what `project` computes with: names and shapes
    of its weights do not tell, and other values draw other pictures."""
    if (given := getattr(options, name)) != needed:
        raise CheckpointError(
            f"backbone.{name} = {str(given).lower()}: {project} computes with"
            f" {str(needed).lower()}; give that, or weights of another project"
        )


def at_time_scale(layout: Layout, options: Options, needed: int, project: str) -> Layout:
    """`layout`, which converts no weights unless c_noise is scaled as `project` scales it."""

    def read(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        check_option(options, "time_scale", needed, project)
        return layout.read(state)

    def write(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        check_option(options, "time_scale", needed, project)
        return layout.write(state)

    return replace(layout, read=read, write=write)
