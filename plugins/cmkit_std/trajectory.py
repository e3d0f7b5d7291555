"""Jumps along the probability-flow ODE by one evaluation (Kim, Lai, Liao, Murata, Takida, Uesaka,
He, Mitsufuji, Ermon: Consistency Trajectory Models, 2023, section 3).

g is a `Denoiser` whose network embeds `Cond.sigma_to`; with precond "edm" it has the scalings of
the published models. On the diagonal, g(x, sigma, sigma) is the estimate D(x, sigma) of x0.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from torch import Tensor

from cmkit import Cond, Denoiser
from cmkit.denoiser import NO_COND
from cmkit.functional import per_image

Outer = Literal["euler", "variance", "euler_variance_mixed"]
"""How G is made of x and g. The published models have "euler"; the others are sony/ctm's trials."""


def jump(
    denoiser: Denoiser,
    x: Tensor,
    sigma: Tensor,
    sigma_to: Tensor,
    cond: Cond = NO_COND,
    outer: Outer = "euler",
) -> Tensor:
    """G, (B, C, H, W): images x at noise levels sigma (B,) taken to sigma_to (B,) along the ODE.

    G = sigma_to / sigma x + (1 - sigma_to / sigma) g(x, sigma, sigma_to) (CTM, eq. 9); where
    sigma_to is sigma it is x itself, whatever the network.
    """
    g = denoiser(x, sigma, replace(cond, sigma_to=sigma_to))
    kept = kept_share(outer, sigma, sigma_to, denoiser.sigma_data, denoiser.noise.sigma_min)
    return per_image(kept, x) * x + per_image(1 - sigma_to / sigma, x) * g


def denoised(
    denoiser: Denoiser, x: Tensor, sigma: Tensor, cond: Cond = NO_COND, outer: Outer = "euler"
) -> Tensor:
    """D, (B, C, H, W): x0_hat of images x at noise levels sigma (B,).

    The end of the line that leaves x as `jump` does when sigma_to falls from sigma: with a = the
    share of x that it keeps, D = g + (1 - sigma da / dsigma_to) x, which is g for "euler".
    Conditions that say sigma_to themselves keep it.
    """
    g = denoiser(x, sigma, cond if cond.sigma_to is not None else replace(cond, sigma_to=sigma))
    if outer == "euler":
        return g
    above = sigma - denoiser.noise.sigma_min
    slope = above / (above**2 + denoiser.sigma_data**2)
    if outer == "euler_variance_mixed":
        slope = (1 + slope) / (sigma + 1)
    return g + per_image(1 - sigma * slope, x) * x


def kept_share(
    outer: Outer, sigma: Tensor, sigma_to: Tensor, sigma_data: float, sigma_min: float
) -> Tensor:
    """The share a of x that a jump from sigma (B,) to sigma_to (B,) keeps, (B,)."""
    euler = sigma_to / sigma
    if outer == "euler":
        return euler
    to, from_ = ((level - sigma_min) ** 2 + sigma_data**2 for level in (sigma_to, sigma))
    variance = (to / from_).sqrt()
    return variance if outer == "variance" else (sigma_to + variance) / (sigma + 1)
