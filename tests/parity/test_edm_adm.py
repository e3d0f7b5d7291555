"""Our U-Net, loaded through layout "edm", reproduces the figures of NVlabs/edm's DhariwalUNet."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from cmkit_std.backbones.adm import ADM
from cmkit_std.backbones.adm.network import UNet

from cmkit import DataSpec, Denoiser, Layout, edm_scalings
from tests.parity import harness

FIGURES = harness.Figures("edm.json")
BOTH = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])


class Official:
    """A case's network with its formula-filled weights, and their official names."""

    def __init__(self, case: dict[str, Any], dtype: torch.dtype, labels: bool = True):
        config = case["config"]
        assert config["model_type"] == "DhariwalUNet"
        self.sigma_data = config.get("sigma_data", 0.5)
        data = DataSpec(config["img_channels"], config["img_resolution"], config["label_dim"])
        self.options = ADM(
            channels=config["model_channels"],
            channel_mult=config["channel_mult"],
            num_res_blocks=config["num_blocks"],
            attention_resolutions=config["attn_resolutions"],
            dropout=config["dropout"],
            num_head_channels=64,
            resblock_updown=True,
            norm_channels=4,
            time_scale=1.0,
        )
        (self.layout,) = [of for of in self.options.layouts(data) if of.name == "edm"]
        conditions = frozenset({"label"} if labels and data.num_classes else ())
        self.network: UNet = self.options.build(data, conditions).to(dtype).eval()
        self.state = self.layout.write(self.network.state_dict())
        filters = {key: t for key, t in self.state.items() if key.endswith("resample_filter")}
        shapes = {key: tuple(t.shape) for key, t in self.state.items() if key not in filters}
        weights = {**FIGURES.weights(shapes, dtype), **filters}
        assert self.layout.matches(weights)
        self.network.load_state_dict(self.layout.read(weights))
        self.buffers = list(filters)
        self.resolution = data.resolution


def official_name(layout: Layout, module: str, layer: str = "") -> str:
    """What layout calls one of our modules, known by its `layer`."""
    (key,) = layout.write({f"{module}{layer}.bias": torch.empty(0)})
    official = key.removeprefix("model.").removesuffix(".bias")
    return official.rpartition(".")[0] if layer else official


def traced(official: Official) -> dict[str, torch.Tensor]:
    """A dict that the next forward pass fills with activations, under official names."""
    seen: dict[str, torch.Tensor] = {}
    network, layout = official.network, official.layout

    def watch(module: str, name: str) -> None:
        network.get_submodule(module).register_forward_hook(
            lambda _module, _args, out: seen.update({name: out.clone()})
        )

    for module in ("time.0", "time.2", "encoder.0.0", "norm_out"):
        watch(module, official_name(layout, module))
    if network.label is not None:
        watch("label", "map_label")
    network.time.register_forward_pre_hook(lambda _module, args: seen.update(map_noise=args[0]))
    for place in official.options.places(official.resolution):
        # Attention comes second, under the same name as its block, and has the last word.
        layer = ".norm" if place.kind == "attention" else ".norm1"
        watch(place.key, official_name(layout, place.key, layer))
    return seen


def forward(case: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    inputs = case["inputs"]
    assert inputs["F"] == "network(X(shape), c_noise)"
    assert inputs["D"] == "EDMPrecond(X(shape) + sigma*Z(shape, c=0), sigma)"
    assert inputs.get("augment_labels") is None
    official = Official(case, dtype)
    x = FIGURES.tensor({"X": {"shape": inputs["shape"]}}, dtype)
    z = FIGURES.tensor({"Z": {"shape": inputs["shape"], "c": 0}}, dtype)
    sigma = FIGURES.tensor(inputs["sigmas"], dtype)
    cond = harness.cond_of(case)

    def denoised(network: UNet) -> torch.Tensor:
        denoiser = Denoiser(network, scalings=edm_scalings, sigma_data=official.sigma_data)
        return denoiser(x + sigma.view(-1, 1, 1, 1) * z, sigma, cond)

    seen = traced(official)
    out = official.network(x, FIGURES.tensor(inputs["c_noise"], dtype), cond, {})
    trace = dict(seen)
    actual = {
        "params": sum(p.numel() for p in official.network.parameters()),
        "state_dict": {key: list(tensor.shape) for key, tensor in official.state.items()},
        "buffers": official.buffers,
        "F": out,
        "trace": trace,
        "D": denoised(official.network),
    }
    if "D_no_labels" in case["expect"]:
        # No label is a zero vector there, and an unconditional network here.
        actual["D_no_labels"] = denoised(Official(case, dtype, labels=False).network)
    return actual


def gradients(case: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    inputs = case["inputs"]
    official = Official(case, dtype)
    x = FIGURES.tensor(inputs["x"], dtype).requires_grad_()
    cond = harness.cond_of(case)
    out = official.network(x, FIGURES.tensor(inputs["c_noise"], dtype), cond, {})
    formula = re.fullmatch(r"mean\(F \* (X\(F\.shape, .*\))\)", inputs["loss"])
    assert formula, f"unknown loss {inputs['loss']}"
    loss = (out * FIGURES.tensor(formula[1], dtype, F=out)).mean()
    loss.backward()
    parameters = official.network.named_parameters()
    grads = official.layout.write({name: p.grad for name, p in parameters})
    norms = {name: grads[name].norm() for name in case["expect"]["grad_norm"]}
    return {"loss": loss, "grad_x": x.grad, "grad_norm": norms}


FUNCTIONS = {
    "training.networks.EDMPrecond / DhariwalUNet forward": forward,
    "autograd through DhariwalUNet.forward": gradients,
}


@BOTH
@pytest.mark.parametrize("name", FIGURES.read_by(FUNCTIONS))
def test_network_computes_the_official_function(name, dtype, record_property):
    case = FIGURES.cases[name]
    function = harness.function_of(case, FUNCTIONS)
    with torch.set_grad_enabled(function is gradients):
        actual = FIGURES.compute(name, function, dtype)
    worst = harness.compare(actual, case["expect"], dtype)
    record_property("parity", (FIGURES.name, str(dtype), worst))
