"""Average velocities of the path x_t = (1 - t) x0 + t z, on the sigma axis.

t = sigma / (1 + sigma), r = s / (1 + s) with s = sigma_to, and x = x_t / (1 - t) = x0 + sigma z is
a noisy image as cmkit's denoisers take it.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from cmkit import Cond, Denoiser, Rng
from cmkit.functional import derivative, difference, per_image


def average(denoiser: Denoiser, x: Tensor, sigma: Tensor, sigma_to: Tensor, cond: Cond) -> Tensor:
    """u(x_t, r, t), (B, C, H, W), at images x (B, C, H, W) of noise levels sigma (B,).

    u = (x_t - x0_hat) / t = (x - (1 + sigma) x0_hat) / sigma.
    """
    x0_hat = denoiser(x, sigma, replace(cond, sigma_to=sigma_to))
    sigma = per_image(sigma, x)
    return (x - (1 + sigma) * x0_hat) / sigma


def target(
    denoiser: Denoiser,
    x: Tensor,
    sigma: Tensor,
    sigma_to: Tensor,
    slope: Tensor,
    cond: Cond,
    how: Literal["forward", "difference"],
    rng: Rng,
) -> Tensor:
    """v - (t - r) du/dt, (B, C, H, W), where images x move by `slope` = dx/dsigma (equation 6).

    v = dx_t/dt = (1 + sigma) slope - x, which is z - x0 along one image; (t - r) d/dt is
    (sigma - s) (1 + sigma) / (1 + s) d/dsigma. Dropout masks are those of
    `cmkit.shared_dropout(rng)` in every call of the network.
    """

    u = partial(average, denoiser, sigma_to=sigma_to, cond=cond)
    length = (sigma - sigma_to) * (1 + sigma) / (1 + sigma_to)
    at, along = (x, sigma), (per_image(length, x) * slope, length)
    if how == "forward":
        _, change = derivative(u, at, along, rng)
    else:
        # At high noise levels the direction is longer than sigma: a step would leave the path.
        size = length.abs() / sigma
        step = torch.finfo(x.dtype).eps ** (1 / 3) / size.clamp(min=1)
        change = difference(u, at, along, rng, step)
    return (1 + per_image(sigma, x)) * slope - x - change
