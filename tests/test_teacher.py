"""A teacher in a recipe: what it is, what the student starts from, and what is refused early."""

from pathlib import Path

import pytest
import torch
from cmkit_std.backbones.adm import ADM
from safetensors.torch import save_file

from cmkit import CheckpointError, DataSpec, RecipeError, discover, edm_scalings
from cmkit.checkpoint import latest_checkpoint, save_checkpoint
from cmkit.plan import build, build_teacher, plan
from cmkit.recipe import load, run_name, schema
from cmkit.train import start, train

CPU = torch.device("cpu")
RECIPE = """\
name = "tiny"
seed = 3
dataset = { use = "digits" }
objective = { use = "cd", num_sigmas = 5, distance = "l2" }

[denoiser]
init = "teacher"

[teacher]
weights = "WEIGHTS"

[backbone]
use = "adm"
channels = 32
channel_mult = [1]
num_res_blocks = 1
attention_resolutions = []
num_head_channels = 16

[train]
steps = 4
batch = 8
lr = 1e-2
ema = [0.5]
log_every = 1
precision = "fp32"
"""
INIT = 'init = "teacher"'
SHAPE = {"channels": 32, "channel_mult": [1], "num_res_blocks": 1, "num_head_channels": 16}


def save_weights(path: Path, conditions=frozenset({"label"}), **options) -> dict:
    torch.manual_seed(99)
    network = ADM(**{**SHAPE, "attention_resolutions": [], **options}).build(
        DataSpec(1, 8, 10), conditions
    )
    for tensor in network.state_dict().values():
        tensor.normal_(std=0.1)
    save_file(network.state_dict(), path)
    return network.state_dict()


@pytest.fixture
def home(tmp_path):
    """A folder with a recipe and its teacher's weights."""
    save_weights(tmp_path / "teacher.safetensors")
    text = RECIPE.replace("WEIGHTS", str(tmp_path / "teacher.safetensors"))
    (tmp_path / "cd.toml").write_text(text)
    return tmp_path


def planned(home, *overrides, drop=()):
    text = (home / "cd.toml").read_text()
    for piece in drop:
        assert piece in text
        text = text.replace(piece, "")
    (home / "changed.toml").write_text(text)
    return plan(load(home / "changed.toml", overrides, discover()))


def refusal(home, *overrides, error=RecipeError, drop=()) -> str:
    with pytest.raises(error) as caught:
        planned(home, *overrides, drop=drop)
    assert "\n" not in str(caught.value)
    return str(caught.value).replace(str(home) + "/", "")


def state_of(denoiser) -> dict:
    return {key: value.clone() for key, value in denoiser.network.state_dict().items()}


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_teacher_is_a_frozen_diffusion_model_and_stays_as_it_was(home):
    training = start(planned(home), CPU)
    teacher, given = training.models.teacher, save_weights(home / "again.safetensors")
    at = torch.tensor([0.002, 1.0]), 0.5, 0.002
    assert torch.equal(torch.stack(teacher.scalings(*at)), torch.stack(edm_scalings(*at)))
    assert training.models.online.scalings(*at).c_out[0] == 0
    assert same(state_of(teacher), given)
    for _ in train(training):
        assert training.models.online.training
        assert training.models.target.training
        assert not teacher.training
    assert not any(p.requires_grad for p in teacher.parameters())
    assert same(state_of(teacher), given)
    assert "teacher" not in training.tensors()


def test_student_starts_from_what_the_recipe_says(home):
    given = state_of(build_teacher(planned(home), CPU))
    models = start(planned(home), CPU).models
    assert same(state_of(models.online), given)
    assert same(state_of(models.target), given)
    fresh = start(planned(home, 'denoiser.init="random"'), CPU).models
    assert not same(state_of(fresh.online), given)
    assert same(state_of(fresh.teacher), given)
    other = save_weights(home / "other.safetensors")
    other = {key: value * 0.5 for key, value in other.items()}
    save_file(other, home / "other.safetensors")
    own = start(planned(home, f'denoiser.weights="{home}/other.safetensors"', drop=[INIT]), CPU)
    assert same(state_of(own.models.online), other)


def test_an_objective_without_a_teacher_may_start_from_one(home):
    """As the published commands of consistency training do; the teacher is then not kept."""
    made = planned(home, "objective={ use = 'ct', distance = 'l2' }")
    models = start(made, CPU).models
    assert models.teacher is None
    assert same(state_of(models.online), state_of(build_teacher(made, CPU)))


def test_what_the_student_starts_from_is_no_guess(home):
    said = 'teacher: say what the student starts from: denoiser.init = "teacher" or "random"'
    assert said in refusal(home, drop=[INIT])
    said = "init 'teacher' and weights exclude each other"
    assert said in refusal(home, 'denoiser.weights="x.safetensors"')


def test_a_missing_teacher_is_refused(home):
    lines = [line for line in (home / "cd.toml").read_text().splitlines() if "weights =" in line]
    bare = [f"[teacher]\n{lines[0]}\n"]
    assert "changed.toml:4: objective: it distils a teacher: add a [teacher]" in refusal(
        home, drop=bare
    )
    said = 'denoiser.init = "teacher": add a [teacher] table'
    assert said in refusal(home, "objective={ use = 'ict' }", drop=bare)


def test_a_teacher_of_another_shape_is_refused_before_training(home):
    save_weights(home / "wide.safetensors", channels=64)
    said = refusal(home, f'teacher.weights="{home}/wide.safetensors"', error=CheckpointError)
    assert "teacher.weights" in said
    assert "tensors do not fit" in said
    assert "no such" in refusal(home, 'teacher.weights="none"', error=CheckpointError).lower()


def test_a_teacher_may_have_a_backbone_of_its_own(home):
    save_weights(home / "wide.safetensors", channels=64)
    text = (home / "cd.toml").read_text()
    options = 'use = "adm", channels = 64, channel_mult = [1], num_res_blocks = 1'
    options += ", attention_resolutions = [], num_head_channels = 16"
    text = text.replace("teacher.safetensors", "wide.safetensors")
    text = text.replace("[teacher]", f"[teacher]\nbackbone = {{ {options} }}")
    (home / "cd.toml").write_text(text)
    made = planned(home, 'denoiser.init="random"')
    models = start(made, CPU).models
    shapes = [next(d.parameters()).shape for d in (models.online, models.teacher)]
    assert shapes[0] != shapes[1]
    assert [used for used in made.recipe.used() if used[0] == "backbone"] == [
        ("backbone", "adm")
    ] * 2
    (home / "resolved.toml").write_text(made.recipe.toml())
    again = load(home / "resolved.toml", [], discover())
    assert run_name(again) == run_name(made.recipe)
    assert again.teacher.backbone == made.recipe.teacher.backbone
    said = refusal(home, error=CheckpointError)  # the student cannot start from a wider network
    assert "denoiser.init" in said
    assert "teacher.backbone.chanels: unknown key; did you mean 'channels'?" in refusal(
        home, "teacher.backbone.chanels=8"
    )


def test_a_teacher_that_does_not_know_the_students_noise_is_refused(home):
    said = refusal(home, "teacher.sigma_max=20")
    assert "it knows noise levels 0.002 to 20, the student's are 0.002 to 80" in said
    assert "it knows noise levels 0.01 to 80" in refusal(home, "teacher.sigma_min=0.01")
    planned(home, "teacher.sigma_max=100", "teacher.sigma_min=0")


def test_teacher_scalings_are_its_own(home):
    made = planned(home, "teacher.sigma_data=0.7", "teacher.sigma_max=90", "denoiser.rho=5")
    teacher = build_teacher(made, CPU)
    assert (teacher.sigma_data, teacher.noise.sigma_max, teacher.noise.sigma_min) == (
        0.7,
        90,
        0.002,
    )
    assert build(made, CPU).sigma_data == 0.5


def test_a_teacher_may_embed_less_than_its_student(home):
    """The student's further embeddings keep their fresh weights."""
    given = save_weights(home / "plain.safetensors", conditions=frozenset())
    overrides = [f'teacher.weights="{home}/plain.safetensors"', "teacher.conditions=[]"]
    made = planned(home, *overrides)
    online = state_of(build(made, CPU))
    fresh = state_of(build(planned(home, *overrides, 'denoiser.init="random"'), CPU))
    extra = online.keys() - given.keys()
    assert extra
    assert all(torch.equal(online[key], given[key]) for key in given)
    assert all(torch.equal(online[key], fresh[key]) for key in extra)
    assert "tensors do not fit" in refusal(home, *overrides[:1], error=CheckpointError)


PD = ["objective={ use = 'pd', start_scales = 4, round_steps = 2 }", 'denoiser.precond="edm"']


def test_progressive_distillation_wants_a_diffusion_model(home):
    assert 'set denoiser.precond = "edm"' in refusal(home, PD[0])


def test_a_round_of_progressive_distillation_ends_in_a_new_teacher(home):
    training = start(planned(home, *PD), CPU)
    first = state_of(training.models.teacher)
    steps = train(training)
    next(steps)
    assert same(state_of(training.models.teacher), first)
    assert not same(state_of(training.models.ema[0.5]), state_of(training.models.online))
    next(steps)
    for denoiser in (training.models.teacher, training.models.ema[0.5]):
        assert same(state_of(denoiser), state_of(training.models.online))
    assert not training.optimizer.state
    second = state_of(training.models.teacher)
    next(steps)
    assert same(state_of(training.models.teacher), second)
    assert not same(state_of(training.models.online), second)
    assert not training.models.teacher.training
    assert training.optimizer.state


@pytest.mark.slow
@pytest.mark.parametrize("cut", [1, 2, 3])
def test_a_resumed_distillation_ends_in_the_same_weights(home, cut):
    made = planned(home, *PD)
    whole = start(made, CPU)
    for _ in train(whole):
        pass
    half = start(made, CPU)
    for step in train(half):
        if step.step == cut:
            break
    save_checkpoint(home / "checkpoints", half.step, half.tensors(), half.state())
    resumed = start(made, CPU)
    resumed.restore(latest_checkpoint(home / "checkpoints", pytest.fail))
    assert resumed.tensors().keys() == half.tensors().keys()
    for _ in train(resumed):
        pass
    for role in ("online", "teacher"):
        assert same(state_of(getattr(resumed.models, role)), state_of(getattr(whole.models, role)))


def test_schema_knows_the_teacher_and_its_backbone():
    table = schema(discover())["$defs"]["teacher"]
    assert {"weights", "precond", "backbone"} <= table["properties"].keys()
    assert table["required"] == ["weights"]
