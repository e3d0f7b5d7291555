"""Our networks, trajectory models, objective and samplers reproduce the figures of sony/ctm.

Its grids fall, ours rise. Three SongUNets of the same file are in test_edm.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from cmkit_std.backbones.adm import ADM
from cmkit_std.backbones.adm.network import UNet
from cmkit_std.backbones.adm.openai import from_openai, to_openai
from cmkit_std.objectives import distances
from cmkit_std.objectives.ctm import CTM, gradient_norm, gradient_ratio
from cmkit_std.objectives.weightings import weighting
from cmkit_std.preconds.iddpm import IDDPM
from cmkit_std.preconds.vp import VP
from cmkit_std.samplers.euler import Euler
from cmkit_std.samplers.gamma import Gamma
from cmkit_std.samplers.heun import Heun
from cmkit_std.samplers.multistep import Multistep
from cmkit_std.samplers.steps import falling
from cmkit_std.trajectory import denoised, jump, kept_share
from torch import Tensor

from cmkit import (
    Cond,
    DataSpec,
    Denoiser,
    Models,
    Network,
    Noise,
    Phase,
    consistency_scalings,
    edm_scalings,
)
from cmkit.denoiser import NO_COND
from tests.parity import harness, test_edm
from tests.parity.test_openai_unet import data_of, options_of

FIGURES = harness.Figures("ctm.json")
BOTH = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
INNER = {"edm": edm_scalings, "cm": consistency_scalings}
AXIS = ("sigma_min", "sigma_max", "rho")


def known(config: dict, *names: str) -> None:
    assert config.keys() <= set(names), f"unknown options {set(config) - set(names)}"


def tensor(case: dict, name: str, dtype: torch.dtype) -> Tensor:
    return FIGURES.tensor(case["inputs"][name], dtype)


def unet(config: dict, dtype: torch.dtype, prefix: str = "", sigma_to: bool = True) -> UNet:
    """The ADM of an official configuration, with its formula-filled weights."""
    options = options_of(config).model_copy(update={"time_scale": 1000.0})
    data, conditions = data_of(config)
    network = options.build(data, conditions | ({"sigma_to"} if sigma_to else set())).to(dtype)
    shapes = {key: tuple(t.shape) for key, t in to_openai(network.state_dict()).items()}
    network.load_state_dict(from_openai(FIGURES.weights(shapes, dtype, prefix)))
    return network.eval()


def net_of(case: dict) -> harness.Config:
    """The network of a case; of one that names none it is "the net above", the file's first."""
    if "net" in case["config"]:
        return case["config"]["net"]
    every = (other["config"] for other in FIGURES.cases.values())
    named = next((config["net"] for config in every if "net" in config), None)
    assert named, "no case names a network"
    return harness.Config(named)


def noisy(case: dict, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(x_t, t)."""
    assert case["inputs"]["x_t"] == "X(shape) + t*Z(shape, c=0)"
    shape, t = case["inputs"]["shape"], tensor(case, "t", dtype)
    z = FIGURES.Z(shape, 0).to(dtype)
    return FIGURES.X(shape).to(dtype) + t.view(-1, 1, 1, 1) * z, t


def rescaled(case: dict) -> tuple[str, str]:
    inputs = case["inputs"]
    names = ("timesteps", "s") if "timesteps" in inputs else ("rescaled_t", "rescaled_s")
    assert [inputs[name] for name in names] == ["250*ln(t), rounded to float32", "250*ln(s)"]
    return names


def adm_forward(case: dict, dtype: torch.dtype) -> dict:
    rescaled(case)
    network, cond = unet(case["config"], dtype), harness.cond_of(case)
    x = tensor(case, "x", dtype)
    t, s = (test_edm.unscaled(case["inputs"][name], dtype) for name in ("t", "s_sigma"))
    state = to_openai(network.state_dict())
    return {
        "params": sum(p.numel() for p in network.parameters()),
        "state_dict": {key: list(t.shape) for key, t in state.items()},
        "out": network(x, 0.25 * t.log(), replace(cond, sigma_to=0.25 * s.log()), {}),
        "out_without_s": network(x, 0.25 * t.log(), cond, {}),
    }


def dhariwal_forward(case: dict, dtype: torch.dtype) -> dict:
    rescaled(case)
    config = dict(case["config"])
    fixed = {"model_type": "DhariwalUNet", "arch": "adm", "training_mode": "ctm"}
    assert {name: config.pop(name) for name in fixed} == fixed
    assert config.pop("sigma_data") == 0.5  # the figure is of F alone
    sizes = (config.pop(name) for name in ("img_channels", "img_resolution", "label_dim"))
    data = DataSpec(*sizes)
    labelled = {"label"} if data.num_classes else set()
    options = ADM(
        channels=config.pop("model_channels"),
        channel_mult=config.pop("channel_mult"),
        num_res_blocks=config.pop("num_blocks"),
        attention_resolutions=config.pop("attn_resolutions"),
        num_head_channels=64,
        resblock_updown=True,
        norm_channels=4,
        time_scale=1.0,
        label_sigma_to=True,
    )
    known(config)
    (layout,) = (layout for layout in options.layouts(data) if layout.name == "edm")
    network = options.build(data, frozenset({"sigma_to"} | labelled)).to(dtype).eval()
    state = layout.write(network.state_dict())
    shapes = {k: tuple(t.shape) for k, t in state.items() if not k.endswith("resample_filter")}
    weights = FIGURES.weights(shapes, dtype)
    assert layout.matches(weights)
    network.load_state_dict(layout.read(weights))
    t, s = (test_edm.unscaled(case["inputs"][name], dtype) for name in ("t", "s_sigma"))
    cond = replace(harness.cond_of(case), sigma_to=0.25 * s.log())
    return {
        "params": sum(p.numel() for p in network.parameters()),
        "state_dict": {key: list(t.shape) for key, t in state.items()},
        "out": network(tensor(case, "x", dtype), 0.25 * t.log(), cond, {}),
    }


def scalings(case: dict, dtype: torch.dtype) -> dict:
    config = case["config"]
    t, s = tensor(case, "t", dtype), tensor(case, "s", dtype)
    data, low = config["sigma_data"], config["sigma_min"]
    seen = {}

    class Spy(Network):
        def forward(self, x, c_noise, cond, scales):
            seen["c_in"], seen["rescaled_t"] = x.flatten(), 1000 * c_noise
            return torch.zeros_like(x)

    Denoiser(Spy(), Noise(low), edm_scalings, data)(t.new_ones(len(t), 1, 1, 1), t)
    inner = {name: ours(t, data, low)[:2] for name, ours in INNER.items()}
    inner["no"] = raw_scalings(t)
    outer = {
        name: {"c_skip": kept_share(name, t, s, data, low), "c_out": 1 - s / t}
        for name in case["expect"]["outer"]
    }
    weights = {}
    for name in case["expect"]["weightings"]:
        if power := re.fullmatch(r"uniform_g_mult(.*)_where_s<t", name):
            i = case["inputs"]["uniform_g_indices"]
            weights[name] = CTM(gap_power=float(power[1])).weight(t[i], s[i], data)
        else:
            ours = {"karras_weight": "karras"}.get(name, name)
            weights[name] = weighting(ours, t, data)
    return {
        **seen,
        "inner": {k: {"c_skip": skip, "c_out": out} for k, (skip, out) in inner.items()},
        "outer": outer,
        "weightings": weights,
    }


def raw_scalings(sigma: Tensor, *_: float) -> tuple[Tensor, Tensor]:
    """The official inner parametrization "no": g is the network's output."""
    return torch.zeros_like(sigma), torch.ones_like(sigma)


class Raw(Denoiser):
    """g = F."""

    def forward(self, x, sigma, cond=NO_COND):
        skip, out = (c.view(-1, 1, 1, 1) for c in raw_scalings(sigma))
        c_in = (sigma**2 + self.sigma_data**2).rsqrt().view(-1, 1, 1, 1)
        cond = replace(cond, sigma_to=0.25 * cond.sigma_to.log())
        return skip * x + out * self.network(c_in * x, 0.25 * sigma.log(), cond, {})


class Corrected(Network):
    """The official option target_subtract: the network says what its frozen teacher lacks."""

    def __init__(self, network: Network, teacher: Network, rescaling: bool):
        super().__init__()
        self.inner, self.teacher, self.rescaling = network, teacher, rescaling

    def forward(self, x, c_noise, cond, scales):
        out = self.inner(x, c_noise, cond, scales)
        if self.rescaling:
            t = (4 * c_noise).exp()
            s = (4 * cond.sigma_to).exp()
            out = out * ((t**2 - s**2).sqrt() / t).view(-1, 1, 1, 1)
        return out + self.teacher(x, c_noise, Cond(label=cond.label), scales)


def trajectory(case: dict, dtype: torch.dtype) -> dict:
    config = dict(case["config"])
    net = net_of(case)
    config.pop("net", None)
    outer = config.pop("outer_parametrization", "euler")
    inner = config.pop("inner_parametrization", "edm")
    levels = {"sigma_min": config.pop("sigma_min", 0.002)}
    sigma_data = config.pop("sigma_data", 0.5)
    if "model_type" in net:
        with_s = harness.Config({**net, "training_mode": "ctm"})
        network = test_edm.filled_network(case, dtype, with_s)
        assert not list(with_s.unread())
    else:
        network = unet(net, dtype)
    if "target_subtract=True" in case["function"]:
        assert config.pop("weights") == "student '', teacher 'teacher/'"
        teacher = unet(net, dtype, "teacher/", sigma_to=False)
        network = Corrected(network, teacher, config.pop("rescaling"))
    known(config)
    kind = Raw if inner == "no" else Denoiser
    denoiser = kind(network, Noise(**levels), INNER.get(inner, edm_scalings), sigma_data)
    (x, t), s = noisy(case, dtype), tensor(case, "s", dtype)
    cond = harness.cond_of(case)
    return {
        "denoised": denoised(denoiser, x, t, replace(cond, sigma_to=s), outer),
        "G": jump(denoiser, x, t, s, cond, outer),
    }


def consistency(case: dict, dtype: torch.dtype) -> dict:
    (x, t), s = noisy(case, dtype), tensor(case, "s", dtype)
    denoiser = Denoiser(unet(net_of(case), dtype))
    return {"denoised": denoiser(x, t, replace(harness.cond_of(case), sigma_to=s))}


def teacher(case: dict, dtype: torch.dtype) -> dict:
    case["config"].ignore("training_mode")
    prefix = re.fullmatch(r"prefix '(.*)'", case["config"]["weights"])
    x, t = noisy(case, dtype)
    network = unet(net_of(case), dtype, prefix[1], sigma_to=False)
    return {"denoised": Denoiser(network, scalings=edm_scalings)(x, t, harness.cond_of(case))}


DEFAULTS = {
    "scale_mode": "fixed",
    "target_ema_mode": "fixed",
    "time_continuous": False,
    "num_heun_step_random": True,
    "heun_step_strategy": "weighted",
    "heun_step_multiplier": 1.0,
    "sample_s_strategy": "uniform",
    "ctm_estimate_outer_type": "target_model_sg",
    "ctm_estimate_inner_type": "model",
    "ctm_target_inner_type": "model_sg",
    "outer_parametrization": "euler",
    "inner_parametrization": "edm",
    "diffusion_schedule_sampler": "halflognormal",
    "consistency_weight": 1.0,
    "training_mode": "ctm",
}
"""What our objective is."""
OF_THE_RUN = {"ema_rate", "lr", "global_batch_size", "sigma_data"}
ADVERSARIAL = {"gan_num_heun_step", "discriminator_weight"}


def schedule(case: dict, dtype: torch.dtype) -> dict:
    config = dict(case["config"])
    assert {name: config.pop(name) for name in DEFAULTS} == DEFAULTS
    noise = Noise(*(float(config.pop(name)) for name in AXIS))
    n = config.pop("start_scales")
    assert config.pop("end_scales") == n
    objective = CTM(num_sigmas=n, distance="l2")
    phase = objective.phase(0, 1)
    assert phase.num_sigmas == n
    assert config.pop("start_ema") == phase.target_ema
    assert config.pop("num_heun_step") == len(objective.gap_weights(n))
    assert config.pop("diffusion_mult") == objective.grid_share
    assert config.pop("diffusion_weight_schedule") == f"{objective.dsm_weighting}_weight"
    assert config.pop("weight_schedule") == objective.weighting
    assert config.pop("denoising_weight") == objective.dsm_weight
    assert config.pop("apply_adaptive_weight") == objective.dsm_adaptive
    known(config, *OF_THE_RUN, *ADVERSARIAL)
    assert case["inputs"]["indices"] == f"0..{n - 1}"
    weights = objective.gap_weights(n)
    return {
        "t": noise.sigmas(n, dtype=dtype).flip(0),
        "t_continuous": noise.sigma_at(1 - tensor(case, "continuous", torch.float64)).to(dtype),
        "heun_step_probability": (weights / weights.sum()).to(dtype),
    }


class GivenDraws:
    """Stands for cmkit.Rng: draws of each kind come from lists, in order."""

    def __init__(self, **draws: list[Tensor]):
        self.draws = draws
        self.device, self.dropout_seed = torch.device("cpu"), 0

    def _next(self, kind: str, n: int) -> Tensor:
        value = self.draws[kind].pop(0)
        assert len(value) == n
        return value

    @property
    def host(self) -> GivenDraws:
        return self

    def normal_like(self, x: Tensor) -> Tensor:
        return self._next("normal", len(x)).view(x.shape)

    def uniform(self, n: int) -> Tensor:
        return self._next("uniform", n)

    def integers(self, high: int, n: int) -> Tensor:
        value = self._next("integers", n)
        assert 0 <= value.min() <= value.max() < high
        return value

    def choice(self, weights: Tensor, n: int) -> Tensor:
        value = self._next("choice", n)
        assert value.max() < len(weights)
        return value


def half_lognormal(case: dict, dtype: torch.dtype) -> dict:
    config, inputs = dict(case["config"]), case["inputs"]
    batch = config.pop("batch")
    share = config.pop("diffusion_mult")
    objective = CTM(grid_share=share, distance="l2", **config)
    assert inputs["randn"] == "Z([bs//2], c=0)"
    assert inputs["rand"] == "U([bs - bs//2], c=1)"
    half = batch // 2
    draws = GivenDraws(
        normal=[FIGURES.Z([half], 0).to(dtype)], uniform=[FIGURES.U([batch - half], 1).to(dtype)]
    )
    sigmas = objective.noise_levels(Noise(), torch.zeros(batch, 1, 1, 1, dtype=dtype), draws)
    return {"sigmas": sigmas, "weights": torch.ones_like(sigmas)}  # none there, none here


class Training:
    """The networks, the draws and the objective of a case."""

    def __init__(self, case: dict, dtype: torch.dtype):
        config, inputs = dict(case["config"]), case["inputs"]
        net = config.pop("net")
        assert config.pop("training_mode") == "ctm"
        assert config.pop("ctm_target_inner_type") == "model_sg"
        assert inputs["weights"].startswith("model '', target 'target/', teacher 'teacher/'")
        assert inputs["weights"].endswith("(teacher without s layers)")
        self.num_sigmas = config.pop("start_scales")
        adaptive = config.pop("apply_adaptive_weight")
        self.objective = CTM(num_sigmas=self.num_sigmas, dsm_adaptive=adaptive)
        self.rest = config
        target = unet(net, dtype, "target/").requires_grad_(False)
        teacher = unet(net, dtype, "teacher/", sigma_to=False).requires_grad_(False)
        online = Denoiser(unet(net, dtype), scalings=edm_scalings)
        self.models = Models(
            online,
            Denoiser(target, scalings=edm_scalings),
            Denoiser(teacher, scalings=edm_scalings),
        )
        self.x0, self.z = tensor(case, "x_start", dtype), tensor(case, "noise", dtype)
        self.cond, self.gap = harness.cond_of(case), inputs["num_heun_step"]
        last = self.num_sigmas - 1
        self.t, self.s = (last - torch.tensor(inputs[f"indices_{name}"]) for name in "ts")
        self.u = self.t - self.gap
        self.sigmas = online.noise.sigmas(self.num_sigmas, dtype=dtype)

    def draws(self) -> GivenDraws:
        return GivenDraws(
            choice=[torch.tensor([self.gap - 1])],
            integers=[self.u],
            uniform=[(self.s + 0.5) / (self.u + 1)],
            normal=[self.z],
        )


def mean_square(net: str, weights: str | None, device: torch.device) -> Callable:
    """Stands for LPIPS of images in [-1, 1]: the mean squared difference of those in [0, 1]."""
    return lambda a, b: ((a - b) / 2).square().flatten(1).mean(1)


def instead_of_lpips(case: dict, patch: pytest.MonkeyPatch) -> None:
    assert case["inputs"]["metric"] == (
        "feature extractor replaced by per-sample mean((a-b)^2) on images mapped to [0,1] and"
        " resized bilinearly to 224"
    )
    patch.setattr(distances, "_lpips", mean_square)


def targets(case: dict, dtype: torch.dtype, patch: pytest.MonkeyPatch) -> dict:
    """What the objective compares, and how it came there, as seen from outside."""
    training = Training(case, dtype)
    known(training.rest)
    calls: dict[str, list[tuple]] = {"online": [], "target": [], "teacher": []}
    for name, seen in calls.items():

        def note(_module, args, out, seen=seen):
            x, sigma, cond = args
            seen.append((x, sigma, cond.sigma_to, out))

        getattr(training.models, name).register_forward_hook(note)
    compared = []

    def lpips(a, b, *_options):
        compared.extend((a, b))
        return distances.l1(a, b)

    patch.setattr(distances, "lpips", lpips)
    phase = Phase(0, training.num_sigmas)
    objective = training.objective.model_copy(update={"dsm_weight": 0.0})
    objective.loss(training.models, training.x0, training.cond, phase, training.draws())
    (_, t, s, _), (x_u, u, again, _) = calls["online"]
    assert torch.equal(s, again)
    assert len(calls["teacher"]) == 2 * training.gap
    (inner, from_s, low, _), _ = calls["target"]
    assert torch.equal(from_s, s)
    assert torch.equal(low, training.sigmas[:1].expand(len(s)))
    estimate, target = compared
    return {
        "t": t,
        "t_dt": u,
        "s": s,
        "x_t_dt": x_u,
        "estimate_inner": inner,
        "estimate": estimate,
        "target": target,
    }


def self_learned(case: dict, dtype: torch.dtype) -> dict:
    """The official trial without a teacher: the target's own jumps solve the ODE."""
    training = Training(case, dtype)
    config = dict(training.rest)
    assert config.pop("self_learn")
    steps = range(training.gap) if config.pop("self_learn_iterative") else [0]
    known(config)
    stride = training.gap // len(steps)
    x = training.x0 + training.sigmas[training.t].view(-1, 1, 1, 1) * training.z
    for k in steps:
        high = training.sigmas[training.t - k]
        low = training.sigmas[training.t - k - stride]
        x = jump(training.models.target, x, high, low, training.cond)
    return {"x_t_dt": x}


def losses(case: dict, dtype: torch.dtype, patch: pytest.MonkeyPatch) -> dict:
    training, inputs = Training(case, dtype), case["inputs"]
    known(training.rest)
    instead_of_lpips(case, patch)
    objective, models, noise = training.objective, training.models, training.models.online.noise
    sigmas = tensor(case, "dsm_sigmas", torch.float64)
    half = len(sigmas) // 2
    ends = noise.sigmas(2, dtype=torch.float64) ** (1 / noise.rho)
    place = (ends[1] - sigmas[half:] ** (1 / noise.rho)) / (ends[1] - ends[0])
    formula = inputs["dsm_noise"].replace("shape", str(list(training.x0.shape)))
    draws = training.draws()
    draws.draws["normal"] += [
        ((sigmas[:half].log() - objective.p_mean) / objective.p_std).to(dtype),
        FIGURES.tensor(formula, dtype),
    ]
    draws.draws["uniform"].append(place / objective.grid_share)
    phase = Phase(0, training.num_sigmas)
    terms: dict[str, Tensor] = {}
    for name in ("consistency", "score_matching"):
        inner = getattr(CTM, name)

        def noted(*args, name=name, inner=inner):
            terms[name] = inner(*args)
            return terms[name]

        patch.setattr(CTM, name, noted)
    total = objective.loss(models, training.x0, training.cond, phase, draws).mean()
    assert not any(draws.draws.values()), "the objective did not use every draw"
    total.backward()
    grads = to_openai({name: p.grad for name, p in models.online.network.named_parameters()})
    return {
        "consistency_loss": terms["consistency"],
        "denoising_loss": terms["score_matching"],
        "total": total,
        "grad_norm": {name: grads[name].norm() for name in case["expect"]["grad_norm"]},
        "grad_norm_total": torch.stack([grad.norm() for grad in grads.values()]).norm(),
    }


def adaptive(case: dict, dtype: torch.dtype) -> dict:
    inputs = case["inputs"]
    assert inputs["loss1"] == "mean((W*X(W.shape))^2)"
    assert inputs["loss2"] == "mean(sin(3W))"
    key = re.fullmatch(r"(.*) W of the net above", inputs["last_layer"])[1]
    weights = to_openai(dict(unet(net_of(case), dtype).named_parameters()))
    w = weights[key]
    loss1 = (w * FIGURES.X(list(w.shape)).to(dtype)).square().mean()
    return {"weight": gradient_ratio(gradient_norm(loss1, w), (3 * w).sin().mean(), w)}


def sampled(case: dict, dtype: torch.dtype) -> dict:
    config, inputs = dict(case["config"]), case["inputs"]
    noise = Noise(*(config.pop(name) for name in AXIS))
    ctm = config.pop("ctm")
    scalings = edm_scalings if ctm else consistency_scalings
    denoiser = Denoiser(unet(config.pop("net"), dtype), noise, scalings)
    assert not config.pop("clip_denoised")
    assert not config.pop("clip_output")
    assert inputs["noise"] == "c-th normal draw (x_T/80 is c=0) = Z(shape, c)"
    name, steps, shape = config.pop("sampler"), config.pop("steps"), inputs["shape"]
    cond, ts = harness.cond_of(case), config.pop("ts", None)
    grid = falling(noise, max(steps, 2))  # of a single step, no point is asked for
    if ts is not None:
        levels = [grid[i] for i in ts]
        assert levels[0] == noise.sigma_max
        assert levels[-1] == noise.sigma_min
        middle = {"sigmas": tuple(levels[1:-1])}
    else:
        middle = {"steps": steps}
    match name:
        case "exact":
            sampler = Gamma(gamma=0, **middle, clamp=False)
        case "cm_multistep":
            sampler = Gamma(gamma=1, **middle, clamp=False)
        case "gamma_multistep":
            sampler = Gamma(gamma=config.pop("gamma"), **middle, clamp=False)
        case "gamma":
            # The jump ends at a point of the grid, from which noise leads up to another.
            low, end = noise.sigma_min, 39  # hard-coded there
            assert grid[end] == low
            s, back = (grid[config.pop(f"ind_{i}")] for i in (1, 2))
            gamma = math.sqrt(1 - ((s - low) / (back - low)) ** 2)
            sampler = Gamma(gamma=gamma, sigmas=(back,), clamp=False)
        case "heun":
            sampler = Heun(steps=steps, clamp=False)
        case "euler":
            # It never says s there, whose default is 1.
            sampler = Euler(steps=steps + 1, clamp=False)
            cond = replace(cond, sigma_to=torch.ones(shape[0], dtype=dtype))
        case "onestep":
            sampler = Multistep(clamp=False)
        case "multistep":
            sampler = Multistep(**middle, clamp=False)
    known(config)
    drawn = {0}

    def draw(c: int) -> Tensor:
        drawn.add(c)
        return FIGURES.Z(shape, c).to(dtype)

    sample = sampler.sample(denoiser, noise.sigma_max * draw(0), cond, draw)
    # Draws without effect: Heun's at every step, and multistep's last, which is multiplied by 0.
    idle = {"heun": steps, "multistep": 1}.get(name, 0)
    return {"sample": sample, "draws": len(drawn) + idle}


def cosine_time(iddpm: IDDPM, sigma: Tensor) -> Tensor:
    """Times in [0, 1] at which the schedule, unclipped, has the noise levels sigma:
    1 / (1 + sigma^2) = cos^2(a (t + c_2)) / cos^2(a c_2), a = pi / (2 (1 + c_2))."""
    a = 0.5 * math.pi / (1 + iddpm.c_2)
    return (math.cos(a * iddpm.c_2) * (1 + sigma**2).rsqrt()).arccos() / a - iddpm.c_2


def variance_preserving(case: dict, dtype: torch.dtype) -> dict:
    config = dict(case["config"])
    beta_min = config.pop("beta_min")
    vp = VP(beta_d=config.pop("beta_max") - beta_min, beta_min=beta_min)
    cosine = config.pop("cos_t_classifier")
    known(config)
    sigma = tensor(case, "sigmas", dtype)
    _, _, mean, _ = vp.scalings(sigma, 0.5, 0.0)
    tau = cosine_time(IDDPM(), sigma) if cosine else vp.betas.time(sigma)
    return {"mean": mean, "std": sigma * mean, "tau": tau}


UNET = "cm.unet.UNetModel.forward(x, timesteps, y, s)"
FUNCTIONS = {
    f"{UNET} with training_mode='ctm', attention_type='legacy'": adm_forward,
    "cm.networks.EDMPrecond_CTM.forward(rescaled_x, rescaled_t, s)": dhariwal_forward,
    "KarrasDenoiser.get_c_in / rescaling_t / get_inner_scalings / get_outer_scalings;"
    " get_weightings": scalings,
    "KarrasDenoiser.get_denoised_and_G(ctm=True)": trajectory,
    "KarrasDenoiser.get_denoised_and_G(ctm=True) with EDMPrecond_CTM(SongUNet)": trajectory,
    "KarrasDenoiser.get_denoised_and_G(ctm=True), target_subtract=True": trajectory,
    "KarrasDenoiser.get_denoised_and_G(ctm=False, teacher=False)": consistency,
    "KarrasDenoiser.get_denoised_and_G(ctm=False, teacher=True)": teacher,
    "cm.script_util defaults; KarrasDenoiser.get_t; heun step probabilities ('weighted': p_i ~"
    " i**heun_step_multiplier, i = 1..num_heun_step)": schedule,
    "cm.resample.HalfLogNormalHalfUniformSampler.sample": half_lognormal,
    "KarrasDenoiser.heun_solver / get_ctm_estimate / get_ctm_target": targets,
    "KarrasDenoiser.heun_solver": self_learned,
    "KarrasDenoiser.ctm_losses (consistency + denoising, no adversarial term)": losses,
    "KarrasDenoiser.calculate_adaptive_weight(loss1, loss2, last_layer)": adaptive,
    "cm.sample_util.karras_sample": sampled,
    "cm.enc_dec_lib.vpsde.transform_unnormalized_wve_to_normalized_vp": variance_preserving,
}
PATCHES = {targets, losses}
WITH_GRADIENT = {losses, adaptive}
ELEMENTWISE = {scalings, schedule, half_lognormal, variance_preserving}
CASES = FIGURES.read_by(FUNCTIONS, lambda config: config.get("model_type") != "SongUNet")


@BOTH
@pytest.mark.parametrize("name", CASES)
def test_it_computes_the_official_function(name, dtype, monkeypatch, record_property):
    case = FIGURES.cases[name]
    function = harness.function_of(case, FUNCTIONS)
    patch: dict[str, Any] = {"patch": monkeypatch} if function in PATCHES else {}
    with torch.set_grad_enabled(function in WITH_GRADIENT):
        actual = FIGURES.compute(name, function, dtype, **patch)
    elementwise = function in ELEMENTWISE
    worst = harness.compare(actual, case["expect"], dtype, elementwise=elementwise)
    record_property("parity", (FIGURES.name, str(dtype), worst))
