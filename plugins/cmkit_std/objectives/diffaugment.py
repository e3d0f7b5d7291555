"""Differentiable augmentation (Zhao, Liu, Lin, Zhu, Han: Differentiable Augmentation for
Data-Efficient GAN Training, 2020) of images (B, C, H, W) in [-1, 1]."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cmkit import Rng
from cmkit.functional import per_image


@dataclass(frozen=True)
class Augmentation:
    """One map an image: colour, then translation, then cutout; all numbers (B,)."""

    brightness: Tensor
    """What is added."""
    saturation: Tensor
    """What distances from a pixel's grey are multiplied by."""
    contrast: Tensor
    """What distances from the image's mean are multiplied by."""
    shift: tuple[Tensor, Tensor]
    """Rows and columns from where a pixel comes; zeros come from outside."""
    hole: tuple[Tensor, Tensor]
    """First row and column of the hole, which may lie partly outside."""
    hole_size: tuple[int, int]

    def __call__(self, x: Tensor) -> Tensor:
        """The augmented images, in the order brightness, saturation, contrast."""
        x = x + per_image(self.brightness, x)
        grey = x.mean(1, keepdim=True)
        x = grey + (x - grey) * per_image(self.saturation, x)
        mean = x.mean((1, 2, 3), keepdim=True)
        x = mean + (x - mean) * per_image(self.contrast, x)
        return self.cut(self.move(x))

    def move(self, x: Tensor) -> Tensor:
        """Images x translated by `shift`."""
        places = [_places(x, axis) + shift for axis, shift in zip((2, 3), self.shift, strict=True)]
        sides = x.shape[2:]
        rows, columns = (p.clamp(0, side - 1) for p, side in zip(places, sides, strict=True))
        known = [(p >= 0) & (p < side) for p, side in zip(places, sides, strict=True)]
        image = torch.arange(len(x), device=x.device).view(-1, 1, 1)
        moved = x[image, :, rows.unsqueeze(2), columns.unsqueeze(1)].permute(0, 3, 1, 2)
        return moved * _product(known).unsqueeze(1)

    def cut(self, x: Tensor) -> Tensor:
        """Images x with zeros in the hole."""
        inside = [
            (_places(x, axis) >= first) & (_places(x, axis) < first + size)
            for axis, first, size in zip((2, 3), self.hole, self.hole_size, strict=True)
        ]
        return x * ~_product(inside).unsqueeze(1)


def draw(
    x: Tensor, rng: Rng, color: float = 1.0, translation: float = 0.125, cutout: float = 0.2
) -> Augmentation:
    """A draw for images x of strengths 0 (the identity) to 1: of colour, and of the share of a side
    that an image is moved by at most, or that is cut out."""
    n, (height, width) = len(x), x.shape[2:]
    colours = [rng.uniform(n) for _ in range(3)]
    most = [int(side * translation + 0.5) for side in (height, width)]
    rows, columns = ((rng.integers(2 * m + 1, n) - m).view(-1, 1) for m in most)
    sizes = int(height * cutout + 0.5), int(width * cutout + 0.5)
    first, second = (
        (rng.integers(side + 1 - size % 2, n) - size // 2).view(-1, 1)
        for side, size in zip((height, width), sizes, strict=True)
    )
    return Augmentation(
        brightness=color * (colours[0] - 0.5),
        saturation=1 + color * (2 * colours[1] - 1),
        contrast=1 + color * (colours[2] - 0.5),
        shift=(rows, columns),
        hole=(first, second),
        hole_size=sizes,
    )


def _places(x: Tensor, axis: int) -> Tensor:
    """0 .. side - 1, (1, side)."""
    return torch.arange(x.shape[axis], device=x.device).view(1, -1)


def _product(axes: list[Tensor]) -> Tensor:
    """Where both hold, (B, H, W), of rows (B, H) and columns (B, W)."""
    rows, columns = axes
    return rows.unsqueeze(2) & columns.unsqueeze(1)
