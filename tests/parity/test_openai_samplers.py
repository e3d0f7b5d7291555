"""Our samplers and zero-shot editing reproduce the figures of openai/consistency_models.

The official grids fall and their samplers draw from one generator, whose c-th call is Z(shape, c);
here noise(k) is that draw, whether or not the steps before used theirs.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from cmkit_std.samplers.ancestral import Ancestral
from cmkit_std.samplers.dpm import DPM
from cmkit_std.samplers.euler import Euler
from cmkit_std.samplers.heun import Heun
from cmkit_std.samplers.multistep import Multistep
from cmkit_std.samplers.progdist import ProgDist

from cmkit import Cond, Denoiser, Noise, Sampler, edit
from tests.parity import harness
from tests.parity.test_openai_denoiser import denoiser_of, noise_of
from tests.parity.test_openai_unet import BOTH
from tests.toys import TinyNetwork

FIGURES = harness.Figures("openai_samplers.json")
WALKS = {"euler": Euler, "heun": Heun, "dpm": DPM, "ancestral": Ancestral, "progdist": ProgDist}
CHURN = ("s_churn", "s_tmin", "s_tmax", "s_noise")


def formula(text: str, **names: torch.Tensor) -> torch.Tensor:
    """The value of a formula of the figures, such as "0.45*tanh(x/sqrt(sigma^2+0.25))"."""
    functions = {name: getattr(torch, name) for name in ("tanh", "sin", "cos", "exp", "sqrt")}
    return eval(text.replace("^", "**"), functions | names)


class Toy(Denoiser):
    """The analytic denoiser of a formula of x and sigma."""

    def __init__(self, text: str, noise: Noise):
        super().__init__(TinyNetwork(), noise)
        self.text = text

    def forward(self, x, sigma, cond=None):
        return formula(self.text, x=x, sigma=sigma.view(-1, 1, 1, 1))


def toy_of(case: dict, noise: Noise) -> Toy:
    """The case's analytic denoiser; "toy D above" is that of the first case that writes it out."""
    texts = [case["inputs"]["denoiser"]] + [
        other["inputs"]["denoiser"]
        for other in case["figures"].cases.values()
        if "denoiser" in other["inputs"]
    ]
    if texts[0].startswith("toy D above"):
        texts = texts[1:]
    written = re.fullmatch(r"D\(x, sigma\) = (.*)", next(t for t in texts if "=" in t))
    assert written, f"unknown denoiser {case['inputs']['denoiser']}"
    return Toy(written[1], noise)


class Watched(Denoiser):
    """A denoiser that remembers its calls, (x, x0_hat)."""

    def __init__(self, inner: Denoiser):
        super().__init__(inner.network, inner.noise)
        self.inner = inner
        self.calls: list[tuple[torch.Tensor, torch.Tensor]] = []

    def forward(self, x, sigma, cond=None):
        x0 = self.inner(x, sigma, cond)
        self.calls.append((x, x0))
        return x0


def draws_of(case: dict, dtype: torch.dtype) -> Callable[[int], torch.Tensor]:
    """c -> Z(shape, c)."""
    shape = next(iter(find(case["expect"], "sample")))["shape"]
    return lambda c: FIGURES.Z(shape, c).to(dtype)


def find(tree: dict, name: str):
    """Every entry called `name`, at any depth."""
    for key, inner in tree.items():
        if key == name:
            yield inner
        elif isinstance(inner, dict):
            yield from find(inner, name)


def falling(noise: Noise, n: int) -> list[float]:
    return noise.sigmas(n, dtype=torch.float64).flip(0).tolist()


def walk_of(config: dict, steps: int, clamp: bool) -> Sampler:
    """Our sampler of one that goes down the whole grid."""
    options = {name: config[name] for name in CHURN if name in config}
    return WALKS[config["sampler"]](steps=steps, clamp=clamp, **options)


def official_draws(config: dict, steps: int) -> int:
    """Calls of the official generator: every step draws, needed or not, where any step may."""
    if config["sampler"] == "multistep":
        return len(config["ts"])
    return 1 + (steps if config["sampler"] in ("heun", "dpm", "ancestral") else 0)


def multistep(
    denoiser: Denoiser, x: torch.Tensor, config: dict, cond: Cond, draw: Callable, clamp: bool
) -> torch.Tensor:
    """Indices `ts` of the falling grid are noise levels; the last one only adds noise.

    It should be the grid's last point, where there is none to add; otherwise the official sampler
    returns a noisy picture. Its first level need not be sigma_max, ours is.
    """
    noise = denoiser.noise
    first, *middle, last = (falling(noise, config["steps"])[i] for i in config["ts"])
    denoiser.noise = Noise(noise.sigma_min, first, noise.rho)
    x0 = Multistep(sigmas=tuple(middle), clamp=clamp).sample(denoiser, x, cond, draw)
    return x0 + (last**2 - noise.sigma_min**2) ** 0.5 * draw(len(config["ts"]) - 1)


def karras_sample(case: dict, dtype: torch.dtype) -> dict:
    inputs = case["inputs"]
    assert inputs["noise"].endswith("returns Z(shape, c)")
    assert set(case["expect"]) <= {"clip", "noclip"}
    return {kind: sampled(case, dtype, clamp=kind == "clip") for kind in case["expect"]}


def sampled(case: dict, dtype: torch.dtype, clamp: bool) -> dict:
    """The official result with its final clamp, the result before, and the trace of steps."""
    config, draw, cond = case["config"], draws_of(case, dtype), harness.cond_of(case)
    denoiser = Watched(denoiser_of(config, FIGURES, dtype))
    noise, steps = denoiser.noise, config["steps"]
    x = noise.sigma_max * draw(0)
    if config["sampler"] == "multistep":
        raw = multistep(denoiser, x, config, cond, draw, clamp)
    elif config["sampler"] == "onestep":
        raw = Multistep(clamp=clamp).sample(denoiser, x, cond, draw)
    else:
        sampler = walk_of(config, steps, clamp)
        raw = sampler.sample(denoiser, x, cond, draw)
        assert len(denoiser.calls) == sampler.nfe
    actual = {"sample": raw.clamp(-1, 1), "raw": raw, "draws": official_draws(config, steps)}
    expected = case["expect"]["clip" if clamp else "noclip"]
    if "steps" in expected:
        levels = falling(noise, steps + (config["sampler"] == "progdist"))
        calls = denoiser.calls[:: 2 if config["sampler"] in ("heun", "dpm") else 1]
        actual["steps"] = {
            str(i): {
                "sigma": torch.tensor(levels[i], dtype=dtype),
                "x": x,
                "denoised": x0.clamp(-1, 1) if clamp else x0,
            }
            for i, (x, x0) in enumerate(calls)
        }
    return actual


def toy(case: dict, dtype: torch.dtype) -> dict:
    """Samplers called directly, with an analytic denoiser that is not clamped."""
    config, inputs = case["config"], case["inputs"]
    assert inputs["noise"] == "following draws Z(shape, c=1,2,..)"
    draw, denoiser = draws_of(case, dtype), toy_of(case, noise_of(config))
    x = FIGURES.tensor(inputs["x_T"], dtype, shape=inputs["shape"])
    steps = config["n_steps"]
    if config["sampler"] == "multistep":
        sample = multistep(denoiser, x, config, Cond(), draw, clamp=False)
    elif config["sampler"] == "onestep":
        sample = Multistep(clamp=False).sample(denoiser, x, Cond(), draw)
    else:
        sample = walk_of(config, steps, clamp=False).sample(denoiser, x, Cond(), draw)
    return {"sample": sample, "draws": official_draws(config, steps)}


def midpoint(case: dict, dtype: torch.dtype) -> dict:
    """dx/dt = v(x, t) in steps of h = 1 / len(ts) that start at each of ts.

    With sigma = t0 + h - t, which falls from h to 0 in a step, it is the flow of the denoiser
    x + sigma v(x, t), and ours is the midpoint step with the arithmetic mean.
    """
    written = re.fullmatch(r"v\(x,t\) = (.*)", case["inputs"]["velocity"])
    assert written, f"unknown velocity {case['inputs']['velocity']}"
    x = FIGURES.tensor(case["inputs"]["x"], dtype)
    h = 1 / len(case["config"]["ts"])
    for start in case["config"]["ts"]:

        def denoiser(x, sigma, cond, end=start + h):
            sigma = sigma.view(-1, 1, 1, 1)
            return x + sigma * formula(written[1], x=x, t=end - sigma)

        x = DPM(mid_rho=1.0, clamp=False).midpoint_step(denoiser, x, h, 0.0, Cond())
    return {"sample": x}


def edited(case: dict, dtype: torch.dtype) -> dict:
    config, inputs = case["config"], case["inputs"]
    assert inputs["noise"] == "loop draws Z(shape, c=0,1,..)"
    assert inputs["denoiser"].endswith("then clamp(-1,1)")
    noise, draw = noise_of(config), draws_of(case, dtype)
    images = FIGURES.tensor(inputs["images"], dtype)
    unknown = torch.zeros_like(images)
    if case["function"].endswith("colorization"):
        project = edit.colorize(images)
    elif case["function"].endswith("superres"):
        project = edit.superres(images)
    else:
        project, unknown = edit.inpaint(images, mask_of(case)), -torch.ones_like(images)
    first, *middle, last = (falling(noise, config["steps"])[i] for i in config["ts"])
    denoiser = toy_of(case, Noise(noise.sigma_min, first, noise.rho))
    x = FIGURES.tensor(inputs["x"], dtype, shape=list(images.shape))
    x0 = edit.edit(denoiser, x, middle, project, Cond(), lambda k: draw(k - 1))
    left = (last**2 - noise.sigma_min**2) ** 0.5 * draw(len(config["ts"]) - 2)
    return {"sample": x0 + left, "images": project(unknown), "draws": len(config["ts"]) - 1}


def mask_of(case: dict) -> torch.Tensor:
    """White pixels of every other group of seven pictures, black ones of those between."""
    b, channels, height, width = case["expect"]["images"]["shape"]
    condition = re.match(r"white\(h,w,ch\) = (.*) for i = flat index", case["inputs"]["mask"])
    assert condition, f"unknown mask {case['inputs']['mask']}"
    white = eval(condition[1], {"i": np.arange(height * width * channels)})
    white = torch.from_numpy(white.reshape(height, width, channels)).permute(2, 0, 1)
    groups = (torch.arange(b) // 7 % 2 == 0).view(-1, 1, 1, 1)
    return torch.where(groups, white, ~white)


def edit_matrices(case: dict, dtype: torch.dtype) -> dict:
    """An orthogonal projection on q is q q^T: its diagonal gives q, up to the sign that makes its
    sum positive. The other columns of Q are any completion, here LAPACK's as in the official code.
    """

    def direction(project: Callable[[torch.Tensor], edit.Projection], shape: tuple[int, ...]):
        basis = torch.eye(np.prod(shape), dtype=dtype).view(-1, *shape)
        onto = project(basis)(torch.zeros_like(basis)).view(len(basis), -1)
        return onto[0] / onto[0, 0].sqrt()

    completed = np.eye(3)
    completed[:, 0] = direction(edit.colorize, (3, 1, 1)).double()
    q, _ = np.linalg.qr(completed)
    return {
        "colorization_Q": torch.from_numpy(q * np.sign(q[:, 0].sum())).to(dtype),
        "superres_Q_first_column": direction(edit.superres, (1, 8, 8)),
    }


DIRECTLY = (
    "sample_onestep",
    "stochastic_iterative_sampler",
    "sample_heun",
    "sample_euler",
    "sample_dpm",
    "sample_euler_ancestral",
    "sample_progdist",
)
EDITS = ("iterative_colorization", "iterative_superres", "iterative_inpainting")
FUNCTIONS = {
    "karras_sample": karras_sample,
    **{f"cm.karras_diffusion.{name}": toy for name in DIRECTLY},
    "cm.karras_diffusion.sample_midpoint_ancestral": midpoint,
    **{f"cm.karras_diffusion.{name}": edited for name in EDITS},
    "obtain_orthogonal_matrix inside iterative_colorization / iterative_superres": edit_matrices,
}


@BOTH
@pytest.mark.parametrize("name", FIGURES.read_by(FUNCTIONS))
@torch.no_grad()
def test_sampler_computes_the_official_function(name, dtype, record_property):
    case = FIGURES.cases[name]
    actual = FIGURES.compute(name, harness.function_of(case, FUNCTIONS), dtype)
    worst = harness.compare(actual, case["expect"], dtype)
    record_property("parity", (FIGURES.name, str(dtype), worst))
