"""Recipes of diffusers' ConsistencyModelPipeline. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cmkit import CheckpointError, RecipeError
from cmkit.files import read_json

PIPELINE = "ConsistencyModelPipeline"
AXIS = ("sigma_min", "sigma_max", "sigma_data", "rho")
FIXED: dict[str, Any] = {
    "act_fn": "silu",
    "add_attention": True,
    "center_input_sample": False,
    "class_embed_type": None,
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-5,
    "time_embedding_type": "positional",
}
"""Options of diffusers' UNet2DModel that every network here has."""


def recipe_of(pipeline: str) -> dict[str, Any] | None:
    """The recipe of a folder, as `Backbone.recipe_of` returns it."""
    folder = Path(pipeline)
    index = folder / "model_index.json"
    if not index.is_file() or read_json(index).get("_class_name") != PIPELINE:
        return None
    places = (folder / "unet" / "config.json", folder / "scheduler" / "scheduler_config.json")
    if lacking := [place.parent.name for place in places if not place.is_file()]:
        raise CheckpointError(
            f"{folder}: half a pipeline, without {', '.join(lacking)}; fetch or save it again"
        )
    network, drawing = map(read_json, places)
    if (noise := drawing.get("s_noise", 1.0)) != 1:
        raise RecipeError(f"{places[1]}: s_noise = {noise}, and here it is 1; draw with diffusers")
    axis = {key: float(drawing[key]) for key in AXIS if key in drawing}
    return {
        "dataset": {
            "use": "invented",
            "channels": network.get("in_channels", 3),
            "resolution": network.get("sample_size"),
            "images": 2,
            "classes": network.get("num_class_embeds"),
        },
        "backbone": _options(network, places[0]),
        "denoiser": {"precond": "consistency", "weights": pipeline, **axis},
        "sampler": {"use": "multistep", "clamp": drawing.get("clip_denoised", True)},
    }


def _options(network: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The table [backbone] of a UNet2DModel's configuration; RecipeError where there is none."""
    from cmkit import DataSpec
    from cmkit_std.backbones.adm import ADM

    try:
        widths, side = network["block_out_channels"], network["sample_size"]
        attends = ["Attn" in block for block in network["down_block_types"]]
        options = {
            "channels": widths[0],
            "channel_mult": [width // widths[0] for width in widths],
            "num_res_blocks": network["layers_per_block"],
            "attention_resolutions": [side >> n for n, attends in enumerate(attends) if attends],
            "num_head_channels": network["attention_head_dim"],
            "use_scale_shift_norm": network["resnet_time_scale_shift"] == "scale_shift",
            "resblock_updown": network["downsample_type"] == "resnet",
            "norm_groups": network["norm_num_groups"],
            "learn_sigma": network["out_channels"] == 2 * network["in_channels"] or None,
            "dropout": float(network.get("dropout", 0.0)),
        }
        data = DataSpec(network["in_channels"], side, network.get("num_class_embeds"))
        from cmkit_std.backbones.adm.diffusers import unet2d_config

        backbone = ADM.model_validate(options)
        same = unet2d_config(backbone, data, conditional=data.num_classes is not None)
    except (KeyError, TypeError, ValueError, IndexError, CheckpointError) as error:
        raise RecipeError(
            f"{path}: no network of backbone adm ({' '.join(str(error).split())[:200]}); draw with"
            " diffusers"
        ) from error
    wanted = {**FIXED, "attn_norm_num_groups": same["norm_num_groups"], **same}
    for key, value in wanted.items():
        if (given := network.get(key, value)) != value:
            raise RecipeError(
                f"{path}: {key} = {given!r}, and backbone adm computes with {value!r}; draw with"
                " diffusers"
            )
    return {"use": "adm", **{key: value for key, value in options.items() if value is not None}}
