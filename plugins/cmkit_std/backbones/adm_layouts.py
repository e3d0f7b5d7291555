"""Names of `adm` weights in the checkpoints of openai/consistency_models, and of sony/ctm, which
adds `time_embed_s` and `emb_layers_s` to them."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

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
_OWN_NAMES = {official: own for own, official in _NAMES.items()}


def to_openai(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a `UNet`, or of one of its blocks, under their official names; no copies."""
    return {_renamed(key, _NAMES): tensor for key, tensor in state.items()}


def from_openai(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Official weights under the names of a `UNet`; no copies. Unknown names stay as they are.

    Attention projections stored as 1-D convolutions, (C', C, 1), become (C', C, 1, 1).
    """
    own = {_renamed(key, _OWN_NAMES): tensor for key, tensor in state.items()}
    return {
        key: tensor[..., None] if tensor.ndim == 3 else tensor  # no other weight has 3 axes
        for key, tensor in own.items()
    }


def _renamed(key: str, names: Mapping[str, str]) -> str:
    pattern = "|".join(re.escape(name) for name in names)
    return re.sub(rf"(?<![^.])(?:{pattern})(?![^.])", lambda match: names[match[0]], key)
