"""Layout "diffusers" reproduces a converted network of huggingface/diffusers, and its key lists."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from cmkit_std.backbones.adm import ADM
from cmkit_std.backbones.adm.openai import from_openai, to_openai

from cmkit import DataSpec, Layout
from tests.parity import harness

FIGURES = harness.Figures("diffusers.json")
FUNCTION = "scripts/convert_consistency_to_diffusers.con_pt_to_diffuser, then UNet2DModel.forward"
BOTH = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
EACH_KEY_FILE = pytest.mark.parametrize(
    "path", harness.key_files("diffusers_*.json"), ids=lambda path: path.stem
)


def diffusers_layout(options: ADM, data: DataSpec) -> Layout:
    (found,) = [layout for layout in options.layouts(data) if layout.name == "diffusers"]
    return found


@BOTH
@pytest.mark.parametrize("name", FIGURES.read_by({FUNCTION: None}))
@torch.no_grad()
def test_converted_network_computes_the_official_function(name, dtype, record_property):
    expected = FIGURES.cases[name]["expect"]
    actual = FIGURES.compute(name, converted, dtype)
    worst = harness.compare(actual, expected, dtype)
    record_property("parity", (FIGURES.name, str(dtype), worst))


def converted(case: dict, dtype: torch.dtype) -> dict:
    assert case["inputs"]["weights"].endswith("filled by its own keys, then converted")
    options, data, conditions = options_of(case["config"])
    layout = diffusers_layout(options, data)
    options = options.model_copy(update={"time_scale": 1.0})  # time steps come as they are here
    network = options.build(data, conditions).to(dtype).eval()
    shapes = {key: tuple(t.shape) for key, t in to_openai(network.state_dict()).items()}
    theirs = layout.write(from_openai(FIGURES.weights(shapes, dtype)))
    network.load_state_dict(layout.read(theirs))
    out = network(
        FIGURES.tensor(case["inputs"]["x"], dtype),
        FIGURES.tensor(case["inputs"]["timesteps"], dtype),
        harness.cond_of(case),
        {},
    )
    assert agrees(layout.config(network.state_dict()), case["config"])
    return {"keys": len(theirs), "out": out}


def agrees(config: dict[str, Any], official: dict[str, Any]) -> bool:
    """Whether every entry of an official config is in ours, which also says its defaults."""
    return {key: config.get(key) for key in official} == official


def described(path) -> tuple[ADM, DataSpec, frozenset[str], dict[str, Any]]:
    """Options, data and conditions of the network of a key list, and the list itself."""
    content = json.loads(path.read_text("utf-8"))
    return *options_of(content["source"]["config"]), content


def options_of(config: Mapping[str, Any]) -> tuple[ADM, DataSpec, frozenset[str]]:
    """Options, data and conditions of a UNet2DModel."""
    widths = config["block_out_channels"]
    data = DataSpec(config["in_channels"], config["sample_size"], config["num_class_embeds"])
    options = ADM(
        channels=widths[0],
        channel_mult=[width // widths[0] for width in widths],
        num_res_blocks=config["layers_per_block"],
        attention_resolutions=[
            data.resolution >> level
            for level, block in enumerate(config["down_block_types"])
            if block.startswith("Attn")
        ],
        num_head_channels=config["attention_head_dim"],
        use_scale_shift_norm=config["resnet_time_scale_shift"] == "scale_shift",
        resblock_updown=config["downsample_type"] == "resnet",
    )
    conditions = frozenset({"label"} if data.num_classes else ())
    return options, data, conditions


@EACH_KEY_FILE
def test_config_is_that_of_the_published_network(path):
    options, data, conditions, content = described(path)
    with torch.device("meta"):
        network = options.build(data, conditions)
    config = diffusers_layout(options, data).config(network.state_dict())
    assert agrees(config, content["source"]["config"])


@EACH_KEY_FILE
def test_every_row_comes_from_where_the_official_conversion_takes_it(path):
    """Rows are told apart by their number in the whole network, not by their values."""
    options, data, conditions, content = described(path)
    with torch.device("meta"):
        official = to_openai(options.build(data, conditions).state_dict())
    first, numbered, end = {}, {}, 0
    for key, tensor in official.items():
        first[key], start, end = end, end, end + len(tensor)
        rows = torch.arange(start, end).view(-1, *[1] * (tensor.ndim - 1))
        numbered[key] = rows.expand(tensor.shape)
    converted = diffusers_layout(options, data).write(from_openai(numbered))
    assert converted.keys() == content["mapping"].keys()
    for key, origin in content["mapping"].items():
        source, start, stop = origin if isinstance(origin, list) else (origin, 0, None)
        stop = len(official[source]) if stop is None else stop
        rows = converted[key].flatten(1)[:, 0] if converted[key].ndim > 1 else converted[key]
        assert rows.tolist() == list(range(first[source] + start, first[source] + stop)), key
