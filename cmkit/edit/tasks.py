"""The editing tasks: what is known of a picture, and the noise levels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from cmkit.edit.projections import Projection, brightness, check_levels, colorize, inpaint, superres
from cmkit.errors import RecipeError
from cmkit.noise import Noise
from cmkit.pictures import read_picture

WHITE = 128
"""The darkest grey of a mask that counts as white."""


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
    fit: bool = False
    """Crop and resize pictures of other sizes, and the mask with them, instead of an error."""

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
        for image in (read_picture(path, channels, sides, self.fit) for path in pictures):
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
        if self.mask is None:
            return None
        return read_picture(self.mask, 1, [side], self.fit)[0] < WHITE

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
        """The known part as images to look at."""
        project = self.projection(known, kept)
        if self.name == "colorize":
            return brightness(known).expand_as(known)
        return project(torch.zeros_like(known))
