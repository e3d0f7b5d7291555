"""Networks that an objective trains beside the denoiser: their optimizer, checkpoints, errors."""

from pathlib import Path

import pytest
import torch
from cmkit_std.objectives.ct import CT
from torch import nn

from cmkit import CheckpointError, Companion, NonFiniteError, PluginError, discover
from cmkit.checkpoint import latest_checkpoint, save_checkpoint
from cmkit.files import read_jsonl
from cmkit.plan import plan
from cmkit.recipe import load
from cmkit.train import Step, start, train
from tests.test_run import CPU, RECIPE, events, fingerprint, finish


class Critic(nn.Module):
    """Learned numbers, running statistics, and a feature that is never trained."""

    def __init__(self):
        super().__init__()
        self.feature = nn.Conv2d(1, 3, 3).requires_grad_(False)
        self.norm = nn.BatchNorm2d(3)
        self.head = nn.Linear(3, 1)

    def forward(self, x):
        return self.head(self.norm(self.feature(x)).mean((2, 3))).flatten()


def companions(self, data):
    return {"critic": Companion(Critic(), lr=0.01, betas=(0.5, 0.9)), "scale": Companion(Scale())}


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.log = nn.Parameter(torch.zeros(()))


def loss(self, models, x0, cond, phase, rng):
    """The critic learns in odd steps, the others in even ones."""
    x = x0 + rng.normal_like(x0)
    critic, scale = (models.companions[name] for name in ("critic", "scale"))
    if phase.step % 2:
        return models.total(critic=(critic(x) - 1).square())
    error = (models.online(x, torch.ones(len(x0)), cond) - x0).square().flatten(1).mean(1)
    return models.total(error=scale.log.exp() * error, scale=-scale.log.expand(len(x0)))


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.setattr(CT, "companions", companions)
    monkeypatch.setattr(CT, "loss", loss)
    path = tmp_path / "tiny.toml"
    path.write_text(RECIPE.replace('metric = [{ use = "fidelity" }, { use = "digits_judge" }]', ""))
    text = path.read_text().split("[search]")[0].replace('rescaler = { use = "global" }\n', "")
    path.write_text(text)
    return path


def begun(recipe, *overrides):
    return start(plan(load(recipe, overrides, discover())), CPU)


def state_of(training, name):
    return {k: v.clone() for k, v in training.models.companions[name].state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.slow
def test_a_run_cut_again_and_again_ends_in_the_same_bits(recipe, tmp_path):
    options = ['train.optimizer="adamw"', "train.save_every=1", "train.log_every=2"]
    whole, _ = finish(recipe, tmp_path / "whole", *options)
    files = fingerprint(whole)
    assert {"companion-critic", "companion-scale"} <= {Path(name).stem for name in files}
    for step in (1, 2, 4):  # before its checkpoint, in turns of either network
        running = events(recipe, tmp_path / "cut", *options)
        next(event for event in running if isinstance(event, Step) and event.step == step)
        running.close()
    resumed, _ = finish(recipe, tmp_path / "cut", *options)
    assert fingerprint(resumed) == files
    assert terms(resumed) == terms(whole)


@pytest.mark.slow
def test_radam_goes_on_with_the_momenta_of_every_network(recipe, tmp_path):
    whole = begun(recipe)
    for step in train(whole):
        save_checkpoint(tmp_path / str(step.step), step.step, whole.tensors(), whole.state())
    expected = whole.tensors()
    for cut in (3, 4):  # after a turn of either network
        resumed = begun(recipe)
        resumed.restore(latest_checkpoint(tmp_path / str(cut), pytest.fail))
        for _ in train(resumed):
            pass
        ends = resumed.tensors()
        assert ends.keys() == expected.keys()
        assert all(same(ends[name], expected[name]) for name in ends)


def terms(folder):
    """What the log says but for times."""
    timed = {"rate", "images_per_second"}
    records = read_jsonl(folder / "log.jsonl")
    return [{key: r[key] for key in r if key not in timed} for r in records]


def test_weights_come_from_the_seed_and_leave_the_global_generator_alone(recipe):
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    first = state_of(begun(recipe), "critic")
    assert torch.equal(torch.rand(3), expected)
    assert same(state_of(begun(recipe), "critic"), first)
    assert not same(state_of(begun(recipe, "seed=4"), "critic"), first)


def test_own_rate_follows_the_schedule_and_absent_values_are_those_of_train(recipe):
    training = begun(recipe, "train.warmup=4", "train.betas=[0.8, 0.7]")
    rates = [[group["lr"] for group in training.optimizer.param_groups] for _ in train(training)]
    assert rates[0] == pytest.approx([0.25e-3, 0.25e-2, 0.25e-3])
    assert rates[5] == pytest.approx([1e-3, 1e-2, 1e-3])
    betas = [group["betas"] for group in training.optimizer.param_groups]
    assert betas == [(0.8, 0.7), (0.5, 0.9), (0.8, 0.7)]


def test_a_network_without_gradients_stays_as_it_is_and_so_does_its_optimizer(recipe):
    """Weight decay and old momenta would move it."""
    training = begun(recipe, "train.weight_decay=0.1", 'train.optimizer="adamw"')
    steps = train(training)
    next(steps)
    online = [p.detach().clone() for p in training.models.online.parameters()]
    head = training.models.companions["critic"].head.weight
    assert head not in training.optimizer.state
    kept = head.detach().clone()
    counted = training.optimizer.state[next(training.models.online.parameters())]["step"].clone()
    next(steps)
    assert not torch.equal(head, kept)
    now = list(training.models.online.parameters())
    assert all(torch.equal(a, b) for a, b in zip(online, now, strict=True))
    assert training.optimizer.state[now[0]]["step"] == counted == 1


def test_frozen_parameters_are_neither_trained_nor_stored(recipe):
    training = begun(recipe)
    before = state_of(training, "critic")
    for _ in train(training):
        pass
    files = training.tensors()
    assert {"head.weight", "head.bias", "norm.running_mean"} <= files["companion-critic"].keys()
    assert not [name for name in files["companion-critic"] if name.startswith("feature")]
    after = state_of(training, "critic")
    assert torch.equal(before["feature.weight"], after["feature.weight"])
    trained = sum(p.requires_grad for p in training.models.companions["critic"].parameters())
    assert len(training.optimizer.param_groups[1]["params"]) == trained == 4


def test_gradients_are_clipped_network_by_network(recipe):
    """RAdam's first steps are lr times the mean gradient."""
    training = begun(recipe, "train.clip_norm=1e-3")
    steps = train(training)
    before = state_of(training, "scale")["log"]
    next(steps)
    moved = (state_of(training, "scale")["log"] - before).abs()
    assert moved == pytest.approx(1e-3 * 1e-3, rel=0.01)  # a share of one norm would be far less


def test_a_checkpoint_of_other_companions_is_refused(recipe, tmp_path, monkeypatch):
    training = begun(recipe)
    next(train(training))
    save_checkpoint(tmp_path / "saved", 1, training.tensors(), training.state())
    found = latest_checkpoint(tmp_path / "saved", pytest.fail)
    again = begun(recipe)
    again.restore(found)
    assert same(state_of(again, "critic"), state_of(training, "critic"))
    wider = {"critic": Companion(nn.Linear(2, 1)), "scale": Companion(Scale())}
    monkeypatch.setattr(CT, "companions", lambda self, data: wider)
    with pytest.raises(CheckpointError, match=r"step-00000001: .* tensors do not fit"):
        begun(recipe).restore(found)
    monkeypatch.setattr(CT, "companions", lambda self, data: {"other": Companion(Scale())})
    with pytest.raises(CheckpointError, match="holds no 'companion-other'"):
        begun(recipe).restore(found)


def test_a_new_teacher_begins_a_new_optimizer_with_the_same_companions(recipe):
    training = begun(recipe)
    for _ in train(training):
        pass
    before = state_of(training, "critic")
    training.renew_teacher()
    assert not training.optimizer.state
    assert [len(g["params"]) for g in training.optimizer.param_groups[1:]] == [4, 1]
    assert training.optimizer.param_groups[1]["betas"] == (0.5, 0.9)
    assert same(state_of(training, "critic"), before)


def test_a_companion_that_is_not_finite_is_named(recipe):
    training = begun(recipe, "train.log_every=1")
    training.models.companions["critic"].feature.weight.data[0] = torch.nan
    pattern = r"between steps 1 and 2; term 'critic'; the critic weight feature.weight is not"
    with pytest.raises(NonFiniteError, match=pattern):
        list(train(training))


def test_a_plan_counts_their_memory_once_and_four_times_where_they_are_trained(recipe, monkeypatch):
    with_them = plan(load(recipe, [], discover())).memory
    monkeypatch.setattr(CT, "companions", lambda self, data: {})
    without = plan(load(recipe, [], discover())).memory
    assert with_them - without == 4 * (30 + 4 * (3 + 3 + 3 + 1) + 4)


@pytest.mark.parametrize("made", [{"../x": Companion(Scale())}, {"critic": Scale()}])
def test_what_is_no_companion_is_refused_before_training(recipe, monkeypatch, made):
    monkeypatch.setattr(CT, "companions", lambda self, data: made)
    with pytest.raises(PluginError, match="it must map names such as 'discriminator'"):
        plan(load(recipe, [], discover()))
