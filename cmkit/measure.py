"""Metrics of images, with their provenance."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
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
    """A meter for a metric that has none: keeps every image on the CPU, and measures at the end."""

    def __init__(self, metric: Metric, reference: Reference, device: torch.device):
        self.metric, self.reference, self.device = metric, reference, device
        self.parts: list[Tensor] = []

    def add(self, images: Tensor) -> None:
        """Keep images, uint8 (B, C, H, W)."""
        self.parts.append(images.cpu())

    def values(self) -> dict[str, float]:
        """The metric's numbers of all images."""
        return self.metric.measure(Images(torch.cat(self.parts)), self.reference, self.device)

    def state(self) -> dict[str, Tensor]:
        """{"images": (N, C, H, W)}, empty before the first image."""
        return {"images": torch.cat(self.parts)} if self.parts else {}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a state."""
        self.parts = list(state.values())


def meter(metric: Metric, images: int, reference: Reference, device: torch.device) -> Meter:
    """A meter of as many `images`, which are added as they are drawn."""
    return metric.meter(images, reference, device) or Kept(metric, reference, device)


def measure(
    metrics: Sequence[Metric],
    images: Images | SavedImages,
    references: Callable[[Metric], Reference],
    device: torch.device,
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """({name: value}, provenance of each metric), each beside its reference; NonFiniteError where a
    value is not finite."""
    values: dict[str, float] = {}
    provenance = []
    for metric in metrics:
        reference = references(metric)
        measured = metric.measure(images, reference, device)
        numbers = {f"{metric.prefix}{key}": value for key, value in measured.items()}
        for key, value in numbers.items():
            if not math.isfinite(value):
                where = f"on {len(images)} images; look at the samples"
                raise NonFiniteError(f"metric {key} = {value} {where}")
        values |= numbers
        about: dict[str, Any] = dict(metric.provenance())
        about |= {"numbers": sorted(numbers), "images": len(images)}
        about["reference"] = reference.fingerprint
        if metric.heldout:
            about["real_images"] = len(reference.images)  # type: ignore[arg-type]
            if "features" in about:
                widths = about["features"].items()
                about["features"] = {f"{metric.prefix}{key}": width for key, width in widths}
        provenance.append(about)
    return values, provenance
