"""Our denoiser, losses and schedules reproduce the figures of openai/consistency_models."""

from __future__ import annotations

import pytest
import torch
from cmkit_std.backbones.adm.openai import from_openai, to_openai
from cmkit_std.objectives.ct import CT
from cmkit_std.objectives.edm import EDM
from cmkit_std.objectives.schedules import adaptive_num_sigmas, halving_num_steps
from cmkit_std.objectives.weightings import weighting
from cmkit_std.samplers.ancestral import ancestral_step

from cmkit import Denoiser, Models, Noise, consistency_scalings, edm_scalings
from cmkit.denoiser import Scaling
from tests.parity import harness
from tests.parity.test_openai_unet import BOTH, data_of, options_of

FIGURES = harness.Figures("openai_denoiser.json")
SCALINGS: dict[bool, Scaling] = {False: edm_scalings, True: consistency_scalings}
"""By the official flag `distillation`."""


def denoiser_of(config: dict, figures: harness.Figures, dtype: torch.dtype) -> Denoiser:
    """A formula-filled network as the denoiser that an official configuration describes."""
    net = config["net"]
    options = options_of(net).model_copy(update={"time_scale": 1000.0})
    network = options.build(*data_of(net))
    shapes = {key: tuple(t.shape) for key, t in to_openai(network.state_dict()).items()}
    network.to(dtype).load_state_dict(from_openai(figures.weights(shapes, dtype)))
    return Denoiser(
        network.eval(),
        noise_of(config),
        SCALINGS[config["distillation"]],
        config.get("sigma_data", 0.5),
    )


def noise_of(config: dict) -> Noise:
    """The sigma axis of an official configuration; what it leaves out is at the shared default."""
    names = {"sigma_min": "t_min", "sigma_max": "t_max", "rho": "rho"}
    found = {
        ours: config.get(ours, config.get(theirs))
        for ours, theirs in names.items()
        if ours in config or theirs in config
    }
    return Noise(**found)


def scalings(case: dict, dtype: torch.dtype) -> dict:
    config = case["config"]
    config.ignore("sigma_max")
    sigma = FIGURES.tensor(case["inputs"]["sigmas"], dtype)
    data, low = config["sigma_data"], config["sigma_min"]
    actual = {"snr": weighting("snr", sigma, data), "weightings": {}}
    for name, scaling in (("scalings", edm_scalings), ("boundary", consistency_scalings)):
        c_skip, c_out, _, _ = scaling(sigma, data, low)
        actual[name] = {"c_skip": c_skip, "c_out": c_out, "c_in": c_in(sigma, data, low)}
    for name in case["expect"]["weightings"]:
        actual["weightings"][name] = weighting(name, sigma, data)
    return actual


def c_in(sigma: torch.Tensor, sigma_data: float, sigma_min: float) -> torch.Tensor:
    """What a denoiser multiplies images of ones by, before its network."""
    seen = []

    class Spy(torch.nn.Module):
        def forward(self, x, c_noise, cond, scales):
            seen.append(x.flatten())
            return x

    ones = sigma.new_ones(len(sigma), 1, 1, 1)
    Denoiser(Spy(), Noise(sigma_min), sigma_data=sigma_data)(ones, sigma)
    return seen[0]


def karras_sigmas(case: dict, dtype: torch.dtype) -> dict:
    """The official grids fall and end in 0."""
    actual = {}
    for n, low, high, rho in case["inputs"]["args"]:
        grid = Noise(low, high, rho).sigmas(n, dtype=dtype).flip(0)
        actual[f"n={n},min={low},max={high},rho={rho}"] = torch.cat([grid, grid.new_zeros(1)])
    return actual


def ancestral(case: dict, dtype: torch.dtype) -> dict:
    actual = {}
    for pair in case["inputs"]["pairs"]:
        down, up = ancestral_step(*FIGURES.tensor(pair, torch.float64).tolist())
        actual[f"{pair[0]}->{pair[1]}"] = {
            "sigma_down": torch.tensor([down], dtype=dtype),
            "sigma_up": torch.tensor([up], dtype=dtype),
        }
    return actual


def denoise(case: dict, dtype: torch.dtype) -> dict:
    config, inputs = case["config"], case["inputs"]
    denoiser = denoiser_of(config, FIGURES, dtype)
    sigma = FIGURES.tensor(inputs["sigmas"], torch.float64)
    x = FIGURES.tensor(inputs["x_t"], dtype, shape=inputs["shape"], sigma=sigma.view(-1, 1, 1, 1))
    seen = {}

    def watch(network, args, out):
        seen["net_input"] = args[0]
        seen["rescaled_t"] = args[1] * network.time_scale
        seen["model_output"] = out

    denoiser.network.register_forward_hook(watch)
    return {"denoised": denoiser(x, sigma.to(dtype), harness.cond_of(case)), **seen}


class Given:
    """In place of an Rng: the draws that lead to given noise levels and noise, in turn."""

    device = torch.device("cpu")
    dropout_seed = 0

    def __init__(self, *draws: torch.Tensor):
        self.draws = list(draws)

    def normal_like(self, x: torch.Tensor) -> torch.Tensor:
        draw = self.draws.pop(0)
        assert draw.shape == x.shape
        assert draw.dtype == x.dtype
        return draw


def training_losses(case: dict, dtype: torch.dtype) -> dict:
    config, inputs = case["config"], case["inputs"]
    denoiser = denoiser_of(config, FIGURES, dtype)
    x0 = FIGURES.tensor(inputs["x_start"], dtype)
    sigma, z = (FIGURES.tensor(inputs[name], dtype) for name in ("sigmas", "noise"))

    def loss(weighting: str) -> torch.Tensor:
        objective = EDM(weighting=weighting)
        draw = (sigma.log() - objective.p_mean) / objective.p_std
        models, cond = Models(denoiser, denoiser), harness.cond_of(case)
        return objective.loss(models, x0, cond, objective.phase(0, 1), Given(draw, z))

    weighted = loss(config["weight_schedule"])
    return {"xs_mse": loss("uniform"), "mse": weighted, "loss": weighted}


def schedule(case: dict, dtype: torch.dtype) -> dict:
    """N and mu of each step; literals of 9 digits."""
    config = case["config"]
    modes = config["target_ema_mode"], config["scale_mode"]
    ema, start, end = (config[key] for key in ("start_ema", "start_scales", "end_scales"))
    total, stage = config["total_steps"], config["distill_steps_per_iter"]

    def adaptive(step: int) -> tuple[int, float]:
        phase = CT(start_scales=start, end_scales=end, start_ema=ema).phase(step, total)
        return phase.num_sigmas, phase.target_ema

    at = {
        ("fixed", "fixed"): lambda step: (start, ema),
        ("fixed", "progressive"): lambda step: (adaptive_num_sigmas(step, total, start, end), ema),
        ("adaptive", "progressive"): adaptive,
        ("fixed", "progdist"): lambda step: (halving_num_steps(step, start, stage), 1.0),
    }
    assert modes in at, f"nothing here computes the schedule {modes}"
    scales, emas = zip(*(at[modes](step) for step in case["inputs"]["steps"]), strict=True)
    return {"num_scales": list(scales), "target_ema": [float(f"{mu:.9g}") for mu in emas]}


FUNCTIONS = {
    "KarrasDenoiser.get_scalings / get_scalings_for_boundary_condition / get_snr; get_weightings": (
        scalings,
        True,
    ),
    "get_sigmas_karras(n, sigma_min, sigma_max, rho)": (karras_sigmas, True),
    "get_ancestral_step(sigma_from, sigma_to) -> (sigma_down, sigma_up)": (ancestral, True),
    "KarrasDenoiser.denoise(model, x_t, sigmas)": (denoise, False),
    "KarrasDenoiser.training_losses": (training_losses, False),
    "cm.script_util.create_ema_and_scales_fn(...)(step) -> (target_ema, num_scales)": (
        schedule,
        False,
    ),
}
"""What computes each official function, and whether its arrays span decades."""


@BOTH
@pytest.mark.parametrize("name", FIGURES.read_by(FUNCTIONS))
@torch.no_grad()
def test_denoiser_and_losses_compute_the_official_function(name, dtype, record_property):
    case = FIGURES.cases[name]
    function, elementwise = harness.function_of(case, FUNCTIONS)
    actual = FIGURES.compute(name, function, dtype)
    worst = harness.compare(actual, case["expect"], dtype, elementwise=elementwise)
    record_property("parity", (FIGURES.name, str(dtype), worst))
