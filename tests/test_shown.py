"""Prompts under pictures, other numbers of steps, and pictures drawn while training."""

import hashlib
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from cmkit import RecipeError
from cmkit.pictures import grid_png
from cmkit.plan import coding_of, plan
from cmkit.recipe import load, run_name, stage_keys
from cmkit.runs import Note, RunFinished, RunFolder, Saved, Shown, run
from cmkit.runs.showing import Showing
from cmkit.sample import Draws
from cmkit.stop import StopSignal
from cmkit.train import Step, start
from tests.toys import HearingNetwork, toy_registry

CPU = torch.device("cpu")
RECIPE = """\
name = "toy"
seed = 3
dataset = { use = "captioned", channels = 1, resolution = 8, images = 50, texts = 7 }
codec = { use = "blocks" }
text = { use = "words" }
cache = false
backbone = { use = "hearing" }
denoiser = { guidance = 1.0 }
objective = { use = "ct", end_scales = 5, distance = "pseudo_huber" }
sampler = { use = "lcm", steps = 2 }

[train]
steps = 6
batch = 8
save_every = 4
log_every = 2
precision = "fp32"
lr = 1e-2
show = ["a red apple", "a frog", ""]
show_every = 2

[sample]
images = 30
precision = "fp32"
show_steps = [1, 2, 8]
"""
PLAIN = ["train.show=0", "sample.show_steps=[]"]


@pytest.fixture(autouse=True)
def _registry(monkeypatch):
    registry = toy_registry()
    monkeypatch.setattr("cmkit.plugins.discover", lambda: registry)


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "toy.toml"
    path.write_text(RECIPE)
    return path


def events(recipe, *overrides, out="runs"):
    made = plan(load(recipe, overrides, toy_registry()))
    return run(made, toy_registry(), recipe.parent / out, CPU, StopSignal())


def finish(recipe, *overrides, out="runs"):
    *seen, last = events(recipe, *overrides, out=out)
    assert isinstance(last, RunFinished)
    notes = "\n".join(event.text for event in seen if isinstance(event, Note))
    return last.folder, last.report["stages"], notes


def stopped_at(recipe, step, *overrides, out, kind=Step):
    """The run's folder once it was killed when this step had been trained, or saved."""
    for event in (going := events(recipe, *overrides, out=out)):
        if isinstance(event, kind) and event.step == step:
            going.close()
            break
    return RunFolder(recipe.parent / out / run_name(load(recipe, overrides, toy_registry())))


def digests(folder: Path, *patterns) -> dict[str, str]:
    files = sorted(path for pattern in patterns for path in folder.glob(pattern))
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture)


TRAINED = ("model.safetensors", "checkpoints/*/*.safetensors", "samples/*", "samples_after.png")


def test_what_is_shown_changes_no_bit_of_a_run_and_no_key(recipe):
    whole, stages, _ = finish(recipe, *PLAIN, out="plain")
    shown, more, _ = finish(recipe)
    assert digests(shown, *TRAINED) == digests(whole, *TRAINED)
    assert len(digests(whole, *TRAINED)) > 6
    assert shown.name == whole.name
    assert more["train"]["final_loss"] == stages["train"]["final_loss"]
    assert "shown" not in stages["train"]
    assert not {*stages["sample"]} & {"steps"}
    keys = [stage_keys(load(recipe, said, toy_registry())) for said in ([], PLAIN)]
    assert keys[0] == keys[1]


def test_pictures_are_of_each_step_that_is_due_and_of_other_numbers_of_steps(recipe):
    folder, stages, _ = finish(recipe)
    shown = stages["train"]["shown"]
    assert shown["prompts"] == ["a red apple", "a frog", ""]
    assert (shown["images"], shown["side"]) == (3, 8)
    assert [*shown["steps"]] == ["2", "4", "6"]
    assert len({*digests(folder, "shown/*").values()}) == 3
    files = RunFolder(folder).status()
    assert {"shown.jsonl", *shown["steps"].values()} <= {*files["train"]["files"]}
    steps = stages["sample"]["steps"]
    assert {*steps.values()} <= {*files["sample"]["files"]}
    arrays = np.load(folder / "samples" / "0000000.npz")["arr_0"][:8, ..., 0]
    own = grid_png(torch.from_numpy(arrays)[:, None], 8)
    assert (folder / steps["2"]).read_bytes() == own
    assert len({(folder / name).read_bytes() for name in steps.values()}) == 3
    _, stages, _ = finish(recipe, "train.show_every=99", "train.show=2", out="other")
    shown = stages["train"]["shown"]
    assert [*shown["steps"]] == ["6"]
    assert shown["prompts"] == stages["sample"]["prompts"][:2] != []


def test_a_number_of_pictures_needs_no_prompts(recipe):
    text = RECIPE.replace('text = { use = "words" }\n', "").replace(", texts = 7", "")
    text = text.replace('"hearing"', '"adm", channels = 16, channel_mult = [1], norm_groups = 8')
    recipe.write_text(text.replace("denoiser =", "#"))
    _, stages, _ = finish(recipe, "train.show=5")
    assert stages["train"]["shown"] == {
        "steps": {str(step): f"shown/step-0000000{step}.png" for step in (2, 4, 6)},
        "prompts": [], "images": 5, "side": 8,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("step", "kind"), [(1, Step), (3, Step), (4, Step), (4, Saved), (5, Step), (6, Saved)]
)
def test_a_killed_run_goes_on_to_the_same_pictures_and_draws_none_twice(
    recipe, step, kind, monkeypatch
):
    whole, stages, _ = finish(recipe)
    drawn, inner = [], Showing.draw

    def draw(self, training):
        drawn.append(training.step)
        return inner(self, training)

    monkeypatch.setattr(Showing, "draw", draw)
    stopped_at(recipe, step, out="killed", kind=kind)
    again, more, _ = finish(recipe, out="killed")
    assert drawn == [2, 4, 6]
    assert digests(again, "shown/*", *TRAINED) == digests(whole, "shown/*", *TRAINED)
    assert more["train"]["shown"] == stages["train"]["shown"]


def test_a_picture_cut_short_is_drawn_again_and_other_prompts_are_not_mixed_with_these(recipe):
    folder = stopped_at(recipe, 5, "train.save_every=2", out="cut")
    (folder.path / "shown" / "step-00000004.png").write_bytes(b"half")
    _, stages, _ = finish(recipe, "train.save_every=2", out="cut")
    assert [*stages["train"]["shown"]["steps"]] == ["2", "6"]  # step 4 is trained already
    stopped_at(recipe, 5, out="changed")
    folder, stages, _ = finish(recipe, 'train.show=["a dog"]', out="changed")
    assert [*stages["train"]["shown"]["steps"]] == ["6"]
    assert stages["train"]["shown"]["prompts"] == ["a dog"]
    assert pixels(folder / "shown" / "step-00000006.png").shape == (48, 48)


def test_a_training_that_is_shared_brings_its_pictures(recipe):
    whole, stages, _ = finish(recipe)
    folder, more, _ = finish(recipe, "sample.images=12")
    assert folder != whole
    assert more["train"]["shown"] == stages["train"]["shown"]
    assert digests(folder, "shown/*") == digests(whole, "shown/*")
    stopped_at(recipe, 5, out="begun")
    folder, more, notes = finish(recipe, "sample.images=13", out="begun")
    assert "goes on from" in notes
    assert digests(folder, "shown/*") == digests(whole, "shown/*")


def test_numbers_of_steps_that_are_said_later_draw_no_image_again(recipe):
    folder, _, _ = finish(recipe, "sample.show_steps=[2]")
    before = {p: p.stat().st_mtime_ns for p in (folder / "samples").iterdir()}
    _, stages, notes = finish(recipe)
    assert "no pictures in steps 1, 8; to have them remove" in notes
    assert [*stages["sample"]["steps"]] == ["2"]
    (folder / "report.json").unlink()
    _, stages, notes = finish(recipe)
    assert "sample: no pictures in steps 1, 8; the stage is done again" in notes
    assert [*stages["sample"]["steps"]] == ["1", "2", "8"]
    assert {p: p.stat().st_mtime_ns for p in (folder / "samples").iterdir()} == before
    _, stages, notes = finish(recipe, "sample.show_steps=[]")
    assert "no pictures" not in notes


def test_drawing_leaves_modes_and_generators_as_they_were(recipe, monkeypatch):
    """Where the average is the target network as well, training evaluates it with dropout."""
    made = plan(load(recipe, [], toy_registry()))
    job = SimpleNamespace(
        plan=made, device=CPU, folder=RunFolder(recipe.parent), coding=coding_of(made, CPU)
    )
    showing, training = Showing(job), start(made, CPU, job.coding.null)
    network = training.models.ema[0.999].network.train()
    network.dropout.eval()
    inner = HearingNetwork.forward

    def forward(self, *args):
        torch.rand(1)
        assert not self.training
        return inner(self, *args)

    monkeypatch.setattr(HearingNetwork, "forward", forward)
    state = torch.get_rng_state()
    drawn = recipe.parent / "shown" / "step-00000000.png"
    assert list(showing.draw(training)) == [Shown(0, drawn.resolve())]
    assert torch.equal(torch.get_rng_state(), state)
    assert [network.training, network.dropout.training, network.first.training] == [1, 0, 1]
    monkeypatch.setattr("cmkit.runs.showing.SIDE", 3)
    list(showing.draw(training))
    assert showing.result()["side"] == 2
    assert pixels(drawn).shape[0] == 48


def test_pictures_that_are_not_finite_do_not_end_the_training(recipe, monkeypatch):
    inner, plain = Showing.draw, Draws.pictures

    def draw(self, training):
        bad = training.step == 4
        monkeypatch.setattr(Draws, "pictures", lambda s, x: plain(s, x) / (0 if bad else 1))
        yield from inner(self, training)
        monkeypatch.setattr(Draws, "pictures", plain)

    monkeypatch.setattr(Showing, "draw", draw)
    _, stages, notes = finish(recipe)
    assert "train.show: nothing drawn at step 4: sample: images 0 to 2 hold NaN" in notes
    assert [*stages["train"]["shown"]["steps"]] == ["2", "6"]


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ("train.show=apple", "say a number of pictures, or prompts such as"),
        ("train.show=true", "say a number of pictures, or prompts such as"),
        ("train.show=[1]", "say a number of pictures, or prompts such as"),
        ("train.show=17", "say at most 16 pictures or prompts"),
        ("train.show=-1", "say at most 16 pictures or prompts"),
        (f"train.show={['a'] * 17}", "say at most 16 pictures or prompts"),
        ("train.show_every=0", "greater than or equal to 1"),
        ("sample.show_steps=[0]", "greater than or equal to 1"),
        ("sample.show_steps=[51]", "cannot take steps = 51: steps 51 must not be above grid 50"),
        ("sampler.use=multistep", "sampler multistep has no key `steps`; drop show_steps"),
        ("sampler={use='gamma', sigmas=[1.0]}", "cannot take steps = 1: steps and sigmas both say"),
    ],
)
def test_what_cannot_be_drawn_is_refused_in_one_line(recipe, said, message):
    if said.startswith("sampler.use"):
        recipe.write_text(RECIPE.replace('"lcm", steps = 2', '"multistep"'))
        said = "seed=3"
    with pytest.raises(RecipeError, match=re.escape(message)) as caught:
        plan(load(recipe, [said], toy_registry()))
    assert "\n" not in str(caught.value)
    assert re.search(r"toy\.toml:\d+|--set", str(caught.value))


def test_pictures_while_training_need_a_sampler_and_prompts_an_encoder(recipe):
    text = RECIPE.partition("[sample]")[0]
    recipe.write_text(text.replace("sampler =", "#"))
    with pytest.raises(RecipeError, match=r"train\.show: pictures need a \[sampler\] table"):
        plan(load(recipe, [], toy_registry()))
    without = text.replace('text = { use = "words" }', "")
    recipe.write_text(without.replace('"hearing"', '"adm", channels = 16, norm_groups = 8'))
    with pytest.raises(RecipeError, match=r"prompts need a \[text\] table; without one say a num"):
        plan(load(recipe, [], toy_registry()))
