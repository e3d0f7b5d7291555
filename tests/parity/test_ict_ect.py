"""Improved consistency training reproduces figures of public re-implementations.

There is no official code. Both re-implementations apply the pseudo-Huber distance to each number
of an image where the paper has the whole image: here each number is then an image of its own.
"""

from __future__ import annotations

import bisect
import math

import pytest
import torch
from cmkit_std.objectives.ct import CT
from cmkit_std.objectives.ict import ICT, lognormal_mass

from cmkit import Cond, Denoiser, Models, Noise, consistency_scalings, edm_scalings
from cmkit.functional import huber_c, pseudo_huber
from tests.parity import harness
from tests.toys import TinyNetwork

FIGURES = harness.Figures("ict_ect.json")
CPU = torch.device("cpu")
BOTH = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])


def nine_digits(values) -> list[float]:
    return [float(f"{value:.9g}") for value in values]


def doubling(case: dict, dtype: torch.dtype) -> dict:
    config, steps = case["config"], case["inputs"]["steps"]
    total = config["max_train_steps"]
    objective = ICT(start_scales=config["s_0"], end_scales=config["s_1"])

    def num_sigmas(step: int) -> int:
        return objective.phase(step, total).num_sigmas

    first = bisect.bisect(range(total), num_sigmas(0), key=num_sigmas)
    return {"k_prime": first, "num_sigmas": [num_sigmas(step) for step in steps]}


def progressive(case: dict, dtype: torch.dtype) -> dict:
    config = case["config"]
    objective = CT(
        start_scales=config["initial"],
        end_scales=config["final"],
        start_ema=config["ema0"],
        mu_denominator="n",
        distance="l2",
    )
    phases = [objective.phase(step, config["total"]) for step in case["inputs"]["steps"]]
    return {
        "n": [phase.num_sigmas for phase in phases],
        "ema": nine_digits(phase.target_ema for phase in phases),
    }


def lognormal(case: dict, dtype: torch.dtype) -> dict:
    """Compared number by number as well: the masses span decades. A small gap in float32 is not:
    it is a difference of near numbers."""
    config = case["config"]
    n = config["num_sigmas"]
    noise = Noise(config["sigma_min"], config["sigma_max"], config["rho"])
    sigmas = noise.sigmas(n, CPU, dtype)
    mass = lognormal_mass(noise, n, config["p_mean"], config["p_std"], CPU)
    assert mass.dtype == torch.float64
    actual = {
        "sigmas": sigmas,
        "weights": mass.to(dtype),
        "probabilities": (mass / mass.sum()).to(dtype),
        "loss_weights": 1 / (sigmas[1:] - sigmas[:-1]),
    }
    tolerance = 1e-8 if dtype == torch.float64 else 5e-6
    each = actual.keys() - ({"loss_weights"} if dtype == torch.float32 else set())
    for name in each:
        figure = case["expect"][name]
        known = torch.tensor(figure["f64"], dtype=torch.float64)
        taken = actual[name].double()[:: figure["k"]]
        torch.testing.assert_close(taken, known, rtol=tolerance, atol=0)
    return actual


def constants(case: dict, dtype: torch.dtype) -> dict:
    shapes = case["inputs"]["resolution_channels"]
    return {"c": nine_digits(huber_c(channels * side**2) for side, channels in shapes)}


def distances(case: dict, dtype: torch.dtype) -> dict:
    inputs, c = case["inputs"], case["config"]["c"]
    a = FIGURES.tensor(inputs["a"], dtype)
    b = FIGURES.tensor(inputs["b"], torch.float64, shape=inputs["shape"]).to(dtype)
    elementwise = pseudo_huber(a.reshape(-1, 1), b.reshape(-1, 1), c).view(a.shape)
    return {
        "elementwise": elementwise,
        "elementwise_mean": elementwise.mean(),
        "vector_norm": pseudo_huber(a, b, c),
    }


class Analytic(Denoiser):
    """c_skip x + c_out tanh(0.8 x + 0.05 cos(sigma)); keeps its estimates."""

    def __init__(self):
        super().__init__(TinyNetwork())
        self.estimates = []

    def forward(self, x, sigma, cond):
        sigma = sigma.view(-1, 1, 1, 1)
        c_skip, c_out, *_ = consistency_scalings(sigma, self.sigma_data, self.noise.sigma_min)
        f = torch.tanh(0.8 * x + 0.05 * torch.cos(sigma))
        self.estimates.append(c_skip * x + c_out * f)
        return self.estimates[-1]


class GivenDraws:
    """Stands for cmkit.Rng."""

    device, dropout_seed = CPU, 0

    def __init__(self, noise: torch.Tensor, indices: torch.Tensor):
        self.noise, self.indices = noise, indices

    def normal_like(self, x: torch.Tensor) -> torch.Tensor:
        return self.noise

    def choice(self, weights: torch.Tensor, n: int) -> torch.Tensor:
        assert self.indices.max() < len(weights)
        return self.indices


def step(case: dict, dtype: torch.dtype) -> dict:
    config, inputs = case["config"], case["inputs"]
    assert inputs["network"] == "F(x, sigma) = tanh(0.8x + 0.05*cos(sigma)), no c_in"
    objective, denoiser = ICT(), Analytic()
    x0 = FIGURES.tensor(inputs["x"], dtype)
    draws = GivenDraws(FIGURES.tensor(inputs["noise"], dtype), torch.tensor(inputs["indices"]))
    phase = objective.phase(config["current_training_step"], config["total_training_steps"])
    loss = objective.loss(Models(denoiser, denoiser), x0, Cond(), phase, draws)
    predicted, target = denoiser.estimates
    weights = (loss / pseudo_huber(predicted, target)).view(-1, 1, 1, 1)
    c = huber_c(math.prod(x0.shape[1:]))
    each = pseudo_huber(predicted.reshape(-1, 1), target.reshape(-1, 1), c).view(x0.shape)
    return {
        "num_sigmas": phase.num_sigmas,
        "predicted": predicted,
        "target": target,
        "loss_weights": weights,
        "loss": (each * weights).mean(),
    }


def mistaken_scalings(case: dict, dtype: torch.dtype) -> dict:
    """Ours, with the mistakes that the case's note lists: c_in lacks the square root, c_out the
    factor sigma_data, and sigma_min is not subtracted."""
    sigma, data = FIGURES.tensor(case["inputs"]["sigmas"], dtype), case["config"]["sigma_data"]
    c_skip, c_out, c_in, c_noise = edm_scalings(sigma, data, 0.0)
    return {
        "noise": {"none": sigma, "edm": c_noise, "cm": 1000 * c_noise},
        "c_in_cm": c_in**2,
        "boundary": {"c_skip": c_skip, "c_out": c_out / data},
    }


FUNCTIONS = {
    "get_discretization_steps(global_step, max_train_steps, s_0, s_1); Kinyugo"
    " improved_timesteps_schedule gives the same": doubling,
    "Kinyugo timesteps_schedule(k, 1000, 2, 150), ema_decay_rate_schedule(N, 0.95, 2)": progressive,
    "get_karras_sigmas / get_discretized_lognormal_weights / get_loss_weighting_schedule": (
        lognormal
    ),
    "args.huber_c default of train_cm_ct_unconditional.py: 0.00054*resolution*sqrt(in_channels)": (
        constants
    ),
    "Kinyugo pseudo_huber_loss (elementwise; the diffusers example uses the same elementwise"
    " form); vector norm as in ECMLoss with c > 0": distances,
    "get_noise_preconditioning / get_input_preconditioning / scalings_for_boundary_conditions": (
        mistaken_scalings
    ),
    "Kinyugo ImprovedConsistencyTraining.__call__, loss = mean(pseudo_huber_loss * loss_weights)": (
        step
    ),
}


@BOTH
@pytest.mark.parametrize("name", FIGURES.read_by(FUNCTIONS))
def test_improved_training_computes_the_known_figures(name, dtype, record_property):
    case = FIGURES.cases[name]
    actual = FIGURES.compute(name, harness.function_of(case, FUNCTIONS), dtype)
    worst = harness.compare(actual, case["expect"], dtype)
    record_property("parity", (FIGURES.name, str(dtype), worst))
