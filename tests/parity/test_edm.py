"""Our SongUNet, EDM's formulations and its samplers reproduce the figures of NVlabs/edm, and the
SongUNet that of sony/ctm, in float32 and float64."""

from __future__ import annotations

import json
import math
import re
from typing import NamedTuple

import pytest
import torch
from cmkit_std.backbones.layers import sinusoids
from cmkit_std.backbones.songunet import SongUNet as Options
from cmkit_std.backbones.songunet.layers import Conv, Fourier, Positional
from cmkit_std.backbones.songunet.layouts import PREFIX, matches, read, write
from cmkit_std.backbones.songunet.network import Block, SongUNet
from cmkit_std.backbones.songunet.options import PRESETS
from cmkit_std.discrete import rounded
from cmkit_std.objectives.weightings import weighting
from cmkit_std.preconds.iddpm import IDDPM
from cmkit_std.preconds.ve import VE
from cmkit_std.preconds.vp import VP
from cmkit_std.samplers.ablation import Ablation
from torch import Tensor

from cmkit import Cond, DataSpec, Denoiser, Noise, edm_scalings
from tests.parity import harness
from tests.parity.test_openai_samplers import toy_of

FIGURES = harness.Figures("edm.json")
CTM = harness.Figures("ctm.json")
BOTH = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])

OFFICIAL_NAMES = {
    "model_channels": "channels",
    "num_blocks": "num_res_blocks",
    "attn_resolutions": "attention_resolutions",
}
SAME_NAME = (
    "augment_dim",
    "channel_mult",
    "channel_mult_noise",
    "decoder_type",
    "dropout",
    "embedding_type",
    "encoder_type",
    "resample_filter",
)
ELSEWHERE = ("sigma_data", "sigma_min", "sigma_max", "use_fp16", "linear_probing", "training_mode")
"""Arguments of the denoiser, and those that change nothing."""


def network_of(config: dict) -> SongUNet:
    """The network of arguments of an official preconditioning."""
    config.ignore(*ELSEWHERE)
    assert config["model_type"] == "SongUNet"
    data = DataSpec(*(config[k] for k in ("img_channels", "img_resolution", "label_dim")))
    conditions = {"label"} if data.num_classes else set()
    if config.get("training_mode") == "ctm":
        conditions.add("sigma_to")
    names = {**OFFICIAL_NAMES, **{name: name for name in (*SAME_NAME, "preset")}, "arch": "preset"}
    fields = {own: config[name] for name, own in names.items() if name in config}
    return Options(**fields).build(data, frozenset(conditions))


def filled(module: torch.nn.Module, case: dict, dtype: torch.dtype, prefix: str = "") -> None:
    """Give `module` its formula-filled weights; filters keep their values. `prefix` is that of
    the official names."""
    official = write(module.state_dict())
    shapes = {
        prefix + key.removeprefix(PREFIX): tuple(tensor.shape)
        for key, tensor in official.items()
        if not key.endswith("resample_filter")
    }
    weights = case["figures"].weights(shapes, dtype, w_quad=case["inputs"].get("w_quad"))
    module.to(dtype)
    missing, unexpected = module.load_state_dict(read(weights), strict=False)
    assert not unexpected
    assert all(key.endswith("filter") for key in missing)
    module.eval()


def filled_network(case: dict, dtype: torch.dtype, config: dict | None = None) -> SongUNet:
    network = network_of(config or case["config"])
    filled(network, case, dtype, PREFIX)
    return network


def augment_of(case: dict, dtype: torch.dtype) -> Tensor | None:
    """Augmentation labels of the case; cases of gradients take those of their network's others."""
    own = case["config"].content
    for other in (case, *FIGURES.cases.values()):
        spec = other["inputs"].get("augment_labels")
        if spec is not None and all(other["config"].get(key) == own[key] for key in own):
            return FIGURES.tensor(spec, dtype)
    assert not own.get("augment_dim"), "no case says the augmentation labels of this network"
    return None


class Augmented(Denoiser):
    """A denoiser that gives its network augmentation labels."""

    def __init__(self, network: SongUNet, augment: Tensor | None):
        super().__init__(network, scalings=edm_scalings)
        network.register_forward_pre_hook(
            lambda _module, args, kwargs: (args, {**kwargs, "augment": augment}), with_kwargs=True
        )


def noisy(case: dict, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """X(shape) + sigma Z(shape, 0), and sigma."""
    inputs = case["inputs"]
    assert "X(shape) + sigma*Z(shape, c=0)" in inputs.get("x", inputs.get("D"))
    sigma = FIGURES.tensor(inputs["sigmas"], dtype)
    shape = inputs["shape"]
    x = FIGURES.X(shape).to(dtype) + sigma.view(-1, 1, 1, 1) * FIGURES.Z(shape, 0).to(dtype)
    return x, sigma


def traced(network: SongUNet) -> dict[str, Tensor]:
    """A dict that the next forward pass fills with activations, under official names."""
    seen = {}

    def watch(module, name):
        def hook(_module, _args, out):
            # There, cosines come first, and are swapped behind the module.
            seen[name] = out.roll(out.shape[1] // 2, 1) if name == "map_noise" else out.clone()

        module.register_forward_hook(hook)

    watch(network.noise, "map_noise")
    for i in (0, 1):
        watch(network.time[2 * i], f"map_layer{i}")
    for stage in (network.encoder, network.decoder):
        for side, level in stage.items():
            layers = {}
            for name, layer in level.named_children():
                numbered = isinstance(layer, torch.nn.ModuleList)
                layers |= (
                    {f"{name}.{i}": inner for i, inner in enumerate(layer)}
                    if numbered
                    else {name: layer}
                )
            for name, layer in layers.items():
                part = "encoder" if stage is network.encoder else "decoder"
                ((key, _),) = write({f"{part}.{side}.{name}.weight": torch.empty(0)}).items()
                watch(layer, key.removeprefix(PREFIX).removesuffix(".weight"))
    return seen


def forward(case: dict, dtype: torch.dtype) -> dict:
    network = filled_network(case, dtype)
    c_noise = FIGURES.tensor(case["inputs"]["c_noise"], dtype)
    cond, augment = harness.cond_of(case), augment_of(case, dtype)
    spec = case["inputs"].get("x")
    x = FIGURES.tensor(spec, dtype) if spec else FIGURES.X(case["inputs"]["shape"]).to(dtype)
    actual = {}
    if "trace" in case["expect"]:
        assert case["inputs"]["F"] == "network(X(shape), c_noise)"
        actual["trace"] = seen = traced(network)
    actual["F"] = network(x, c_noise, cond, {}, augment=augment)
    if "D" in case["expect"]:
        actual["trace"] = dict(seen)
        if network.label is not None:
            context = network._label(cond)
            actual["trace"]["map_label"] = context
        denoiser = Augmented(network, augment)
        actual["D"] = denoiser(*noisy(case, dtype), cond)
        state = write(network.state_dict())
        actual["params"] = sum(p.numel() for p in network.parameters())
        actual["state_dict"] = {key: list(tensor.shape) for key, tensor in state.items()}
        buffers = write(dict(network.named_buffers()))
        actual["buffers"] = list(buffers)
    if "D_no_labels" in case["expect"]:
        actual["D_no_labels"] = denoiser(*noisy(case, dtype))
    return actual


def gradients(case: dict, dtype: torch.dtype) -> dict:
    network = filled_network(case, dtype)
    x = FIGURES.tensor(case["inputs"]["x"], dtype).requires_grad_()
    c_noise = FIGURES.tensor(case["inputs"]["c_noise"], dtype)
    out = network(x, c_noise, harness.cond_of(case), {}, augment=augment_of(case, dtype))
    formula = re.fullmatch(r"mean\(F \* (X\(F\.shape, .*\))\)", case["inputs"]["loss"])
    assert formula, f"unknown loss {case['inputs']['loss']}"
    loss = (out * FIGURES.tensor(formula[1], dtype, F=out)).mean()
    loss.backward()
    return {"loss": loss, "grad_x": x.grad, "grad_norm": norms(case, network)}


def norms(case: dict, network: SongUNet) -> dict:
    grads = write({name: p.grad for name, p in network.named_parameters() if p.grad is not None})
    return {name: grads[name].norm() for name in case["expect"]["grad_norm"]}


def preconditioned(case: dict, dtype: torch.dtype) -> dict:
    name = re.fullmatch(r"training\.networks\.(\w+)Precond\.forward", case["function"])[1]
    column = {"VP": VP(), "VE": VE(), "iDDPM": IDDPM()}[name]
    denoiser = Denoiser(filled_network(case, dtype), Noise(*column.known), column.scalings)
    x, sigma = noisy(case, dtype)
    return {
        "D": denoiser(x, sigma, harness.cond_of(case)),
        "round_sigma": rounded(column.schedule, sigma) if name == "iDDPM" else sigma,
        "sigma_min": torch.tensor(column.known[0], dtype=dtype),
        "sigma_max": torch.tensor(column.known[1], dtype=dtype),
    }


class LogNormal(NamedTuple):
    """Draws and weights of objective `edm`."""

    mean: float = -1.2
    std: float = 1.2

    def drawn(self, z: Tensor) -> Tensor:
        return (self.mean + self.std * z).exp()

    def weight(self, sigma: Tensor) -> Tensor:
        return weighting("karras", sigma, 0.5)


class UniformTime(NamedTuple):
    """Draws and weights of training in column VP."""

    vp: VP = VP()

    def drawn(self, u: Tensor) -> Tensor:
        return self.vp.betas.sigma(1 + u * (self.vp.epsilon - 1))

    def weight(self, sigma: Tensor) -> Tensor:
        return sigma**-2


class LogUniform(NamedTuple):
    """Draws and weights of training in column VE."""

    ve: VE = VE()

    def drawn(self, u: Tensor) -> Tensor:
        return self.ve.low * (self.ve.high / self.ve.low) ** u

    def weight(self, sigma: Tensor) -> Tensor:
        return sigma**-2


def losses(case: dict, dtype: torch.dtype) -> dict:
    config = case["config"]
    network = filled_network(case, dtype, config["net"])
    names = {"P_mean": "mean", "P_std": "std"}
    renamed = {own: config[name] for name, own in names.items() if name in config}
    name = re.fullmatch(r"training\.loss\.(\w+)Loss\.__call__", case["function"])[1]
    law = {"EDM": LogNormal, "VP": UniformTime, "VE": LogUniform}[name](**renamed)
    images = FIGURES.tensor(case["inputs"]["images"], dtype)
    draw = {"EDM": FIGURES.Z, "VP": FIGURES.U, "VE": FIGURES.U}[name]
    sigma = law.drawn(draw([len(images)], 0).to(dtype))
    z = FIGURES.Z(list(images.shape), 1).to(dtype)
    denoiser = Denoiser(network, scalings=edm_scalings)
    x0_hat = denoiser(images + sigma.view(-1, 1, 1, 1) * z, sigma, harness.cond_of(case))
    loss = law.weight(sigma).view(-1, 1, 1, 1) * (x0_hat - images).square()
    total = loss.sum() / len(images)
    total.backward()
    return {"loss": loss, "sum_over_batch_size": total, "grad_norm": norms(case, network)}


RENAMED = {"num_steps": "steps", "S_churn": "s_churn", "S_min": "s_min", "S_max": "s_max"} | {
    "S_noise": "s_noise"
}
LEVELS = {
    "edm": Noise(),
    "vp": Noise(VP(epsilon=1e-3).levels[0], VP().levels[1]),
    "ve": Noise(0.02, 100.0),
    "iddpm": Noise(0.002, 81.0),
}
"""Where the official samplers start and end unless told."""


def sampled(case: dict, dtype: torch.dtype) -> dict:
    config = dict(case["config"])
    net = config.pop("net", None)
    given = {k: config.pop(k) for k in ("sigma_min", "sigma_max", "rho") if k in config}
    sampler = Ablation(**{RENAMED.get(name, name): value for name, value in config.items()})
    noise = Noise(**given) if given else LEVELS[sampler.discretization]
    if net:
        denoiser = Denoiser(filled_network(case, dtype, net), noise, scalings=edm_scalings)
    else:
        denoiser = toy_of(case, noise)
    z = FIGURES.tensor(case["inputs"]["latents"], torch.float64)
    x = (noise.sigma_max * z).to(dtype)
    sample = sampler.sample(
        denoiser, x, harness.cond_of(case), lambda k: FIGURES.Z(list(z.shape), k).to(dtype)
    )
    actual = {"sample": sample}
    if "draws" in case["expect"]:
        # There every step draws, so that the k-th draw is the k-th step's, as it is here.
        actual["draws"] = 1 + sampler.steps
    return actual


def block(case: dict, dtype: torch.dtype) -> dict:
    config = case["config"]
    fixed = {"num_heads": 1, "skip_scale": "sqrt(0.5)", "eps": 1e-6, "resample_proj": True}
    for name, value in {**fixed, "adaptive_scale": False}.items():
        assert config[name] == value
    up, down = config.get("up", False), config.get("down", False)
    layer = Block(
        config["in_channels"],
        config["out_channels"],
        "up" if up else "down" if down else None,
        config["attention"],
        emb_channels=config["emb_channels"],
        options=Options(resample_filter=config.get("resample_filter", (1, 1))),
    )
    filled(layer, case, dtype)
    keys = [key.removeprefix(PREFIX) for key in write(layer.state_dict())]
    x, emb = (FIGURES.tensor(case["inputs"][name], dtype) for name in ("x", "emb"))
    return {"keys": keys, "out": layer(x, layer.project(emb))}


def convolution(case: dict, dtype: torch.dtype) -> dict:
    config = case["config"]
    up, down = config.get("up", False), config.get("down", False)
    layer = Conv(
        config["in_channels"],
        config["out_channels"],
        config["kernel"],
        "up" if up else "down" if down else None,
        tuple(config["resample_filter"]),
        fused=config.get("fused_resample", False),
    )
    filled(layer, case, dtype)
    x = FIGURES.tensor(case["inputs"]["x"], dtype)
    return {"resample_filter": layer.filter, "out": layer(x)}


def embeddings(case: dict, dtype: torch.dtype) -> dict:
    dim = case["config"]["num_channels"]
    x = FIGURES.tensor(case["inputs"]["x"], dtype)
    fourier = Fourier(dim, scale=16.0).to(dtype)
    fourier.frequencies.copy_(FIGURES.weights({"freqs": (dim // 2,)}, dtype)["freqs"])
    return {
        "positional": sinusoids(x, dim),
        "positional_endpoint": Positional(dim)(x).roll(dim // 2, 1),
        "freqs": fourier.frequencies,
        "fourier": fourier(x[:-1]).roll(dim // 2, 1),
    }


def towards(case: dict, dtype: torch.dtype) -> dict:
    """The network of CTM, which is told the target noise level s as well."""
    network = filled_network(case, dtype)
    inputs = case["inputs"]
    assert inputs["rescaled_t"] == "250*ln(t), rounded to float32"
    assert inputs["rescaled_s"] == "250*ln(s)"
    t, s = (unscaled(inputs[name], dtype) for name in ("t", "s_sigma"))
    cond = Cond(label=harness.cond_of(case).label, sigma_to=0.25 * s.log())
    state = write(network.state_dict())
    return {
        "params": sum(p.numel() for p in network.parameters()),
        "state_dict": {key: list(tensor.shape) for key, tensor in state.items()},
        "out": network(CTM.tensor(inputs["x"], dtype), 0.25 * t.log(), cond, {}),
    }


def unscaled(sigmas: list[float], dtype: torch.dtype) -> Tensor:
    """exp(r / 250), of r = 250 ln(sigma) rounded to float32."""
    rescaled = torch.tensor([250 * math.log(sigma) for sigma in sigmas]).float()
    return (rescaled.to(dtype) / 250).exp()


FUNCTIONS = {
    "training.networks.EDMPrecond / SongUNet forward": forward,
    "training.networks.SongUNet forward": forward,
    "autograd through SongUNet.forward": gradients,
    "training.networks.VPPrecond.forward": preconditioned,
    "training.networks.VEPrecond.forward": preconditioned,
    "training.networks.iDDPMPrecond.forward": preconditioned,
    "training.loss.EDMLoss.__call__": losses,
    "training.loss.VELoss.__call__": losses,
    "training.loss.VPLoss.__call__": losses,
    "generate.edm_sampler": sampled,
    "generate.ablation_sampler": sampled,
    "training.networks.UNetBlock.forward": block,
    "training.networks.Conv2d.forward": convolution,
    "training.networks.PositionalEmbedding / FourierEmbedding": embeddings,
    "cm.networks.EDMPrecond_CTM.forward(rescaled_x, rescaled_t, s)": towards,
}
WITH_GRADIENT = {gradients, losses}
CASES = [(FIGURES, name) for name in FIGURES.read_by(FUNCTIONS)] + [
    (CTM, name)
    for name in CTM.read_by(FUNCTIONS, lambda config: config.get("model_type") == "SongUNet")
]


@BOTH
@pytest.mark.parametrize(("figures", "name"), CASES, ids=[name for _, name in CASES])
def test_it_computes_the_official_function(figures, name, dtype, record_property):
    case = figures.cases[name]
    function = harness.function_of(case, FUNCTIONS)
    with torch.set_grad_enabled(function in WITH_GRADIENT):
        actual = figures.compute(name, function, dtype)
    worst = harness.compare(actual, case["expect"], dtype)
    record_property("parity", (figures.name, str(dtype), worst))


@pytest.mark.parametrize("path", harness.key_files("*_cifar10_*.json"), ids=lambda path: path.stem)
def test_layout_has_the_names_and_shapes_of_the_published_weights(path):
    content = json.loads(path.read_text("utf-8"))
    config = harness.Config({"preset": "ddpmpp"} | content["source"]["config"])
    with torch.device("meta"):
        network = network_of(config)
    official = write(network.state_dict())
    assert not list(config.unread())
    assert {key: list(tensor.shape) for key, tensor in official.items()} == content["keys"]
    assert list(official) == list(content["keys"])
    assert sum(p.numel() for p in network.parameters()) == content["n_parameters"]
    assert list(write(dict(network.named_buffers()))) == content["buffers"]
    own = read(official)
    assert list(own) == list(network.state_dict())
    assert all(own[key].shape == tensor.shape for key, tensor in network.state_dict().items())
    assert matches(official)


@pytest.mark.parametrize("preset", PRESETS)
def test_preset_is_the_network_of_the_published_weights(preset):
    path = harness.OWN_FIGURES / "keys" / f"edm_cifar10_{preset}_cond.json"
    config = harness.Config(json.loads(path.read_text("utf-8"))["source"]["config"])
    with torch.device("meta"):
        options = Options(preset=preset, augment_dim=9, dropout=0.13)
        network = options.build(DataSpec(3, 32, 10), frozenset({"label"}))
        assert repr(network) == repr(network_of(config))


def test_layout_round_trip_is_bit_identical():
    options = Options(preset="ncsnpp", channels=32, channel_mult=[1, 2], num_res_blocks=1)
    state = options.build(DataSpec(3, 16, 10), frozenset({"label"})).state_dict()
    back = read(write(state))
    assert list(back) == list(state)
    assert all(torch.equal(back[key], state[key]) for key in state)


def test_layout_reads_without_the_prefix_and_drops_the_table_of_iddpm():
    options = Options(encoder_type="skip", decoder_type="skip", channels=32, channel_mult=[1, 2])
    state = options.build(DataSpec(3, 16), frozenset()).state_dict()
    official = {key.removeprefix(PREFIX): tensor for key, tensor in write(state).items()}
    assert matches(official)
    back = read({"u": torch.zeros(1001), **official})
    assert all(torch.equal(back[key], state[key]) for key in state)
    assert len(back) == len(state)


@pytest.mark.parametrize("name", ["openai_imagenet64", "openai_lsun256"])
def test_layout_does_not_match_other_networks(name):
    path = harness.OWN_FIGURES / "keys" / f"{name}.json"
    keys = json.loads(path.read_text("utf-8"))["keys"]
    assert not matches({key: torch.empty(shape, device="meta") for key, shape in keys.items()})
