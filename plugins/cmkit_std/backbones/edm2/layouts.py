"""Names of `edm2` weights in the checkpoints of NVlabs/edm2, and of ECT, which keeps its names.

EDM2's query, key and value channels are in the order (heads, head width, three); here it is (three,
heads, head width), so those filters are permuted.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from cmkit import Layout
from cmkit_std.backbones.edm2.options import EDM2Options
from cmkit_std.backbones.songunet.layouts import conversions

PREFIX = "unet."
"""The official network is a member of its preconditioning."""
UNCERTAINTY = ("logvar_fourier.", "logvar_linear.")
"""What the preconditioning learns beside it: how uncertain the loss is at a noise level. That
belongs to an objective, ECT's checkpoints lack it, and it is left out."""
_NAMES = {
    "waves.frequencies": "emb_fourier.freqs",
    "waves.phases": "emb_fourier.phases",
    "noise": "emb_noise",
    "noise_s": "emb_noise_s",
    "label": "emb_label",
    "guidance": "emb_guidance",
    "guidance_gain": "emb_guidance_gain",
    "conv1": "conv_res0",
    "film": "emb_linear",
    "film_gain": "emb_gain",
    "film_s": "emb_linear_s",
    "film_s_gain": "emb_gain_s",
    "conv2": "conv_res1",
    "shortcut": "conv_skip",
    "attention.qkv": "attn_qkv",
    "attention.proj": "attn_proj",
    "conv_out": "out_conv",
}
"""Components of a key here -> there; those of guidance and of `_s` are ours, in EDM2's manner."""


def layout(options: EDM2Options) -> Layout:
    """The layout of EDM2's U-Net with the heads of `options`."""
    read, write = conversions(
        PREFIX,
        _NAMES,
        left_out=lambda official: official.startswith(UNCERTAINTY),
        heads=lambda qkv: options.heads(len(qkv) // 3),
    )
    return Layout("edm2", matches, read, write)


def matches(state: Mapping[str, Tensor]) -> bool:
    """Whether `state` is a U-Net of EDM2's code, or of ECT's after it."""
    return bool(state.keys() & {f"{PREFIX}emb_noise.weight", "emb_noise.weight"})
