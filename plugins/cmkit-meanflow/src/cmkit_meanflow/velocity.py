"""Average velocities of the path x_t = (1 - t) x0 + t z, on the sigma axis.

t = sigma / (1 + sigma), r = s / (1 + s) with s = sigma_to, and x = x_t / (1 - t) = x0 + sigma z is
a noisy image as cmkit's denoisers take it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import cmkit
from cmkit import Cond, Denoiser, Rng

Function = Callable[[Tensor, Tensor], Tensor]


def average(denoiser: Denoiser, x: Tensor, sigma: Tensor, sigma_to: Tensor, cond: Cond) -> Tensor:
    """u(x_t, r, t), (B, C, H, W), at images x (B, C, H, W) of noise levels sigma (B,).

    u = (x_t - x0_hat) / t = (x - (1 + sigma) x0_hat) / sigma.
    """
    x0_hat = denoiser(x, sigma, replace(cond, sigma_to=sigma_to))
    sigma = sigma.view(-1, 1, 1, 1)
    return (x - (1 + sigma) * x0_hat) / sigma


def target(
    denoiser: Denoiser,
    x: Tensor,
    sigma: Tensor,
    sigma_to: Tensor,
    slope: Tensor,
    cond: Cond,
    derivative: str,
    rng: Rng,
) -> Tensor:
    """v - (t - r) du/dt, (B, C, H, W), where images x move by `slope` = dx/dsigma (equation 6).

    v = dx_t/dt = (1 + sigma) slope - x, which is z - x0 along one image; (t - r) d/dt is
    (sigma - s) (1 + sigma) / (1 + s) d/dsigma. Dropout masks are those of
    `cmkit.shared_dropout(rng)` in every call of the network.
    """

    def call(x: Tensor, sigma: Tensor) -> Tensor:
        with cmkit.shared_dropout(rng):
            return average(denoiser, x, sigma, sigma_to, cond)

    length = (sigma - sigma_to) * (1 + sigma) / (1 + sigma_to)
    along = (length.view(-1, 1, 1, 1) * slope, length)
    with torch.autocast(x.device.type, enabled=False):
        change = DERIVATIVES[derivative](call, (x, sigma), along)
    return (1 + sigma.view(-1, 1, 1, 1)) * slope - x - change


def forward(call: Function, at: tuple[Tensor, Tensor], along: tuple[Tensor, Tensor]) -> Tensor:
    """The derivative of `call` along a direction, by forward-mode differentiation."""
    # Of PyTorch's kernels of attention only the plain one has a forward-mode derivative.
    with sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
        # PyTorch imports a module of its own that still uses torch.jit.script.
        warnings.filterwarnings("ignore", category=FutureWarning, module="torch.*")
        warnings.filterwarnings("ignore", category=DeprecationWarning, module="torch.*")
        derivative: Tensor = torch.func.jvp(call, at, along)[1]
    return derivative


def difference(call: Function, at: tuple[Tensor, Tensor], along: tuple[Tensor, Tensor]) -> Tensor:
    """The same by central differences over a small part of sigma: two calls of the network, and
    rounding of about eps^(2/3)."""
    x, sigma = at
    # The direction is longer than sigma at high noise levels, where a step along it would leave
    # the path.
    size = along[1].abs() / sigma
    h = torch.finfo(x.dtype).eps ** (1 / 3) / size.clamp(min=1)
    step = h.view(-1, 1, 1, 1)
    ahead = call(x + step * along[0], sigma + h * along[1])
    behind = call(x - step * along[0], sigma - h * along[1])
    return (ahead - behind) / (2 * step)


DERIVATIVES = {"forward": forward, "difference": difference}
