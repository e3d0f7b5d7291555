"""Our EDM2 network, its parts and its stored weights in training reproduce the figures of
NVlabs/edm2, in float32 and float64. Those of ECT on it are in the tests of cmkit-ect."""

from __future__ import annotations

import json
import re

import pytest
import torch
from cmkit_std.backbones.edm2 import EDM2
from cmkit_std.backbones.edm2 import magnitude as mp
from cmkit_std.backbones.edm2.layouts import PREFIX, UNCERTAINTY
from cmkit_std.backbones.edm2.magnitude import Conv, Fourier, Linear, filters, normalized
from cmkit_std.backbones.edm2.network import BRANCH, Block, EDM2UNet
from torch import Tensor, nn

from cmkit import DataSpec, Denoiser, Layout, edm_scalings
from tests.parity import harness

FIGURES = harness.Figures("edm2.json")
BOTH = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])

OFFICIAL_NAMES = {
    "model_channels": "channels",
    "num_blocks": "num_res_blocks",
    "attn_resolutions": "attention_resolutions",
    "channels_per_head": "num_head_channels",
    "channel_mult": "channel_mult",
    "dropout": "dropout",
}


def options_of(config: dict) -> tuple[EDM2, DataSpec]:
    """The network and the data of arguments of the official preconditioning."""
    config.ignore("use_fp16")
    sizes = [config[key] for key in ("img_channels", "img_resolution", "label_dim")]
    fields = {own: config[name] for name, own in OFFICIAL_NAMES.items() if name in config}
    return EDM2(**fields), DataSpec(*sizes)


def layout_of(options: EDM2, data: DataSpec) -> Layout:
    (layout,) = options.layouts(data)
    return layout


def filled_network(config: dict, dtype: torch.dtype) -> tuple[EDM2UNet, Layout]:
    """The network of an official configuration with its formula-filled weights, and its layout."""
    options, data = options_of(config)
    layout = layout_of(options, data)
    network = options.build(data, frozenset({"label"} if data.num_classes else ()))
    network.to(dtype)
    shapes = {key: tuple(t.shape) for key, t in layout.write(network.state_dict()).items()}
    network.load_state_dict(layout.read(FIGURES.weights(shapes, dtype)))
    return network.eval(), layout


def forward(case: dict, dtype: torch.dtype) -> dict:
    network, layout = filled_network(case["config"], dtype)
    inputs, cond = case["inputs"], harness.cond_of(case)
    assert inputs["F"] == "network(X(shape), c_noise)"
    assert inputs["D"] == "Precond(X(shape) + sigma*Z(shape, c=0), sigma)"
    x = FIGURES.X(inputs["shape"]).to(dtype)
    sigma = FIGURES.tensor(inputs["sigmas"], dtype)
    noisy = x + sigma.view(-1, 1, 1, 1) * FIGURES.Z(inputs["shape"], 0).to(dtype)
    denoiser = Denoiser(network, scalings=edm_scalings)
    state = {key: list(t.shape) for key, t in layout.write(network.state_dict()).items()}
    apart = {k: v for k, v in case["expect"]["state_dict"].items() if k.startswith(UNCERTAINTY)}
    assert apart.keys() == {"logvar_fourier.freqs", "logvar_fourier.phases", "logvar_linear.weight"}
    actual = {
        "params": sum(p.numel() for p in network.parameters()) + apart["logvar_linear.weight"][1],
        "state_dict": {**state, **apart},
        "F": network(x, FIGURES.tensor(inputs["c_noise"], dtype), cond, {}),
        "D": denoiser(noisy, sigma, cond),
    }
    if cond.label is not None:
        actual["D_no_labels"] = denoiser(noisy, sigma)
    return actual


def trained(case: dict, dtype: torch.dtype) -> dict:
    network, layout = filled_network(case["config"], dtype)
    network.train().settle()
    x = FIGURES.tensor(case["inputs"]["x"], dtype).requires_grad_()
    c_noise = FIGURES.tensor(case["inputs"]["c_noise"], dtype)
    out = network(x, c_noise, harness.cond_of(case), {})
    formula = re.fullmatch(r"mean\(F \* (X\(F\.shape, .*\))\)", case["inputs"]["loss"])
    assert formula, f"unknown loss {case['inputs']['loss']}"
    loss = (out * FIGURES.tensor(formula[1], dtype, F=out)).mean()
    loss.backward()
    stored = layout.write(network.state_dict())
    return {
        "loss": loss,
        "F": out,
        "grad_x": x.grad,
        **gradients(network, layout),
        "stored": {key: stored[key] for key in case["expect"]["stored"]},
    }


def gradients(network: EDM2UNet, layout: Layout) -> dict:
    """The norm of each gradient of filters, and the gradients of the gains by their names' order:
    those are sums that cancel, so that one of them may be tiny beside its rounding."""
    grads = layout.write({key: p.grad for key, p in network.named_parameters()})
    return {
        "grad_norm": {key: grad.norm() for key, grad in grads.items() if grad.ndim},
        "grad_gains": torch.stack([grads[key] for key in sorted(grads) if not grads[key].ndim]),
    }


def block(case: dict, dtype: torch.dtype) -> dict:
    config = case["config"]
    width, heads = config["out_channels"], config["channels_per_head"]
    layer = Block(
        config["in_channels"],
        width,
        config["emb_channels"],
        pixel_norm={"enc": True, "dec": False}[config["flavor"]],
        resample={"keep": None, "up": "up", "down": "down"}[config.get("resample_mode", "keep")],
        heads=width // heads if config.get("attention", False) else 0,
    ).to(dtype)
    layout = layout_of(EDM2(num_head_channels=heads), DataSpec(1, 64))
    shapes = {
        key.removeprefix(PREFIX): tuple(tensor.shape)
        for key, tensor in layout.write(layer.state_dict()).items()
    }
    layer.load_state_dict(layout.read(FIGURES.weights(shapes, dtype)))
    x, emb = (FIGURES.tensor(case["inputs"][name], dtype) for name in ("x", "emb"))
    return {"keys": list(shapes), "out": layer(x, layer.project(emb))}


def functions(case: dict, dtype: torch.dtype) -> dict:
    config, inputs = case["config"], case["inputs"]
    a, b = (FIGURES.tensor(inputs[name], dtype) for name in ("a", "b"))
    assert config["t"] == BRANCH
    conv = filled(Conv(*config["conv"]), dtype)
    actual = {
        "mp_silu": mp.silu(a),
        "mp_sum": mp.sum(a, b[:, :6], BRANCH),
        "mp_cat": mp.cat(a, b),
        "normalize": filters(a),
        "normalize_pixel": normalized(a, (1,)),
        "normalize_zero": normalized(torch.zeros_like(a[:, :2, :1, :1]), (1,)),
        "fourier": filled(Fourier(config["fourier"]), dtype)(
            FIGURES.tensor(inputs["c_noise"], dtype)
        ),
        "conv": conv(a),
        "linear": filled(Linear(*config["linear"]), dtype)(b[:, :, 0, 0]),
    }
    holder = EDM2UNet.__new__(EDM2UNet)
    nn.Module.__init__(holder)
    holder.conv = conv
    for name in ("stored", "stored_twice"):
        holder.settle()
        actual.setdefault("conv_train", conv(a))
        actual[name] = conv.weight.detach().clone()
    return actual


def filled(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    names = {"frequencies": "freqs"}
    shapes = {names.get(key, key): tuple(t.shape) for key, t in module.state_dict().items()}
    weights = FIGURES.weights(shapes, dtype)
    module.to(dtype)
    module.load_state_dict({key: weights[names.get(key, key)] for key in module.state_dict()})
    return module


FUNCTIONS = {
    "training.networks_edm2.Precond / UNet forward": forward,
    "autograd through UNet.forward in train mode": trained,
    "training.networks_edm2.Block.forward": block,
    "training.networks_edm2.mp_silu, mp_sum, mp_cat, normalize, MPFourier, MPConv": functions,
}


@BOTH
@pytest.mark.parametrize("name", FIGURES.read_by(FUNCTIONS))
def test_it_computes_the_official_figures(name, dtype, record_property):
    case = FIGURES.cases[name]
    actual = FIGURES.compute(name, harness.function_of(case, FUNCTIONS), dtype)
    worst = harness.compare(actual, case["expect"], dtype)
    record_property("parity", (FIGURES.name, str(dtype), worst))


def official_keys() -> dict[str, Tensor]:
    """The tensors of the published network s, without memory."""
    path = harness.OWN_FIGURES / "keys" / "edm2_imagenet64_s.json"
    keys = json.loads(path.read_text("utf-8"))["keys"]
    return {key: torch.empty(shape, device="meta") for key, shape in keys.items()}


def test_the_preset_takes_the_published_weights_strictly():
    options, data = EDM2(preset="s"), DataSpec(3, 64, 1000)
    with torch.device("meta"):
        network = options.build(data, frozenset({"label"}))
    (layout,) = options.layouts(data)
    official = official_keys()
    assert layout.matches(official)
    own = layout.read(official)
    state = network.state_dict()
    assert {key: t.shape for key, t in own.items()} == {key: t.shape for key, t in state.items()}
    kept = [key for key in official if not key.startswith(UNCERTAINTY)]
    assert sorted(layout.write(state)) == sorted(kept)


@pytest.mark.parametrize("name", ["edm_imagenet64_adm", "edm_cifar10_ddpmpp_cond", "dit_s_4_256"])
def test_layout_does_not_match_other_networks(name):
    path = harness.OWN_FIGURES / "keys" / f"{name}.json"
    keys = json.loads(path.read_text("utf-8"))["keys"]
    (layout,) = EDM2().layouts(DataSpec(3, 64, 1000))
    assert not layout.matches(
        {key: torch.empty(shape, device="meta") for key, shape in keys.items()}
    )


def test_no_other_layout_matches_the_weights():
    from cmkit_std.backbones.adm import ADM
    from cmkit_std.backbones.songunet import SongUNet

    data = DataSpec(3, 64, 1000)
    for other in (ADM(preset="openai-imagenet64"), SongUNet()):
        assert not [
            layout.name for layout in other.layouts(data) if layout.matches(official_keys())
        ]
