"""The toolbox for authors, against closed forms: most on Gaussian data, whose ODE is known."""

import math

import pytest
import torch
from torch.nn.functional import dropout, scaled_dot_product_attention

from cmkit import Rng, shared_dropout
from cmkit.functional import (
    derivative,
    difference,
    euler,
    heun,
    l2,
    lognormal_sigma,
    per_image,
    pseudo_huber,
    slope,
)
from tests.toys import GaussianDenoiser

CPU = torch.device("cpu")
S = 0.7
"""Standard deviation of the Gaussian data."""
SIGMA = torch.tensor([0.1, 1.0, 20.0], dtype=torch.float64)
FORMATS = [torch.contiguous_format, torch.channels_last]


def images(n=3):
    return torch.randn(n, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def rng():
    return Rng(0, "law", 0, CPU)


def forward(f, at, along):
    return derivative(f, at, along, rng())[1]


def central(f, at, along):
    return difference(f, at, along, rng())


BOTH = pytest.mark.parametrize("change_of", [forward, central])


def test_per_image_is_a_factor_of_each_image_in_the_type_of_the_images():
    x = torch.ones(2, 1, 3, 3, dtype=torch.bfloat16)
    scaled = per_image(torch.tensor([2.0, 3.0]), x) * x
    assert scaled.dtype == x.dtype
    assert torch.equal(scaled[0], 2 * x[0])
    assert torch.equal(scaled[1], 3 * x[1])


def test_lognormal_levels_have_their_mean_and_deviation_and_the_type_of_the_images():
    x0 = torch.zeros(200_000, 1, 1, 1, dtype=torch.float64)
    sigma = lognormal_sigma(x0, -1.2, 0.6, rng())
    assert sigma.shape == (len(x0),)
    assert sigma.dtype == x0.dtype
    assert sigma.log().mean().item() == pytest.approx(-1.2, abs=0.01)
    assert sigma.log().std().item() == pytest.approx(0.6, abs=0.01)
    assert torch.equal(sigma, lognormal_sigma(x0, -1.2, 0.6, rng()))


def test_slope_of_gaussian_data_is_its_closed_form():
    x = images()
    got = slope(x, SIGMA, GaussianDenoiser(S)(x, SIGMA))
    torch.testing.assert_close(got, per_image(SIGMA / (S**2 + SIGMA**2), x) * x)


@pytest.mark.parametrize(("step", "times"), [(euler, 4), (heun, 8)])
def test_error_of_a_step_falls_with_its_order(step, times):
    """When the gap is halved, by 4 and 8: the error of one step is of order 2 and 3 in it."""
    x, errors = images(), []
    for gap in (0.02, 0.01):
        low = (1 - gap) * SIGMA
        known = x * per_image(((S**2 + low**2) / (S**2 + SIGMA**2)).sqrt(), x)
        errors.append(l2(step(GaussianDenoiser(S), x, SIGMA, low), known).sqrt())
    torch.testing.assert_close(
        errors[0] / errors[1], torch.full_like(SIGMA, times), rtol=0.05, atol=0
    )


@pytest.mark.parametrize("step", [euler, heun])
def test_a_level_of_all_images_may_be_a_float(step):
    def denoise(x, sigma, cond):
        return GaussianDenoiser(S)(x, torch.as_tensor(sigma, dtype=x.dtype).expand(len(x)))

    x, high, low = images(), torch.full_like(SIGMA, 2.0), torch.full_like(SIGMA, 1.5)
    torch.testing.assert_close(step(denoise, x, 2.0, 1.5), step(denoise, x, high, low))


def test_an_euler_step_to_zero_is_the_estimate_itself():
    x, denoise = images(), GaussianDenoiser(S)
    assert torch.equal(euler(denoise, x, SIGMA, 0 * SIGMA), denoise(x, SIGMA))


@BOTH
@pytest.mark.parametrize("grad", [True, False])
def test_derivative_of_the_gaussian_denoiser_is_its_closed_form(change_of, grad):
    """d/dsigma of x s^2 / (s^2 + sigma^2) where x moves by dx/dsigma."""
    x, dx, total = images(), images().flip(0), S**2 + SIGMA**2
    with torch.set_grad_enabled(grad):
        got = change_of(GaussianDenoiser(S), (x, SIGMA), (dx, torch.ones_like(SIGMA)))
    by_x, by_sigma = S**2 / total, -2 * SIGMA * S**2 / total**2
    known = per_image(by_x, x) * dx + per_image(by_sigma, x) * x
    torch.testing.assert_close(got, known, rtol=1e-7, atol=1e-7)


def test_derivative_gives_the_value_as_well():
    x, ones = images(), torch.ones_like(SIGMA)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            value, _ = derivative(GaussianDenoiser(S), (x, SIGMA), (x, ones), rng())
        assert torch.equal(value, GaussianDenoiser(S)(x, SIGMA))


def test_derivative_with_gradient_can_be_trained_on():
    """Also through a softmax, as in attention: d/dw by differences in w."""
    x, dx, h = images(), images().flip(0), 1e-6

    def total(w):
        return forward(lambda x: torch.softmax(w * x, -1).square(), (x,), (dx,)).sum()

    w = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    total(w).backward()
    torch.testing.assert_close(w.grad, ((total(w + h) - total(w - h)) / (2 * h)).detach())


@BOTH
@pytest.mark.parametrize("grad", [True, False])
def test_derivative_of_a_constant_is_zero(change_of, grad):
    with torch.set_grad_enabled(grad):
        assert not change_of(lambda x: torch.ones(3, 1, 1, 1), (images(),), (images(),)).any()


@BOTH
def test_derivative_goes_through_attention(change_of):
    """Forward mode by the plain formula: torch's fused kernels have none."""

    def f(x):
        k = x.flatten(2)
        return scaled_dot_product_attention(k, k, k).view_as(x)

    x, dx, h = images(), images().flip(0), 1e-6
    with torch.no_grad():
        got = change_of(f, (x,), (dx,))
    torch.testing.assert_close(got, (f(x + h * dx) - f(x - h * dx)) / (2 * h), rtol=1e-6, atol=1e-8)


@BOTH
def test_derivative_is_not_rounded_by_autocast(change_of):
    layer = torch.nn.Conv2d(2, 2, 3)
    x, dx = images().float(), images().flip(0).float()
    with torch.no_grad():
        exact = change_of(layer, (x,), (dx,))
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(change_of(layer, (x,), (dx,)), exact)


@BOTH
@pytest.mark.parametrize("memory", FORMATS)
def test_dropout_masks_of_a_derivative_are_those_of_every_shared_pass(change_of, memory):
    x, dx = (torch.randn(8, 4, 8, 8).double().to(memory_format=memory) for _ in range(2))
    with torch.no_grad():
        got = change_of(lambda x: dropout(x, 0.5), (x,), (dx,))
        with shared_dropout(rng()):
            kept = dropout(torch.ones_like(x), 0.5)
    assert 0.3 < (kept > 0).double().mean() < 0.7
    torch.testing.assert_close(got, kept * dx, rtol=1e-7, atol=1e-7)


def test_a_difference_goes_as_far_as_it_is_told():
    """Of ln(sigma) along 10,000, which from sigma = 0.01 soon leads below 0."""
    sigma, along = torch.full((3,), 0.01).double(), torch.full((3,), 1e4).double()
    step = torch.tensor([1e-8, 1e-9, 1e-10], dtype=torch.float64)
    got = difference(torch.log, (sigma,), (along,), rng(), step)
    torch.testing.assert_close(got, along / sigma, rtol=1e-4, atol=0)
    assert central(torch.log, (sigma,), (along,)).isnan().all()


def test_l2_is_the_mean_square_of_each_image():
    a, b = torch.zeros(2, 3, 4, 4), torch.full((2, 3, 4, 4), 0.5)
    b[1] = 3.0
    assert torch.equal(l2(a, b), torch.tensor([0.25, 9.0]))


def test_pseudo_huber_is_of_the_whole_image_and_has_the_c_of_ict():
    a, b = torch.zeros(2, 3, 4, 4), torch.full((2, 3, 4, 4), 0.5)
    c = 0.00054 * math.sqrt(48)
    expected = math.sqrt(48 * 0.25 + c * c) - c
    torch.testing.assert_close(pseudo_huber(a, b), torch.full((2,), expected))


def test_pseudo_huber_is_a_square_below_c_and_the_norm_above():
    a, b = images(), images().flip(0) / 2
    norm = (a - b).flatten(1).norm(dim=1)
    torch.testing.assert_close(pseudo_huber(a, b, 1e4), norm**2 / 2e4, rtol=1e-6, atol=0)
    torch.testing.assert_close(pseudo_huber(a, b, 1e-9), norm)
    torch.testing.assert_close(pseudo_huber(a, b, 0.0), norm)


@pytest.mark.parametrize("c", [0.0, 0.03])
def test_pseudo_huber_of_equal_images_is_zero_without_gradient(c):
    a, b = images().requires_grad_(), images()
    value = pseudo_huber(a, b, c)
    value.sum().backward()
    assert not value.any()
    assert not a.grad.any()
