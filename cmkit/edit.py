"""Zero-shot editing with a consistency model (Consistency Models, 2023, algorithm 4)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from cmkit.denoiser import Cond, Denoiser
from cmkit.errors import DataError, RecipeError
from cmkit.noise import Noise
from cmkit.pictures import read_picture

Projection = Callable[[Tensor], Tensor]
"""x0_hat -> the nearest images with the known part, (B, C, H, W) -> (B, C, H, W)."""

LUMINANCE = (0.2989, 0.5870, 0.1140)
"""Weights of red, green and blue in the brightness of a pixel (ITU-R BT.601)."""

WHITE = 128
"""The darkest grey of a mask that counts as white."""


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


def superres(known: Tensor, patch: int = 8) -> Projection:
    """The projection to the means of `known` over squares of `patch` pixels; `known` is as large as
    x0_hat, so repeat the pixels of low-resolution images first."""
    height, width = known.shape[-2:]
    if height % patch or width % patch:
        raise DataError(f"superres: {height}x{width} images do not divide into {patch}x{patch}")
    return lambda x0: x0 + F.interpolate(F.avg_pool2d(known - x0, patch), scale_factor=patch)


def inpaint(known: Tensor, mask: Tensor) -> Projection:
    """The projection to `known` where `mask`, bool and broadcast to (B, C, H, W), is true."""
    return lambda x0: torch.where(mask, known, x0)


@dataclass(frozen=True)
class Task:
    """An editing task: which part of a picture is known, and the noise levels."""

    name: Literal["inpaint", "colorize", "superres"]
    mask: Path | None = None
    """The picture whose white part `inpaint` paints anew."""
    patch: int = 8
    """The side, in pixels, of the squares whose means `superres` keeps."""
    steps: int = 40
    """Points of the Karras grid from sigma_max on, as in the official code."""
    sigmas: tuple[float, ...] = ()
    """Falling noise levels below sigma_max instead."""

    def levels(self, noise: Noise) -> list[float]:
        """Falling noise levels that follow sigma_max; RecipeError where they do not."""
        check_levels(noise, self.sigmas)
        grid = noise.sigmas(self.steps, dtype=torch.float64).flip(0)
        return list(self.sigmas) or grid[1:-1].tolist()

    def known(self, pictures: Sequence[Path], channels: int, side: int) -> Tensor:
        """The pictures, (n, channels, side, side) in [-1, 1]; `superres` enlarges small ones."""
        sides = [side]
        if self.name == "superres" and side % self.patch == 0:
            sides.append(side // self.patch)
        large = []
        for image in (read_picture(path, channels, sides) for path in pictures):
            factor = side // image.shape[-1]
            large.append(image.repeat_interleave(factor, 1).repeat_interleave(factor, 2))
        return torch.stack(large) / 127.5 - 1

    def kept(self, side: int) -> Tensor | None:
        """Where the mask is black, bool (side, side); None without a mask."""
        if (self.name == "inpaint") != (self.mask is not None):
            raise RecipeError(
                "--task inpaint wants --mask FILE, white where to paint anew"
                if self.mask is None
                else f"--mask {self.mask}: only --task inpaint takes a mask; leave it out"
            )
        return None if self.mask is None else read_picture(self.mask, 1, [side])[0] < WHITE

    def projection(self, known: Tensor, kept: Tensor | None) -> Projection:
        """The projection to the known part; DataError where the images do not suit the task."""
        match self.name:
            case "inpaint":
                assert kept is not None
                return inpaint(known, kept.to(known.device))
            case "colorize":
                return colorize(known)
            case "superres":
                return superres(known, self.patch)

    def given(self, known: Tensor, kept: Tensor | None) -> Tensor:
        """The known part as images to look at; for `colorize` their brightness in all channels."""
        project = self.projection(known, kept)
        if self.name == "colorize":
            weights = known.new_tensor(LUMINANCE).view(3, 1, 1)
            return (known * weights).sum(1, keepdim=True).expand_as(known)
        return project(torch.zeros_like(known))
