import pytest
import torch
from cmkit_std.samplers.multistep import Multistep
from pydantic import ValidationError

from cmkit import Cond, Noise, RecipeError
from tests.toys import Counting, GaussianFlow


@pytest.mark.parametrize("sigmas", [(), (0.8,), (10.0, 1.0, 0.1)])
def test_nfe_is_what_is_counted(sigmas):
    sampler, denoiser = Multistep(sigmas=sigmas), Counting(GaussianFlow())
    x = 80 * torch.randn(2, 1, 4, 4)
    sampler.sample(denoiser, x, Cond(), lambda k: torch.randn_like(x))
    assert sampler.nfe == len(denoiser.seen) == 1 + len(sigmas)
    assert denoiser.seen == pytest.approx([80.0, *sigmas])


def test_exact_f_reproduces_gaussian_data_in_any_number_of_steps():
    flow, s = GaussianFlow(s=0.2), 0.2
    x = (80**2 + s**2) ** 0.5 * torch.randn(40_000, 1, 1, 1, dtype=torch.float64)
    for sigmas in ((), (2.0,), (5.0, 0.5)):
        out = Multistep(sigmas=sigmas).sample(flow, x, Cond(), lambda k: torch.randn_like(x))
        assert out.std() == pytest.approx(s, rel=0.02)


def test_second_step_adds_the_noise_that_is_missing_to_sigma():
    """x = x0 + sqrt(sigma^2 - sigma_min^2) z, (Consistency Models, algorithm 1)."""
    seen = []

    class Spy(GaussianFlow):
        def forward(self, x, sigma, cond=None):
            seen.append(x)
            return torch.full_like(x, 0.25)

    x = torch.zeros(1, 1, 2, 2)
    Multistep(sigmas=(0.5,)).sample(Spy(noise=Noise(0.3)), x, Cond(), lambda k: torch.ones_like(x))
    torch.testing.assert_close(seen[1], torch.full_like(x, 0.25 + (0.5**2 - 0.3**2) ** 0.5))


def test_levels_that_do_not_fall_or_lie_outside_are_refused():
    with pytest.raises(ValidationError, match="must fall"):
        Multistep(sigmas=(1.0, 2.0))
    x = torch.zeros(1, 1, 2, 2)
    with pytest.raises(RecipeError, match="between sigma_min"):
        Multistep(sigmas=(90.0,)).sample(GaussianFlow(), x, Cond(), lambda k: x)


def test_estimates_are_clamped_before_noise_is_added():
    seen = []

    class Bright(GaussianFlow):
        def forward(self, x, sigma, cond=None):
            seen.append(x)
            return torch.full_like(x, 3.0)

    x = torch.zeros(1, 1, 2, 2)
    out = Multistep(sigmas=(0.5,)).sample(Bright(), x, Cond(), lambda k: torch.zeros_like(x))
    assert torch.equal(seen[1], torch.ones_like(x))
    assert torch.equal(out, torch.ones_like(x))
