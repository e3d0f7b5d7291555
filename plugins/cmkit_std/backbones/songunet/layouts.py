"""Names of `songunet` weights in the checkpoints of EDM, and of ECT and CTM, which keep its names.

CTM adds `map_layer0_s`, `map_layer1_s` and `affine_s`. EDM's query, key and value channels are in
the order (head width, three); here it is (three, head width), so those weights are permuted.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from torch import Tensor

from cmkit_std.backbones.layouts import (
    EDM_BLOCK,
    Conversion,
    from_edm_qkv,
    is_qkv,
    renamed,
    to_edm_qkv,
)

PREFIX = "model."
"""The official network is a member of its preconditioning."""

_STAGES = {"encoder": "enc", "decoder": "dec"}
_PLACES = {
    "enter": "conv",
    "middle": "in",
    "blocks": "block",
    "picture_down": "aux_down",
    "picture_in": "aux_skip",
    "residual": "aux_residual",
    "picture_up": "aux_up",
    "norm_out": "aux_norm",
    "conv_out": "aux_conv",
}
"""A layer of a level here -> there. Others (up, down) are the same."""
_NAMES = {
    "noise.frequencies": "map_noise.freqs",
    "label": "map_label",
    "augment": "map_augment",
    "time.0": "map_layer0",
    "time.2": "map_layer1",
    "time_s.0": "map_layer0_s",
    "time_s.2": "map_layer1_s",
    **EDM_BLOCK,
    "attention.norm": "norm2",
    "attention.qkv": "qkv",
    "attention.proj": "proj",
    "filter": "resample_filter",
}
"""Further components of a key here -> there. Others (weight, bias) are the same."""
_OWN_STAGES, _OWN_PLACES = (
    {theirs: ours for ours, theirs in names.items()} for names in (_STAGES, _PLACES)
)


def matches(state: Mapping[str, Tensor]) -> bool:
    """Whether `state` is a SongUNet of EDM's code, or of its descendants."""
    return any(re.fullmatch(r"(?:model\.)?dec\.(\d+)x\1_aux_conv\.weight", key) for key in state)


def conversions(
    prefix: str,
    names: Mapping[str, str],
    left_out: Callable[[str], bool],
    heads: Callable[[Tensor], int],
) -> tuple[Conversion, Conversion]:
    """(read, write) between our names and those of EDM's code, which follow `prefix`.

    `names` are those of the layers inside a block. Weights whose official name is `left_out` are
    not read; unknown names stay as they are. `heads` tells those of a projection to queries, keys
    and values.
    """
    own_names = {theirs: ours for ours, theirs in names.items()}

    def read(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        own = {
            own_key(official.removeprefix(prefix), own_names): tensor
            for official, tensor in state.items()
            if not left_out(official)
        }
        return {key: from_edm_qkv(t, heads(t)) if is_qkv(key) else t for key, t in own.items()}

    def write(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {
            prefix + official_key(key, names): to_edm_qkv(t, heads(t)) if is_qkv(key) else t
            for key, t in state.items()
        }

    return read, write


def official_key(key: str, names: Mapping[str, str]) -> str:
    """Our name of a weight as EDM has it; `names` are those of the layers inside a block."""
    place = re.fullmatch(r"(encoder|decoder)\.(\d+)\.([a-z_]+)((?:\.\d+)?)(\..+)", key)
    if not place:
        return renamed(key, names)
    stage, side, layer, number, rest = place.groups()
    layer = _PLACES.get(layer, layer) + number[1:]
    return f"{_STAGES[stage]}.{side}x{side}_{layer}{renamed(rest, names)}"


def own_key(key: str, names: Mapping[str, str]) -> str:
    """EDM's name of a weight as we have it; the inverse of `official_key` with inverse `names`."""
    place = re.fullmatch(r"(enc|dec)\.(\d+)x\2_([a-z_]+)(\d*)(\..+)", key)
    if not place:
        return renamed(key, names)
    stage, side, layer, number, rest = place.groups()
    layer = _OWN_PLACES.get(layer, layer) + (number and f".{number}")
    return f"{_OWN_STAGES[stage]}.{side}.{layer}{renamed(rest, names)}"


# The noise table `u` of EDM's iDDPM preconditioning is no weight of the network.
read, write = conversions(PREFIX, _NAMES, lambda key: key == "u", heads=lambda qkv: 1)
