"""TrigFlow on the sigma axis: its network, and the tangent of its consistency function.

t is atan(sigma / sigma_data); x is a noisy image x0 + sigma z as cmkit's denoisers take it, and
TrigFlow's x_t is cos(t) x.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

import cmkit
from cmkit import Cond, Denoiser, Rng
from cmkit.functional import derivative, difference, per_image


def network(denoiser: Denoiser, x: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
    """TrigFlow's F', (B, C, H, W), at images x (B, C, H, W) of noise levels sigma (B,)."""
    u, c_noise = _inputs(x, sigma, denoiser.sigma_data)
    return -denoiser.network(u, c_noise, cond, {}).to(x.dtype)


def tangent(
    denoiser: Denoiser,
    x: Tensor,
    sigma: Tensor,
    slope: Tensor,
    cond: Cond,
    share: float,
    how: Literal["forward", "difference"],
    rng: Rng,
) -> Tensor:
    """g, (B, C, H, W), where images x move by `slope` = dx/dsigma.

    g = -cos^2 (sigma_data F' - dx_t/dt) - r cos sin (x_t + sigma_data dF'/dt), r = `share`
    (algorithm 1), which is cos(t) df/dt at r = 1.

    cos sin d/dt is sigma d/dsigma: the network's second argument ln(sigma) / 4 then moves by 1/4 at
    every noise level, and its first, x_t / sigma_data, by no more than itself. Dropout masks are
    those of `cmkit.shared_dropout(rng)` in every call of the network.
    """
    angle = per_image(torch.atan2(sigma, torch.full_like(sigma, denoiser.sigma_data)), x)
    cos, sin = angle.cos(), angle.sin()
    x_t = cos * x
    z = slope * denoiser.sigma_data
    dx_t = cos * z - sin * (x - per_image(sigma, x) * slope)
    u, c_noise = _inputs(x, sigma, denoiser.sigma_data)
    du = cos * sin * dx_t / denoiser.sigma_data

    def call(u: Tensor, c_noise: Tensor) -> Tensor:
        return -denoiser.network(u, c_noise, cond, {}).to(x.dtype)

    at, along = (u, c_noise), (du, torch.full_like(c_noise, 0.25))
    if how == "forward":
        f, df = derivative(call, at, along, rng)
    else:
        with torch.autocast(x.device.type, enabled=False), cmkit.shared_dropout(rng):
            f = call(*at)
        df = difference(call, at, along, rng)
    stable = cos**2 * (denoiser.sigma_data * f - dx_t)
    return -stable - share * (cos * sin * x_t + denoiser.sigma_data * df)


def _inputs(x: Tensor, sigma: Tensor, sigma_data: float) -> tuple[Tensor, Tensor]:
    """What cmkit.Denoiser gives its network: (x_t / sigma_data, ln(sigma) / 4)."""
    c_in = (sigma**2 + sigma_data**2).rsqrt()
    return per_image(c_in, x) * x, 0.25 * torch.log(sigma)
