"""Laws of the samplers of EDM's ablation."""

from __future__ import annotations

import math

import pytest
import torch
from cmkit_std.samplers.ablation import Ablation

from cmkit import Cond, Denoiser, Noise, RecipeError
from tests.toys import Counting, GaussianDenoiser, TinyNetwork

S = 0.7
WALKS = {
    "edm": {},
    "vp": {"discretization": "vp", "schedule": "vp", "scaling": "vp"},
    "ve": {"discretization": "ve", "schedule": "ve"},
    "vp_levels_straight": {"discretization": "vp"},
    "vp_scaling": {"scaling": "vp"},
    "midpoint": {"alpha": 0.5},
}


def start(n=4, noise=None):
    g = torch.Generator().manual_seed(0)
    return (noise or Noise()).sigma_max * torch.randn(n, 1, 2, 2, generator=g, dtype=torch.float64)


def no_noise(k):
    raise AssertionError("drew noise")


def error(sampler):
    """Of x0 ~ N(0, S^2), whose flow from sigma_max ends at x S / sqrt(S^2 + sigma_max^2).

    The last step has order 1 always: from so low a sigma_min it hardly adds anything.
    """
    noise = Noise(sigma_min=2e-4)
    x = start(noise=noise)
    exact = x * S / math.sqrt(S**2 + noise.sigma_max**2)
    return float((sampler.sample(GaussianDenoiser(S, noise), x, Cond(), no_noise) - exact).norm())


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2)])
@pytest.mark.parametrize("walk", WALKS)
def test_halved_steps_shrink_the_error_by_the_order_of_the_solver_at_least(walk, solver, order):
    coarse, fine = (error(Ablation(steps=n, solver=solver, **WALKS[walk])) for n in (40, 80))
    assert math.log2(coarse / fine) > order - 0.3


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_nfe_is_the_number_of_evaluations(solver):
    sampler = Ablation(steps=7, solver=solver)
    denoiser = Counting(GaussianDenoiser(S))
    sampler.sample(denoiser, start(), Cond(), no_noise)
    assert len(denoiser.seen) == sampler.nfe == {"euler": 7, "heun": 13}[solver]


@pytest.mark.parametrize("walk", WALKS)
def test_churn_keeps_the_spread_of_the_data(walk):
    sampler = Ablation(steps=150, s_churn=40.0, **WALKS[walk])
    draws = torch.Generator().manual_seed(1)
    x = start(20_000)
    out = sampler.sample(
        GaussianDenoiser(S), x, Cond(), lambda k: torch.randn(x.shape, generator=draws)
    )
    assert abs(out.std() / S - 1) < 0.02


def test_churn_draws_between_its_bounds_alone_and_by_the_number_of_the_step():
    sampler = Ablation(steps=10, s_churn=1.0, s_min=0.1, s_max=10.0)
    seen = []

    def noise(k):
        seen.append(k)
        return torch.zeros(4, 1, 2, 2)

    sampler.sample(GaussianDenoiser(S), start(), Cond(), noise)
    sigmas = Noise().sigmas(10).flip(0)
    assert seen == [k for k, sigma in enumerate(sigmas, 1) if 0.1 <= sigma <= 10]
    assert seen


@pytest.mark.parametrize("discretization", ["edm", "vp", "ve", "iddpm"])
def test_noise_levels_fall_from_sigma_max_to_sigma_min(discretization):
    noise = Noise(0.01, 50.0)
    sigmas = Ablation(steps=9, discretization=discretization).sigmas(noise)
    assert (sigmas.diff() < 0).all()
    tolerance = 0.1 if discretization == "iddpm" else 1e-9  # it has levels of its own
    assert abs(sigmas[0] / 50 - 1) < tolerance
    assert abs(sigmas[-1] / 0.01 - 1) < 3 * tolerance


def test_samples_have_the_type_of_the_noise_and_need_no_memory_to_plan():
    noisy = start().float()
    assert Ablation().sample(GaussianDenoiser(S), noisy, Cond(), no_noise).dtype == torch.float32
    with torch.device("meta"):
        denoiser = Denoiser(TinyNetwork())
    churning = Ablation(steps=3, s_churn=1.0)
    out = churning.sample(denoiser, noisy.to("meta"), Cond(), lambda k: noisy.to("meta"))
    assert out.shape == noisy.shape


def test_bounds_out_of_order_and_more_steps_than_levels_are_refused():
    with pytest.raises(ValueError, match=r"s_min 2\.0 must not be above s_max 1\.0"):
        Ablation(s_min=2.0, s_max=1.0)
    few = Noise(1.0, 2.0)
    with pytest.raises(RecipeError, match=r"sampler\.steps = 900: iddpm has \d+ noise levels"):
        Ablation(steps=900, discretization="iddpm").sigmas(few)
