"""One step of the probability-flow ODE dx / dsigma = (x - D(x, sigma)) / sigma (EDM, eq. 4)."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from cmkit import Cond, Denoiser


def euler(teacher: Denoiser, x: Tensor, high: Tensor, low: Tensor, cond: Cond) -> Tensor:
    """x (B, C, H, W) taken from noise levels high (B,) to low (B,) along its slope."""
    return x + _slope(teacher, x, high, cond) * (low - high).view(-1, 1, 1, 1)


def heun(teacher: Denoiser, x: Tensor, high: Tensor, low: Tensor, cond: Cond) -> Tensor:
    """x (B, C, H, W) taken from noise levels high (B,) to low (B,), which must be above 0, along
    the mean of the slopes at both ends."""
    gap = (low - high).view(-1, 1, 1, 1)
    slope = _slope(teacher, x, high, cond)
    end = _slope(teacher, x + slope * gap, low, cond)
    return x + (slope + end) / 2 * gap


SOLVERS = {"euler": euler, "heun": heun}


def _slope(teacher: Denoiser, x: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
    slope: Tensor = (x - teacher(x, sigma, cond)) / sigma.view(-1, 1, 1, 1)
    return slope
