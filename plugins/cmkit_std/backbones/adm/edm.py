"""Weights of `adm` as NVlabs/edm, and sony/ctm after it, keep those of DhariwalUNet."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from cmkit import DataSpec, Layout
from cmkit.errors import CheckpointError
from cmkit_std.backbones.adm.options import ADMOptions
from cmkit_std.backbones.layouts import (
    EDM_BLOCK,
    check_option,
    check_places,
    from_edm_qkv,
    is_qkv,
    moved,
    to_edm_qkv,
)

_ATTENTION = {"norm": "norm2", "qkv": "qkv", "proj": "proj"}
_FIXED = {
    "use_scale_shift_norm": True,
    "resblock_updown": True,
    "norm_groups": 32,
    "time_scale": 1,
    "null_class": False,
}
_HEAD = 64
_FILTER = 0.25
"""Each of the 2 x 2 taps of the resampling filters, buffers that are the same everywhere."""


def layout(options: ADMOptions, data: DataSpec) -> Layout:
    """The layout of DhariwalUNet: a block and its attention share one name, channels of queries,
    keys and values have the order (heads, head width, three), labels enter a linear layer.

    Its filters, which are constants, and its embedding of augmentations, which serves training
    alone, are not read.
    """

    def converted(key: str, t: Tensor, reorder: Callable[[Tensor, int], Tensor]) -> Tensor:
        if key == "label.weight":
            return t.t().contiguous()
        return reorder(t, len(t) // (3 * _HEAD)) if is_qkv(key) else t

    def check_sigma_to(embedded: bool) -> None:
        if embedded:
            check_option(options, "label_sigma_to", True, "sony/ctm's DhariwalUNet")

    def read(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        check_sigma_to("model.map_layer0_s.weight" in state)
        own_names = {theirs: own for own, theirs in _modules(options, data).items()}
        own = {
            moved(key, own_names): tensor
            for key, tensor in state.items()
            if not key.endswith(".resample_filter") and not key.startswith("model.map_augment.")
        }
        return {key: converted(key, tensor, from_edm_qkv) for key, tensor in own.items()}

    def write(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        check_sigma_to("time_s.0.weight" in state)
        names = _modules(options, data)
        check_places(state, names, "EDM's DhariwalUNet")
        resampling = {p.key for p in options.places(data.resolution) if p.kind == "resample"}
        theirs: dict[str, Tensor] = {}
        for key, tensor in state.items():
            theirs[moved(key, names)] = converted(key, tensor, to_edm_qkv)
            block = key.removesuffix(".conv1.weight")
            if block in resampling:
                for layer in ("conv1", "shortcut"):
                    filtered = names[f"{block}.{layer}"]
                    theirs[f"{filtered}.resample_filter"] = tensor.new_full((1, 1, 2, 2), _FILTER)
        return theirs

    return Layout("edm", _matches, read, write)


def _check(options: ADMOptions, data: DataSpec) -> None:
    for name, only in _FIXED.items():
        check_option(options, name, only, "EDM's DhariwalUNet")
    if (widths := options.head_widths(data.resolution)) != [_HEAD]:
        raise CheckpointError(
            f"backbone.num_heads: attention heads are {', '.join(map(str, widths))} channels wide,"
            f" those of EDM's DhariwalUNet {_HEAD}; give num_head_channels = {_HEAD}"
        )
    for width, _ in options.levels(data.resolution):
        if options.groups(width) != min(32, width // 4):
            raise CheckpointError(
                f"backbone.norm_channels = {options.norm_channels}: EDM's DhariwalUNet has"
                f" {min(32, width // 4)} groups in levels of {width} channels; give"
                " norm_channels = 4"
            )


def _modules(options: ADMOptions, data: DataSpec) -> dict[str, str]:
    """Module of ours -> of DhariwalUNet, whose names hold the side of the pictures in pixels."""
    _check(options, data)
    side = [f"{n}x{n}" for _, n in options.levels(data.resolution)]
    names = {
        "time.0": "map_layer0",
        "time.2": "map_layer1",
        "time_s.0": "map_layer0_s",
        "time_s.2": "map_layer1_s",
        "label": "map_label",
        "encoder.0.0": f"enc.{side[0]}_conv",
        "norm_out": "out_norm",
        "conv_out": "out_conv",
    }
    for place in options.places(data.resolution):
        if place.kind != "resample":
            part = {"encoder": "enc", "middle": "dec", "decoder": "dec"}[place.part]
            number = f"in{place.i}" if place.part == "middle" else f"block{place.i}"
            block = f"{part}.{side[place.level]}_{number}"
        elif place.part == "encoder":
            block = f"enc.{side[place.level + 1]}_down"
        else:
            block = f"dec.{side[place.level - 1]}_up"
        inner = _ATTENTION if place.kind == "attention" else EDM_BLOCK
        names |= {f"{place.key}.{own}": f"{block}.{theirs}" for own, theirs in inner.items()}
    return {own: f"model.{theirs}" for own, theirs in names.items()}


def _matches(state: Mapping[str, Tensor]) -> bool:
    # EDM's other network, SongUNet, has no `out_conv`.
    return "model.map_layer0.weight" in state and "model.out_conv.weight" in state
