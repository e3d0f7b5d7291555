"""Likelihoods by the probability-flow ODE, against closed forms."""

import math

import pytest
import torch
from cmkit_std.likelihood import bits_per_dim, log_density

from cmkit import Cond, Denoiser, Noise, Rng
from tests.toys import GaussianDenoiser, TinyNetwork

CPU = torch.device("cpu")


class Correlated(Denoiser):
    """The exact denoiser of x0 ~ N(0, C): D(x, sigma) = C (C + sigma^2)^-1 x."""

    def __init__(self, covariance):
        super().__init__(TinyNetwork(), Noise())
        self.covariance = covariance

    def forward(self, x, sigma, cond=None):
        eye = torch.eye(len(self.covariance), dtype=x.dtype)
        gain = self.covariance @ torch.linalg.inv(self.covariance + sigma[0] ** 2 * eye)
        return (x.flatten(1) @ gain.T).view_as(x)


def rng(index=0):
    return Rng(0, "law", index, CPU)


def normal(x, covariance):
    eye = torch.eye(len(covariance), dtype=torch.float64)
    zeros = torch.zeros(len(covariance), dtype=torch.float64)
    law = torch.distributions.MultivariateNormal(zeros, covariance + 0.002**2 * eye)
    return law.log_prob(x.flatten(1))


def test_log_density_of_gaussian_data_is_exact_and_of_second_order():
    """Signs estimate a diagonal Jacobian without error: what is left falls 4 times a doubling."""
    x = 0.5 * torch.randn(8, 3, 4, 4, dtype=torch.float64)
    known = normal(x, 0.25 * torch.eye(48, dtype=torch.float64))
    denoiser = GaussianDenoiser(s=0.5)
    errors = []
    for n in (50, 100, 400):
        errors.append((log_density(denoiser, x, rng=rng(), num_sigmas=n) - known).abs().max() / 48)
    assert errors[2] < 1e-3
    assert 3.0 < errors[0] / errors[1] < 5.5


def test_log_density_of_correlated_data_is_right_on_average_over_probes():
    mixing = torch.tensor([[0.5, 0.0], [0.3, 0.2]], dtype=torch.float64)
    covariance = mixing @ mixing.T
    point = (mixing @ torch.tensor([0.4, -0.7], dtype=torch.float64)).view(1, 1, 1, 2)
    x = point.expand(2048, -1, -1, -1)
    values = log_density(Correlated(covariance), x, rng=rng())
    known = normal(point, covariance)
    assert values.std() > 0.05
    assert float(values.mean()) == pytest.approx(float(known), abs=4 * float(values.std()) / 45)
    four = log_density(Correlated(covariance), x, rng=rng(), probes=4)
    assert float(four.std() / values.std()) == pytest.approx(0.5, rel=0.15)


def test_bits_per_dim_counts_the_256_values():
    """Of values drawn in one bin width's wide law: 7 bits less the density's own."""
    x0 = (torch.randint(256, (16, 1, 4, 4)).double() / 127.5) - 1
    got = bits_per_dim(GaussianDenoiser(s=0.5), x0, rng=rng(), num_sigmas=400)
    spread = ((x0 + 1) * 127.5 + rng().uniform(x0.numel()).view_as(x0)) / 128 - 1
    known = 7 - normal(spread, 0.25 * torch.eye(16, dtype=torch.float64)) / 16 / math.log(2)
    torch.testing.assert_close(got, known, atol=2e-3, rtol=0)


def test_bits_per_dim_of_a_discrete_law_is_its_entropy():
    """Data whose density is flat over a bin cost what Shannon says: a wide Gaussian's entropy."""
    s = 0.2
    u = (torch.randn(4096, 1, 2, 2, dtype=torch.float64) * s + 1).mul(128).floor().clamp(0, 255)
    bits = bits_per_dim(GaussianDenoiser(s=s), u / 127.5 - 1, rng=rng(), num_sigmas=400)
    entropy = 0.5 * math.log2(2 * math.pi * math.e * s**2) + 7
    assert float(bits.mean()) == pytest.approx(entropy, abs=0.02)


def test_a_likelihood_does_not_depend_on_its_batch_nor_keep_a_graph():
    x = 0.5 * torch.randn(4, 1, 4, 4, dtype=torch.float64)
    denoiser = GaussianDenoiser(s=0.5)
    whole = log_density(denoiser, x, rng=rng(), num_sigmas=20)
    parts = [log_density(denoiser, row[None], Cond(), rng=rng(), num_sigmas=20) for row in x]
    torch.testing.assert_close(whole, torch.cat(parts))
    assert not whole.requires_grad
