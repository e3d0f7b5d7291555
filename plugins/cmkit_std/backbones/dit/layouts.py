"""Names of `dit` weights in the checkpoints of facebookresearch/DiT."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from cmkit import Layout
from cmkit_std.backbones.dit.options import DiTOptions
from cmkit_std.backbones.layouts import at_time_scale, renamings

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
read, write = renamings(_NAMES)
_MARKS = {"x_embedder.proj.weight", "t_embedder.mlp.0.weight", "blocks.0.adaLN_modulation.1.weight"}


def layout(options: DiTOptions) -> Layout:
    """The layout of facebookresearch/DiT, whose networks take steps as they are."""
    own = Layout("dit", matches, read, write)
    return at_time_scale(own, options, 1, "facebookresearch/DiT")


def matches(state: Mapping[str, Tensor]) -> bool:
    """Whether the names are those of facebookresearch/DiT."""
    return state.keys() >= _MARKS
