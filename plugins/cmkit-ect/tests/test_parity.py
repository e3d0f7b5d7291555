"""The figures of the official code (locuslab/ect), in float32 and float64."""

from __future__ import annotations

import re

import pytest
import torch
from cmkit_ect.objective import ECT
from cmkit_ect.sampler import ECTSampler
from cmkit_std.backbones.songunet import SongUNet
from cmkit_std.backbones.songunet.layouts import read, write
from torch import Tensor

from cmkit import Cond, DataSpec, Denoiser, Models, Noise, consistency_scalings, edm_scalings
from cmkit.denoiser import Scaling
from tests.parity import harness, test_edm2

FIGURES = harness.Figures("ict_ect.json")
BOTH = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
CPU = torch.device("cpu")


def objective_of(config: dict) -> ECT:
    """`adj` "const" is k = 0."""
    adjusted = config.get("adj", "sigmoid")
    assert adjusted in ("sigmoid", "const")
    return ECT(
        q=config["q"],
        k=config["k"] if adjusted == "sigmoid" else 0.0,
        b=config["b"],
        stage_steps=1,
        p_mean=config.get("P_mean", -1.1),
        p_std=config.get("P_std", 2.0),
        c=config.get("c", 0.0),
    )


def denoiser_of(config: dict, scalings: Scaling, dtype: torch.dtype) -> Denoiser:
    """The network of an official configuration with its formula-filled weights."""
    config = dict(config)
    assert config.pop("model_type") == "SongUNet"
    data = DataSpec(config.pop("img_channels"), config.pop("img_resolution"), None)
    assert config.pop("label_dim") == 0
    noise = Noise(sigma_min=rounded(config.pop("sigma_min"), dtype))
    sigma_data = config.pop("sigma_data")
    names = {
        "model_channels": "channels",
        "num_blocks": "num_res_blocks",
        "attn_resolutions": "attention_resolutions",
    }
    options = SongUNet(**{names.get(key, key): value for key, value in config.items()})
    network = options.build(data, frozenset())
    official = {
        key: tuple(tensor.shape)
        for key, tensor in write(network.state_dict()).items()
        if not key.endswith("resample_filter")
    }
    network.to(dtype)
    missing, unexpected = network.load_state_dict(
        read(FIGURES.weights(official, dtype)), strict=False
    )
    assert not unexpected
    assert all(key.endswith("filter") for key in missing)
    return Denoiser(network.eval(), noise, scalings, sigma_data)


def rounded(value: float, dtype: torch.dtype) -> float:
    """What both official runs hold: a float32."""
    return torch.tensor(value, dtype=torch.float32).to(dtype).item()


class GivenDraws:
    """Stands for cmkit.Rng: z of the noise levels, then that of the images."""

    device, dropout_seed = CPU, 0

    def __init__(self, *draws: Tensor):
        self.draws = list(draws)

    def normal_like(self, x: Tensor) -> Tensor:
        draw = self.draws.pop(0)
        assert draw.shape == x.shape
        return draw


def mapping(case: dict, dtype: torch.dtype) -> dict:
    objective, inputs = objective_of(case["config"]), case["inputs"]
    sigma = FIGURES.tensor(inputs["t"], dtype)
    actual = {}
    for stage in inputs["stages"]:
        phase = objective.phase(stage, 10**6)
        ratio = torch.tensor(1 - phase.log["gap"], dtype=dtype)
        actual[str(stage)] = {"ratio": ratio, "r": objective.lower(sigma, phase)}
    return actual


def preconditioned(case: dict, dtype: torch.dtype) -> dict:
    inputs = case["inputs"]
    assert inputs["x"] == "X(shape) + sigma*Z(shape, c=0)"
    sigma, shape = FIGURES.tensor(inputs["sigmas"], dtype), inputs["shape"]
    x = FIGURES.X(shape).to(dtype) + sigma.view(-1, 1, 1, 1) * FIGURES.Z(shape, 0).to(dtype)
    return {
        mode: denoiser_of(case["config"], scalings, dtype)(x, sigma)
        for mode, scalings in (("train", edm_scalings), ("eval", consistency_scalings))
    }


def step(case: dict, dtype: torch.dtype) -> dict:
    config, inputs = case["config"], case["inputs"]
    assert inputs["t"] == "exp(2*Z([4,1,1,1], c=0) - 1.1)"
    objective, denoiser = objective_of(config), denoiser_of(config["net"], edm_scalings, dtype)
    x0 = FIGURES.tensor(inputs["images"], dtype)
    levels, z = FIGURES.Z([4], 0).to(dtype), FIGURES.tensor(inputs["noise"], dtype)
    phase = objective.phase(config["stage"], 10**6)
    loss = objective.loss(
        Models(denoiser, denoiser), x0, Cond(), phase, GivenDraws(levels.clone(), z)
    )
    loss.mean().backward()
    sigma = (objective.p_mean + objective.p_std * levels).exp()
    gradients = write(
        {name: p.grad for name, p in denoiser.network.named_parameters() if p.grad is not None}
    )
    return {
        "t": sigma.view(-1, 1, 1, 1),
        "r": objective.lower(sigma, phase).view(-1, 1, 1, 1),
        "loss": loss,
        "grad_norm": {name: gradients[name].norm() for name in case["expect"]["grad_norm"]},
    }


@torch.no_grad()
def generated(case: dict, dtype: torch.dtype) -> dict:
    config, shape = case["config"], case["inputs"]["latents"]["Z"]["shape"]
    denoiser = denoiser_of(config["net"], consistency_scalings, dtype)
    assert config["t_max"] == denoiser.noise.sigma_max
    x = config["t_max"] * FIGURES.tensor(case["inputs"]["latents"], dtype)
    sampler = ECTSampler(sigmas=tuple(config["mid_t"]))
    sample = sampler.sample(denoiser, x, Cond(), lambda k: FIGURES.Z(shape, k).to(dtype))
    return {"sample": sample}


def step_on_edm2(case: dict, dtype: torch.dtype) -> dict:
    """A step of tuning EDM2's network, which training settles before."""
    config, inputs = dict(case["config"]), case["inputs"]
    assert (config.pop("wt"), inputs["t"]) == ("snrpk", "exp(1.6*Z([4,1,1,1], c=0) - 0.8)")
    objective = objective_of(config).model_copy(update={"weighting": "snr"})
    network, layout = test_edm2.filled_network(config["net"], dtype)
    denoiser = Denoiser(network.train(), scalings=edm_scalings)
    network.settle()
    levels = test_edm2.FIGURES.Z([4], 0).to(dtype)
    x0, z = (test_edm2.FIGURES.tensor(inputs[name], dtype) for name in ("images", "noise"))
    phase = objective.phase(config["stage"], 10**6)
    models, draws = Models(denoiser, denoiser), GivenDraws(levels.clone(), z)
    loss = objective.loss(models, x0, test_edm2.cond_of(case), phase, draws)
    loss.mean().backward()
    sigma = (objective.p_mean + objective.p_std * levels).exp()
    return {
        "t": sigma.view(-1, 1, 1, 1),
        "r": objective.lower(sigma, phase).view(-1, 1, 1, 1),
        "loss": loss,
        **test_edm2.gradients(network, layout),
    }


FUNCTIONS = {
    "training.loss.ECMLoss.update_schedule / t_to_r": mapping,
    "training.networks.ECMPrecond.forward in eval and in train mode": preconditioned,
    "training.loss.ECMLoss.__call__": step,
    "training.ct_training_loop.generator_fn": generated,
}
CASES = [name for name in FIGURES.cases if re.match("ect_|ecm_", name)]


def test_no_case_of_the_official_code_is_left_out():
    own = {name for name, case in FIGURES.cases.items() if case["function"] in FUNCTIONS}
    assert own == set(CASES)
    assert len(CASES) == 12


@BOTH
@pytest.mark.parametrize("name", CASES)
def test_tuning_computes_the_official_figures(name, dtype):
    case = FIGURES.cases[name]
    harness.compare(FUNCTIONS[case["function"]](case, dtype), case["expect"], dtype)


ON_EDM2 = [k for k, case in test_edm2.FIGURES.cases.items() if case["function"] == test_edm2.OF_ECT]


@BOTH
@pytest.mark.parametrize("name", ON_EDM2)
def test_tuning_of_edm2_computes_the_official_figures(name, dtype):
    case = test_edm2.FIGURES.cases[name]
    harness.compare(step_on_edm2(case, dtype), case["expect"], dtype)
