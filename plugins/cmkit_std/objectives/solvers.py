"""One step of the probability-flow ODE dx / dsigma = (x - D(x, sigma)) / sigma (EDM, eq. 4)."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from cmkit import Cond, Denoiser


def slope(teacher: Denoiser, x: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
    """dx / dsigma, like x (B, C, H, W), at noise levels sigma (B,)."""
    along: Tensor = (x - teacher(x, sigma, cond)) / sigma.view(-1, 1, 1, 1)
    return along


def euler(teacher: Denoiser, x: Tensor, high: Tensor, low: Tensor, cond: Cond) -> Tensor:
    """x (B, C, H, W) taken from noise levels high (B,) to low (B,) along its slope."""
    return x + slope(teacher, x, high, cond) * (low - high).view(-1, 1, 1, 1)


def heun(teacher: Denoiser, x: Tensor, high: Tensor, low: Tensor, cond: Cond) -> Tensor:
    """x (B, C, H, W) taken from noise levels high (B,) to low (B,), which must be above 0, along
    the mean of the slopes at both ends."""
    gap = (low - high).view(-1, 1, 1, 1)
    start = slope(teacher, x, high, cond)
    end = slope(teacher, x + start * gap, low, cond)
    return x + (start + end) / 2 * gap


SOLVERS = {"euler": euler, "heun": heun}
