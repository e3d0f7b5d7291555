"""One step at a time: what a step does to the weights, and the laws of its schedule."""

import copy

import pytest
import torch
from cmkit_std.objectives.ct import CT

from cmkit import Models, NonFiniteError, discover
from cmkit.checkpoint import latest_checkpoint, save_checkpoint
from cmkit.plan import plan
from cmkit.recipe import TrainTable, load
from cmkit.train import learning_rate, start, train
from tests.test_run import RECIPE

CPU = torch.device("cpu")


@pytest.fixture
def one_step(tmp_path, monkeypatch):
    """Weights before and after one step, (n,) each, and its log, with a loss without randomness."""

    def loss(self, models, x0, cond, phase, rng):
        level = torch.full((len(x0),), 1.5)
        return (models.online.eval()(x0, level, cond) - x0).square().flatten(1).mean(
            1
        ) * self.huber_c

    monkeypatch.setattr(CT, "loss", loss)
    path = tmp_path / "tiny.toml"
    path.write_text(RECIPE)

    def call(*overrides, scale=1.0):
        base = ["train.steps=1", f"objective.huber_c={scale}", *overrides]
        training = start(plan(load(path, base, discover())), CPU)
        before = flat(training)
        (step,) = train(training)
        return before, flat(training), step.log

    return call


def flat(training) -> torch.Tensor:
    return torch.cat([p.detach().flatten().clone() for p in training.models.online.parameters()])


@pytest.mark.slow
def test_accumulated_parts_make_the_step_of_the_whole_batch(one_step):
    _, whole, log = one_step()
    for parts in (2, 4):
        _, accumulated, parts_log = one_step(f"train.accumulate={parts}")
        torch.testing.assert_close(accumulated, whole, rtol=0, atol=1e-6)
        assert parts_log["loss"] == pytest.approx(log["loss"], rel=1e-5)


def test_clipping_bounds_the_step(one_step):
    """RAdam's first step is lr times the gradient."""
    before, free, _ = one_step()
    _, clipped, _ = one_step("train.clip_norm=1e-3")
    assert (free - before).norm() > 1e-5
    assert (clipped - before).norm() == pytest.approx(1e-3 * 1e-3, rel=0.05)


@pytest.mark.parametrize("optimizer", ["radam", "adamw"])
def test_weight_decay_is_decoupled(one_step, optimizer):
    options = [f"train.optimizer={optimizer}", "train.weight_decay=0.5", "train.lr=0.1"]
    before, after, _ = one_step(*options, scale=0.0)
    torch.testing.assert_close(after, before * (1 - 0.1 * 0.5))


def test_the_rate_rises_linearly_then_falls_along_a_half_cosine():
    table = TrainTable(steps=110, batch=8, lr=2.0, warmup=10, decay=True)
    assert learning_rate(table, 0) == pytest.approx(0.2)
    assert learning_rate(table, 9) == pytest.approx(2.0)
    assert learning_rate(table, 10) == pytest.approx(2.0)
    assert learning_rate(table, 60) == pytest.approx(1.0)
    assert learning_rate(table, 109) < 1e-3
    constant = TrainTable(steps=110, batch=8, lr=2.0)
    assert {learning_rate(constant, step) for step in range(110)} == {2.0}


def test_the_rate_falls_with_the_square_root_of_the_step():
    table = TrainTable(steps=100_000, batch=8, lr=0.01, sqrt_decay=2000, warmup=10)
    assert learning_rate(table, 4) == pytest.approx(0.005)
    assert {learning_rate(table, step) for step in (10, 1000, 2000)} == {0.01}
    assert learning_rate(table, 8000) == pytest.approx(0.005)
    assert learning_rate(table, 50_000) == pytest.approx(0.002)
    with pytest.raises(ValueError, match="choose one of them"):
        TrainTable(steps=1, batch=8, decay=True, sqrt_decay=1)


TERMS = ["train.steps=6", "train.log_every=2"]
"""Overrides under which `two_terms` has three windows."""


@pytest.fixture
def two_terms(tmp_path, monkeypatch):
    """Trainings whose loss is a sum of "near" = step and, in odd steps alone, "far" = huber_c."""

    def loss(self, models, x0, cond, phase, rng):
        online = models.online(x0, torch.full((len(x0),), 1.5), cond)
        near = phase.step + 0 * online.flatten(1).mean(1)
        if phase.step % 2 == 0:
            return models.total(near=near)
        return models.total(near=near, far=torch.full((len(x0),), self.huber_c))

    monkeypatch.setattr(CT, "loss", loss)
    (tmp_path / "tiny.toml").write_text(RECIPE)

    def of(*overrides, far=3.0):
        base = [*TERMS, f"objective.huber_c={far}", *overrides]
        return start(plan(load(tmp_path / "tiny.toml", base, discover())), CPU)

    return of


def logs(training):
    return [
        (step.step, {k: step.log[k] for k in ("loss", "near", "far") if k in step.log})
        for step in train(training)
        if step.log
    ]


@pytest.mark.slow
@pytest.mark.parametrize("parts", [1, 4])
def test_log_has_the_mean_of_each_term_over_the_steps_that_had_it(two_terms, parts):
    assert logs(two_terms(f"train.accumulate={parts}")) == [
        (2, {"loss": 2.0, "near": 0.5, "far": 3.0}),
        (4, {"loss": 4.0, "near": 2.5, "far": 3.0}),
        (6, {"loss": 6.0, "near": 4.5, "far": 3.0}),
    ]
    every = dict(logs(two_terms(f"train.accumulate={parts}", "train.log_every=1")))
    assert every[1] == {"loss": 0.0}  # the other term is not known yet
    assert every[3] == {"loss": 2.0, "near": 2.0}
    assert every[4] == {"loss": 6.0, "near": 3.0, "far": 3.0}


@pytest.mark.slow
@pytest.mark.parametrize("cut", [1, 2, 3])
def test_a_resumed_run_logs_the_same_terms(two_terms, tmp_path, cut):
    whole, half, resumed = two_terms(), two_terms(), two_terms()
    for step in train(half):
        if step.step == cut:
            break
    save_checkpoint(tmp_path / "checkpoints", half.step, half.tensors(), half.state())
    resumed.restore(latest_checkpoint(tmp_path / "checkpoints", pytest.fail))
    assert logs(resumed) == [line for line in logs(whole) if line[0] > cut]


@pytest.mark.parametrize("optimizer", ["radam", "adamw"])
def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(tmp_path, optimizer):
    """Weights are channels_last, and so must be what the optimizer holds of them."""
    (tmp_path / "tiny.toml").write_text(RECIPE)
    overrides = [f'train.optimizer="{optimizer}"', "train.steps=4"]
    made = plan(load(tmp_path / "tiny.toml", overrides, discover()))
    whole, half, resumed = (start(made, CPU) for _ in range(3))
    for step in train(half):
        if step.step == 2:
            break
    save_checkpoint(tmp_path / "checkpoints", half.step, half.tensors(), half.state())
    resumed.restore(latest_checkpoint(tmp_path / "checkpoints", pytest.fail))
    for training in (whole, resumed):
        for _ in train(training):
            pass
    assert torch.equal(flat(resumed), flat(whole))


def test_a_loss_of_one_term_is_logged_once(one_step):
    assert set(one_step()[2]) == {*("loss", "rate", "images_per_second", "lr", "num_sigmas")}


def test_terms_add_up_to_the_loss_and_are_kept_as_numbers():
    models = Models(None, None)
    a, b = torch.tensor([1.0, 2.0], requires_grad=True), torch.tensor([5.0, 7.0])
    total = models.total(a=a, b=b)
    assert total.tolist() == [6.0, 9.0]
    models.total(a=a)
    assert {name: kept.tolist() for name, kept in models.terms.items()} == {
        "a": [3.0, 2.0],
        "b": [6.0, 1.0],
    }
    assert not any(kept.requires_grad for kept in models.terms.values())
    assert torch.autograd.grad(total.sum(), a)[0].tolist() == [1.0, 1.0]


def test_the_term_that_is_not_finite_is_named(two_terms, monkeypatch):
    honest = Models.total

    def poisoned(self, **terms):
        return honest(self, **{k: t / 0 if k == "far" else t for k, t in terms.items()})

    monkeypatch.setattr(Models, "total", poisoned)
    with pytest.raises(NonFiniteError, match=r"is inf between steps 0 and 2; term 'far'; lower"):
        list(train(two_terms()))


@pytest.mark.parametrize("role", ["loss", "teacher", "online"])
def test_what_was_not_finite_is_named(tmp_path, monkeypatch, role):
    """The objective always; a weight, and whose it is, where that is the cause."""
    path = tmp_path / "tiny.toml"
    path.write_text(RECIPE)
    training = start(plan(load(path, ["train.steps=1"], discover())), CPU)
    models = training.models
    models.teacher = copy.deepcopy(models.online)
    if role != "loss":
        getattr(models, role).network.conv_out.bias.data[0] = torch.nan
    monkeypatch.setattr(CT, "loss", lambda self, models, x0, *_: x0.flatten(1).sum(1) * torch.nan)
    monkeypatch.setattr(torch.Tensor, "backward", lambda self: None)
    with pytest.raises(NonFiniteError) as caught:
        list(train(training))
    message = str(caught.value)
    assert "the loss of objective 'ct' is nan between steps 0 and 1;" in message
    for other in ("teacher", "online"):
        named = f"the {other} weight conv_out.bias is not finite" in message
        assert named == (role == other)
    assert "the last checkpoint is finite" in message
