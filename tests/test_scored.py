"""Quick scores while a network trains, and the checkpoint of the best."""

import hashlib
import json
import re

import pytest
import torch

from cmkit import RecipeError
from cmkit.checkpoint import read_weights, verify
from cmkit.plan import plan
from cmkit.recipe import load, run_name, stage_keys
from cmkit.recipe.grid import scored
from cmkit.runs import Note, RunFinished, RunFolder, Saved, Scored, drawn_from, integrity, run
from cmkit.runs.scoring import Scores
from cmkit.stop import StopSignal
from cmkit.train import Step
from tests.toys import toy_registry

CPU = torch.device("cpu")
RECIPE = """\
name = "scored"
seed = 3
dataset = { use = "invented", channels = 1, resolution = 8, images = 60 }
backbone = { use = "adm", channels = 16, channel_mult = [1], norm_groups = 8, dropout = 0.1 }
objective = { use = "ct", end_scales = 5, distance = "pseudo_huber" }
sampler = { use = "multistep" }

[train]
steps = 6
batch = 8
save_every = 4
log_every = 2
precision = "fp32"
lr = 1e-2
score_every = 2
score_images = 20

[sample]
images = 20
precision = "fp32"

[[metric]]
use = "fidelity"
"""
PLAIN = "train.score_every=99"
TRAINED = ("model.safetensors", "checkpoints/step-*/*.safetensors", "samples/*")


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
    seen = [*events(recipe, *overrides, out=out)]
    assert isinstance(seen[-1], RunFinished)
    return seen[-1].folder, seen[-1].report["stages"]["train"], seen


def stopped_at(recipe, step, *overrides, out, kind=Step):
    for event in (going := events(recipe, *overrides, out=out)):
        if isinstance(event, kind) and event.step == step:
            going.close()
            break
    return RunFolder(recipe.parent / out / run_name(load(recipe, overrides, toy_registry())))


def digests(folder, *patterns):
    files = sorted(path for pattern in patterns for path in folder.glob(pattern))
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def test_scores_change_no_bit_of_a_run_and_no_key(recipe):
    recipe.write_text(RECIPE.replace("score_every = 2\n", ""))
    whole, plain, _ = finish(recipe, out="plain")
    recipe.write_text(RECIPE)
    folder, scored, _ = finish(recipe)
    assert digests(folder, *TRAINED) == digests(whole, *TRAINED)
    assert len(digests(folder, *TRAINED)) > 5
    assert folder.name == whole.name
    assert scored["final_loss"] == plain["final_loss"]
    assert "scores" not in plain
    assert not (whole / "checkpoints" / "best").exists()
    keys = [stage_keys(load(recipe, said, toy_registry())) for said in ([], [PLAIN])]
    assert keys[0] == keys[1]


def test_each_step_that_is_due_has_its_score_and_the_best_is_kept(recipe):
    folder, stage, seen = finish(recipe)
    found = [event for event in seen if isinstance(event, Scored)]
    assert [(event.step, event.name) for event in found] == [
        (step, "heldout_kid_mean") for step in (2, 4, 6)
    ]
    scores = {str(event.step): event.score for event in found}
    assert len({*scores.values()}) == 3
    assert stage["scores"]["steps"] == scores
    best = min(found, key=lambda event: event.score)
    assert stage["scores"]["best"] == {"step": best.step, "score": best.score}
    assert [event.step for event in found if event.best][-1] == best.step
    (checkpoint,) = (folder / "checkpoints" / "best").iterdir()
    verify(checkpoint)
    state = json.loads((checkpoint / "state.json").read_text())
    assert (state["step"], state["state"]["score"]) == (best.step, best.score)
    logged = {str(r["step"]): r["score"] for r in RunFolder(folder).log() if "score" in r}
    assert logged == scores
    assert "kid_mean of 20 images" in (folder / "report.html").read_text()


def test_the_best_checkpoint_is_that_of_its_step_and_is_sampled_by_name(recipe):
    folder, stage, _ = finish(recipe, "train.keep=9", "train.save_every=2")
    step = stage["scores"]["best"]["step"]
    name = f"{folder}@best"
    drawn = drawn_from(name, [], toy_registry(), 4)
    assert drawn.denoiser.weights == name
    saved, best = RunFolder(folder).checkpoint(step), RunFolder(folder).checkpoint("best")
    assert digests(saved, "*.safetensors") == digests(best / saved.name, "*.safetensors")
    assert [*read_weights(best)] == [*read_weights(saved)]
    plan(drawn)


@pytest.mark.parametrize(
    ("step", "kind"), [(1, Step), (3, Step), (4, Step), (4, Scored), (4, Saved), (6, Scored)]
)
def test_a_killed_run_goes_on_to_the_same_scores_and_the_same_best(recipe, step, kind):
    whole, stage, _ = finish(recipe)
    stopped_at(recipe, step, out="killed", kind=kind)
    again, more, _ = finish(recipe, out="killed")
    assert more["scores"] == stage["scores"]
    best = "checkpoints/best/*/*.safetensors"
    assert len(digests(whole, best)) > 2
    assert digests(again, best, *TRAINED) == digests(whole, best, *TRAINED)
    pairs = [(r["step"], r["score"]) for r in RunFolder(again).log() if "score" in r]
    assert pairs == [(int(step), score) for step, score in stage["scores"]["steps"].items()]


@pytest.mark.parametrize("step", [2, 4, 6])
def test_a_kill_between_the_best_checkpoint_and_its_score_loses_neither(recipe, step, monkeypatch):
    """Each score is better than the one before, so that each checkpoint is to take a place."""
    monkeypatch.setattr(Scores, "_value", lambda self, training: 1 / training.step)
    append = RunFolder.append_log

    def killed(self, record, durable=False):
        if "score" in record and record["step"] == step:
            raise KeyboardInterrupt
        append(self, record, durable)

    monkeypatch.setattr(RunFolder, "append_log", killed)
    with pytest.raises(KeyboardInterrupt):
        finish(recipe)
    monkeypatch.setattr(RunFolder, "append_log", append)
    folder, stage, seen = finish(recipe)
    best = [event.step for event in seen if isinstance(event, Scored) and event.best]
    assert best == [due for due in (2, 4, 6) if due >= step]
    assert stage["scores"]["best"] == {"step": 6, "score": 1 / 6}
    assert [*stage["scores"]["steps"]] == ["2", "4", "6"]
    assert kept(folder) == {"step-00000006": "heldout_kid_mean"}


def kept(folder):
    """Of which number each checkpoint in the best's place is the best."""
    found = (folder / "checkpoints" / "best").glob("*/state.json")
    return {path.parent.name: json.loads(path.read_text())["state"]["of"] for path in found}


def test_a_training_that_is_shared_brings_its_scores_and_its_best(recipe):
    whole, stage, _ = finish(recipe)
    folder, more, _ = finish(recipe, "sample.images=12")
    assert folder != whole
    assert more["scores"] == stage["scores"]
    best = "checkpoints/best/*/*"
    assert digests(folder, best) == digests(whole, best) != {}
    stopped_at(recipe, 5, out="begun")
    folder, more, _ = finish(recipe, "sample.images=13", out="begun")
    assert more["scores"] == stage["scores"]


def test_another_score_is_not_compared_with_those_before(recipe):
    stopped_at(recipe, 5, out="changed")
    _, stage, _ = finish(recipe, "train.score=fid", out="changed")
    assert stage["scores"]["of"] == "heldout_fid"
    assert [*stage["scores"]["steps"]] == ["6"]
    assert stage["scores"]["best"]["step"] == 6


def test_the_best_of_another_score_gives_its_place_up_to_the_next(recipe, monkeypatch):
    monkeypatch.setattr(Scores, "_value", lambda self, training: 1 / training.step)
    folder = stopped_at(recipe, 6, kind=Scored, out="changed").path  # its last checkpoint is of 4
    assert kept(folder) == {"step-00000006": "heldout_kid_mean"}
    stopped_at(recipe, 5, "train.score=fid", out="changed")
    assert kept(folder) == {"step-00000006": "heldout_kid_mean"}
    finish(recipe, "train.score=fid", out="changed")
    assert kept(folder) == {"step-00000006": "heldout_fid"}


def test_a_damaged_best_checkpoint_is_said_and_the_next_score_takes_its_place(recipe):
    folder = stopped_at(recipe, 5, out="damaged")
    (file,) = folder.path.glob("checkpoints/best/*/online.safetensors")
    file.write_bytes(b"half")
    name = str(file.relative_to(folder.path).parent)
    assert [(path, "damaged" in fault) for path, fault in integrity.verify(folder) if fault] == [
        (name, True)
    ]
    *_, seen = finish(recipe, out="damaged")
    notes = [event.text for event in seen if isinstance(event, Note)]
    assert any(f"{file}: damaged" in t and t.endswith("takes its place") for t in notes), notes
    assert kept(folder.path) == {"step-00000006": "heldout_kid_mean"}


@pytest.mark.parametrize("said", ["kid_mean", "heldout_kid_mean", "fid"])
def test_a_score_is_named_as_its_metric_or_its_event_does(recipe, said):
    loaded = load(recipe, [f"train.score={said}", "train.score_images=30"], toy_registry())
    metric, key = scored(loaded, 30)
    assert (metric.keys()[0], metric.heldout) == (key, True)
    assert said.endswith(key)
    assert metric.kid_subset_size == (1000 if key == "fid" else 30)
    plan(loaded)


def test_training_goes_on_from_the_best(recipe):
    folder, stage, _ = finish(recipe)
    step = stage["scores"]["best"]["step"]
    more = [f"train.start='{folder}@best'", "train.steps=8"]
    *_, seen = finish(recipe, *more, out="more")
    assert next(event.step for event in seen if isinstance(event, Step)) == step + 1


def test_the_highest_score_is_the_best_where_more_is_better(recipe):
    said = RECIPE.replace('use = "fidelity"', 'use = "fidelity"\nprecision_recall = true')
    recipe.write_text(said)
    scores = dict.fromkeys((2, 4, 6), 0.0) | {4: 1.0}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Scores, "_value", lambda self, training: scores[training.step])
        _, stage, _ = finish(recipe, "train.score=recall")
    assert stage["scores"]["best"] == {"step": 4, "score": 1.0}


def test_scores_that_are_not_finite_do_not_end_the_training(recipe, monkeypatch):
    value = iter([0.5, float("nan"), 0.7])
    monkeypatch.setattr(Scores, "_value", lambda *_: next(value))
    _, stage, seen = finish(recipe)
    notes = [event.text for event in seen if isinstance(event, Note)]
    assert "train.score: no score at step 4: heldout_kid_mean is nan" in notes
    assert stage["scores"]["steps"] == {"2": 0.5, "6": 0.7}


def test_checkpoints_are_also_saved_by_minutes(recipe):
    *_, seen = finish(recipe, "train.save_every=99", "train.save_minutes=1e-9")
    assert [event.step for event in seen if isinstance(event, Saved)] == [1, 2, 3, 4, 5, 6]
    *_, seen = finish(recipe, "train.save_every=99", "train.save_minutes=999", out="slow")
    assert [event.step for event in seen if isinstance(event, Saved)] == [6]


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ("metric=[]", "train.score_every: a score needs a [[metric]] table"),
        ("train.score=kdi", "no [[metric]] returns it as a score; known: kid_mean, fid"),
        ("train.score_images=1", "greater than or equal to 2"),
        ("train.save_minutes=0", "greater than 0"),
    ],
)
def test_what_cannot_be_scored_is_refused_in_one_line(recipe, said, message):
    with pytest.raises(RecipeError, match=re.escape(message)) as caught:
        plan(load(recipe, [said], toy_registry()))
    assert "\n" not in str(caught.value)


def test_a_run_without_best_checkpoint_says_how_to_have_one(recipe):
    from cmkit import CheckpointError

    folder = stopped_at(recipe, 3, PLAIN, out="none")
    with pytest.raises(CheckpointError, match="no best checkpoint is kept; a training with sc"):
        plan(drawn_from(f"{folder.path}@best", [], toy_registry(), 4))
