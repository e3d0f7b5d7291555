"""Schedulers and distillation helpers of huggingface/diffusers, on our sigma axis.

A latent x_vp of theirs is alpha x of ours, with sigma = sqrt(1 - alpha^2) / alpha, so that DDIM is
the Euler step and LCMScheduler is sampler `lcm`. The converted U-Net has a file of its own.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable

import numpy as np
import pytest
import torch
from cmkit_std.backbones.embedding import guidance_waves
from cmkit_std.discrete import DiscreteNoise, lcm_boundary, nearest, zero_terminal_snr
from cmkit_std.objectives.lcm import LCM
from cmkit_std.preconds.discrete import Discrete
from cmkit_std.preconds.schedule import Schedule
from cmkit_std.samplers import lcm
from cmkit_std.samplers.multistep import Multistep
from torch import Tensor

from cmkit import Cond, Denoiser, Models, Network, Noise, consistency_scalings, edm_scalings
from cmkit.functional import euler
from tests.parity import harness
from tests.parity.test_openai_samplers import formula
from tests.parity.test_openai_unet import BOTH

FIGURES = harness.Figures("diffusers.json")
DRAWS = "Z(shape, c=1,2,..)"


class Formula(Network):
    """A network that is a formula such as "tanh(0.8x) + 0.2*cos(t/90) times 1.3"."""

    null_label = 10

    def __init__(self, text: str, no_label: str | None = None, time_scale: float = 1.0):
        super().__init__()
        self.texts, self.time_scale = (text, no_label or text), time_scale
        self.seen: list[tuple[Tensor, Tensor]] = []

    def forward(self, x, c_noise, cond, scales):
        t = self.time_scale * c_noise
        self.seen.append((x, t))
        text, _, factor = self.texts[cond.label is None].partition(" times ")
        named = re.sub(r"(\d)([a-z])", r"\1*\2", text.rpartition("= ")[2])
        return float(factor or 1) * formula(named, x=x, z=x, scaled=x, t=t.view(-1, 1, 1, 1))


def schedule_of(config: dict) -> Schedule:
    """The schedule of a config, whose defaults are those of LCMScheduler."""
    names = {"beta_start": "beta_start", "beta_end": "beta_end", "beta_schedule": "spacing"}
    given = {own: config[name] for name, own in names.items() if name in config}
    steps = config.get("num_train_timesteps", config.get("timesteps", 1000))
    return Schedule(**given, steps=steps)


def float64(numbers: Iterable[float]) -> Tensor:
    return torch.tensor(list(numbers), dtype=torch.float64)


def column_of(schedule: Schedule, prediction: str = "epsilon", scaling=None) -> Discrete:
    fields = dataclasses.asdict(schedule)
    return Discrete(**fields, prediction=prediction, timestep_scaling=scaling)


def denoiser_of(network: Network, column: Discrete) -> Denoiser:
    return Denoiser(network, DiscreteNoise.of(column.schedule), column.scalings)


def alphas_of(case: dict, dtype: torch.dtype) -> dict:
    config, index = case["config"], torch.tensor(case["inputs"]["index"])
    schedule = schedule_of(config)
    alphas, betas = map(float64, (schedule.alphas_cumprod(), schedule.betas()))
    if config.get("rescale_betas_zero_snr"):
        alphas = zero_terminal_snr(alphas)
        betas = 1 - alphas / torch.cat([alphas.new_ones(1), alphas[:-1]])
    known = {"betas": betas, "alphas_cumprod": alphas}
    return {name: known[name][index].to(dtype) for name in case["expect"]}


def boundary(case: dict, dtype: torch.dtype) -> dict:
    config = case["config"]
    return {
        str(t): dict(
            zip(
                ("c_skip", "c_out"),
                lcm_boundary(torch.tensor(t, dtype=dtype), **config),
                strict=True,
            )
        )
        for t in case["inputs"]["t"]
    }


def timesteps(schedule: Schedule, steps: int, grid: int, strength: float = 1.0) -> list[int]:
    """The steps that sampler `lcm` visits; a strength below 1 starts within the grid."""
    falling = DiscreteNoise.of(schedule).steps(grid + 1)[1:].flip(0).tolist()
    falling = falling[grid - int(grid * strength) :]
    return [falling[i] for i in lcm.skipped(len(falling), steps)]


def set_timesteps(case: dict, dtype: torch.dtype) -> dict:
    actual = {}
    for name in case["expect"]:
        given = re.fullmatch(r"n=(\d+),orig=(\d+),strength=([\d.]+)", name)
        assert given, f"unknown figure {name}"
        steps, grid, strength = int(given[1]), int(given[2]), float(given[3])
        actual[name] = timesteps(schedule_of(case["config"]), steps, grid, strength)
    return actual


class Limited(Denoiser):
    """A discrete denoiser whose estimate is limited before the boundary condition: what
    `clip_sample` and `thresholding` of the schedulers do."""

    def __init__(
        self,
        inner: Denoiser,
        column: Discrete,
        limit: Callable[[Tensor], Tensor],
        scaling: float,
    ):
        super().__init__(inner.network, inner.noise)
        self.inner, self.column, self.limit, self.scaling = inner, column, limit, scaling
        self.seen: list[tuple[Tensor, Tensor]] = []

    def forward(self, x, sigma, cond=None):
        x0 = self.limit(self.inner(x, sigma, Cond()))
        t = nearest(self.column.schedule, sigma)
        near, far = lcm_boundary(t.to(x.dtype), self.scaling)
        alpha = (1 + sigma**2).rsqrt()
        out = (near * alpha).view(-1, 1, 1, 1) * x + far.view(-1, 1, 1, 1) * x0
        self.seen.append((x, out))
        return out


def limit_of(config: dict) -> Callable[[Tensor], Tensor]:
    if config.get("thresholding"):
        ratio = config.get("dynamic_thresholding_ratio", 0.995)
        top = config.get("sample_max_value", 1.0)

        def limit(x0: Tensor) -> Tensor:
            s = torch.quantile(x0.abs().flatten(1), ratio, dim=1).clamp(1, top)
            s = s.view(-1, 1, 1, 1)
            return torch.maximum(torch.minimum(x0, s), -s) / s

        return limit
    if config.get("clip_sample"):
        bound = config.get("clip_sample_range", 1.0)
        return lambda x0: x0.clamp(-bound, bound)
    return lambda x0: x0


def lcm_steps(case: dict, dtype: torch.dtype) -> dict:
    config, inputs = case["config"], case["inputs"]
    assert inputs["noise"] == DRAWS
    schedule = schedule_of(config)
    scaling = config.get("timestep_scaling", 10.0)
    # The boundary is part of the column, unless the estimate is limited before it.
    limited = any(config.get(name) for name in ("clip_sample", "thresholding"))
    column = column_of(
        schedule, config.get("prediction_type", "epsilon"), None if limited else scaling
    )
    inner = denoiser_of(Formula(inputs["model"]), column)
    denoiser = Limited(inner, column, limit_of(config), scaling) if limited else Seen(inner)
    x_T = FIGURES.tensor(inputs["x_T"], dtype)
    steps, grid = config["num_inference_steps"], config.get("original_inference_steps", 50)
    sampler = lcm.LCM(steps=steps, grid=grid, clamp=False)
    visited = timesteps(schedule, steps, grid)
    alpha = float64(schedule.alphas_cumprod()).sqrt()

    def draw(k: int) -> Tensor:
        return FIGURES.Z(list(x_T.shape), k).to(dtype)

    sampler.sample(denoiser, x_T / alpha[visited[0]].item(), Cond(), draw)
    assert len(denoiser.seen) == sampler.nfe
    assert [t[0].item() for _, t in inner.network.seen] == visited
    actual = {}
    for k, t in enumerate(visited):
        x0 = denoiser.seen[k][1]
        last = k == steps - 1
        actual[str(t)] = {
            "prev_sample": x0 if last else alpha[visited[k + 1]].item() * denoiser.seen[k + 1][0],
            "denoised": x0,
        }
    return actual


class Seen(Denoiser):
    """A denoiser that remembers what it was given and what it gave."""

    def __init__(self, inner: Denoiser):
        super().__init__(inner.network, inner.noise)
        self.inner = inner
        self.seen: list[tuple[Tensor, Tensor]] = []

    def forward(self, x, sigma, cond=None):
        out = self.inner(x, sigma, cond or Cond())
        self.seen.append((x, out))
        return out


def add_noise(case: dict, dtype: torch.dtype) -> dict:
    """The noisy latent is alpha (x0 + sigma z); its velocity is what a network of v-prediction must
    say for the denoiser to find x0."""
    inputs = case["inputs"]
    column = column_of(schedule_of(case["config"]), "v_prediction")
    t = torch.tensor(inputs["t"])
    sigma = float64(column.schedule.sigmas())[t].to(dtype)
    assert torch.equal(nearest(column.schedule, sigma), t)
    c_skip, c_out, alpha, _ = (c.view(-1, 1, 1, 1) for c in column.scalings(sigma, 0.5, 0.0))
    x0 = FIGURES.tensor(inputs["x"], dtype)
    x = x0 + sigma.view(-1, 1, 1, 1) * FIGURES.tensor(inputs["noise"], dtype)
    return {"noisy": alpha * x, "velocity": (x0 - c_skip * x) / c_out}


def cm_noise(config: dict) -> tuple[Noise, Tensor]:
    """The axis, and the falling grid of the scheduler, float64."""
    axis = {name: config[name] for name in ("sigma_min", "sigma_max", "rho") if name in config}
    noise = Noise(**axis)
    return noise, noise.sigmas(config.get("num_train_timesteps", 40), dtype=torch.float64).flip(0)


def time_of(sigma: Tensor) -> Tensor:
    return 1000 * 0.25 * torch.log(sigma + 1e-44)


def cm_init(case: dict, dtype: torch.dtype) -> dict:
    noise, sigmas = cm_noise(case["config"])
    return {
        "sigmas": sigmas.to(dtype),
        "timesteps": time_of(sigmas).to(dtype),
        "init_noise_sigma": torch.tensor(noise.sigma_max, dtype=dtype),
    }


def in_float32(of: Callable[[np.float32], np.float32], sigma: float) -> float:
    """A coefficient as the scheduler has it: its levels are float32 scalars, also for a float64
    picture, and so is all that it computes of them."""
    return float(of(np.float32(sigma)))


class RoundedDenoiser(Denoiser):
    """Our denoiser with coefficients in float32, which must be almost the same."""

    def forward(self, x, sigma, cond=None):
        exact = super().forward(x, sigma, Cond())
        level, data, low = sigma[0].item(), self.sigma_data, self.noise.sigma_min
        root = in_float32(lambda s: np.sqrt(s**2 + data**2), level)
        c_skip = in_float32(lambda s: data**2 / ((s - low) ** 2 + data**2), level)
        c_out = in_float32(lambda s: (s - low) * data / np.sqrt(s**2 + data**2), level)
        t = 0.25 * torch.log(sigma + 1e-44)
        self.network.seen.pop()
        rounded = c_skip * x + c_out * self.network(x / root, t, Cond(), {})
        torch.testing.assert_close(rounded, exact, rtol=1e-6, atol=1e-6)
        return rounded


def cm_steps(case: dict, dtype: torch.dtype) -> dict:
    """Sampler `multistep` from the levels that the indices name on the falling grid."""
    config, inputs = case["config"], case["inputs"]
    assert inputs["noise"] == DRAWS
    scale = re.fullmatch(r"([\d.]+)\*Z\(shape, c=0\)", inputs["x_T"])
    assert scale, f"unknown start {inputs['x_T']}"
    noise, grid = cm_noise(config)
    if "timesteps" in config:
        indices = sorted(config["timesteps"])
    else:
        n = config["num_inference_steps"]
        indices = [k * (len(grid) // n) for k in range(n)]
    low, levels = (
        noise.sigma_min,
        [*grid[indices].float().tolist(), in_float32(abs, noise.sigma_min)],
    )
    network = Formula(inputs["model"], time_scale=1000.0)
    spied = Seen(
        RoundedDenoiser(network, noise, consistency_scalings, config.get("sigma_data", 0.5))
    )

    def added(level: float) -> float:
        return in_float32(lambda s: np.sqrt(np.maximum(s**2 - low**2, 0)), level)

    def draw(k: int) -> Tensor:
        """The k-th draw, as much longer as the scheduler's coefficient of it is by rounding."""
        z = FIGURES.Z(inputs["shape"], k).to(dtype)
        return z * (added(levels[k]) / (levels[k] ** 2 - low**2) ** 0.5)

    clamp = config.get("clip_denoised", True)
    sampler = Multistep(sigmas=tuple(levels[1:-1]), clamp=clamp)
    x_T = (float(scale[1]) * FIGURES.Z(inputs["shape"], 0)).to(dtype)
    out = sampler.sample(spied, x_T, Cond(), draw)
    assert len(network.seen) == sampler.nfe
    if sampler.nfe > 1:
        # Theirs draws also for the last level, where rounding may leave a little to add.
        out = out + added(levels[-1]) * FIGURES.Z(inputs["shape"], sampler.nfe).to(dtype)
    actual = {
        "sigmas": torch.tensor(levels, dtype=dtype),
        "timesteps": torch.stack([t[0] for _, t in network.seen]),
    }
    following = [x for x, _ in spied.seen[1:]] + [out]
    for k, ((scaled, _), x) in enumerate(zip(network.seen, following, strict=True)):
        actual[f"step{k}"] = {"scaled": scaled, "prev_sample": x}
    return actual


def cm_scalings(case: dict, dtype: torch.dtype) -> dict:
    noise, _ = cm_noise(case["config"])
    sigma = FIGURES.tensor(case["inputs"]["sigmas"], dtype)
    of = (sigma, case["config"].get("sigma_data", 0.5), noise.sigma_min)
    names = ("c_skip", "c_out")
    return {
        "plain": dict(zip(names, edm_scalings(*of)[:2], strict=True)),
        "boundary": dict(zip(names, consistency_scalings(*of)[:2], strict=True)),
        "timestep": time_of(sigma),
    }


def embedding(case: dict, dtype: torch.dtype) -> dict:
    w = FIGURES.tensor(case["inputs"]["w"], dtype)
    return {f"dim{dim}": guidance_waves(w, dim) for dim in case["inputs"]["dims"]}


def solver_of(config: dict) -> DiscreteNoise:
    return DiscreteNoise.of(schedule_of(config))


def ddim_solver(case: dict, dtype: torch.dtype) -> dict:
    noise = solver_of(case["config"])
    assert case["inputs"]["alpha_cumprods"] == "LCMScheduler().alphas_cumprod"
    n = case["config"]["ddim_timesteps"] + 1
    alphas = 1 / (1 + noise.sigmas(n, dtype=torch.float64) ** 2)
    return {
        "ddim_timesteps": noise.steps(n)[1:].tolist(),
        "alpha_cumprods": alphas[1:].to(dtype),
        "alpha_cumprods_prev": alphas[:-1].to(dtype),
    }


def ddim_step(case: dict, dtype: torch.dtype) -> dict:
    """Our Euler step from where these two estimates meet."""
    inputs = case["inputs"]
    sigmas = solver_of(case["config"]).sigmas(case["config"]["ddim_timesteps"] + 1, dtype=dtype)
    index = torch.tensor(inputs["index"])
    low, high = sigmas[index], sigmas[index + 1]
    x0, z = (FIGURES.tensor(inputs[k], dtype) for k in ("pred_x0", "pred_noise"))
    x = x0 + high.view(-1, 1, 1, 1) * z
    stepped = euler(lambda x, sigma, cond: x0, x, high, low)
    return {"x_prev": alpha_of(low) * stepped}


def alpha_of(sigma: Tensor) -> Tensor:
    return (1 + sigma**2).rsqrt().view(-1, 1, 1, 1)


class Given:
    """The draws of a case, in the place of an Rng."""

    device = torch.device("cpu")
    dropout_seed = 0

    def __init__(self, high: list[int], noise: Tensor, uniform: Tensor):
        self.high, self.noise, self.u = high, noise, uniform

    def integers(self, high, n):
        return torch.tensor(self.high)

    def normal_like(self, x):
        return self.noise

    def uniform(self, n):
        return self.u


def distillation(case: dict, dtype: torch.dtype) -> dict:
    """Objective `lcm` on all steps of the schedule, k at a time. On the grid of only every k-th
    step it says the same."""
    config, inputs = case["config"], case["inputs"]
    assert case["note"] == "guidance: cond + w*(cond - uncond)"
    total, parts = Schedule().steps, config["num_ddim_timesteps"]
    skip = total // parts
    ends = [(i + 1) * skip - 1 for i in inputs["index"]]
    whole = distilled(case, dtype, LCM(num_sigmas=total, skip=skip), ends)
    coarse = LCM(num_sigmas=parts + 1, skip=1)
    harness.compare(
        distilled(case, dtype, coarse, [i + 1 for i in inputs["index"]]), case["expect"], dtype
    )
    return whole


def distilled(case: dict, dtype: torch.dtype, objective: LCM, points: list[int]) -> dict:
    """What a step of training sees and says that starts at these points of the objective's grid."""
    config, inputs = case["config"], case["inputs"]
    student, _, also = inputs["student"].partition(" (")
    assert also == "also the target network)"
    prediction = config["prediction_type"]
    columns = [Discrete(prediction=prediction, timestep_scaling=config["timestep_scaling"])] * 2
    columns.append(Discrete(prediction=prediction))
    networks = [Formula(student), Formula(student)]
    networks.append(Formula(inputs["teacher_cond"], inputs["teacher_uncond"]))
    online, target, teacher = (
        Seen(denoiser_of(network, column))
        for network, column in zip(networks, columns, strict=True)
    )
    latents = FIGURES.tensor(inputs["latents"], dtype)
    drawn = FIGURES.tensor(inputs["noise"], dtype), FIGURES.tensor(inputs["w"], dtype)
    cond = Cond(label=torch.zeros(len(latents), dtype=torch.int64))
    options = {**objective.model_dump(), "w_min": 0.0, "w_max": 1.0, "huber_c": config["huber_c"]}
    losses = {}
    for name in ("l2", "huber"):
        exact = LCM(**{**options, "distance": name})
        rng = Given([point - 1 for point in points], *drawn)
        loss = exact.loss(Models(online, target, teacher), latents, cond, exact.phase(0, 1), rng)
        losses[f"loss_{name}"] = loss.mean()
    (x_vp, t), (_, t_teacher), (x_vp_low, t_low) = (networks[k].seen[0] for k in (0, 2, 1))
    assert torch.equal(t, t_teacher)
    return {
        "start_timesteps": t.int().tolist(),
        "timesteps": t_low.int().tolist(),
        "noisy": x_vp,
        "model_pred": online.seen[0][1],
        "x_prev": x_vp_low,
        "target": target.seen[0][1],
        **losses,
    }


FUNCTIONS = {
    "LCMScheduler.__init__ (scaled_linear)": alphas_of,
    "rescale_zero_terminal_snr": alphas_of,
    "LCMScheduler.get_scalings_for_boundary_condition_discrete": boundary,
    "LCMScheduler.set_timesteps": set_timesteps,
    "LCMScheduler.step": lcm_steps,
    "LCMScheduler.add_noise / get_velocity": add_noise,
    "CMStochasticIterativeScheduler.__init__": cm_init,
    "CMStochasticIterativeScheduler.set_timesteps / scale_model_input / step": cm_steps,
    "CMStochasticIterativeScheduler.get_scalings / get_scalings_for_boundary_condition"
    " / sigma_to_t": cm_scalings,
    "guidance_scale_embedding(w, embedding_dim) of examples/consistency_distillation (identical to"
    " the LCM pipelines)": embedding,
    "DDIMSolver.__init__": ddim_solver,
    "DDIMSolver.ddim_step(pred_x0, pred_noise, timestep_index)": ddim_step,
    "train_lcm_distill_sd_wds.py, steps 2-10 of the training loop, assembled from its helper"
    " functions with analytic networks": distillation,
}
BY_ELEMENT = {alphas_of, boundary, cm_scalings}
"""Whose arrays span decades."""


@BOTH
@pytest.mark.parametrize("name", FIGURES.read_by(FUNCTIONS))
@torch.no_grad()
def test_our_parts_compute_the_official_function(name, dtype, record_property):
    case = FIGURES.cases[name]
    compute = harness.function_of(case, FUNCTIONS)
    actual = FIGURES.compute(name, compute, dtype)
    worst = harness.compare(actual, case["expect"], dtype, elementwise=compute in BY_ELEMENT)
    record_property("parity", (FIGURES.name, str(dtype), worst))
