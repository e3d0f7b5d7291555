"""Names of `dit` weights in the checkpoints of facebookresearch/DiT."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from cmkit import Layout
from cmkit_std.backbones.dit.options import DiTOptions
from cmkit_std.backbones.layouts import at_time_scale, renamed

_NAMES = {
    "patch": "x_embedder",
    "time": "t_embedder.mlp",
    "label": "y_embedder.embedding_table",
    "guidance": "w_embedder",
    "time_s": "s_embedder.mlp",
    "film": "adaLN_modulation.1",
    "final": "final_layer",
}
"""Component of a key here -> there; `w_embedder` and `s_embedder` are ours, in their manner.
Others (pos_embed, blocks, attn, mlp, numbers, weight) are the same."""
_OWN_NAMES = {official: own for own, official in _NAMES.items()}
_MARKS = {"x_embedder.proj.weight", "t_embedder.mlp.0.weight", "blocks.0.adaLN_modulation.1.weight"}


def layout(options: DiTOptions) -> Layout:
    """The layout of facebookresearch/DiT, whose networks take steps as they are."""
    own = Layout("dit", matches, read, write)
    return at_time_scale(own, options.time_scale, 1, "facebookresearch/DiT")


def matches(state: Mapping[str, Tensor]) -> bool:
    """Whether the names are those of facebookresearch/DiT."""
    return state.keys() >= _MARKS


def read(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Official weights under the names of a `Transformer`; no copies. Unknown names stay."""
    return {renamed(key, _OWN_NAMES): tensor for key, tensor in state.items()}


def write(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a `Transformer`, or of one of its blocks, under official names; no copies."""
    return {renamed(key, _NAMES): tensor for key, tensor in state.items()}
