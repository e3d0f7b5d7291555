import math
from itertools import pairwise

import pytest
import torch
from cmkit_std.samplers.ancestral import Ancestral, ancestral_step
from cmkit_std.samplers.ddim import DDIM
from cmkit_std.samplers.dpm import DPM
from cmkit_std.samplers.edm import EDM
from cmkit_std.samplers.euler import Euler
from cmkit_std.samplers.heun import Heun
from cmkit_std.samplers.multistep import Multistep
from cmkit_std.samplers.progdist import ProgDist
from pydantic import ValidationError

from cmkit import Cond, DataSpec, Noise, RecipeError
from cmkit.sample import Draws, sample
from tests.toys import Counting, GaussianDenoiser, GaussianFlow

CHURN = {"s_churn": 8.0, "s_tmin": 0.05, "s_tmax": 50.0, "s_noise": 1.0}
WALKS = [
    Euler(steps=5),
    Heun(steps=5),
    Heun(steps=5, **CHURN),
    DPM(steps=5),
    DPM(steps=5, **CHURN),
    Ancestral(steps=5),
    DDIM(steps=5),
    DDIM(steps=5, eta=0.5),
    ProgDist(steps=5),
    EDM(steps=5),
    EDM(steps=5, **CHURN),
]


def no_noise(k):
    raise AssertionError("a deterministic sampler drew noise")


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


@pytest.mark.parametrize("sampler", WALKS, ids=repr)
def test_nfe_of_a_walk_is_what_is_counted(sampler):
    denoiser, x = Counting(GaussianDenoiser()), 80 * torch.randn(2, 1, 4, 4)
    sampler.sample(denoiser, x, Cond(), lambda k: torch.randn_like(x))
    assert sampler.nfe == len(denoiser.seen)
    assert denoiser.seen[0] == pytest.approx(80)


@pytest.mark.parametrize(
    ("sampler", "order"),
    [
        (Euler, 1),
        (DDIM, 1),
        (ProgDist, 1),
        (Heun, 2),
        (EDM, 2),
        (DPM, 2),
        (lambda **options: DPM(mid_rho=2.0, **options), 2),
    ],
)
def test_error_falls_at_the_order_of_the_method(sampler, order):
    """The flow of x0 ~ N(0, s^2) is known: x(sigma) = x(sigma_max) sqrt of a ratio of variances."""
    noise, s = Noise(1e-3, 80.0), 0.5
    denoiser, x = GaussianDenoiser(s, noise), torch.full((1, 1, 1, 1), 80.0, dtype=torch.float64)
    last = noise.sigma_min if sampler is ProgDist else 0.0
    exact = 80 * ((s**2 + last**2) / (s**2 + 80**2)) ** 0.5
    clamp = {} if sampler is EDM else {"clamp": False}

    def error(steps):
        found = sampler(steps=steps, **clamp).sample(denoiser, x, Cond(), no_noise)
        return abs(float(found) - exact)

    assert error(40) / error(80) == pytest.approx(2**order, rel=0.15)


@pytest.mark.parametrize(
    "sampler",
    [
        Ancestral(steps=400, clamp=False),
        DDIM(steps=400, eta=0.7, clamp=False),
        Heun(steps=40, s_churn=40.0, clamp=False),
        DPM(steps=40, s_churn=40.0, clamp=False),
        EDM(steps=40, s_churn=40.0),
    ],
    ids=repr,
)
def test_fresh_noise_keeps_the_law_of_gaussian_data(sampler):
    """With little noise in x_T, most of the samples' spread comes from fresh noise."""
    denoiser, s = GaussianDenoiser(s=0.7), 0.7
    x = 80 * torch.randn(20_000, 1, 1, 1, dtype=torch.float64)
    out = sampler.sample(denoiser, x, Cond(), lambda k: torch.randn_like(x))
    assert out.std() == pytest.approx(s, rel=0.03)
    still = sampler.sample(denoiser, 0 * x, Cond(), lambda k: torch.randn_like(x))
    assert still.std() > 0.5 * s


@pytest.mark.parametrize("sampler", WALKS, ids=repr)
def test_samples_of_a_walk_do_not_depend_on_batch_size(sampler):
    draws, indices = Draws(DataSpec(1, 4), seed=1), range(5)

    def images(batch):
        found = sample(
            GaussianDenoiser(), sampler, draws, indices, batch, torch.device("cpu"), "fp32"
        )
        return torch.cat([part.images for part in found])

    assert torch.equal(images(5), images(2))


@pytest.mark.parametrize("sampler", [Heun, DPM, EDM])
def test_a_step_takes_its_own_draw_whatever_the_steps_before_took(sampler):
    asked = []
    x = torch.zeros(1, 1, 2, 2)

    def noise(k):
        asked.append(k)
        return x

    levels = Noise().sigmas(6).flip(0)
    options = sampler(steps=6, s_churn=1.0, s_tmin=float(levels[3]) - 1e-3, s_tmax=30.0)
    options.sample(GaussianDenoiser(), x, Cond(), noise)
    inside = [k for k, sigma in enumerate(levels, 1) if float(levels[3]) - 1e-3 <= sigma <= 30]
    assert asked == inside
    assert len(inside) == 3


def test_ancestral_draws_after_every_step_but_the_last():
    asked, x = [], torch.zeros(1, 1, 2, 2)

    def noise(k):
        asked.append(k)
        return x

    Ancestral(steps=4).sample(GaussianDenoiser(), x, Cond(), noise)
    assert asked == [1, 2, 3]


@pytest.mark.parametrize(("s_churn", "gamma"), [(1.2, 0.2), (100.0, 2**0.5 - 1)])
def test_churn_raises_sigma_by_gamma_and_at_most_by_sqrt_2(s_churn, gamma):
    x = torch.zeros(1, 1, 2, 2, dtype=torch.float64)
    sampler = Heun(steps=6, s_churn=s_churn, s_noise=2.0)
    noised, sigma = sampler.churned(x, 10.0, 1, lambda k: torch.ones_like(x))
    assert sigma == pytest.approx(10 * (1 + gamma))
    assert float(noised[0, 0, 0, 0]) == pytest.approx(2 * (sigma**2 - 100) ** 0.5)
    denoiser = Counting(GaussianDenoiser())
    sampler.sample(denoiser, x, Cond(), lambda k: x)
    assert denoiser.seen[0] == pytest.approx(80 * (1 + gamma))


def test_ancestral_step_splits_the_next_variance_as_the_posterior_does():
    """x' given x = x' + fresh noise and x0 varies by sigma'^2 (sigma^2 - sigma'^2) / sigma^2."""
    down, up = ancestral_step(2.0, 0.5)
    assert down**2 + up**2 == pytest.approx(0.25)
    assert up**2 == pytest.approx(0.25 * (4 - 0.25) / 4)
    assert ancestral_step(2.0, 0.0) == (0.0, 0.0)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_ddim_adds_the_noise_of_equation_16(eta):
    """sigma_t(eta) of x_vp, over sqrt(alpha) of the next level, alpha = 1 / (1 + sigma^2)."""
    x = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    noise = Noise(0.5, 3.0)
    high, low = 1 / (1 + 3.0**2), 1 / (1 + 0.5**2)
    up = eta * ((1 - low) / (1 - high)) ** 0.5 * (1 - high / low) ** 0.5 / low**0.5
    seen = []

    class Spy(GaussianDenoiser):
        def forward(self, x, sigma, cond=None):
            seen.append(x)
            return torch.full_like(x, 0.2)

    DDIM(steps=2, eta=eta).sample(Spy(noise=noise), x + 3.0, Cond(), lambda k: torch.ones_like(x))
    down = (0.5**2 - up**2) ** 0.5
    assert float(seen[1]) == pytest.approx(0.2 + down * (3.0 - 0.2) / 3.0 + up, rel=1e-12)


@pytest.mark.parametrize(("eta", "other"), [(0.0, Euler(steps=6)), (1.0, Ancestral(steps=6))])
def test_ends_of_ddim_are_euler_and_ancestral(eta, other):
    x = 80 * torch.randn(2, 1, 4, 4, dtype=torch.float64)
    draws = torch.randn(7, *x.shape, dtype=torch.float64)
    found, expected = (
        sampler.sample(GaussianDenoiser(), x, Cond(), draws.__getitem__)
        for sampler in (DDIM(steps=6, eta=eta), other)
    )
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("sampler", [Euler(), Heun(), Ancestral(), DDIM(eta=0.5)], ids=repr)
def test_last_step_to_zero_returns_the_last_estimate(sampler):
    """Also where x is so large that x - (x - x0_hat) would lose digits."""

    class Constant(GaussianDenoiser):
        def forward(self, x, sigma, cond=None):
            return torch.full_like(x, 0.123)

    x = torch.randn(1, 1, 2, 2)
    out = sampler.sample(Constant(), 80 * x, Cond(), lambda k: torch.ones_like(x))
    torch.testing.assert_close(out, torch.full_like(x, 0.123), atol=1e-7, rtol=0)


def two_steps(**options):
    return Multistep(sigmas=(1e-4,), **options)


@pytest.mark.parametrize(
    "sampler", [Euler, Heun, DPM, Ancestral, DDIM, ProgDist, Multistep, two_steps]
)
def test_clamp_limits_estimates_and_can_be_put_off(sampler):
    class Bright(GaussianDenoiser):
        def forward(self, x, sigma, cond=None):
            return torch.full_like(x, 3.0)

    # With one noise level only, as good as, every step lands on the estimate.
    x = torch.full((1, 1, 2, 2), 3.0)
    for clamp, value in ((True, 1.0), (False, 3.0)):
        denoiser = Bright(noise=Noise(1e-6, 1e-3))
        out = sampler(clamp=clamp).sample(denoiser, x, Cond(), lambda k: torch.zeros_like(x))
        assert float(out.mean()) == pytest.approx(value, abs=0.01)


def test_edm_is_heun_without_clamp_kept_in_float64():
    x = 80 * torch.randn(2, 1, 4, 4, dtype=torch.float64)
    z = torch.randn(9, 2, 1, 4, 4, dtype=torch.float64)
    denoiser = GaussianDenoiser()
    edm = EDM(steps=7, **CHURN).sample(denoiser, x, Cond(), lambda k: z[k])
    heun = Heun(steps=7, clamp=False, **CHURN).sample(denoiser, x, Cond(), lambda k: z[k])
    torch.testing.assert_close(edm, heun, rtol=0, atol=1e-12)
    seen = []

    class Spy(GaussianDenoiser):
        def forward(self, x, sigma, cond=None):
            seen.append((x.dtype, sigma.dtype))
            return super().forward(x, sigma, cond)

    out = EDM(steps=7, **CHURN).sample(Spy(), x.float(), Cond(), lambda k: z[k].float())
    assert set(seen) == {(torch.float32, torch.float32)}
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), edm, atol=1e-5, rtol=1e-5)


def test_rounding_of_edm_does_not_grow_with_the_steps():
    x = 80 * torch.randn(16, 1, 4, 4)
    sampler = EDM(steps=1000)
    exact = sampler.sample(GaussianDenoiser(), x.double(), Cond(), no_noise)
    rounded = sampler.sample(GaussianDenoiser(), x, Cond(), no_noise)
    assert float((rounded - exact).abs().max()) < 7e-7


@pytest.mark.parametrize(
    ("sampler", "options", "message"),
    [
        *(
            (sampler, {"steps": 1}, "greater than or equal to 2")
            for sampler in (Euler, Heun, DPM, Ancestral, EDM)
        ),
        (ProgDist, {"steps": 0}, "greater than or equal to 1"),
        (Heun, {"s_churn": -1.0}, "greater than or equal to 0"),
        (DPM, {"s_noise": -1.0}, "greater than or equal to 0"),
        (EDM, {"s_tmin": 2.0, "s_tmax": 1.0}, r"s_tmin 2\.0 must not be above s_tmax 1\.0"),
    ],
)
def test_options_that_mean_nothing_are_refused(sampler, options, message):
    with pytest.raises(ValidationError, match=message):
        sampler(**options)


def of_k_diffusion(denoiser, x, levels):
    """`sample_dpm_2`: a step by its middle in ln(sigma), but by Euler to 0."""
    for sigma, after in pairwise([*levels, 0.0]):
        middle = math.sqrt(sigma * after) or after
        slope = (x - denoiser(x, x.new_full((len(x),), sigma))) / sigma
        if after > 0:
            x_middle = x + (middle - sigma) * slope
            x0 = denoiser(x_middle, x.new_full((len(x),), middle))
            slope = (x_middle - x0) / middle
        x = x + (after - sigma) * slope
    return x


def test_dpm_tends_to_that_of_k_diffusion_but_for_the_last_step():
    """Whose midpoint is the limit of ours as mid_rho grows; the default is another."""
    noise, s = Noise(0.2, 80.0), 0.5
    denoiser, x = GaussianDenoiser(s, noise), torch.full((1, 1, 1, 1), 80.0, dtype=torch.float64)
    levels = noise.sigmas(12, dtype=torch.float64).flip(0).tolist()
    theirs = float(of_k_diffusion(denoiser, x, levels))

    def ours(mid_rho):
        """Down to the last positive level, and from there by Euler."""
        sampler = DPM(mid_rho=mid_rho, clamp=False)
        y = x
        for sigma, after in pairwise(levels):
            y = sampler.midpoint_step(denoiser, y, sigma, after, Cond())
        return float(denoiser(y, y.new_full((1,), levels[-1])))

    gaps = [abs(ours(mid_rho) / theirs - 1) for mid_rho in (1.0, 3.0, 6.0, 10.0)]
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[1] > 0.01
    assert gaps[-1] < gaps[1] / 3


@pytest.mark.parametrize("mid_rho", [1.0, 3.0, 7.0, 10.0])
def test_every_mid_rho_that_is_allowed_is_exact_enough_in_float32(mid_rho):
    x = 80 * torch.randn(8, 1, 2, 2, dtype=torch.float64)
    denoiser, sampler = GaussianDenoiser(0.5, Noise()), DPM(steps=12, mid_rho=mid_rho, clamp=False)
    exact = sampler.sample(denoiser, x, Cond(), no_noise)
    rounded = sampler.sample(denoiser, x.float(), Cond(), no_noise)
    torch.testing.assert_close(rounded.double(), exact, rtol=0, atol=2e-4)
    with pytest.raises(ValidationError, match="less than or equal to 10"):
        DPM(mid_rho=10.5)
