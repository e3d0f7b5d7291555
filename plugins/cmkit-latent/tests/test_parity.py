"""The figures of huggingface/diffusers (its distillation scripts, pipeline and U-Net) and of peft,
in float32 and float64."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers.models.embeddings as embeddings
import pytest
import torch
from cmkit_latent.backbone import SDUNet
from cmkit_latent.factors import Factors, mixed
from cmkit_latent.network import guidance_waves
from cmkit_std.discrete import DiscreteNoise, lcm_boundary, nearest
from cmkit_std.objectives.lcm import LCM
from cmkit_std.preconds.discrete import Discrete
from cmkit_std.samplers import lcm
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from torch import Tensor, nn

from cmkit import Cond, DataSpec, Denoiser, Guided, Layout, Models, Network, TextSpec
from cmkit.functional import euler, slope
from tests.parity import harness
from tests.parity.test_diffusers import Given, Seen, alpha_of, denoiser_of, float64

FIGURES = harness.Figures("text_to_image.json")
BOTH = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
SAVED: dict[str, Path] = {}


@pytest.fixture(autouse=True)
def _widened_sinusoids(monkeypatch):
    """Sinusoids of steps in float64 for a float64 network, as in the official run: diffusers always
    computes them in float32."""
    exact = embeddings.get_timestep_embedding

    def sinusoids(
        t: Tensor,
        dim: int,
        flip_sin_to_cos=False,
        downscale_freq_shift=1,
        scale=1,
        max_period=10000,
    ) -> Tensor:
        if t.dtype != torch.float64:
            given = (flip_sin_to_cos, downscale_freq_shift, scale, max_period)
            return exact(t, dim, *given)
        half = dim // 2
        steps = torch.arange(half, dtype=t.dtype) / (half - downscale_freq_shift)
        angles = scale * t[:, None] * torch.exp(-math.log(max_period) * steps)
        waves = (angles.cos(), angles.sin()) if flip_sin_to_cos else (angles.sin(), angles.cos())
        return torch.nn.functional.pad(torch.cat(waves, dim=1), (0, dim % 2))

    monkeypatch.setattr(embeddings, "get_timestep_embedding", sinusoids)


def filled(
    case: dict, dtype: torch.dtype, prefix: str, waves: int | None
) -> tuple[Network, Layout]:
    """The network of a case with its formula-filled weights, and the layout of diffusers."""
    unet = plain(case["config"]["unet"])
    folder = SAVED["folder"] / str(len(list(SAVED["folder"].iterdir())))
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**unet, "time_cond_proj_dim": waves}))
    ((_, latents), (_, prompts)) = (
        next(iter(case["inputs"][name].items())) for name in ("latents", "prompt_embeds")
    )
    channels, side = latents["shape"][1:3]
    data = DataSpec(channels, side, text=TextSpec(*prompts["shape"][1:]))
    backbone = SDUNet(folder=str(folder))
    network = backbone.build(data, frozenset({"text"} | ({"guidance"} if waves else set())))
    (layout,) = backbone.layouts(data)
    shapes = {name: tuple(t.shape) for name, t in layout.write(network.state_dict()).items()}
    network.to(dtype)
    network.load_state_dict(layout.read(case["figures"].weights(shapes, dtype, prefix)))
    return network.eval(), layout


def plain(config: Any) -> Any:
    """A config without its record of what was asked."""
    if isinstance(config, Mapping):
        return {key: plain(config[key]) for key in config}
    return config


def column_of(betas: str, prediction: str = "epsilon", scaling: float | None = None) -> Discrete:
    spacing, start, end, steps = betas.split()
    return Discrete(
        spacing=spacing, beta_start=float(start), beta_end=float(end), steps=int(steps),
        prediction=prediction, timestep_scaling=scaling,
    )  # fmt: skip


class Constant(Network):
    """A network that always says the same."""

    def __init__(self, out: Tensor):
        super().__init__()
        self.out = out

    def forward(self, x, c_noise, cond, scales):
        return self.out


def w_embedding(case: dict, dtype: torch.dtype) -> dict:
    w = FIGURES.tensor(case["inputs"]["w"], dtype)
    return {f"dim{dim}": guidance_waves(w, dim) for dim in case["config"]["dims"]}


def boundary(case: dict, dtype: torch.dtype) -> dict:
    t = torch.tensor(case["inputs"]["timestep"], dtype=dtype)
    found = lcm_boundary(t, case["config"]["timestep_scaling"])
    return dict(zip(("c_skip", "c_out"), found, strict=True))


def predictions(case: dict, dtype: torch.dtype) -> dict:
    """Estimates of a network that says the given output, and the noise between them and x."""
    inputs = case["inputs"]
    said, x_vp = (FIGURES.tensor(inputs[name], dtype) for name in ("model_output", "sample"))
    actual = {}
    for prediction in case["expect"]:
        column = column_of(case["config"]["betas"], prediction)
        sigma = float64(column.schedule.sigmas())[inputs["timesteps"]].to(dtype)
        assert nearest(column.schedule, sigma).tolist() == inputs["timesteps"]
        x = x_vp / alpha_of(sigma)
        x0 = denoiser_of(Constant(said), column)(x, sigma)
        actual[prediction] = {"x0": x0, "noise": slope(x, sigma, x0)}
    return actual


def ddim_step(case: dict, dtype: torch.dtype) -> dict:
    """Our Euler step from where the two estimates meet."""
    config, inputs = case["config"], case["inputs"]
    noise = DiscreteNoise.of(Discrete(steps=config["timesteps"]).schedule)
    n = config["ddim_timesteps"] + 1
    sigmas, index = noise.sigmas(n, dtype=dtype), torch.tensor(inputs["index"])
    low, high = sigmas[index], sigmas[index + 1]
    x0, z = (FIGURES.tensor(inputs[name], dtype) for name in ("pred_x0", "pred_noise"))
    x = x0 + high.view(-1, 1, 1, 1) * z
    stepped = euler(lambda x, sigma, cond: x0, x, high, low)
    return {"ddim_timesteps": noise.steps(n)[1:].tolist(), "x_prev": alpha_of(low) * stepped}


class Calls:
    """What a network is given and says, call by call."""

    def __init__(self, network: Network):
        self.x: list[Tensor] = []
        self.t: list[Tensor] = []
        self.out: list[Tensor] = []
        network.register_forward_hook(self._keep)

    def _keep(self, network: nn.Module, given: tuple, out: Tensor) -> None:
        self.x.append(given[0])
        self.t.append(given[1])
        self.out.append(out)


def step_of(
    case: dict, dtype: torch.dtype, models: Models, distance: str = "huber", index: int = 0
) -> Tensor:
    """Losses of a training step, (B,), by objective lcm."""
    config, inputs = case["config"], case["inputs"]
    x0, z, text, w = (
        FIGURES.tensor(inputs[name], dtype) for name in ("latents", "noise", "prompt_embeds", "w")
    )
    objective = LCM(
        num_sigmas=config["num_ddim_timesteps"] + 1, skip=1, w_min=0.0, w_max=1.0,
        huber_c=config["huber_c"], distance=distance,
    )  # fmt: skip
    phase = objective.phase(index, index + 1)
    return objective.loss(models, x0, Cond(text=text), phase, Given(inputs["index"], z, w))


def columns_of(config: Mapping) -> tuple[Discrete, Discrete]:
    """Scalings of the student and of its teacher."""
    scaling, prediction = config["timestep_scaling"], config["prediction_type"]
    return Discrete(prediction=prediction, timestep_scaling=scaling), Discrete(
        prediction=prediction
    )


def null_of(case: dict, dtype: torch.dtype) -> Cond:
    return Cond(text=FIGURES.tensor(case["inputs"]["uncond_prompt_embeds"], dtype))


def distillation(case: dict, dtype: torch.dtype) -> dict:
    """A step of training with student and target that embed w, and a teacher that does not."""
    config = case["config"]
    prefixes, waves = config["prefixes"], config["time_cond_proj_dim"]
    online, layout = filled(case, dtype, prefixes["online"], waves)
    target, _ = filled(case, dtype, prefixes["target"], waves)
    teacher, _ = filled(case, dtype, prefixes["teacher"], None)
    column, plain_column = columns_of(config)
    models = Models(
        Seen(denoiser_of(online, column)),
        Seen(denoiser_of(target, column)),
        Seen(denoiser_of(teacher, plain_column)),
    )
    models.teacher.null = null_of(case, dtype)
    calls, target_calls = Calls(online), Calls(target)
    with torch.no_grad():
        by_l2 = step_of(case, dtype, models, "l2")
    loss = step_of(case, dtype, models)
    loss.mean().backward()
    gradients = layout.write({name: p.grad for name, p in online.named_parameters()})
    state = layout.write(online.state_dict())
    expect = case["expect"]
    actual = {
        "start_timesteps": calls.t[0].int().tolist(),
        "timesteps": target_calls.t[0].int().tolist(),
        "noisy": calls.x[0],
        "noise_pred": calls.out[0],
        "model_pred": models.online.seen[0][1],
        "x_prev": target_calls.x[0],
        "target": models.target.seen[0][1],
        "loss_huber": loss.mean(),
        "loss_l2": by_l2.mean(),
        "loss_huber_per_image": loss,
        "grad_norm": {name: gradient.norm() for name, gradient in gradients.items()},
        "grad": {name: gradients[name] for name in expect["grad"]},
        "state_dict": {name: list(tensor.shape) for name, tensor in state.items()},
    }
    assert list(state) == list(expect.get("state_dict", state))
    return {name: actual[name] for name in expect}


class WithoutAdapters(Denoiser):
    """A network as it was before adapters were added."""

    def forward(self, x, sigma, cond=None):
        self.network.unet.disable_adapters()
        try:
            return super().forward(x, sigma, cond)
        finally:
            self.network.unet.enable_adapters()


def lora_steps(case: dict, dtype: torch.dtype) -> dict:
    """Steps of training adapters, whose network without them is the teacher."""
    config, expect = case["config"], case["expect"]
    prefixes = config["prefixes"]
    network, _ = filled(case, dtype, prefixes["base and teacher"], None)
    adapters = LoraConfig(
        r=config["rank"], lora_alpha=config["lora_alpha"], target_modules=config["target_modules"]
    )
    network.unet.add_adapter(adapters)
    network.to(dtype)
    parameters = get_peft_model_state_dict(network.unet)
    shapes = {name: tuple(tensor.shape) for name, tensor in parameters.items()}
    values = FIGURES.weights(shapes, dtype, prefixes["lora"])
    trained = {
        name.replace(".default.", "."): p
        for name, p in network.unet.named_parameters()
        if p.requires_grad
    }
    assert trained.keys() == values.keys()
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(values[name])
    column, plain_column = columns_of(config)
    online = Seen(denoiser_of(network, column))
    noise = DiscreteNoise.of(plain_column.schedule)
    teacher = WithoutAdapters(network, noise, plain_column.scalings)
    teacher.null = null_of(case, dtype)
    models = Models(online, online, teacher)
    calls = Calls(network)
    optimizer = torch.optim.AdamW(
        trained.values(), lr=config["lr"], weight_decay=config.get("weight_decay", 0.0)
    )
    losses, actual = [], {}
    for step in range(expect["losses"]["shape"][0]):
        optimizer.zero_grad()
        loss = step_of(case, dtype, models, index=step).mean()
        loss.backward()
        losses.append(loss.detach())
        norms = {name: p.grad.norm() for name, p in trained.items()}
        total = nn.utils.clip_grad_norm_(trained.values(), config["clip_grad_norm"])
        if step == 0:
            (_, model_pred), (_, target) = online.seen
            actual |= {"model_pred": model_pred, "target": target, "x_prev": calls.x[-1]}
            actual |= {"grad_norm": norms, "total_norm": total}
        optimizer.step()
    after = {name: trained[name].detach().clone() for name in expect["after"]}
    sizes = {name: list(shape) for name, shape in shapes.items()}
    return {**actual, "losses": torch.stack(losses), "shapes": sizes, "after": after}


@torch.no_grad()
def sampling(case: dict, dtype: torch.dtype) -> dict:
    """Sampler lcm with an embedded weight, which is the guidance scale less 1."""
    config, inputs = case["config"], case["inputs"]
    assert inputs["noise of step k (1-based)"] == "Z(c=k)"
    w = config["guidance_scale"] - 1
    assert w == inputs["w"]
    network, _ = filled(case, dtype, "", config["time_cond_proj_dim"])
    column = Discrete(
        prediction=config.get("prediction_type", "epsilon"),
        timestep_scaling=config.get("timestep_scaling", 10.0),
        unit_start=True,
    )
    noise = column.noise(*column.levels, 7.0)
    denoiser = Seen(Guided(Denoiser(network, noise, column.scalings), w, embedded=True))
    denoiser.bounds = None
    calls = Calls(network)
    z = FIGURES.tensor(inputs["latents"], dtype)
    cond = Cond(text=FIGURES.tensor(inputs["prompt_embeds"], dtype))
    actual = {}
    for n in config["num_inference_steps"]:
        for kept in (calls.x, calls.t, calls.out, denoiser.seen):
            kept.clear()
        sampler = lcm.LCM(steps=n, grid=config.get("original_inference_steps", 50))
        out = sampler.sample(
            denoiser, noise.start * z, cond, lambda k: FIGURES.Z(list(z.shape), k).to(dtype)
        )
        steps = [int(t[0]) for t in calls.t]
        said = zip(steps, calls.out, denoiser.seen, strict=True)
        trace = {str(t): {"noise_pred": f, "denoised": x0} for t, f, (_, x0) in said}
        actual[f"n={n}"] = {"timesteps": steps, "denoised": out, "trace": trace}
    return actual


@torch.no_grad()
def merging(case: dict, dtype: torch.dtype) -> dict:
    """Changes of weights by adapters, apart and together; what peft calls "cat" and "linear"."""
    config = case["config"]
    assert case["inputs"] == {"parameters": "prefix lora/, names such as lin.lora_A.one.weight"}
    (inward, outward), (channels, features, side) = config["linear"], config["conv"]
    layers = nn.ModuleDict(
        {"lin": nn.Linear(inward, outward), "conv": nn.Conv2d(channels, features, side)}
    )
    ranks, alphas = config["ranks"], plain(config["lora_alpha"])
    options = {
        name: LoraConfig(r=rank, lora_alpha=alphas[name], target_modules=list(layers))
        for name, rank in zip(alphas, ranks, strict=True)
    }
    first, *others = options
    model = PeftModel(layers, options[first], first)
    for name in others:
        model.add_adapter(name, options[name])
    model.to(dtype)
    for key, parameter in model.base_model.model.named_parameters():
        if "lora_" in key:
            shapes = {key: tuple(parameter.shape)}
            parameter.copy_(case["figures"].weights(shapes, dtype, "lora/")[key])
    tuned, weights = model.base_model, config["weights"]
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # new adapters are made in it
    try:
        for kind in ("linear", "cat"):
            name = f"peft {kind}"
            tuned.add_weighted_adapter(list(options), weights, name, combination_type=kind)
    finally:
        torch.set_default_dtype(usual)

    def delta(name: str) -> dict:
        return {layer: tuned.model[layer].get_delta_weight(name) for layer in layers}

    def sums(how: str, alpha: Callable[[str, int], float]) -> dict:
        """What `cmkit merge` makes of the adapters."""
        read = {
            name: {
                layer: Factors(own.lora_A[name].weight, own.lora_B[name].weight, alpha(name, rank))
                for layer, own in ((layer, tuned.model[layer]) for layer in layers)
            }
            for name, rank in zip(options, ranks, strict=True)
        }
        made = mixed(read, dict(zip(options, weights, strict=True)), how)
        shapes = {layer: tuned.model[layer].base_layer.weight.shape for layer in layers}
        return {layer: made[layer].change().view(shapes[layer]) for layer in layers}

    additive = sums("add", lambda name, _: alphas[name])
    factors = sums("factors", lambda _, rank: rank)  # the sources' factors have no alpha
    every = [*options, "peft linear", "peft cat"]
    return {**{name: delta(name) for name in every}, "additive": additive, "factors": factors}


FUNCTIONS = {
    "guidance_scale_embedding(w, embedding_dim)": w_embedding,
    "scalings_for_boundary_conditions(timestep, sigma_data=0.5, timestep_scaling)": boundary,
    "get_predicted_original_sample / get_predicted_noise(model_output, timesteps, sample,"
    " prediction_type, alphas, sigmas)": predictions,
    "DDIMSolver.ddim_step(pred_x0, pred_noise, index)": ddim_step,
    "train_lcm_distill_sd_wds.py, training loop steps 2 to 10, with UNet2DConditionModel":
        distillation,
    "train_lcm_distill_lora_sd_wds.py, training loop, two steps": lora_steps,
    "LatentConsistencyModelPipeline denoising loop with LCMScheduler(original_inference_steps=50)":
        sampling,
    "peft add_weighted_adapter(adapters, weights, combination_type)": merging,
}  # fmt: skip


def alike_in_rounding(expect: dict) -> dict:
    """The figures with err32 of every gradient's norm the largest relative one among them: of a
    single number err32 is one draw, which may happen to be 0."""
    norms = expect.get("grad_norm", {})
    share = max((leaf["err32"] / leaf["f64"][0] for leaf in norms.values()), default=0.0)
    alike = {name: {**leaf, "err32": share * leaf["f64"][0]} for name, leaf in norms.items()}
    return {**expect, **({"grad_norm": alike} if norms else {})}


@BOTH
@pytest.mark.parametrize("name", FIGURES.read_by(FUNCTIONS))
def test_our_parts_compute_the_official_figures(
    name, dtype, tmp_path, monkeypatch, record_property
):
    monkeypatch.setitem(SAVED, "folder", tmp_path)
    case = FIGURES.cases[name]
    compute = harness.function_of(case, FUNCTIONS)
    actual = FIGURES.compute(name, compute, dtype)
    expect = alike_in_rounding(case["expect"])
    worst = harness.compare(actual, expect, dtype, elementwise=compute is boundary)
    record_property("parity", (FIGURES.name, str(dtype), worst))
