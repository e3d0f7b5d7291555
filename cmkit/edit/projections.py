"""Zero-shot editing with a consistency model (Consistency Models, 2023, algorithm 4)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from cmkit.denoiser import Cond, Denoiser
from cmkit.errors import DataError, RecipeError
from cmkit.noise import Noise

Projection = Callable[[Tensor], Tensor]
"""x0_hat -> the nearest images with the known part, (B, C, H, W) -> (B, C, H, W)."""

LUMINANCE = (0.2989, 0.5870, 0.1140)
"""Weights of red, green and blue in the brightness of a pixel (ITU-R BT.601)."""


def edit(
    denoiser: Denoiser,
    x: Tensor,
    sigmas: Sequence[float],
    project: Projection,
    cond: Cond,
    noise: Callable[[int], Tensor],
) -> Tensor:
    """Images (B, C, H, W) with the known part that `project` puts back, from x = sigma_max * z.

    Multistep consistency sampling through the falling noise levels `sigmas`, with `project` on
    every estimate; noise(k), k >= 1, is the k-th standard normal draw. RecipeError when the levels
    do not fall between sigma_max and sigma_min.
    """
    check_levels(denoiser.noise, sigmas)
    low, high = denoiser.noise.sigma_min, denoiser.noise.sigma_max

    def estimate(x: Tensor, sigma: float) -> Tensor:
        return project(denoiser(x, x.new_full((len(x),), sigma), cond).clamp(-1, 1))

    x0 = estimate(x, high)
    for k, sigma in enumerate(sigmas, 1):
        x0 = estimate(x0 + math.sqrt(sigma**2 - low**2) * noise(k), sigma)
    return x0


def check_levels(noise: Noise, sigmas: Sequence[float]) -> None:
    """RecipeError when the levels do not fall between sigma_max and sigma_min."""
    low, high = noise.sigma_min, noise.sigma_max
    if any(after >= before for before, after in pairwise([high, *sigmas, low])):
        raise RecipeError(f"sigmas {list(sigmas)} must fall between {high} and {low}")


def colorize(known: Tensor) -> Projection:
    """The projection to the brightness of `known` (B, 3, H, W): for each pixel
    a a^T known + (1 - a a^T) x0_hat, a = LUMINANCE / |LUMINANCE|."""
    if known.shape[1] != 3:
        raise DataError(f"colorize needs images of 3 channels, not {known.shape[1]}")
    a = torch.tensor(LUMINANCE, dtype=torch.float64)
    a = (a / a.norm()).to(known).view(3, 1, 1)
    return lambda x0: x0 + a * (a * (known - x0)).sum(1, keepdim=True)


def brightness(images: Tensor) -> Tensor:
    """The brightness (B, 1, H, W) of images (B, 3, H, W)."""
    return (images * images.new_tensor(LUMINANCE).view(3, 1, 1)).sum(1, keepdim=True)


def superres(known: Tensor, patch: int = 8) -> Projection:
    """The projection to the means of `known` over squares of `patch` pixels; `known` is as large as
    x0_hat, so repeat the pixels of low-resolution images first."""
    height, width = known.shape[-2:]
    if height % patch or width % patch:
        raise DataError(f"superres: {height}x{width} images do not divide into {patch}x{patch}")

    def project(x0: Tensor) -> Tensor:
        return x0 + F.interpolate(F.avg_pool2d(known - x0, patch), scale_factor=patch)

    return project


def inpaint(known: Tensor, mask: Tensor) -> Projection:
    """The projection to `known` where `mask`, bool and broadcast to (B, C, H, W), is true."""
    return lambda x0: torch.where(mask, known, x0)
