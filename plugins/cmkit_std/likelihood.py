"""Likelihoods of diffusion models by their probability-flow ODE (Song, Sohl-Dickstein, Kingma,
Kumar, Ermon, Poole: Score-Based Generative Modeling through SDEs, 2020, section 4.3)."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from cmkit import Cond, Denoiser, Rng

NO_COND = Cond()


def bits_per_dim(
    denoiser: Denoiser,
    x0: Tensor,
    cond: Cond = NO_COND,
    *,
    rng: Rng,
    num_sigmas: int = 200,
    probes: int = 1,
) -> Tensor:
    """Negative log-likelihood, (B,) bits a number, of 8-bit images x0 (B, C, H, W) = u / 127.5 - 1.

    The 256 values are spread over [-1, 1) by uniform noise, x = (u + U[0, 1)) / 128 - 1, which
    makes the number an upper bound; a bin is 2^-7 wide, hence 7 bits.
    """
    u = ((x0 + 1) * 127.5).round()
    x = (u + rng.uniform(u.numel()).view_as(u)) / 128 - 1
    nats = log_density(denoiser, x, cond, rng=rng, num_sigmas=num_sigmas, probes=probes)
    return 7 - nats / (x[0].numel() * math.log(2))


def log_density(
    denoiser: Denoiser,
    x: Tensor,
    cond: Cond = NO_COND,
    *,
    rng: Rng,
    num_sigmas: int = 200,
    probes: int = 1,
) -> Tensor:
    """ln p(x) at sigma_min, (B,) nats, of a diffusion model's denoiser and images x (B, C, H, W).

    ln N(x_T; 0, sigma_max^2) + the integral of div(dx / dsigma) from sigma_min to sigma_max, by
    Heun's steps between the points of a Karras grid: 2 (num_sigmas - 1) evaluations with as many
    backward passes, the same for every image, so that a number does not depend on its batch. The
    divergence is Hutchinson's estimate with `probes` vectors of signs a step, drawn once.
    """
    sigmas = denoiser.noise.sigmas(num_sigmas, x.device, x.dtype)
    signs = [2 * rng.integers(2, x.numel()).view_as(x) - 1 for _ in range(probes)]
    integral = x.new_zeros(len(x))
    for low, high in itertools.pairwise(sigmas):
        start, start_div = _slope(denoiser, x, low, cond, signs)
        end, end_div = _slope(denoiser, x + (high - low) * start, high, cond, signs)
        x = x + (high - low) / 2 * (start + end)
        integral = integral + (high - low) / 2 * (start_div + end_div)
    squared = (x / sigmas[-1]).square().flatten(1).sum(1)
    normal = -0.5 * squared - x[0].numel() * (0.5 * math.log(2 * math.pi) + sigmas[-1].log())
    return normal + integral


def _slope(
    denoiser: Denoiser, x: Tensor, sigma: Tensor, cond: Cond, signs: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """dx / dsigma = (x - D(x, sigma)) / sigma, like x, and its estimated divergence, (B,)."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        slope = (x - denoiser(x, sigma.expand(len(x)), cond)) / sigma
        terms = []
        for n, sign in enumerate(signs):
            last = n == len(signs) - 1
            (along,) = torch.autograd.grad((slope * sign).sum(), x, retain_graph=not last)
            terms.append((along * sign).flatten(1).sum(1))
    return slope.detach(), torch.stack(terms).mean(0)
