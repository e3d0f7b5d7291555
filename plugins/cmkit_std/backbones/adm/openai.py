"""Weights of `adm` as openai/consistency_models, sony/ctm and openai/guided-diffusion keep them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from torch import Tensor

from cmkit import Layout
from cmkit_std.backbones.adm.options import ADMOptions
from cmkit_std.backbones.layouts import at_time_scale, is_qkv, regrouped, renamings

_NAMES = {
    "time": "time_embed",
    "time_s": "time_embed_s",
    "label": "label_emb",
    "encoder": "input_blocks",
    "middle": "middle_block",
    "decoder": "output_blocks",
    "norm_out": "out.0",
    "conv_out": "out.2",
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "film": "emb_layers.1",
    "film_s": "emb_layers_s.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "shortcut": "skip_connection",
    "pool": "op",
    "proj": "proj_out",
}
"""Component of a key here -> there. Others (qkv, norm, conv, numbers, weight) are the same."""
TIME_SCALE = 1000
"""`time_scale` of OpenAI's consistency models, and of their like in diffusers."""
_read, to_openai = renamings(_NAMES)


def from_openai(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Official weights under the names of a `UNet`, or of one of its blocks.

    Attention projections stored as 1-D convolutions, (C', C, 1), become (C', C, 1, 1).
    """
    # No other weight has 3 axes.
    return {key: t[..., None] if t.ndim == 3 else t for key, t in _read(state).items()}


def _has_attention_of_rank(rank: int, state: Mapping[str, Tensor]) -> bool:
    # Every network attends in its middle. The two projects differ in this rank alone.
    qkv = state.get("middle_block.1.qkv.weight")
    return "input_blocks.0.0.weight" in state and qkv is not None and qkv.ndim == rank


def layout(options: ADMOptions) -> Layout:
    """The layout of openai/consistency_models; also of sony/ctm, which adds `time_embed_s` and
    `emb_layers_s`."""
    own = Layout("openai", partial(_has_attention_of_rank, 4), from_openai, to_openai)
    return at_time_scale(own, options, TIME_SCALE, "openai/consistency_models")


def guided_diffusion(options: ADMOptions) -> Layout:
    """The layout of openai/guided-diffusion: attention by 1-D convolutions, with channels of
    queries, keys and values in the order (heads, three, head width) unless `new_attention_order`.

    Names and shapes are the same in both orders. Its networks take time steps as they are.
    """

    def heads(key: str, qkv: Tensor) -> int:
        return options.heads(len(qkv) // 3, decoder=key.startswith("decoder."))

    def permutes(key: str) -> bool:
        return is_qkv(key) and not options.new_attention_order

    def read(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {
            key: regrouped(t, (heads(key, t), 3, -1), (1, 0, 2)) if permutes(key) else t
            for key, t in from_openai(state).items()
        }

    def write(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        theirs = {
            key: regrouped(t, (3, heads(key, t), -1), (1, 0, 2)) if permutes(key) else t
            for key, t in state.items()
        }
        flat = (".qkv.weight", ".proj.weight")
        return to_openai({k: t[..., 0] if k.endswith(flat) else t for k, t in theirs.items()})

    own = Layout("guided-diffusion", partial(_has_attention_of_rank, 3), read, write)
    return at_time_scale(own, options, 1, "guided-diffusion")
