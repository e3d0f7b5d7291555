"""Our U-Net reproduces the figures of openai/consistency_models, in float32 and float64."""

from __future__ import annotations

import json
import re

import pytest
import torch
from cmkit_std.backbones.adm import ADM
from cmkit_std.backbones.adm import network as adm_network
from cmkit_std.backbones.adm.network import Attention, ResBlock, UNet
from cmkit_std.backbones.adm.openai import from_openai, to_openai
from cmkit_std.backbones.adm.options import PRESETS
from cmkit_std.backbones.layers import MAX_PERIOD, Downsample, Upsample, attend, sinusoids
from torch import nn
from torch.nn import functional as F

from cmkit import DataSpec
from tests.parity import harness

FIGURES = harness.Figures("openai_unet.json")
BOTH = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
ATTENTION_16, TORSO_16 = 2e-3, 3e-2
"""Errors, relative to rms, of official float16 attention and of an official float16 torso."""

SAME_NAME = {
    "dropout",
    "conv_resample",
    "num_heads",
    "use_scale_shift_norm",
    "resblock_updown",
    "num_res_blocks",
    "channel_mult",
}
OF_THE_DATA = {"in_channels", "out_channels", "num_classes", "image_size"}
WITHOUT_EFFECT = {"use_fp16", "use_new_attention_order", "use_checkpoint"}


def options_of(config: dict) -> ADM:
    """ADM options of arguments of the official UNetModel."""
    config = dict(config)
    fields = {name: config.pop(name) for name in SAME_NAME & set(config)}
    for name in ("num_head_channels", "num_heads_upsample"):
        given = config.pop(name, -1)
        fields[name] = None if given == -1 else given
    fields["channels"] = config.pop("model_channels")
    factors = config.pop("attention_resolutions")  # factors of downsampling, there
    levels = {2**n for n in range(len(fields["channel_mult"]))}
    fields["attention_resolutions"] = [config["image_size"] // f for f in factors if f in levels]
    unknown = set(config) - OF_THE_DATA - WITHOUT_EFFECT
    assert not unknown, f"unknown options {unknown}"
    return ADM(**fields, time_scale=1.0)


def data_of(config: dict) -> tuple[DataSpec, frozenset[str]]:
    """The data and the conditions of arguments of the official UNetModel."""
    data = DataSpec(config["in_channels"], config["image_size"], config["num_classes"])
    return data, frozenset({"label"} if data.num_classes else ())


def unet_of(case: dict, dtype: torch.dtype) -> UNet:
    """The case's network with its formula-filled weights."""
    config = case["config"]
    network = options_of(config).build(*data_of(config))
    if (channels := config["out_channels"]) != config["in_channels"]:
        # Ours has the channels of its images; one official network has more outputs.
        network.out_channels = channels
        network.conv_out = nn.Conv2d(network.conv_out.in_channels, channels, 3, padding=1)
    return filled(network, case, dtype)


def filled(module: torch.nn.Module, case: dict, dtype: torch.dtype) -> torch.nn.Module:
    shapes = {key: tuple(t.shape) for key, t in to_openai(module.state_dict()).items()}
    weights = FIGURES.weights(shapes, dtype, w_quad=case["inputs"].get("w_quad"))
    module.to(dtype).load_state_dict(from_openai(weights))
    return module.eval()


def run_of(case: dict, dtype: torch.dtype, network: UNet | None = None):
    """A function (timesteps, scales) -> output of the case's network."""
    network = network or unet_of(case, dtype)
    x = FIGURES.tensor(case["inputs"]["x"], dtype)
    cond = harness.cond_of(case)

    def run(timesteps, scales=None):
        return network(x, FIGURES.tensor(timesteps, dtype), cond, scales or {})

    return run


def traced(network: UNet) -> dict[str, torch.Tensor]:
    """A dict that the next forward pass fills with activations, under official names."""
    seen = {}

    def watch(module, name):
        module.register_forward_hook(lambda _module, _args, out: seen.update({name: out.clone()}))

    watch(network.time, "time_embed")
    if network.label is not None:
        watch(network.label, "label_emb")
    for name in ("encoder", "middle", "decoder"):
        for i, stage in enumerate(getattr(network, name)):
            ((key, _),) = to_openai({f"{name}.{i}": torch.empty(0)}).items()
            watch(stage, key)
    watch(network.norm_out, "out.0")
    return seen


def forward(case: dict, dtype: torch.dtype) -> dict:
    network = unet_of(case, dtype)
    seen = traced(network)
    run = run_of(case, dtype, network)
    actual = {}
    for name in case["expect"]:
        kind, _, which = name.partition("_")
        timesteps = case["inputs"]["timesteps"]
        if name == "params":
            actual[name] = sum(p.numel() for p in network.parameters())
        elif name == "state_dict":
            state = to_openai(network.state_dict())
            actual[name] = {key: list(tensor.shape) for key, tensor in state.items()}
        elif kind in ("out", "trace"):
            out = run(timesteps[which] if which else timesteps)
            actual[name] = out if kind == "out" else dict(seen)
        else:
            raise AssertionError(f"unknown figure {name}")
    return actual


def gradients(case: dict, dtype: torch.dtype) -> dict:
    network = unet_of(case, dtype)
    x = FIGURES.tensor(case["inputs"]["x"], dtype).requires_grad_()
    cond = harness.cond_of(case)
    out = network(x, FIGURES.tensor(case["inputs"]["timesteps"], dtype), cond, {})
    formula = re.fullmatch(r"mean\(out \* (X\(out\.shape, .*\))\)", case["inputs"]["loss"])
    assert formula, f"unknown loss {case['inputs']['loss']}"
    loss = (out * FIGURES.tensor(formula[1], dtype, out=out)).mean()
    loss.backward()
    grads = to_openai({name: p.grad for name, p in network.named_parameters()})
    norms = {name: grad.norm() for name, grad in grads.items()}
    return {
        "loss": loss,
        "grad_x": x.grad,
        "grad_norm": {name: norms[name] for name in case["expect"]["grad_norm"]},
        "grad_norm_total": torch.stack(list(norms.values())).norm(),
    }


def rescaled(case: dict, dtype: torch.dtype) -> dict:
    network = unet_of(case, dtype)
    run = run_of(case, dtype, network)
    actual = {}
    for name in case["expect"]:
        s0, s1 = re.fullmatch(r"s0=([-\d.]+),s1=([-\d.]+)", name).groups()
        families = {"skip": torch.tensor(float(s0), dtype=dtype), "emb": torch.tensor(float(s1))}
        scales = {site: families[site.split(".")[0]].to(dtype) for site in network.sites}
        actual[name] = run(case["inputs"]["timesteps"], scales)
    return actual


def attention_modules(case: dict, dtype: torch.dtype) -> dict:
    heads, d = case["config"]["n_heads"], case["config"]["head_dim"]
    case["config"].ignore("length")  # the shape has it
    shape = case["inputs"]["shape"]
    qkv = FIGURES.tensor(case["inputs"]["qkv"], dtype, shape=shape)

    def from_order(order: tuple[int, int, int], stored: tuple[int, int, int]) -> torch.Tensor:
        return qkv.unflatten(1, stored).permute(0, *(1 + axis for axis in order), 4).flatten(1, 3)

    encoder = FIGURES.tensor(case["inputs"]["encoder_kv"], dtype)
    q, k, v = qkv.unflatten(1, (3, heads * d)).unbind(1)
    encoder_k, encoder_v = encoder.unflatten(1, (2, heads * d)).unbind(1)
    # Keys and values of a text encoder go before the picture's own; the U-Net itself has none, so
    # queries are padded to the same length and their outputs dropped.
    k, v = torch.cat([encoder_k, k], -1), torch.cat([encoder_v, v], -1)
    q = F.pad(q, (encoder.shape[-1], 0))
    known = {
        "QKVAttention": lambda: attend(qkv, heads),
        "QKVFlashAttention_stub": lambda: attend(qkv, heads),
        # Always in float16, an official defect; without rounding in the float64 figures.
        "QKVAttentionLegacy": lambda: in_float16(qkv, heads),
        "QKVAttention_encoder_kv": lambda: attend(torch.cat([q, k, v], 1), heads)[
            ..., encoder.shape[-1] :
        ],
        "derived_order_heads_three_d": lambda: attend(from_order((1, 0, 2), (heads, 3, d)), heads),
        "derived_order_heads_d_three": lambda: attend(from_order((2, 0, 1), (heads, d, 3)), heads),
    }
    return {name: known[name]() for name in case["expect"]}


def in_float16(qkv: torch.Tensor, heads: int) -> torch.Tensor:
    """What the official QKVAttentionLegacy does: float32 in and out, float16 between."""
    if qkv.dtype == torch.float64:
        return attend(qkv, heads)
    return attend(qkv.half(), heads).to(qkv.dtype)


def legacy_attention(case: dict, dtype: torch.dtype) -> dict:
    """Our network always attends in the working type; the official defect is put in here."""
    with pytest.MonkeyPatch.context() as patch:
        if dtype == torch.float32:
            patch.setattr(adm_network, "attend", in_float16)
        return {"out": run_of(case, dtype)(case["inputs"]["timesteps"])}


def float16_torso(case: dict, dtype: torch.dtype) -> dict:
    """Autocast rounds where the official half-precision weights do, near enough for float16."""
    with torch.autocast("cpu", torch.float16, enabled=dtype == torch.float32):
        return {"out": run_of(case, dtype)(case["inputs"]["timesteps"])}


def embedding(case: dict, dtype: torch.dtype) -> dict:
    assert case["config"] == {"max_period": MAX_PERIOD}
    t = FIGURES.tensor(case["inputs"]["timesteps"], dtype)
    return {f"dim{dim}": sinusoids(t, dim) for dim in case["inputs"]["dims"]}


def res_block(case: dict, dtype: torch.dtype) -> dict:
    config = case["config"]
    up, down = config.get("up", False), config.get("down", False)
    block = ResBlock(
        config["channels"],
        config.get("out_channels", config["channels"]),
        "up" if up else "down" if down else None,
        emb_channels=config["emb_channels"],
        options=ADM(
            dropout=config["dropout"],
            use_scale_shift_norm=config.get("use_scale_shift_norm", False),
        ),
        shortcut_kernel=3 if config.get("use_conv", False) else 1,
    )
    block = filled(block, case, dtype)
    emb = FIGURES.tensor(case["inputs"]["emb"], dtype)
    x = FIGURES.tensor(case["inputs"]["x"], dtype)
    return {"keys": keys_of(block), "out": block(x, block.project(F.silu(emb)))}


def resampling(case: dict, dtype: torch.dtype) -> dict:
    direction, conv = case["config"]["kind"].split("_")
    x = FIGURES.tensor(case["inputs"]["x"], dtype)
    out_channels = case["expect"]["out"]["shape"][1]
    layer = {"up": Upsample, "down": Downsample}[direction](
        x.shape[1], out_channels, {"conv": True, "noconv": False}[conv]
    )
    return {"keys": keys_of(layer), "out": filled(layer, case, dtype)(x)}


def attention_block(case: dict, dtype: torch.dtype) -> dict:
    channels, width = case["config"]["channels"], case["config"]["num_head_channels"]
    block = filled(Attention(channels, channels // width), case, dtype)
    return {"keys": keys_of(block), "out": block(FIGURES.tensor(case["inputs"]["x"], dtype))}


def keys_of(module: torch.nn.Module) -> list[str]:
    return list(to_openai(module.state_dict()))


FUNCTIONS = {
    "cm.unet.UNetModel.forward": (forward, 0.0),
    "autograd through cm.unet.UNetModel.forward": (gradients, 0.0),
    "cm.unet.UNetModel.forward with the 3 changed lines of arXiv 'Rescaling Intermediate Features"
    " Makes Trained Consistency Models Perform Better', appendix A": (rescaled, 0.0),
    "cm.unet.QKVAttention / QKVAttentionLegacy / QKVFlashAttention": (attention_modules, 0.0),
    "cm.unet.UNetModel.forward, AttentionBlock.attention replaced by QKVAttentionLegacy"
    " (attention_type != 'flash')": (legacy_attention, ATTENTION_16),
    "cm.unet.UNetModel(use_fp16=True).convert_to_fp16().forward on CPU": (float16_torso, TORSO_16),
    "cm.nn.timestep_embedding": (embedding, 0.0),
    "cm.unet.ResBlock.forward": (res_block, 0.0),
    "cm.unet.Upsample / Downsample": (resampling, 0.0),
    "cm.unet.AttentionBlock.forward (flash semantics)": (attention_block, 0.0),
}
FLOAT16_FIGURES = {"QKVAttentionLegacy": ATTENTION_16}


@BOTH
@pytest.mark.parametrize("name", FIGURES.read_by(FUNCTIONS))
def test_network_computes_the_official_function(name, dtype, record_property):
    case = FIGURES.cases[name]
    function, float16 = harness.function_of(case, FUNCTIONS)
    with torch.set_grad_enabled(function is gradients):
        actual = FIGURES.compute(name, function, dtype)
    assert actual.keys() == case["expect"].keys()
    worst = max(
        harness.compare(actual[figure], expected, dtype, FLOAT16_FIGURES.get(figure, float16))
        for figure, expected in case["expect"].items()
    )
    record_property("parity", (FIGURES.name, str(dtype), worst))


OFFICIAL_MULT = {64: (1, 2, 3, 4), 128: (1, 1, 2, 3, 4), 256: (1, 1, 2, 2, 4, 4)}


@pytest.mark.parametrize("path", harness.key_files("openai_*.json"), ids=lambda path: path.stem)
def test_layout_has_the_names_and_shapes_of_the_published_weights(path):
    content = json.loads(path.read_text("utf-8"))
    network = on_meta(content["source"]["config"])
    official = to_openai(network.state_dict())
    assert {key: list(tensor.shape) for key, tensor in official.items()} == content["keys"]
    assert list(official) == list(content["keys"])
    assert sum(p.numel() for p in network.parameters()) == content["n_parameters"]
    assert list(from_openai(official)) == list(network.state_dict())


def on_meta(flags: dict) -> UNet:
    """The network of flags of the official create_model, without memory."""
    options = options_of_flags(flags)
    data = DataSpec(3, flags["image_size"], 1000 if flags["class_cond"] else None)
    with torch.device("meta"):
        return options.build(data, frozenset({"label"} if flags["class_cond"] else ()))


def options_of_flags(flags: dict) -> ADM:
    """ADM options of flags of the official create_model."""
    flags = {name: value for name, value in flags.items() if name != "class_cond"}
    mult = flags.pop("channel_mult", "") or OFFICIAL_MULT[flags["image_size"]]
    del flags["image_size"]
    return ADM(
        channels=flags.pop("num_channels"),
        channel_mult=[int(m) for m in mult.split(",")] if isinstance(mult, str) else mult,
        attention_resolutions=[int(r) for r in flags.pop("attention_resolutions").split(",")],
        **flags,
    )


@pytest.mark.parametrize("preset", [name for name in PRESETS if name.startswith("openai")])
def test_preset_is_the_network_of_the_published_weights(preset):
    path = harness.OWN_FIGURES / "keys" / f"{preset.replace('-', '_')}.json"
    flags = json.loads(path.read_text("utf-8"))["source"]["config"]
    data = DataSpec(3, flags["image_size"], 1000 if flags["class_cond"] else None)
    with torch.device("meta"):
        network = ADM(preset=preset).build(
            data, frozenset({"label"} if flags["class_cond"] else ())
        )
    assert repr(network) == repr(on_meta(flags))


def any_network() -> UNet:
    options = ADM(channels=32, channel_mult=[1, 2], num_res_blocks=1, attention_resolutions=[8])
    return options.build(DataSpec(3, 16, 10), frozenset({"label"}))


def test_layout_round_trip_is_bit_identical():
    state = any_network().state_dict()
    back = from_openai(to_openai(state))
    assert list(back) == list(state)
    assert all(torch.equal(back[key], state[key]) for key in state)


def test_layout_reads_one_dimensional_attention_projections():
    state = any_network().state_dict()
    official = to_openai(state)
    flat = {
        key: t.squeeze(-1) if re.search(r"(qkv|proj_out)\.weight", key) else t
        for key, t in official.items()
    }
    back = from_openai(flat)
    assert all(torch.equal(back[key], state[key]) for key in state)
