"""What parts are tried on: images, devices, a small network; and how closely tensors agree."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from cmkit.denoiser import Cond, Network
from cmkit.values import DataSpec

CPU, META = torch.device("cpu"), torch.device("meta")
DIGITS = DataSpec(channels=1, resolution=8, num_classes=10)
CONDITIONS = ("label", "guidance", "sigma_to", "text")


def image_shape(data: DataSpec) -> tuple[int, int, int]:
    """(C, H, W)."""
    return data.channels, data.resolution, data.resolution


def close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    """Whether a is b up to `tolerance` of the root mean square of b."""
    return bool((a.double() - b.double()).square().mean().sqrt() <= tolerance * _rms(b))


def _rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item()


def equal(a: Tensor, b: Tensor) -> bool:
    """Whether a is b bit for bit, of whatever shapes."""
    return a.shape == b.shape and torch.equal(a, b)


class Small(Network):
    """A network with dropout that embeds whatever it is given, and knows whether it saw labels."""

    sites = ("skip.0", "emb.0")

    def __init__(self, data: DataSpec):
        super().__init__()
        generator = torch.Generator().manual_seed(2)
        self.first = nn.Conv2d(data.channels, 8, 3, padding=1)
        self.label = nn.Embedding(data.num_classes or 1, 8)
        self.dropout = nn.Dropout(0.3)
        self.second = nn.Conv2d(8, data.channels, 3, padding=1)
        self.labelled = False
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.normal_(std=0.3, generator=generator)

    def forward(
        self, x: Tensor, c_noise: Tensor, cond: Cond, scales: Mapping[str, Tensor]
    ) -> Tensor:
        self.labelled |= cond.label is not None
        emb = torch.sin(c_noise)[:, None]
        if cond.label is not None:
            emb = emb + self.label(cond.label)
        for level in (cond.guidance, cond.sigma_to):
            if level is not None:
                emb = emb + torch.cos(level.float())[:, None]
        h = self.dropout(torch.tanh(self.first(x) + emb[:, :, None, None]))
        return self.second(h).float()
