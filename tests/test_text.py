"""Prompts and latents from the recipe to the pictures: plans, guidance, samples, trainings."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from cmkit import Denoiser, Guided, PluginError, RecipeError
from cmkit.latents.coding import Coding
from cmkit.models import Models
from cmkit.plan import build, check_fit, coding_of, cut_note, plan, prompts_of
from cmkit.recipe import load
from cmkit.runs import RunFolder, run
from cmkit.runs.drawing import draw
from cmkit.runs.finished import drawn_from
from cmkit.sample import Draws, sample
from cmkit.stop import StopSignal
from cmkit.train import start, train
from cmkit.values import Phase
from tests.toys import Blocks, Words, toy_registry

CPU = torch.device("cpu")
TOML = """\
name = "toy"
seed = 3
dataset = { use = "captioned", channels = 1, resolution = 8, images = 24, texts = 5 }
codec = { use = "blocks", spread = 0.0 }
text = { use = "words" }
backbone = { use = "reader" }
denoiser = { precond = { use = "discrete", unit_start = true } }
objective = { use = "edm", noise_levels = "grid", weighting = "snr" }
train = { steps = 4, batch = 4, save_every = 2, log_every = 2, precision = "fp32" }
sampler = { use = "ddim", steps = 3 }
sample = { images = 7, batch = 3, precision = "fp32" }
metric = [{ use = "mean" }]
"""
STUDENT = [
    'denoiser={precond={use="discrete",timestep_scaling=10.0},init="teacher",guidance=2.0}',
    'objective={use="lcm",num_sigmas=51,skip=1,w_min=1.0,w_max=4.0}',
    'sampler={use="lcm",steps=2}',
    "train.ema=[0.95]",
    "train.ema_warmup=false",
]


@pytest.fixture(scope="module")
def registry():
    return toy_registry()


@pytest.fixture
def toml(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    Path("toy.toml").write_text(TOML)
    return "toy.toml"


def made(toml, registry, *overrides):
    return plan(load(toml, overrides, registry))


def finished(toml, registry, *overrides):
    """The folder of a run of the recipe."""
    *_, last = run(made(toml, registry, *overrides), registry, Path("runs"), CPU, StopSignal())
    return last.folder


@pytest.fixture
def teacher(toml, registry):
    return finished(toml, registry)


def distilled(toml, registry, teacher, *overrides):
    told = [f'teacher={{weights="{teacher}",precond="discrete"}}', *STUDENT, *overrides]
    return made(toml, registry, *told)


def test_a_plan_tells_pictures_and_latents_apart(toml, registry):
    found = made(toml, registry)
    assert (found.data.channels, found.data.resolution, found.data.text) == (1, 8, None)
    assert (found.space.channels, found.space.resolution) == (4, 4)
    assert found.space.text == Words().spec()
    assert found.conditions == {"text", "pooled", "size"}
    assert found.nfe == 3
    plain = made(toml, registry, "codec.side=1", "denoiser.guidance=1.5")
    assert plain.space.channels == 1
    assert plain.nfe == 6  # guided: each is evaluated with its prompt and without


def test_a_run_measures_and_keeps_pictures_that_were_drawn_as_latents(toml, registry):
    folder = finished(toml, registry)
    report = RunFolder(folder).report()
    result = report["stages"]["sample"]
    captions = load(toml, [], registry).dataset.reference().captions
    assert result["prompts"] == list(captions[:7])
    assert report["stages"]["metric"]["values"]["prompts"] == 24
    (file,) = sorted((folder / "samples").glob("*.npz"))
    with np.load(file) as kept:
        assert kept["arr_0"].shape == (7, 8, 8, 1)
    model = check_fit(load(toml, [f'denoiser.weights="{folder}"'], registry))
    coding = coding_of(model, CPU)
    denoiser = build(model, CPU).eval()
    noise = Draws(model.space, 3).noise(range(7), 0) * denoiser.noise.start
    cond = coding.conditions(captions[:7])
    x0 = model.recipe.sampler.sample(denoiser, noise, cond, lambda k: torch.zeros_like(noise))
    pixels = ((coding.pictures(x0) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    with np.load(file) as kept:
        off = pixels.permute(0, 2, 3, 1).int() - torch.from_numpy(kept["arr_0"]).int()
    assert off.abs().max() <= 1


def test_samples_depend_on_their_prompts_and_not_on_the_batch(toml, registry):
    found = made(toml, registry)
    denoiser, coding = build(found, CPU).eval(), coding_of(found, CPU)

    def pictures(prompts, batch):
        draws = Draws(found.space, 0, prompts=prompts, coding=coding)
        sampler = found.recipe.sampler
        drawn = sample(denoiser, sampler, draws, range(6), batch, CPU, "fp32")
        return torch.cat([each.images for each in drawn])

    one = pictures(["a red apple", "a green one"], 6)
    assert torch.equal(one, pictures(["a red apple", "a green one"], 4))
    same = pictures(["a red apple"], 6)
    assert torch.equal(one[::2], same[::2])
    assert not torch.equal(one[1::2], same[1::2])


def test_guidance_leads_away_from_the_unconditional_or_the_negative_prompt(toml, registry):
    found = made(toml, registry)
    denoiser = build(found, CPU).eval()
    x, sigma = torch.randn(3, 4, 4, 4), torch.full((3,), 2.0)
    for negative, told in ((None, ""), ("blue", "blue")):
        coding = coding_of(found, CPU, negative)
        denoiser.null = coding.null
        cond = coding.conditions(["a", "b c", "a"])
        other = coding.conditions([told] * 3)
        with torch.no_grad():
            guided = Guided(denoiser, 3.0)(x, sigma, cond)
            with_prompt, without = denoiser(x, sigma, cond), denoiser(x, sigma, other)
        torch.testing.assert_close(guided, with_prompt + 3 * (with_prompt - without))
        assert not torch.equal(with_prompt, without)


def test_unit_start_begins_where_the_noisy_latent_has_deviation_one(toml, registry):
    unit = build(made(toml, registry), CPU).noise
    plain = build(made(toml, registry, "denoiser.precond.unit_start=false"), CPU).noise
    assert plain.start == plain.sigma_max == unit.sigma_max
    assert unit.start / math.hypot(1, unit.sigma_max) == 1


def test_only_pictures_are_clamped(toml, registry):
    Path("pixels.toml").write_text(TOML.replace("codec =", "# codec ="))
    for recipe, most in ((toml, 3.0), ("pixels.toml", 1.0)):
        assert build(made(recipe, registry), CPU).clamp(torch.full((1, 1), 3.0)).item() == most


def test_a_teacher_in_bf16_takes_half_the_memory_and_estimates_nearly_the_same(
    toml, registry, teacher
):
    one = distilled(toml, registry, teacher)
    half = distilled(toml, registry, teacher, 'teacher.dtype="bf16"')
    weights = sum(p.numel() for p in build(made(toml, registry), CPU).parameters())
    assert one.memory - half.memory == 2 * (weights + (one.parameters - weights))
    models = [start(each, CPU, coding_of(each, CPU).null).models for each in (one, half)]
    x, sigma = torch.randn(2, 4, 4, 4), torch.full((2,), 1.5)
    cond = coding_of(one, CPU).conditions(["a", "b"])
    with torch.no_grad():
        whole, rounded = (model.teacher(x, sigma, cond) for model in models)
    assert models[1].teacher.network.first.weight.dtype == torch.bfloat16
    assert not torch.equal(whole, rounded)
    torch.testing.assert_close(whole, rounded, rtol=0.03, atol=0.03)


def test_one_copy_is_target_and_average_where_both_are_the_same(toml, registry, teacher):
    one = distilled(toml, registry, teacher)
    two = distilled(toml, registry, teacher, "train.ema=[0.9501]")
    assert two.memory - one.memory == 4 * one.parameters
    shared, apart = (start(each, CPU, coding_of(each, CPU).null) for each in (one, two))
    assert shared.models.target is shared.models.ema[0.95]
    assert apart.models.target is not apart.models.ema[0.9501]
    assert "target" in apart.tensors()
    assert "target" not in shared.tensors()
    steps = [list(train(each)) for each in (shared, apart)]
    assert steps[0][-1].log["loss"] == steps[1][-1].log["loss"]
    both = (each.models.target.network.state_dict() for each in (shared, apart))
    for one, other in zip(*(state.values() for state in both), strict=True):
        assert torch.equal(one, other)


def test_a_target_that_is_an_average_keeps_its_decay():
    online = Denoiser(torch.nn.Linear(1, 1))
    copied = Denoiser(torch.nn.Linear(1, 1))
    models = Models(online, copied, ema={0.9: copied})
    models.update(Phase(0, target_ema=0.9))
    with pytest.raises(PluginError, match=r"target_ema is 0.5 at step 3, and was train.ema = 0.9"):
        models.update(Phase(3, target_ema=0.5))


def test_a_distilled_model_draws_from_prompts(toml, registry, teacher):
    told = [f'teacher={{weights="{teacher}",precond="discrete"}}', *STUDENT]
    folder = finished(toml, registry, *told)
    recipe = drawn_from(folder, [], registry, 4, prompts=["a", "b"])
    *_, last = draw(recipe, 5, [], Path("out.npz"), CPU)
    assert last.result["prompts"] == ["a", "b", "a", "b"]
    assert last.result["nfe"] == 2
    with np.load("out.npz") as kept:
        assert kept["arr_0"].shape == (4, 8, 8, 1)
    with pytest.raises(RecipeError, match="--negative: the network embeds its guidance weight"):
        list(draw(recipe, 5, [], Path("more.npz"), CPU, "blue"))


def test_long_prompts_are_said_to_be_cut(toml, registry, teacher, monkeypatch):
    monkeypatch.setattr(
        Words, "cut", lambda self, prompts: [max(0, len(p.split()) - 4) for p in prompts]
    )
    recipe = drawn_from(teacher, [], registry, 1, prompts=["a b c d e f"])
    events = list(draw(recipe, 0, [], Path("long.png"), CPU))
    texts = [event.text for event in events if hasattr(event, "text")]
    assert texts == ["the last 2 tokens of a prompt are cut off: 'a b c d e f'.."]


def test_captions_that_training_cuts_are_counted(toml, registry, monkeypatch):
    found = made(toml, registry)
    assert cut_note(found) == ""
    monkeypatch.setattr(Words, "cut", lambda self, said: [k % 2 for k in range(len(said))])
    assert cut_note(found).startswith("2 of the first 5 captions are longer than the prompt")
    assert cut_note(found, 3).startswith("1 of the first 3")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ['backbone={use="adm",channels=16,norm_groups=8}'],
            r"cannot embed pooled, size; .* or leave \[text\] out",
        ),
        (
            ['dataset={use="captioned",channels=1,resolution=8}'],
            r"text: nothing to draw from: the data set has no captions",
        ),
        (["codec.side=16"], r"codec: spec\(\) gives latents of 256x0"),
    ],
)
def test_what_does_not_fit_is_one_line(toml, registry, overrides, said):
    with pytest.raises((RecipeError, PluginError), match=said) as error:
        prompts_of(made(toml, registry, *overrides).recipe)
    assert "\n" not in str(error.value)


def test_prompts_are_refused_where_they_do_nothing(toml, registry, teacher):
    Path("plain.toml").write_text(
        TOML.replace('text = { use = "words" }', "").replace('"reader"', '"adm", norm_groups = 8')
    )
    plain = load("plain.toml", [], registry)
    assert prompts_of(plain) == ()
    recipe = drawn_from(teacher, [], registry, 1, prompts=["a"])
    with pytest.raises(
        RecipeError, match="--negative: guidance leads away from it; say --guidance"
    ):
        list(draw(recipe, 0, [], Path("x.png"), CPU, "blue"))


def test_a_codec_that_decodes_to_other_shapes_is_named(toml, registry):
    found = made(toml, registry)
    coding = Coding(replace(found.data, channels=3), Blocks(), None)
    with pytest.raises(
        PluginError, match=r"codec: decode returned \(1, 1, 8, 8\), not \(1, 3, 8, 8\)"
    ):
        coding.pictures(torch.zeros(1, 4, 4, 4))
