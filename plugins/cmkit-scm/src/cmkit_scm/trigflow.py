"""TrigFlow on the sigma axis: its network, and the tangent of its consistency function.

t is atan(sigma / sigma_data); x is a noisy image x0 + sigma z as cmkit's denoisers take it, and
TrigFlow's x_t is cos(t) x.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import cmkit
from cmkit import Cond, Denoiser, Rng

Derivative = Literal["forward", "difference"]
Function = Callable[[Tensor, Tensor], Tensor]


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
    derivative: Derivative,
    rng: Rng,
) -> Tensor:
    """g, (B, C, H, W), where images x move by `slope` = dx/dsigma.

    g = -cos^2 (sigma_data F' - dx_t/dt) - r cos sin (x_t + sigma_data dF'/dt), r = `share`
    (algorithm 1), which is cos(t) df/dt at r = 1.

    cos sin d/dt is sigma d/dsigma: the network's second argument ln(sigma) / 4 then moves by 1/4 at
    every noise level, and its first, x_t / sigma_data, by no more than itself. Dropout masks are
    those of `cmkit.shared_dropout(rng)` in every call of the network.
    """
    angle = torch.atan2(sigma, torch.full_like(sigma, denoiser.sigma_data)).view(-1, 1, 1, 1)
    cos, sin = angle.cos(), angle.sin()
    x_t = cos * x
    z = slope * denoiser.sigma_data
    dx_t = cos * z - sin * (x - sigma.view(-1, 1, 1, 1) * slope)
    u, c_noise = _inputs(x, sigma, denoiser.sigma_data)
    du = cos * sin * dx_t / denoiser.sigma_data

    def call(u: Tensor, c_noise: Tensor) -> Tensor:
        with cmkit.shared_dropout(rng):
            return -denoiser.network(u, c_noise, cond, {}).to(x.dtype)

    with torch.autocast(x.device.type, enabled=False):
        f, df = DERIVATIVES[derivative](call, (u, c_noise), (du, torch.full_like(c_noise, 0.25)))
    stable = cos**2 * (denoiser.sigma_data * f - dx_t)
    return -stable - share * (cos * sin * x_t + denoiser.sigma_data * df)


def forward(
    call: Function, at: tuple[Tensor, Tensor], along: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """`call` at a point and its derivative along a direction, by forward-mode differentiation."""
    # Of PyTorch's kernels of attention only the plain one has a forward-mode derivative.
    with sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
        # PyTorch imports a module of its own that still uses torch.jit.script.
        warnings.filterwarnings("ignore", category=FutureWarning, module="torch.*")
        warnings.filterwarnings("ignore", category=DeprecationWarning, module="torch.*")
        value, derivative = torch.func.jvp(call, at, along)
    return value, derivative


def difference(
    call: Function, at: tuple[Tensor, Tensor], along: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """The same by central differences; two more calls of the network, and rounding of about
    eps^(2/3)."""
    h = torch.finfo(at[0].dtype).eps ** (1 / 3)
    ahead = call(at[0] + h * along[0], at[1] + h * along[1])
    behind = call(at[0] - h * along[0], at[1] - h * along[1])
    return call(*at), (ahead - behind) / (2 * h)


DERIVATIVES = {"forward": forward, "difference": difference}


def _inputs(x: Tensor, sigma: Tensor, sigma_data: float) -> tuple[Tensor, Tensor]:
    """What cmkit.Denoiser gives its network: (x_t / sigma_data, ln(sigma) / 4)."""
    c_in = (sigma**2 + sigma_data**2).rsqrt()
    return c_in.view(-1, 1, 1, 1) * x, 0.25 * torch.log(sigma)
