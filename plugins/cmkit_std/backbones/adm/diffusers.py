"""Weights of `adm` as huggingface/diffusers keeps those of a UNet2DModel, the network of its
converted consistency models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from cmkit import DataSpec, Layout
from cmkit.errors import CheckpointError
from cmkit_std.backbones.adm.openai import TIME_SCALE
from cmkit_std.backbones.adm.options import ADMOptions
from cmkit_std.backbones.layouts import check_option, check_places, moved

_ENDS = {
    "time.0": "time_embedding.linear_1",
    "time.2": "time_embedding.linear_2",
    "label": "class_embedding",
    "encoder.0.0": "conv_in",
    "norm_out": "conv_norm_out",
    "conv_out": "conv_out",
}
_BLOCK = {
    "norm1": "norm1",
    "conv1": "conv1",
    "film": "time_emb_proj",
    "norm2": "norm2",
    "conv2": "conv2",
    "shortcut": "conv_shortcut",
}
_ATTENTION = {"norm": "group_norm", "qkv": "to_qkv", "proj": "to_out.0"}
_PROJECTIONS = (".qkv.weight", ".proj.weight")


def layout(options: ADMOptions, data: DataSpec) -> Layout:
    """The layout of UNet2DModel; queries, keys and values are linear layers of their own in it."""

    def read(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        own_names = {theirs: own for own, theirs in _modules(options, data).items()}
        own = {moved(key, own_names): tensor for key, tensor in _joined(state).items()}
        return {
            key: t[..., None, None] if key.endswith(_PROJECTIONS) and t.ndim == 2 else t
            for key, t in own.items()
        }

    def write(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        names = _modules(options, data)
        check_places(state, names, "diffusers' UNet2DModel")
        return _split(
            {
                moved(key, names): t[..., 0, 0] if key.endswith(_PROJECTIONS) else t
                for key, t in state.items()
            }
        )

    def config(state: Mapping[str, Tensor]) -> dict[str, Any]:
        return unet2d_config(options, data, conditional="label.weight" in state)

    return Layout("diffusers", _matches, read, write, config)


def unet2d_config(options: ADMOptions, data: DataSpec, conditional: bool) -> dict[str, Any]:
    """The `config.json` of a UNet2DModel that computes what `options` build for `data`.

    It takes 250 ln(sigma) for a time step, as CMStochasticIterativeScheduler gives it.
    CheckpointError for options that it lacks.
    """
    _check(options, data)
    levels = options.levels(data.resolution)
    plain = ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D")
    if not options.resblock_updown:
        plain = ("DownBlock2D", "UpBlock2D")
    attends = [options.attends(side) for _, side in levels]
    resampling = "resnet" if options.resblock_updown else "conv"
    return {
        "_class_name": "UNet2DModel",
        "sample_size": data.resolution,
        "in_channels": data.channels,
        "out_channels": (2 if options.learn_sigma else 1) * data.channels,
        "block_out_channels": [width for width, _ in levels],
        "layers_per_block": options.num_res_blocks,
        "down_block_types": ["AttnDownBlock2D" if a else plain[0] for a in attends],
        "up_block_types": ["AttnUpBlock2D" if a else plain[1] for a in reversed(attends)],
        "downsample_type": resampling,
        "upsample_type": resampling,
        "attention_head_dim": options.head_widths(data.resolution)[0],
        "norm_num_groups": options.norm_groups,
        "attn_norm_num_groups": options.norm_groups,
        "resnet_time_scale_shift": "scale_shift" if options.use_scale_shift_norm else "default",
        "num_class_embeds": _classes(options, data) if conditional else None,
        "dropout": options.dropout,
    }


def _classes(options: ADMOptions, data: DataSpec) -> int | None:
    return data.num_classes and data.num_classes + options.null_class


def _check(options: ADMOptions, data: DataSpec) -> None:
    if options.channel_mult[0] != 1:
        raise CheckpointError(
            f"backbone.channel_mult = {list(options.channel_mult)}: the first level of diffusers'"
            " UNet2DModel has the width of its time embedding; only 1 can come first"
        )
    if not (options.resblock_updown or options.conv_resample or len(options.channel_mult) == 1):
        raise CheckpointError(
            "backbone.conv_resample = false: diffusers' UNet2DModel changes the resolution by"
            " convolutions or residual blocks; only conv_resample = true or resblock_updown ="
            " true can be expressed"
        )
    if len(widths := options.head_widths(data.resolution)) > 1:
        raise CheckpointError(
            "backbone.num_heads: attention heads are"
            f" {', '.join(map(str, widths))} channels wide, and those of diffusers' UNet2DModel"
            " all alike; only a network trained with num_head_channels, such as"
            f" {widths[0]}, can be expressed"
        )
    narrow = min(width for width, _ in options.levels(data.resolution))
    if options.groups(narrow) != options.norm_groups:
        raise CheckpointError(
            f"backbone.norm_channels = {options.norm_channels}: leaves {options.groups(narrow)}"
            f" groups to levels of {narrow} channels, and diffusers' UNet2DModel has"
            f" {options.norm_groups} everywhere; only norm_channels = 1 can be expressed"
        )
    project = "diffusers' CMStochasticIterativeScheduler"
    check_option(options, "time_scale", TIME_SCALE, project)


def _modules(options: ADMOptions, data: DataSpec) -> dict[str, str]:
    """Module of ours -> of UNet2DModel, whose names follow level and kind."""
    _check(options, data)
    last = len(options.channel_mult) - 1
    names = dict(_ENDS)
    for place in options.places(data.resolution):
        level, resamplers, convolution = {
            "encoder": (f"down_blocks.{place.level}", "downsamplers", {"pool": "conv"}),
            "middle": ("mid_block", "", {}),
            "decoder": (f"up_blocks.{last - place.level}", "upsamplers", {"conv": "conv"}),
        }[place.part]
        lists, inner = {
            "block": ("resnets", _BLOCK),
            "attention": ("attentions", _ATTENTION),
            "resample": (resamplers, _BLOCK if options.resblock_updown else convolution),
        }[place.kind]
        for own, theirs in inner.items():
            names[f"{place.key}.{own}"] = f"{level}.{lists}.{place.i}.{theirs}"
    return names


def _matches(state: Mapping[str, Tensor]) -> bool:
    return "mid_block.attentions.0.to_q.weight" in state and "conv_norm_out.weight" in state


def _joined(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`state` with each to_q, to_k, to_v stacked to one to_qkv, in the order that ours has."""
    joined = dict(state)
    for key in state:
        parts = [key.replace(".to_q.", f".to_{which}.") for which in "qkv"]
        shapes = {part in state and state[part].shape for part in parts}
        if ".to_q." in key and shapes == {state[key].shape}:
            stacked = torch.cat([joined.pop(part) for part in parts])
            joined[key.replace(".to_q.", ".to_qkv.")] = stacked
    return joined


def _split(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`state` with each to_qkv as to_q, to_k, to_v; no copies."""
    split: dict[str, Tensor] = {}
    for key, tensor in state.items():
        if ".to_qkv." in key:
            for which, part in zip("qkv", tensor.chunk(3), strict=True):
                split[key.replace(".to_qkv.", f".to_{which}.")] = part
        else:
            split[key] = tensor
    return split
