"""Numbers about images, with what must stand beside them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset

from cmkit.errors import NonFiniteError
from cmkit.kinds import Meter, Metric
from cmkit.sample import SavedImages
from cmkit.values import Reference


class Images(TorchDataset[Tensor]):
    """uint8 images (N, C, H, W) held in memory, as metrics take them."""

    def __init__(self, images: Tensor):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.images[index]


class Kept:
    """The meter of a metric that has none: it keeps every image on the CPU, and then measures."""

    def __init__(self, metric: Metric, reference: Reference, device: torch.device):
        self.metric, self.reference, self.device = metric, reference, device
        self.parts: list[Tensor] = []

    def add(self, images: Tensor) -> None:
        """Keep images, uint8 (B, C, H, W)."""
        self.parts.append(images.cpu())

    def values(self) -> dict[str, float]:
        """What the metric gives of all of them."""
        return self.metric.measure(Images(torch.cat(self.parts)), self.reference, self.device)

    def state(self) -> dict[str, Tensor]:
        """{"images": (N, C, H, W)}, or nothing of no image."""
        return {"images": torch.cat(self.parts)} if self.parts else {}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a state."""
        self.parts = list(state.values())


def meter(metric: Metric, images: int, reference: Reference, device: torch.device) -> Meter:
    """What measures as many `images` as they are drawn."""
    return metric.meter(images, reference, device) or Kept(metric, reference, device)


def measure(
    metrics: Sequence[Metric],
    images: Images | SavedImages,
    reference: Reference,
    device: torch.device,
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """({name: value}, provenance of each metric); NonFiniteError names a value that is none."""
    values: dict[str, float] = {}
    provenance = []
    for metric in metrics:
        numbers = metric.measure(images, reference, device)
        for key, value in numbers.items():
            if not math.isfinite(value):
                raise NonFiniteError(
                    f"metric {key} = {value} on {len(images)} images; look at the samples"
                )
        values |= numbers
        provenance.append(
            {"numbers": sorted(numbers), "images": len(images), **metric.provenance()}
        )
    return values, provenance
