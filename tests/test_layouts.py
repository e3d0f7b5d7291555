"""Laws of the layouts of other projects for backbone `adm`: names, shapes, orders of channels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from cmkit_std.backbones.adm import ADM
from cmkit_std.backbones.adm.network import Attention, ResBlock
from cmkit_std.backbones.dit import DiT
from cmkit_std.backbones.layers import Downsample, Upsample
from cmkit_std.backbones.songunet import SongUNet
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import Identity

from cmkit import CheckpointError, Cond, DataSpec, Layout
from cmkit.weights import adapt
from tests.parity import harness, test_diffusers_unet, test_openai_unet

LABEL, LABEL_AND_TARGET = frozenset({"label"}), frozenset({"label", "sigma_to"})
DATA = DataSpec(3, 8, 5)

TINY = {
    "head width": {"channels": 32, "channel_mult": [1, 2, 1], "num_head_channels": 16},
    "heads": {
        "channels": 32,
        "channel_mult": [2, 1, 3],
        "num_heads": 2,
        "num_heads_upsample": 4,
        "use_scale_shift_norm": False,
        "norm_groups": 16,
        "resblock_updown": True,
    },
    "pooled": {"channels": 32, "num_heads": 4, "conv_resample": False},
    "one level": {
        "channels": 32,
        "channel_mult": [1],
        "attention_resolutions": [8],
        "num_head_channels": 8,
    },
    "wide": {
        "channels": 64,
        "channel_mult": [2, 4],
        "num_head_channels": 64,
        "resblock_updown": True,
        "time_scale": 1.0,
    },
    "narrow": {
        "channels": 64,
        "channel_mult": [1, 2],
        "num_head_channels": 64,
        "resblock_updown": True,
        "time_scale": 1.0,
        "norm_channels": 4,
    },
}
OPENAI_TINY = tuple(name for name, fields in TINY.items() if "time_scale" not in fields)
EXPRESSIBLE = {
    "openai": OPENAI_TINY,
    "guided-diffusion": OPENAI_TINY,
    "diffusers": ("head width", "one level"),
    "edm": ("wide", "narrow"),
}
EACH = pytest.mark.parametrize(
    ("layout", "options"), [(name, tiny) for name, each in EXPRESSIBLE.items() for tiny in each]
)


def options_of(tiny: str) -> ADM:
    return ADM(**{"num_res_blocks": 1, "attention_resolutions": [8, 4], **TINY[tiny]})


def layout_of(name: str, options: ADM, data: DataSpec = DATA) -> Layout:
    if name == "guided-diffusion" and options.time_scale == 1000:
        options = options.model_copy(update={"time_scale": 1.0})
    (found,) = [layout for layout in options.layouts(data) if layout.name == name]
    return found


def network_of(options: ADM, conditions: frozenset[str] = LABEL) -> torch.nn.Module:
    """A network with random weights: fresh ones are zero in many places."""
    network = options.build(DATA, conditions).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        parameter.data.normal_(0, 0.2, generator=generator)
    return network


def output(network: torch.nn.Module, state: dict[str, Tensor] | None = None) -> Tensor:
    if state is not None:
        network.load_state_dict(state)
    x = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    c_noise = torch.tensor([-1.5, 0.0, 1.1])
    with torch.no_grad():
        return network(x, c_noise, Cond(label=torch.tensor([0, 4, 2])), {})


KEY_FILES = {path.stem: path for path in harness.key_files()}
LAYOUT_OF = {
    "openai_imagenet64": "openai",
    "openai_lsun256": "openai",
    "ctm_imagenet64": "openai",
    "diffusers_imagenet64": "diffusers",
    "diffusers_lsun256": "diffusers",
    "edm_imagenet64_adm": "edm",
}
"""Key lists of networks that `adm` can be; all others are of other networks."""


def described(path: Path) -> tuple[ADM, DataSpec, frozenset[str]]:
    """Options, data and conditions of the network of an official key list."""
    config: dict[str, Any] = json.loads(path.read_text("utf-8"))["source"]["config"]
    if path.stem.startswith("diffusers"):
        return test_diffusers_unet.described(path)[:3]
    if path.stem.startswith("edm"):
        options = ADM(
            channels=config["model_channels"],
            channel_mult=config["channel_mult"],
            num_res_blocks=3,
            num_head_channels=64,
            resblock_updown=True,
            time_scale=1.0,
        )
        return options, DataSpec(3, config["img_resolution"], config["label_dim"]), LABEL
    flags = {k: v for k, v in config.items() if k not in ("training_mode", "attention_type")}
    data = DataSpec(3, flags["image_size"], 1000 if flags["class_cond"] else None)
    conditions = {"label"} if flags["class_cond"] else set()
    if config.get("training_mode") == "ctm":
        conditions.add("sigma_to")
    return test_openai_unet.options_of_flags(flags), data, frozenset(conditions)


def on_meta(path: Path) -> dict[str, Tensor]:
    keys = json.loads(path.read_text("utf-8"))["keys"]
    return {key: torch.empty(shape, device="meta") for key, shape in keys.items()}


def shapes(state: dict[str, Tensor]) -> dict[str, list[int]]:
    return {key: list(tensor.shape) for key, tensor in state.items()}


@pytest.mark.parametrize("stem", LAYOUT_OF)
def test_published_weights_are_recognized_and_fit_in_both_directions(stem):
    options, data, conditions = described(KEY_FILES[stem])
    official = on_meta(KEY_FILES[stem])
    (layout,) = [each for each in options.layouts(data) if each.matches(official)]
    assert layout.name == LAYOUT_OF[stem]
    with torch.device("meta"):
        own = options.build(data, conditions).state_dict()
    read, written = layout.read(official), layout.write(own)
    assert shapes(read) == shapes(own)
    assert shapes(written) == shapes(official)
    assert all(t.is_meta for t in [*read.values(), *written.values()])


@pytest.mark.parametrize("stem", sorted(set(KEY_FILES) - set(LAYOUT_OF)))
def test_weights_of_other_networks_are_not_recognized(stem):
    state = on_meta(KEY_FILES[stem])
    assert not [each.name for each in ADM().layouts(DATA) if each.matches(state)]


def test_own_names_are_not_recognized():
    own = network_of(options_of("head width"), LABEL_AND_TARGET).state_dict()
    for state in (own, {}):
        assert not [each.name for each in ADM().layouts(DATA) if each.matches(state)]


@EACH
def test_reading_what_was_written_gives_every_bit_back(layout, options):
    options = options_of(options)
    own = network_of(options).state_dict()
    written = layout_of(layout, options).write(own)
    matching = [each.name for each in options.layouts(DATA) if each.matches(written)]
    assert matching == [layout]
    back = layout_of(layout, options).read(written)
    assert back.keys() == own.keys()
    assert all(torch.equal(back[key], own[key]) for key in own)
    again = layout_of(layout, options).write(back)
    assert again.keys() == written.keys()
    assert all(torch.equal(again[key], written[key]) for key in written)


@EACH
def test_what_was_written_goes_into_a_file_of_safetensors(layout, options, tmp_path):
    """Its own function, which others use, takes no tensors with gaps."""
    options = options_of(options)
    written = layout_of(layout, options).write(network_of(options).state_dict())
    save_file(written, tmp_path / "weights.safetensors")
    stored = load_file(tmp_path / "weights.safetensors")
    assert stored.keys() == written.keys()
    assert all(torch.equal(stored[key], written[key]) for key in written)


def test_config_of_diffusers_follows_the_options():
    options = ADM(channels=64, norm_groups=16, dropout=0.25, num_head_channels=32)
    config = layout_of("diffusers", options).config
    changed = {
        "norm_num_groups": 16,
        "attn_norm_num_groups": 16,
        "dropout": 0.25,
        "attention_head_dim": 32,
        "downsample_type": "conv",
        "upsample_type": "conv",
        "down_block_types": ["AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D"],
    }
    for conditions, classes in ((LABEL, 5), (frozenset(), None)):
        with torch.device("meta"):
            found = config(options.build(DATA, conditions).state_dict())
        assert {**found, **changed, "num_class_embeds": classes} == found
        assert json.loads(json.dumps(found)) == found


def test_openai_layouts_keep_the_target_level_of_ctm():
    options = options_of("head width")
    own = network_of(options, LABEL_AND_TARGET).state_dict()
    for layout in (layout_of("openai", options), layout_of("guided-diffusion", options)):
        back = layout.read(layout.write(own))
        assert back.keys() == own.keys()
        assert all(torch.equal(back[key], own[key]) for key in own)


@pytest.mark.parametrize("tiny", TINY)
def test_places_are_the_parts_of_the_network_in_forward_order(tiny):
    options = options_of(tiny)
    kinds = {
        ResBlock: "block",
        Attention: "attention",
        Upsample: "resample",
        Downsample: "resample",
    }
    found = []
    for name, module in network_of(options).named_modules():
        inside_a_block = name.endswith(".resample")
        if type(module) in kinds and not inside_a_block:
            resamples = not isinstance(getattr(module, "resample", Identity()), Identity)
            found.append((name, "resample" if resamples else kinds[type(module)]))
    assert [(place.key, place.kind) for place in options.places(8)] == found


STORED_ROW = {
    "openai": lambda which, head, j, heads, d: (which * heads + head) * d + j,
    "guided-diffusion": lambda which, head, j, heads, d: (head * 3 + which) * d + j,
    "edm": lambda which, head, j, heads, d: (head * d + j) * 3 + which,
}
"""Row of query (0), key (1) or value (2) number j of a head, in the projection as it is stored."""


def stored_projection(
    layout: str, written: dict[str, Tensor], name: str, width: int, heads: int
) -> Tensor:
    """Weights and bias of each query, key and value, (three, heads, d, C + 1), picked row by row
    from another project's weights of the attention `name`."""
    parts, d = [], width // heads
    for leaf in ("weight", "bias"):
        if layout == "diffusers":
            rows = torch.stack([written[f"{name}.to_{which}.{leaf}"] for which in "qkv"])
        else:
            stored = written[f"{name}.qkv.{leaf}"]
            order = [(w, h, j) for w in range(3) for h in range(heads) for j in range(d)]
            rows = stored[[STORED_ROW[layout](*place, heads, d) for place in order]]
        parts.append(rows.reshape(3, heads, d, -1))
    return torch.cat(parts, dim=-1)


@EACH
def test_attention_computes_with_the_channels_in_the_order_they_are_stored(layout, options):
    """Rows are picked one by one from random weights of the other project."""
    options = options_of(options)
    network = network_of(options)
    found = layout_of(layout, options)
    generator = torch.Generator().manual_seed(2)
    written = {
        key: t if key.endswith("resample_filter") else torch.randn(t.shape, generator=generator) / 8
        for key, t in found.write(network.state_dict()).items()
    }
    network.load_state_dict(found.read(written))
    attentions = [place for place in options.places(8) if place.kind == "attention"]
    assert len(attentions) > 3
    for place in attentions:
        module = network.get_submodule(place.key)
        (norm,) = found.write({f"{place.key}.norm.bias": torch.empty(0)})
        stored = norm.removesuffix(".bias").rpartition(".")[0]
        width = len(module.norm.weight)
        heads = options.heads(width, decoder=place.part == "decoder")
        rows = stored_projection(layout, written, stored, width, heads)
        h = torch.randn(2, width, 3, 2, generator=generator)
        with torch.no_grad():
            pixels = torch.cat([module.norm(h).flatten(2), torch.ones(2, 1, 6)], dim=1)
            q, k, v = torch.einsum("whjc,bcn->wbhjn", rows, pixels)
            scores = torch.einsum("bhjn,bhjm->bhnm", q, k) / (width // heads) ** 0.5
            mixed = torch.einsum("bhnm,bhjm->bhjn", scores.softmax(-1), v)
            expected = h + module.proj(mixed.reshape(2, width, 3, 2))
            torch.testing.assert_close(module(h), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("layout", "tiny"), [("guided-diffusion", "head width"), ("edm", "wide"), ("edm", "narrow")]
)
def test_channels_read_in_the_order_of_openai_give_another_function(layout, tiny):
    options = options_of(tiny)
    network = network_of(options)
    own = {key: t.clone() for key, t in network.state_dict().items()}
    found = layout_of(layout, options)
    expected = output(network)
    written = found.write(own)
    torch.testing.assert_close(output(network, found.read(written)), expected, rtol=0, atol=0)
    misread = dict(own)
    for key in own:
        if key.endswith((".qkv.weight", ".qkv.bias")):
            (theirs,) = found.write({key: own[key]}).values()
            misread[key] = theirs.reshape(own[key].shape)
    difference = (output(network, misread) - expected).std() / expected.std()
    assert difference > 1e-3, difference


@pytest.mark.parametrize(
    ("layout", "tiny"), [(name, each[0]) for name, each in EXPRESSIBLE.items()]
)
def test_unknown_names_and_shapes_of_another_network_are_left_for_the_network_to_refuse(
    layout, tiny
):
    options = options_of(tiny)
    found = layout_of(layout, options)
    written = found.write(network_of(options).state_dict())
    odd = {key: t[:-1] if ".qkv." in key else t for key, t in written.items()}
    own = found.read({**odd, "optimizer.what": torch.ones(2, 3)})
    assert torch.equal(own["optimizer.what"], torch.ones(2, 3))
    missing = {key: t for key, t in written.items() if ".to_k." not in key and ".qkv." not in key}
    assert "middle.1.qkv.weight" not in found.read(missing)


def test_edm_reads_neither_its_filters_nor_its_embedding_of_augmentations():
    options = options_of("wide")
    found = layout_of("edm", options)
    own = network_of(options).state_dict()
    written = found.write(own)
    filters = [key for key in written if key.endswith("resample_filter")]
    assert len(filters) == 4  # of the two convolutions of each change of resolution
    assert all(torch.equal(written[key], torch.full((1, 1, 2, 2), 0.25)) for key in filters)
    assert (
        found.read({**written, "model.map_augment.weight": torch.ones(64, 9)}).keys() == own.keys()
    )


def test_weights_that_a_project_has_no_place_for_are_refused():
    layout = "diffusers"
    options = options_of(EXPRESSIBLE[layout][0])
    own = network_of(options, LABEL_AND_TARGET).state_dict()
    with pytest.raises(CheckpointError, match=r"time_s\.0\.weight: .* has no place for it"):
        layout_of(layout, options).write(own)


@pytest.mark.parametrize(
    ("layout", "tiny", "change", "message"),
    [
        (
            "diffusers",
            "head width",
            {"channel_mult": [2, 4]},
            r"channel_mult = \[2, 4\]: .* only 1",
        ),
        ("diffusers", "pooled", {}, r"conv_resample = false: .*resblock_updown = true"),
        ("diffusers", "head width", {"num_head_channels": None}, r"num_heads: .* 8, 16 channels"),
        (
            "diffusers",
            "one level",
            {"num_head_channels": None, "num_heads_upsample": 8},
            r"num_heads: .* 4, 8 channels",
        ),
        ("diffusers", "narrow", {}, r"norm_channels = 4: leaves 16 groups .*norm_channels = 1"),
        ("edm", "wide", {"resblock_updown": False}, r"resblock_updown = false: .* with true; give"),
        ("edm", "wide", {"use_scale_shift_norm": False}, r"use_scale_shift_norm = false: "),
        ("edm", "wide", {"norm_groups": 16}, r"norm_groups = 16: .* with 32; give that"),
        ("edm", "wide", {"time_scale": 1000.0}, r"time_scale = 1000\.0: .* with 1; give that"),
        ("openai", "pooled", {"time_scale": 1.0}, r"time_scale = 1\.0: .* with 1000; give that"),
        ("guided-diffusion", "pooled", {"time_scale": 4.0}, r"time_scale = 4\.0: .* with 1; give"),
        ("diffusers", "head width", {"time_scale": 1.0}, r"time_scale = 1\.0: .* with 1000"),
        ("edm", "wide", {"num_head_channels": 32}, r"num_heads: .* 32 channels wide.* 64; give"),
        ("edm", "narrow", {"norm_channels": 1}, r"norm_channels = 1: .* 16 groups .* 64 channels"),
    ],
)
def test_options_that_a_project_lacks_are_refused_with_a_cure(layout, tiny, change, message):
    options = options_of(tiny).model_copy(update=change)
    found = layout_of(layout, options)
    actions = [found.read, found.write] + ([found.config] if found.config else [])
    for action in actions:
        with pytest.raises(CheckpointError, match=rf"^backbone\.{message}"):
            action({})


@pytest.mark.parametrize(
    ("backbone", "layout"),
    [
        (SongUNet(channels=16, channel_mult=(1, 2), num_res_blocks=1), "edm"),
        (DiT(patch_size=4, width=32, depth=2, num_heads=2, time_scale=1.0), "dit"),
    ],
    ids=["songunet", "dit"],
)
def test_other_backbones_read_their_projects_weights_by_the_same_door(backbone, layout):
    data = DataSpec(3, 16, 10)
    network = backbone.build(data, frozenset({"label"}))
    own = {key: torch.randn(t.shape).to(t.dtype) for key, t in network.state_dict().items()}
    (only,) = backbone.layouts(data)
    theirs = only.write(own)
    assert only.name == layout
    assert theirs.keys() != own.keys()
    found = adapt(theirs, network, backbone.layouts(data))
    assert found.keys() == own.keys()
    assert all(torch.equal(found[key], own[key]) for key in own)
