"""Our objectives and our training loop reproduce the figures of openai/consistency_models."""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cmkit_std.backbones.adm.openai import from_openai, to_openai
from cmkit_std.objectives.cd import CD
from cmkit_std.objectives.ct import CT
from cmkit_std.objectives.pd import PD

import cmkit.train.loop
from cmkit import (
    Cond,
    Denoiser,
    Models,
    Noise,
    Objective,
    Phase,
    consistency_scalings,
    edm_scalings,
)
from cmkit.denoiser import Scaling
from cmkit.recipe import TrainTable
from cmkit.train.optimizer import optimizer_of
from tests.parity import harness
from tests.parity.test_openai_unet import data_of, options_of

FIGURES = harness.Figures("openai_losses.json")
BOTH = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
ROLES = {"student": "online", "target": "target", "teacher": "teacher"}
AS_ABOVE = "student: prefix ''; target: prefix 'target/'; teacher: prefix 'teacher/'"


class GivenDraws:
    """Stands for cmkit.Rng with given noise, and given indices of a grid that falls."""

    def __init__(self, noise: torch.Tensor, indices: torch.Tensor):
        self.noise, self.indices = noise, indices
        self.device, self.dropout_seed = noise.device, 0

    def normal_like(self, x: torch.Tensor) -> torch.Tensor:
        assert x.shape == self.noise.shape
        return self.noise

    def integers(self, high: int, n: int) -> torch.Tensor:
        assert n == len(self.indices)
        assert 0 <= self.indices.min() <= self.indices.max() < high
        return high - 1 - self.indices


def formula(text: str, case: dict, **names: Any) -> torch.Tensor:
    """The value of a formula in a case's inputs, such as "(5*arange(4)+2) % (num_scales-1)"."""
    given = {name: case["inputs"].get(name) for name in ("shape", "y0")}
    given["y0"] = given["y0"] and torch.tensor(given["y0"])
    known = {"X": FIGURES.X, "Z": FIGURES.Z, "arange": torch.arange, **FIGURES.constants}
    told = {
        name: case["config"][name] for name in re.findall(r"\w+", text) if name in case["config"]
    }
    return eval(text.removeprefix("step k: "), {**known, **given, **told, **names})


def prefixes_of(case: dict) -> dict[str, str]:
    """The prefix of each network's weights."""
    text = case["inputs"]["weights"]
    found = {}
    for clause in (AS_ABOVE if text == "as above" else text).split(";"):
        who, prefix = re.fullmatch(r"(.*)prefix '(.*)'", clause.strip()).groups()
        found |= dict.fromkeys(re.findall("student|target|teacher", who), prefix)
    assert "student" in found, text
    return found


def denoiser_of(case: dict, scalings: Scaling, prefix: str, dtype: torch.dtype) -> Denoiser:
    """The case's network with its formula-filled weights, as a denoiser."""
    config, net = case["config"], case["config"]["net"]
    options = options_of(net).model_copy(update={"time_scale": 1000.0})
    network = options.build(*data_of(net)).to(dtype)
    shapes = {key: tuple(t.shape) for key, t in to_openai(network.state_dict()).items()}
    network.load_state_dict(from_openai(FIGURES.weights(shapes, dtype, prefix)))
    levels = {name: config[name] for name in ("sigma_min", "sigma_max", "rho") if name in config}
    return Denoiser(network, Noise(**levels), scalings, config.get("sigma_data", 0.5))


def models_of(case: dict, dtype: torch.dtype, distils: bool, ema: tuple[float, ...] = ()) -> Models:
    """The networks of a case; the student of progressive distillation is a diffusion model."""
    distilled = case["config"].get("distillation", True)
    scalings = consistency_scalings if distilled else edm_scalings
    prefixes = prefixes_of(case)
    online = denoiser_of(case, scalings, prefixes["student"], dtype)
    target = denoiser_of(case, scalings, prefixes["target"], dtype).requires_grad_(False)
    teacher = denoiser_of(case, edm_scalings, prefixes["teacher"], dtype) if distils else None
    copies = {decay: copy.deepcopy(online).requires_grad_(False) for decay in ema}
    if teacher:
        teacher.eval().requires_grad_(False)
    return Models(online, target, teacher, copies)


def watch(models: Models) -> dict[str, dict[str, Any]]:
    """A dict that fills with every denoiser evaluation, in order."""
    calls: dict[str, dict[str, Any]] = {}
    for name, role in ROLES.items():

        def note(_module, args, out, name=name):
            x, sigma = args[0], args[1]
            call = {"model": name, "sigma": sigma, "x": x, "denoised": out}
            calls[str(len(calls))] = call

        if getattr(models, role) is not None:
            getattr(models, role).register_forward_hook(note)
    return calls


def objective_of(case: dict) -> Objective:
    """The objective of a single loss."""
    config = case["config"]
    common = {"distance": config["loss_norm"], "weighting": config["weight_schedule"]}
    if "progdist_losses" in case["function"]:
        return PD(**common)
    if not config["teacher"]:
        return CT(**common)
    return CD(**common, solver="euler" if "euler_solver" in case["function"] else "heun")


def single_loss(case: dict, dtype: torch.dtype) -> dict:
    config, inputs = case["config"], case["inputs"]
    objective = objective_of(case)
    models = models_of(case, dtype, config["teacher"])
    calls = watch(models)
    x0 = FIGURES.tensor(inputs["x_start"], dtype)
    cond = harness.cond_of(case)
    indices = formula(inputs["indices"], case)
    scales = config["num_scales"]
    phase = Phase(0, 2 * scales + 1 if isinstance(objective, PD) else scales)
    draws = GivenDraws(FIGURES.tensor(inputs["noise"], dtype), indices)
    loss = objective.loss(models, x0, cond, phase, draws)
    loss.mean().backward()
    grads = {name: p.grad for name, p in models.online.network.named_parameters()}
    assert all(grad is not None for grad in grads.values())
    grads = to_openai(grads)
    return {
        "loss": loss,
        "loss_mean": loss.mean(),
        "indices": indices.tolist(),
        "grad_norm": {name: grads[name].norm() for name in case["expect"]["grad_norm"]},
        "grad_norm_total": torch.stack([grad.norm() for grad in grads.values()]).norm(),
        "grad_input_conv": grads["input_blocks.0.0.weight"],
        "denoise_calls": calls,
    }


def scheduled(case: dict) -> Objective:
    """The objective of a training loop with the official schedule."""
    config, schedule = case["config"], case["config"]["schedule"]
    common = {"distance": config["loss_norm"], "weighting": config["weight_schedule"]}
    s0, s1, mu0 = (schedule[name] for name in ("start_scales", "end_scales", "start_ema"))
    schedule.ignore("distill_steps_per_iter")  # of progressive distillation
    adaptive = {"adaptive": True, "fixed": False}[schedule["target_ema_mode"]]
    grows = {"progressive": True, "fixed": False}[schedule["scale_mode"]]
    if "teacher" in case["inputs"]["weights"]:
        return CD(
            **common,
            num_sigmas=s0,
            end_scales=s1 if grows else None,
            target_ema=mu0,
            adaptive_ema=adaptive,
        )
    return CT(
        **common,
        start_scales=s0,
        end_scales=s1,
        num_sigmas=None if grows else s0,
        start_ema=mu0,
        target_ema=None if adaptive else mu0,
    )


class Recorded:
    """An objective that keeps its phases and losses."""

    def __init__(self, objective: Objective):
        self.objective, self.phases, self.losses = objective, [], []

    def phase(self, step: int, total: int) -> Phase:
        self.phases.append(self.objective.phase(step, total))
        return self.phases[-1]

    def loss(self, *arguments: Any) -> torch.Tensor:
        loss = self.objective.loss(*arguments)
        self.losses.append(loss.detach())
        return loss


def ema_rates(config: Mapping[str, Any]) -> tuple[float, ...]:
    return tuple(float(rate) for rate in config["ema_rate"].split(","))


def optimizer_as_theirs(
    config: Mapping[str, Any], steps: int, network: torch.nn.Module
) -> tuple[TrainTable, torch.optim.Optimizer]:
    """The [train] table of an official loop, and its optimizer with the decay of weights as there:
    of torch's RAdam it is part of the gradient unless told; ours never is."""
    kind = config.get("optimizer", "RAdam")
    table = TrainTable(
        steps=steps,
        batch=config["batch"],
        lr=config["lr"],
        ema=ema_rates(config),
        precision="fp32",
        optimizer=kind.lower(),
        weight_decay=config["weight_decay"],
    )
    optimizer = optimizer_of(table, network)
    for group in optimizer.param_groups:
        assert group["decoupled_weight_decay"]
        group["decoupled_weight_decay"] = config.get("decoupled_weight_decay", kind == "AdamW")
    return table, optimizer


def train_loop(case: dict, dtype: torch.dtype) -> dict:
    """The training loop of cmkit itself, with given batches and draws."""
    config, inputs = case["config"], case["inputs"]
    objective = Recorded(scheduled(case))
    models = models_of(case, dtype, "teacher" in inputs["weights"], ema_rates(config))
    total = config["schedule"]["total_steps"]
    table, optimizer = optimizer_as_theirs(config, total, models.online.network)

    def batches(size, seed, device, start=0):
        for k in itertools.count(start):
            names = {"k": k, "num_classes": config["net"]["num_classes"]}
            label = formula(inputs["y"], case, **names) if inputs.get("y") else None
            yield formula(inputs["batch"], case, **names).to(dtype), Cond(label=label)

    def draws(seed, purpose, k, device):
        scales = objective.phases[k].num_sigmas
        indices = formula(inputs["indices"], case, num_scales=lambda _: scales, k=k)
        return GivenDraws(formula(inputs["noise"], case, k=k).to(dtype), indices)

    plain = {"codec": None, "text": None, "train": table}
    recipe = SimpleNamespace(
        objective=objective, seed=0, dataset=SimpleNamespace(batches=batches), **plain
    )
    training = cmkit.train.Training(
        SimpleNamespace(recipe=recipe),
        table,
        torch.device("cpu"),
        models,
        optimizer,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cmkit.train.loop, "Rng", draws)
        for _ in itertools.islice(cmkit.train.train(training), config["steps"]):
            pass
    ends = {"student": models.online, "target": models.target}
    ends |= {f"ema_{rate}".replace(".", "_"): ema for rate, ema in models.ema.items()}
    return {
        "loss_per_step": {str(k): loss for k, loss in enumerate(objective.losses)},
        "schedule": [[float(f"{p.target_ema:.9g}"), p.num_sigmas] for p in objective.phases],
        **{name: weights_of(ends[name], case["expect"][name]) for name in ends},
    }


def weights_of(denoiser: Denoiser, wanted: dict) -> dict[str, torch.Tensor]:
    state = to_openai(denoiser.network.state_dict())
    return {name: state[name] for name in wanted}


FUNCTIONS = {
    "KarrasDenoiser.consistency_losses": single_loss,
    "KarrasDenoiser.consistency_losses with its own euler_solver substituted for heun_solver"
    " (derived: the official CD always uses Heun)": single_loss,
    "KarrasDenoiser.progdist_losses": single_loss,
    "cm.train_util.CMTrainLoop.run_step repeated (RAdam, EMA, target update)": train_loop,
}


@BOTH
@pytest.mark.parametrize("name", FIGURES.read_by(FUNCTIONS))
def test_training_computes_the_official_figures(name, dtype, record_property):
    case = FIGURES.cases[name]
    actual = FIGURES.compute(name, harness.function_of(case, FUNCTIONS), dtype)
    worst = harness.compare(actual, case["expect"], dtype)
    record_property("parity", (FIGURES.name, str(dtype), worst))


@pytest.mark.parametrize(
    ("config", "apart"),
    [({}, False), ({"decoupled_weight_decay": True}, True), ({"optimizer": "AdamW"}, True)],
    ids=str,
)
def test_weight_decay_is_part_of_the_gradient_or_apart_as_the_config_says(config, apart):
    """Without a gradient, what is apart shrinks weights by 1 - lr decay a step; what is part of the
    gradient RAdam divides by its own size, from the sixth step on."""
    network = torch.nn.Linear(1, 1, bias=False, dtype=torch.float64)
    given = {"lr": 0.01, "weight_decay": 0.1, "ema_rate": "0.5", "batch": 1, **config}
    _, optimizer = optimizer_as_theirs(given, 8, network)
    before = network.weight.item()
    for _ in range(8):
        network.weight.grad = torch.zeros_like(network.weight)
        optimizer.step()
    shrunk = network.weight.item() / before
    assert (shrunk == pytest.approx((1 - 0.01 * 0.1) ** 8, rel=1e-9)) is apart
