"""From Python: what `cmkit.load` draws is what the commands draw, `cmkit.run` is the command."""

import json
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from cmkit_std.objectives.ict import ICT
from cmkit_std.rescalers.global_ import Global
from PIL import Image
from safetensors.torch import save_file

from cmkit import Cond, DataSpec, Interrupted, RecipeError, RunFinished, load, run
from cmkit import recipe as recipes
from cmkit.api import overrides
from cmkit.plan import space_of
from cmkit.plugins import discover
from tests.test_draw import written
from tests.wheels import ROOT

GREY = DataSpec(1, 8, 10)
LABEL = frozenset({"label"})


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """A recipe with random weights that draws classes."""
    monkeypatch.chdir(tmp_path)
    return written(tmp_path, GREY, LABEL)


def drawn(cmkit, recipe, *options):
    """What `cmkit sample` draws."""
    code, _, err = cmkit("sample", recipe, *options, "--device", "cpu", "--out", "drawn.npz")
    assert code == 0, err
    with np.load("drawn.npz") as kept:
        return torch.from_numpy(kept["arr_0"]).permute(0, 3, 1, 2)


@pytest.mark.parametrize(
    ("options", "given"),
    [
        (["-n", "5", "--seed", "4"], {"count": 5, "seed": 4}),
        (["-n", "5", "--label", "3", "--label", "7"], {"count": 5, "label": [3, 7]}),
        (["-n", "1", "--label", "7"], {"label": "7"}),
        (["-n", "3", "--steps", "2"], {"count": 3, "steps": 2}),
    ],
)
def test_images_are_those_of_the_command(cmkit, recipe, options, given):
    if "steps" in given:
        recipe.write_text(recipe.read_text().replace('"multistep", sigmas = [0.8]', '"lcm"'))
    images = load(recipe, device="cpu").sample(**given)
    assert images.dtype == torch.uint8
    assert torch.equal(images, drawn(cmkit, recipe, *options))


def test_images_do_not_depend_on_the_batch(recipe):
    model = load(recipe, device="cpu")
    assert torch.equal(model.sample(5, batch=2), model.sample(5, batch=5))
    assert torch.equal(model.sample(5)[:3], model.sample(3))


def test_rescaled_draws_what_the_recipe_with_these_scales_draws(recipe):
    model = load(recipe, device="cpu")
    assert model.recipe.rescaler == Global(skip=0.8)
    other = load(recipe, device="cpu", rescaler={"emb": 1.3})
    assert torch.equal(model.rescaled(emb=1.3).sample(4), other.sample(4))
    assert torch.equal(model.rescaled(Global(skip=0.8, emb=1.3)).sample(4), other.sample(4))
    assert not torch.equal(model.sample(4), other.sample(4))
    off = load(recipe, device="cpu", rescaler="off")
    assert torch.equal(model.rescaled().sample(4), off.sample(4))
    assert torch.equal(off.rescaled(skip=0.8).sample(4), model.sample(4))
    assert model.recipe.rescaler == Global(skip=0.8)


def test_the_denoiser_is_the_rescaled_one(recipe):
    model = load(recipe, device="cpu")
    x, sigma, cond = torch.randn(2, 1, 8, 8), torch.ones(2), Cond(torch.tensor([1, 2]))
    assert torch.equal(model.denoiser(x, sigma, cond), model.unscaled.rescaled(
        Global(skip=0.8))(x, sigma, cond))  # fmt: skip
    assert not torch.equal(model.denoiser(x, sigma, cond), model.unscaled(x, sigma, cond))
    assert (model.data.channels, model.data.resolution, model.data.num_classes) == (1, 8, 10)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda m: m.sample(0), "count 0: draw at least one"),
        (lambda m: m.sample(label=10), "--label 10: no class of the model's; give 0 to 9"),
        (lambda m: m.sample(prompt="a frog"), "prompt 'a frog': the model knows no prompts"),
        (lambda m: m.sample(steps=3), "steps: the sampler refuses it: Extra inputs"),
        (lambda m: m.rescaled(skp=1.1), "skp: the rescaler refuses it: Extra inputs"),
        (lambda m: m.rescaled(skip=float("nan")), "skip: the rescaler refuses it: Input should be"),
    ],
)
def test_what_the_model_does_not_know_is_refused(recipe, call, said):
    with pytest.raises(RecipeError, match=said):
        call(load(recipe, device="cpu"))


def test_changes_are_said_as_the_command_says_them():
    changes = {
        "seed": 3,
        "train": {"steps": 5, "ema": [0.9, 0.99]},
        "search": {"grid": {"skip.0": [0.9, 1 / 3]}},
        "objective": {"use": "ict", "sigma_data": 0.5},
        "metric.0.images": 9,
    }
    assert overrides(changes) == [
        "seed=3",
        "train.steps=5",
        "train.ema=[0.9, 0.99]",
        'search.grid."skip.0"=[0.9, 0.3333333333333333]',
        'objective={ use = "ict", sigma_data = 0.5 }',
        "metric.0.images=9",
    ]
    with pytest.raises(RecipeError, match=r"train\.lr: None is no value"):
        overrides({"train": {"lr": None}})


def test_a_recipe_is_carried_out_once_and_draws(recipe, monkeypatch):
    changes = {"out": "kept", "device": "cpu", "sample": {"images": 4}}
    *events, last = run(recipe, **changes)
    assert isinstance(last, RunFinished)
    assert len(events) > 2
    report = (last.folder / "report.html").read_bytes()
    *_, again = run(recipe, **changes)
    assert again.folder == last.folder
    assert (last.folder / "report.html").read_bytes() == report
    of_run, of_recipe = (load(source, device="cpu") for source in (last.folder, recipe))
    monkeypatch.setenv("CMKIT_RUNS", "kept")
    assert load("random@latest", device="cpu").recipe == of_run.recipe
    assert torch.equal(of_run.sample(4, label=[1, 2]), of_recipe.sample(4, label=[1, 2]))


def test_ctrl_c_saves_and_the_same_call_goes_on_to_the_same_weights(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    adm = {"use": "adm", "channels": 8, "channel_mult": [1], "norm_groups": 4, "num_heads": 1}
    changes = {"device": "cpu", "backbone": adm, "train": {"steps": 6, "batch": 4}}
    Path("tiny.toml").write_text('name = "tiny"\ndataset.use = "digits"\nobjective.use = "ict"\n')
    loss, calls = ICT.loss, []

    def interrupted(self, *given):
        calls.append(1)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        return loss(self, *given)

    *_, whole = run("tiny.toml", out="whole", **changes)
    monkeypatch.setattr(ICT, "loss", interrupted)
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted, match="step 3"):
        list(run("tiny.toml", out="again", **changes))
    assert signal.getsignal(signal.SIGINT) is handler
    *_, again = run("tiny.toml", out="again", **changes)
    assert len(calls) == 6
    weights = [(each.folder / "model.safetensors").read_bytes() for each in (whole, again)]
    assert weights[0] == weights[1]


def test_the_notebook_does_what_it_says(tmp_path, monkeypatch):
    """Every cell of code runs, one after another, with a shorter training and search."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    cells = json.loads((ROOT / "docs" / "python.ipynb").read_text("utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    short = {
        'train={"steps": 700}': 'train={"steps": 20, "batch": 8}, sample={"images": 20}',
        'search={"images": 500}': 'search={"images": 20, "rerank": 0, "confirm_images": 20,'
        ' "grid": {"skip": [1.0], "emb": [1.0, 1.2]}}, metric=[{"use": "fidelity", "fid": True}]',
    }
    for long, brief in short.items():
        assert long in code[0]
        code[0] = code[0].replace(long, brief)
    names = {}
    for cell in code:
        exec(cell, names)
    assert len(names["losses"]) > 0
    assert names["images"].shape == (20, 1, 8, 8)
    assert names["rows"][0].ne(names["rows"][2]).any()
    for name in ("digits", "scales", "two_steps"):
        with Image.open(f"{name}.png") as picture:
            assert picture.width > 8 * 10


def test_words_that_say_nothing_are_told_and_prompts_of_no_others_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("told.toml").write_text(
        'name = "told"\ndataset = { use = "emoji", labels = false }\ntext.use = "emoji_words"\n'
        'denoiser.weights = "told.safetensors"\nsampler.use = "multistep"\nbackbone = { use ='
        ' "adm",'
        " channels = 8, channel_mult = [1], num_res_blocks = 1, norm_groups = 4, patch_size = 4,"
        " attention_resolutions = [], num_heads = 1 }\n"
    )
    made = recipes.load("told.toml", ["sample.images=1"], discover())
    space = space_of(made, made.dataset.spec())
    save_file(made.backbone.build(space, frozenset({"text"})).state_dict(), "told.safetensors")
    model = load("told.toml", device="cpu")
    with pytest.warns(UserWarning, match="not known, and left out: 'zyxwv'"):
        assert model.sample(prompt="a zyxwv frog").shape == (1, 3, 32, 32)
    with pytest.raises(RecipeError, match="none of its words is in a caption"):
        model.sample(prompt="zyxwv")
