"""What the objective and the sampler promise, whatever the network."""

from __future__ import annotations

import math

import pytest
import torch
from cmkit_ect.objective import ECT
from cmkit_ect.sampler import ECTSampler

from cmkit import (
    Cond,
    Denoiser,
    Models,
    Noise,
    RecipeError,
    Rng,
    consistency_scalings,
    edm_scalings,
    testing,
)
from cmkit.functional import pseudo_huber
from tests.toys import TinyNetwork

CPU = torch.device("cpu")
SIGMAS = torch.logspace(-4, 4, 400, dtype=torch.float64)


def draws(seed: int = 0) -> Rng:
    return Rng(seed, "train", 0, CPU)


def images(n: int, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(n, 1, 4, 4, generator=torch.Generator().manual_seed(5)).to(dtype) / 2


class Recorded(Denoiser):
    """A denoiser that keeps the images, noise levels and estimates of each call."""

    def __init__(self, dtype=torch.float64, scalings=edm_scalings):
        torch.manual_seed(1)
        super().__init__(TinyNetwork().to(dtype), scalings=scalings)
        self.calls = []

    def forward(self, x, sigma, cond=None):
        x0_hat = super().forward(x, sigma)
        self.calls.append((x, sigma, x0_hat))
        return x0_hat


class Knowing(Denoiser):
    """theta times the clean images, from wherever on their trajectories."""

    def __init__(self, x0):
        super().__init__(TinyNetwork())
        self.x0, self.theta = x0, torch.nn.Parameter(torch.ones((), dtype=x0.dtype))

    def forward(self, x, sigma, cond=None):
        return self.theta * self.x0


def loss(objective, denoiser, x0, step=0, total=8, rng=None):
    phase = objective.phase(step, total)
    return objective.loss(Models(denoiser, denoiser), x0, Cond(), phase, rng or draws())


@pytest.mark.parametrize("options", [{}, {"q": 256.0}, {"k": 0.0}, {"q": 1.01, "b": 3.0}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_r_lies_from_0_to_below_sigma_and_rises_with_the_stage_towards_sigma(options, dtype):
    objective, sigma = ECT(stage_steps=1, **options), SIGMAS.to(dtype)
    before = torch.zeros_like(sigma)
    for stage in [*range(40), 10**3, 10**9]:
        r = objective.lower(sigma, objective.phase(stage, 10))
        assert (r >= 0).all()
        assert (r < sigma).all()
        assert (r >= before).all()
        before = r
    torch.testing.assert_close(before, sigma)


def test_r_falls_short_of_sigma_by_n_times_a_power_of_q():
    objective = ECT(q=3.0, k=5.0, b=0.5, stage_steps=1)
    sigma = torch.tensor([2.0], dtype=torch.float64)
    r = objective.lower(sigma, objective.phase(2, 10))
    n = 1 + 5 / (1 + math.exp(0.5 * 2))
    assert r.item() == pytest.approx(2 * (1 - n / 27), rel=1e-14)


def test_training_starts_as_denoising_up_to_ln_7_with_the_papers_constants():
    """n >= q there: k sigmoid(-sigma) >= 1."""
    objective = ECT()
    clean = objective.lower(SIGMAS, objective.phase(0, 8)) == 0
    assert torch.equal(clean, math.log(7) >= SIGMAS)


@pytest.mark.parametrize("scalings", [edm_scalings, consistency_scalings])
def test_where_r_is_0_the_loss_is_the_distance_to_the_clean_image_over_sigma(scalings):
    """Even for a model that is no identity there."""
    objective, denoiser, x0 = ECT(k=1e6), Recorded(scalings=scalings).eval(), images(6)
    value = loss(objective, denoiser, x0)
    (_, sigma, x0_hat), (_, r, _) = denoiser.calls
    assert (r == 0).all()
    torch.testing.assert_close(value, (x0_hat - x0).flatten(1).norm(dim=1) / sigma)


@pytest.mark.parametrize("c", [0.0, 0.06])
def test_elsewhere_it_is_the_distance_to_the_same_noise_at_r_over_the_gap(c):
    objective, denoiser, x0 = ECT(k=0.0, c=c), Recorded().eval(), images(6)
    value = loss(objective, denoiser, x0, step=2)
    (high, sigma, online), (low, r, target) = denoiser.calls
    torch.testing.assert_close(r, sigma * (1 - 2.0**-3))
    z = (high - x0) / sigma.view(-1, 1, 1, 1)
    torch.testing.assert_close(low, x0 + r.view(-1, 1, 1, 1) * z)
    norm = (online - target).flatten(1).norm(dim=1)
    torch.testing.assert_close(value, ((norm**2 + c**2).sqrt() - c) / (sigma - r))
    assert value.shape == (6,)


def test_the_weight_of_diffusion_training_is_that_of_sigma_alone():
    """SNR + k, k = 1 / sigma_data^2: with r = 0 and squared distances it is EDM's loss."""
    objective, denoiser, x0 = ECT(weighting="snr", c=0.06), Recorded().eval(), images(6)
    value = loss(objective, denoiser, x0, step=7)
    (_, sigma, online), (_, _, target) = denoiser.calls
    distance = pseudo_huber(online, target, objective.c)
    torch.testing.assert_close(value, distance * (sigma**2 + 0.25) / (0.5 * sigma) ** 2)


def test_the_objective_keeps_the_laws_of_its_kind():
    testing.check_objective(ECT())


def test_no_gradient_flows_through_the_target():
    objective, denoiser, x0 = ECT(k=0.0), Recorded().eval(), images(6)
    loss(objective, denoiser, x0).sum().backward()
    assert denoiser.calls[0][2].requires_grad
    assert not denoiser.calls[1][2].requires_grad


@pytest.mark.parametrize("c", [0.0, 0.06])
@pytest.mark.parametrize("step", [0, 7])
def test_a_model_that_is_constant_along_trajectories_has_loss_0_and_gradient_0(c, step):
    x0 = images(64)
    denoiser = Knowing(x0)
    value = loss(ECT(c=c), denoiser, x0, step)
    assert value.abs().max() <= 1e-14 * (c > 0)
    value.sum().backward()
    assert denoiser.theta.grad == 0


@pytest.mark.parametrize("step", [0, 20, 2000, 10**6])
def test_loss_and_gradient_are_finite_and_weights_positive_however_late_the_stage(step):
    objective, denoiser = ECT(stage_steps=1), Recorded(torch.float32).eval()
    value = loss(objective, denoiser, images(512, torch.float32), step)
    value.mean().backward()
    (_, sigma, _), (_, r, _) = denoiser.calls
    weight = 1 / (sigma - r)
    assert (weight > 0).all()
    assert weight.isfinite().all()
    assert value.isfinite().all()
    assert all(p.grad.isfinite().all() for p in denoiser.parameters())


def test_both_passes_drop_the_same_units():
    objective, denoiser, x0 = ECT(k=0.0, stage_steps=1), Recorded().train(), images(32)
    loss(objective, denoiser, x0, step=40)
    (_, _, online), (_, _, target) = denoiser.calls
    torch.testing.assert_close(online, target, rtol=0, atol=1e-8)


def test_ln_sigma_is_normal_with_the_given_mean_and_deviation():
    denoiser = Recorded().eval()
    loss(ECT(p_mean=-0.8, p_std=1.6), denoiser, images(20_000))
    levels = denoiser.calls[0][1].log()
    assert levels.mean().item() == pytest.approx(-0.8, abs=0.05)
    assert levels.std().item() == pytest.approx(1.6, abs=0.05)


def test_the_loss_is_a_function_of_its_draws():
    objective, x0 = ECT(), images(6)
    first, again, other = (
        loss(objective, Recorded().train(), x0, rng=draws(seed)) for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_stage_lasts_stage_steps_or_an_eighth_of_the_training():
    def stages(objective, total):
        return [objective.phase(step, total).log["stage"] for step in range(total)]

    assert stages(ECT(stage_steps=3), 8) == [0, 0, 0, 1, 1, 1, 2, 2]
    assert stages(ECT(), 16) == [n // 2 for n in range(16)]
    assert stages(ECT(), 23) == [n // 2 for n in range(23)]
    assert stages(ECT(), 3) == [0, 1, 2]
    assert ECT().phase(5, 16) == ECT().phase(5, 16)


def test_the_sampler_adds_the_whole_noise_before_each_further_step():
    denoiser, shape = Recorded().eval(), (2, 1, 4, 4)
    z = [torch.full(shape, float(k), dtype=torch.float64) for k in range(3)]
    sampler = ECTSampler(sigmas=(5.0, 0.821))
    with torch.no_grad():
        out = sampler.sample(denoiser, 80 * z[1], Cond(), z.__getitem__)
    assert sampler.nfe == len(denoiser.calls) == 3
    (x, first, a), (y, second, b), (w, third, c) = denoiser.calls
    assert [sigma.tolist() for sigma in (first, second, third)] == [
        [80.0] * 2,
        [5.0] * 2,
        [0.821] * 2,
    ]
    assert torch.equal(x, 80 * z[1])
    assert torch.equal(y, a + 5.0 * z[1])
    assert torch.equal(w, b + 0.821 * z[2])
    assert torch.equal(out, c)


def test_the_sampler_refuses_a_level_that_is_not_below_the_highest():
    x = torch.zeros(1, 1, 4, 4)
    denoiser = Denoiser(TinyNetwork(), Noise(sigma_max=5.0), edm_scalings)
    with pytest.raises(RecipeError, match=r"^sampler.sigmas = \[5.0\]: must lie below sigma_max 5"):
        ECTSampler(sigmas=(5.0,)).sample(denoiser, x, Cond(), lambda k: x)
