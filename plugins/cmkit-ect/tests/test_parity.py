"""The figures of the official code (locuslab/ect), in float32 and float64."""

from __future__ import annotations

import pytest
import torch
from cmkit_ect.objective import ECT
from cmkit_ect.sampler import ECTSampler
from cmkit_std.backbones.songunet import SongUNet
from cmkit_std.backbones.songunet.layouts import read, write
from torch import Tensor

from cmkit import DataSpec, Denoiser, Models, Noise, consistency_scalings, edm_scalings
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
        k=config["k"] * (adjusted == "sigmoid"),
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
    sizes = (config.pop(key) for key in ("img_channels", "img_resolution", "label_dim"))
    data = DataSpec(*sizes)
    noise = Noise(sigma_min=rounded(config.pop("sigma_min"), dtype))
    sigma_data = config.pop("sigma_data")
    names = {
        "model_channels": "channels",
        "num_blocks": "num_res_blocks",
        "attn_resolutions": "attention_resolutions",
    }
    options = SongUNet(**{names.get(key, key): value for key, value in config.items()})
    network = options.build(data, frozenset({"label"} if data.num_classes else ()))
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
        mode: denoiser_of(case["config"], scalings, dtype)(x, sigma, harness.cond_of(case))
        for mode, scalings in (("train", edm_scalings), ("eval", consistency_scalings))
    }


def tuned(case: dict, objective: ECT, denoiser: Denoiser, dtype: torch.dtype) -> dict:
    """The noise levels and the loss of a step, whose gradients it leaves."""
    inputs, figures = case["inputs"], case["figures"]
    x0, z = (figures.tensor(inputs[name], dtype) for name in ("images", "noise"))
    law = f"exp({objective.p_std:g}*Z([{len(x0)},1,1,1], c=0) - {-objective.p_mean:g})"
    assert inputs["t"] == law
    levels = figures.Z([len(x0)], 0).to(dtype)
    phase = objective.phase(case["config"]["stage"], 10**6)
    models, draws = Models(denoiser, denoiser), GivenDraws(levels.clone(), z)
    loss = objective.loss(models, x0, harness.cond_of(case), phase, draws)
    loss.mean().backward()
    sigma = (objective.p_mean + objective.p_std * levels).exp()
    return {
        "t": sigma.view(-1, 1, 1, 1),
        "r": objective.lower(sigma, phase).view(-1, 1, 1, 1),
        "loss": loss,
    }


def step(case: dict, dtype: torch.dtype) -> dict:
    denoiser = denoiser_of(case["config"]["net"], edm_scalings, dtype)
    figures = tuned(case, objective_of(case["config"]), denoiser, dtype)
    gradients = write(
        {name: p.grad for name, p in denoiser.network.named_parameters() if p.grad is not None}
    )
    return {
        **figures,
        "grad_norm": {name: gradients[name].norm() for name in case["expect"]["grad_norm"]},
    }


@torch.no_grad()
def generated(case: dict, dtype: torch.dtype) -> dict:
    config, shape = case["config"], case["inputs"]["latents"]["Z"]["shape"]
    denoiser = denoiser_of(config["net"], consistency_scalings, dtype)
    assert config["t_max"] == denoiser.noise.sigma_max
    x = config["t_max"] * FIGURES.tensor(case["inputs"]["latents"], dtype)
    sampler = ECTSampler(sigmas=tuple(config["mid_t"]))
    sample = sampler.sample(
        denoiser, x, harness.cond_of(case), lambda k: FIGURES.Z(shape, k).to(dtype)
    )
    return {"sample": sample}


def step_on_edm2(case: dict, dtype: torch.dtype) -> dict:
    """A step of tuning EDM2's network, which training settles before."""
    config = case["config"]
    assert config["wt"] == "snrpk"
    objective = objective_of(config).model_copy(update={"weighting": "snr"})
    network, layout = test_edm2.filled_network(config["net"], dtype)
    denoiser = Denoiser(network.train(), scalings=edm_scalings)
    network.settle()
    figures = tuned(case, objective, denoiser, dtype)
    return {**figures, **test_edm2.gradients(network, layout)}


FUNCTIONS = {
    "training.loss.ECMLoss.update_schedule / t_to_r": mapping,
    "training.networks.ECMPrecond.forward in eval and in train mode": preconditioned,
    "training.loss.ECMLoss.__call__": step,
    "training.ct_training_loop.generator_fn": generated,
}
ON_EDM2 = {"training.loss.ECMLoss.__call__ of locuslab/ect, branch imgnet": step_on_edm2}
EVERY = [(FIGURES, name, FUNCTIONS) for name in FIGURES.read_by(FUNCTIONS)]
EVERY += [(test_edm2.FIGURES, name, ON_EDM2) for name in test_edm2.FIGURES.read_by(ON_EDM2)]


@BOTH
@pytest.mark.parametrize(
    ("figures", "name", "functions"), EVERY, ids=[name for _, name, _ in EVERY]
)
def test_tuning_computes_the_official_figures(figures, name, functions, dtype):
    case = figures.cases[name]
    actual = figures.compute(name, harness.function_of(case, functions), dtype)
    harness.compare(actual, case["expect"], dtype)
