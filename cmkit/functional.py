"""A toolbox for authors: noise levels, slopes, solver steps, derivatives and distances.

Shapes: images x (B, C, H, W), noise levels sigma (B,), or a float where all images have the same.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from cmkit.denoiser import NO_COND, Cond, per_image
from cmkit.rng import Rng, shared_dropout

__all__ = [
    "derivative",
    "difference",
    "euler",
    "heun",
    "l2",
    "lognormal_sigma",
    "per_image",
    "pseudo_huber",
    "slope",
]

Level = Tensor | float
"""Noise levels (B,), or that of all images."""
Denoise = Callable[[Tensor, Any, Cond], Tensor]
"""(x, sigma, cond) -> x0_hat: a denoiser, or what a sampler makes of one."""


def lognormal_sigma(x0: Tensor, mean: float, std: float, rng: Rng) -> Tensor:
    """Random noise levels with ln(sigma) ~ N(mean, std^2), (B,), one for each image of x0 and in
    its type (EDM, table 1)."""
    return (mean + std * rng.normal_like(x0.new_empty(len(x0)))).exp()


def slope(x: Tensor, sigma: Level, x0_hat: Tensor) -> Tensor:
    """dx/dsigma = (x - x0_hat) / sigma of the probability-flow ODE, like x (EDM, eq. 4)."""
    return (x - x0_hat) / _per_image(sigma, x)


def euler(
    denoiser: Denoise, x: Tensor, sigma: Level, sigma_next: Level, cond: Cond = NO_COND
) -> Tensor:
    """x at sigma_next after one Euler step of the probability-flow ODE, which is a DDIM step.

    x0_hat + sigma_next / sigma (x - x0_hat): exactly x0_hat where sigma_next is 0.
    """
    x0_hat = denoiser(x, sigma, cond)
    return x0_hat + _per_image(sigma_next / sigma, x) * (x - x0_hat)


def heun(
    denoiser: Denoise, x: Tensor, sigma: Level, sigma_next: Level, cond: Cond = NO_COND
) -> Tensor:
    """x at sigma_next > 0 after one step of Heun's method (EDM, algorithm 1): along the mean of the
    slopes at both ends."""
    gap = _per_image(sigma_next - sigma, x)
    start = slope(x, sigma, denoiser(x, sigma, cond))
    x_next = x + gap * start
    end = slope(x_next, sigma_next, denoiser(x_next, sigma_next, cond))
    return x + gap * (start + end) / 2


def derivative(
    f: Callable[..., Tensor], at: tuple[Tensor, ...], along: tuple[Tensor, ...], rng: Rng
) -> tuple[Tensor, Tensor]:
    """(f(*at), its derivative along the direction `along`), by forward-mode differentiation.

    Without autocast: it is a small difference of large numbers. Dropout masks are those of
    `shared_dropout(rng)`. For df/dsigma of a denoiser where images move by dx/dsigma, `at` is
    (x, sigma) and `along` (dx, torch.ones_like(sigma)).
    """
    value: Tensor
    change: Tensor | None
    exact = torch.autocast(at[0].device.type, enabled=False)
    # Fused kernels of attention have no forward mode, the plain formula has.
    with exact, sdpa_kernel(SDPBackend.MATH), shared_dropout(rng), warnings.catch_warnings():
        # The first use compiles torch's own formulas with torch.jit, which torch deprecates.
        warnings.filterwarnings("ignore", category=FutureWarning, module="torch.*")
        warnings.filterwarnings("ignore", category=DeprecationWarning, module="torch.*")
        if torch.is_grad_enabled():  # backward through dual tensors' softmax is torch's bug
            value, change = torch.func.jvp(f, at, along)[:2]
        else:  # torch.func would draw other masks in channels_last memory
            with forward_ad.dual_level():
                duals = map(forward_ad.make_dual, at, along)
                value, change = forward_ad.unpack_dual(f(*duals))
    return value, torch.zeros_like(value) if change is None else change


def difference(
    f: Callable[..., Tensor],
    at: tuple[Tensor, ...],
    along: tuple[Tensor, ...],
    rng: Rng,
    step: Tensor | None = None,
) -> Tensor:
    """The derivative of f at `at` along `along`, by central differences: for networks that have no
    forward mode. Two calls of f; precision and dropout as in `derivative`.

    `step` (B,) is the part of `along` to go each way, by default eps^(1/3), which leaves an error
    of about eps^(2/3).
    """
    default = at[0].new_full((len(at[0]),), torch.finfo(at[0].dtype).eps ** (1 / 3))
    part = default if step is None else step

    def moved(sign: int) -> Tensor:
        with shared_dropout(rng):
            return f(*(a + sign * per_image(part, a) * d for a, d in zip(at, along, strict=True)))

    with torch.autocast(at[0].device.type, enabled=False):
        ahead, behind = moved(1), moved(-1)
    return (ahead - behind) / (2 * per_image(part, ahead))


def l2(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared difference of each image, (B,)."""
    return (a - b).square().flatten(1).mean(1)


def pseudo_huber(a: Tensor, b: Tensor, c: float | None = None) -> Tensor:
    """sqrt(||a - b||^2 + c^2) - c of each whole image, (B,) (iCT, eq. 7).

    c is `huber_c` of the numbers in an image unless given; c = 0 is the norm itself, with gradient
    0 where a = b.
    """
    apart = (a - b).flatten(1)
    c = huber_c(apart.shape[1]) if c is None else c
    if c == 0:
        norm: Tensor = torch.linalg.vector_norm(apart, dim=1)  # sqrt has gradient NaN at 0
        return norm
    return (apart.square().sum(1) + c * c).sqrt() - c


def huber_c(d: int) -> float:
    """0.00054 sqrt(d) for images of d numbers (iCT, section 3.3)."""
    return 0.00054 * math.sqrt(d)


def _per_image(sigma: Level, x: Tensor) -> Tensor | float:
    """`per_image` of noise levels (B,); a float is the same for all and stays as it is."""
    return per_image(sigma, x) if isinstance(sigma, Tensor) else sigma
