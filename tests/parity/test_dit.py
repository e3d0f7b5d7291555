"""Our transformer reproduces the figures of facebookresearch/DiT, in float32 and float64."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace

import pytest
import torch
from cmkit_std.backbones.dit import DiT
from cmkit_std.backbones.dit import network as dit_network
from cmkit_std.backbones.dit.layouts import matches, read, write
from cmkit_std.backbones.dit.network import Block, Final, Transformer
from cmkit_std.backbones.dit.options import PRESETS
from cmkit_std.backbones.embedding import mlp
from cmkit_std.backbones.layers import sinusoids
from cmkit_std.objectives.edm import dropped

from cmkit import Cond, DataSpec, Denoiser, Guided, Scalings
from tests.parity import harness

FIGURES = harness.Figures("dit.json")
LABEL = frozenset({"label"})
FIELDS = {
    "patch_size": "patch_size",
    "hidden_size": "width",
    "depth": "depth",
    "num_heads": "num_heads",
    "mlp_ratio": "mlp_ratio",
    "learn_sigma": "learn_sigma",
}
"""Argument of the official DiT -> field of ours."""


@pytest.fixture(params=[torch.float64, torch.float32], ids=["f64", "f32"])
def dtype(request):
    """Also the default type, in which a network makes its position embedding."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(before)


def network_of(case: dict, dtype: torch.dtype) -> Transformer:
    """The case's network with its formula-filled weights."""
    config = case["config"]
    config.ignore("cfg_scale")
    fields = {own: config[name] for name, own in FIELDS.items() if name in config}
    fields["null_class"] = config.get("class_dropout_prob", 0) > 0
    data = DataSpec(config["in_channels"], config["input_size"], config["num_classes"])
    conditions = frozenset({"label"} if data.num_classes else ())
    return filled(DiT(**fields, time_scale=1.0).build(data, conditions), case, dtype)


def filled(module: torch.nn.Module, case: dict, dtype: torch.dtype) -> torch.nn.Module:
    """`module` with the case's weights; the position embedding keeps its value."""
    official = write(module.state_dict())
    shapes = {key: tuple(t.shape) for key, t in official.items() if key != "pos_embed"}
    weights = FIGURES.weights(shapes, dtype, w_quad=case["inputs"].get("w_quad"))
    module.load_state_dict(read({**official, **weights}))
    return module.eval()


def run_of(case: dict, dtype: torch.dtype, network: Transformer, t: str = "t") -> torch.Tensor:
    """What the network says of all its output channels."""
    inputs = case["inputs"]
    cond = harness.cond_of(case)
    x = FIGURES.tensor(inputs["x"], dtype)
    return network.outputs(x, FIGURES.tensor(inputs[t], dtype), cond, {})


def traced(network: Transformer) -> dict[str, torch.Tensor]:
    """A dict that the next forward pass fills with activations, under official names."""
    seen = {}

    def watch(module, name):
        module.register_forward_hook(lambda _module, _args, out: seen.update({name: out.clone()}))

    named = {"patch": "x_embedder", "time": "t_embedder", "label": "y_embedder"}
    for own, official in named.items():
        watch(getattr(network, own), official)
    for i, block in enumerate(network.blocks):
        watch(block, f"blocks.{i}")
        watch(block.attn, f"blocks.{i}.attn")
        watch(block.mlp, f"blocks.{i}.mlp")
    watch(network.final, "final_layer")
    return seen


def forward(case: dict, dtype: torch.dtype) -> dict:
    network = network_of(case, dtype)
    seen = traced(network)
    actual = {}
    for name in case["expect"]:
        kind, _, which = name.partition("_")
        if name == "pos_embed":
            actual[name] = network.pos_embed
        elif name == "params":
            actual[name] = sum(tensor.numel() for tensor in network.state_dict().values())
        elif name == "state_dict":
            state = write(network.state_dict())
            actual[name] = {key: list(tensor.shape) for key, tensor in state.items()}
        elif name == "trace":
            run_of(case, dtype, network)
            actual[name] = {place: seen[place] for place in case["expect"]["trace"]}
        elif kind == "out":
            actual[name] = run_of(case, dtype, network, f"t_{which}" if which else "t")
        else:
            raise AssertionError(f"unknown figure {name}")
    return actual


def guidance(case: dict, dtype: torch.dtype) -> dict:
    """The second half of the official output is guided in three channels as well, and has no label
    elsewhere."""
    network = network_of(case, dtype)
    inputs = case["inputs"]
    x = FIGURES.tensor(inputs["x"], dtype)
    t, labels = FIGURES.tensor(inputs["t"], dtype), torch.tensor(inputs["y"])
    half = len(x) // 2
    assert inputs["t"][:half] == inputs["t"][half:]
    assert (labels[half:] == network.null_label).all()
    with_label = network.outputs(x[:half], t[:half], Cond(label=labels[:half]), {})
    without = network.outputs(x[:half], t[:half], Cond(), {})
    guided = Guided(Denoiser(network, scalings=plain), case["config"]["cfg_scale"] - 1)
    first = guided(x[:half], t[:half], Cond(label=labels[:half]))
    channels = first.shape[1]
    second = torch.cat([first[:, :3], without[:, 3:]], dim=1)
    first = torch.cat([first, with_label[:, channels:]], dim=1)
    return {"out": torch.cat([first, second])}


def plain(sigma, sigma_data, sigma_min) -> Scalings:
    """Those with which a denoiser is its network: D(x, t) = F(x, t)."""
    one = torch.ones_like(sigma)
    return Scalings(0 * one, one, one, sigma)


def training(case: dict, dtype: torch.dtype) -> dict:
    """A training step, the official uniform draws put in the place of ours."""
    network = network_of(case, dtype).train()
    inputs = case["inputs"]
    x = FIGURES.tensor(inputs["x"], dtype).requires_grad_()
    t, labels = FIGURES.tensor(inputs["t"], dtype), torch.tensor(inputs["y"])
    draws, null = torch.tensor(inputs["rand"]), case["config"]["num_classes"]
    rng = SimpleNamespace(uniform=lambda n: draws)
    cond = dropped(Cond(label=labels), case["config"]["class_dropout_prob"], null, rng)
    out = network.outputs(x, t, cond, {})
    assert cond.label.tolist() == [
        null if drop else y for y, drop in zip(inputs["y"], inputs["dropped"], strict=True)
    ]
    formula = re.fullmatch(r"mean\(out \* (X\(out\.shape, .*\))\)", inputs["loss"])
    assert formula, f"unknown loss {inputs['loss']}"
    loss = (out * FIGURES.tensor(formula[1], dtype, out=out)).mean()
    loss.backward()
    grads = write({name: p.grad for name, p in network.named_parameters()})
    return {
        "out": out,
        "loss": loss,
        "grad_x": x.grad,
        "grad_norm": {name: grads[name].norm() for name in case["expect"]["grad_norm"]},
        "pos_embed_requires_grad": network.pos_embed.requires_grad,
    }


def block(case: dict, dtype: torch.dtype) -> dict:
    config = case["config"]
    layer = Block(config["hidden_size"], config["num_heads"], config["mlp_ratio"])
    return layer_figures(layer, case, dtype)


def final_layer(case: dict, dtype: torch.dtype) -> dict:
    config = case["config"]
    features = config["patch_size"] ** 2 * config["out_channels"]
    layer = Final(config["hidden_size"], features)
    return layer_figures(layer, case, dtype)


def layer_figures(layer: Block | Final, case: dict, dtype: torch.dtype) -> dict:
    keys = list(write(layer.state_dict()))
    filled(layer, case, dtype)
    active = torch.nn.functional.silu(FIGURES.tensor(case["inputs"]["c"], dtype))
    out = layer(FIGURES.tensor(case["inputs"]["x"], dtype), layer.film(active))
    return {"keys": keys, "out": out}


def noise_level(case: dict, dtype: torch.dtype) -> dict:
    assert case["config"]["frequency_embedding_size"] == dit_network.WAVES
    layer = mlp(dit_network.WAVES, case["config"]["hidden_size"])
    # On its own the official module has no outer name, by which the figures fill it.
    names = {
        key: write({f"time.{key}": torch.empty(0)}).popitem()[0].removeprefix("t_embedder.")
        for key in layer.state_dict()
    }
    shapes = {names[key]: tuple(tensor.shape) for key, tensor in layer.state_dict().items()}
    weights = FIGURES.weights(shapes, dtype)
    layer.load_state_dict({key: weights[name] for key, name in names.items()})
    waves = sinusoids(FIGURES.tensor(case["inputs"]["t"], dtype), dit_network.WAVES)
    return {"keys": list(names.values()), "sinusoid": waves, "out": layer(waves)}


def position_embedding(case: dict, dtype: torch.dtype) -> dict:
    return {
        f"{width}x{side}": dit_network.positions(width, side)
        for width, side in case["config"]["args"]
    }


FUNCTIONS = {
    "models.DiT.forward": forward,
    "models.DiT.forward_with_cfg": guidance,
    "models.DiT.forward in train mode (label dropout) and autograd": training,
    "models.DiTBlock.forward": block,
    "models.FinalLayer.forward": final_layer,
    "models.TimestepEmbedder.forward": noise_level,
    "models.get_2d_sincos_pos_embed(embed_dim, grid_size)": position_embedding,
}


@pytest.mark.parametrize("name", FIGURES.read_by(FUNCTIONS))
def test_network_computes_the_official_function(name, dtype, record_property):
    case = FIGURES.cases[name]
    function = harness.function_of(case, FUNCTIONS)
    with torch.set_grad_enabled(function is training):
        actual = FIGURES.compute(name, function, dtype)
    worst = harness.compare(actual, case["expect"], dtype)
    record_property("parity", (FIGURES.name, str(dtype), worst))


@pytest.mark.parametrize("path", harness.key_files("dit_*.json"), ids=lambda path: path.stem)
def test_preset_holds_the_names_and_shapes_of_the_published_weights(path):
    content = json.loads(path.read_text("utf-8"))
    config = content["source"]["config"]
    preset = content["source"]["function"].removeprefix("models.").lower().replace("_", "-")
    with torch.device("meta"):
        data = DataSpec(4, config["input_size"], config["num_classes"])
        network = DiT(preset=preset).build(data, LABEL)
        official = {key: torch.empty(shape) for key, shape in content["keys"].items()}
    state = network.state_dict()
    assert matches(official)
    assert list(write(state)) == list(official)
    network.load_state_dict(read(official), assign=True)
    assert {k: list(t.shape) for k, t in write(network.state_dict()).items()} == content["keys"]
    assert sum(tensor.numel() for tensor in state.values()) == content["n_parameters"]
    frozen = state.keys() - dict(network.named_parameters()).keys()
    assert sorted(frozen) == content["frozen"]


def test_every_size_of_the_family_is_a_preset():
    for preset, sizes in PRESETS.items():
        options = DiT(preset=preset)
        assert {name: getattr(options, name) for name in sizes} == sizes


def test_layout_round_trip_is_bit_identical():
    options = DiT(patch_size=2, width=48, depth=2, num_heads=3, learn_sigma=True)
    state = options.build(DataSpec(4, 8, 10), LABEL).state_dict()
    back = read(write(state))
    assert list(back) == list(state)
    assert all(back[key] is state[key] for key in state)
    assert matches(write(state))
    assert not matches(state)
