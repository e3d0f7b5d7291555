"""A number about images."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cmkit import Metric, Reference

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.utils.data import Dataset as Images


class Mine(Metric):
    """How far mean and spread of the pixels are from those of the real images, in 0 .. 255."""

    def keys(self) -> tuple[str, ...]:
        return "mine_mean", "mine_spread"

    def measure(
        self, images: Images[Tensor], reference: Reference, device: torch.device
    ) -> dict[str, float]:
        """Both differences, for images[i] (C, H, W) uint8."""
        (mean, spread), (real_mean, real_spread) = map(_moments, (images, reference.images))
        return {
            "mine_mean": abs(mean - real_mean),
            "mine_spread": abs(spread - real_spread),
        }


def _moments(images: Images[Tensor]) -> tuple[float, float]:
    import torch

    total = square = torch.zeros((), dtype=torch.float64)
    for i in range(len(images)):
        pixels = images[i].double()
        total, square = total + pixels.mean(), square + pixels.square().mean()
    mean, mean_square = (total / len(images)).item(), (square / len(images)).item()
    return mean, max(mean_square - mean**2, 0.0) ** 0.5
