"""The network of `mine`, in a module of its own because it imports torch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cmkit import Cond, Network, Scales


class MineNetwork(Network):
    """out(silu(norm(enter(x)) + embedding)) + a skip connection from `enter`."""

    sites = ("skip.0", "emb.0")

    def __init__(self, channels: int, width: int, num_classes: int | None):
        super().__init__()
        self.enter = nn.Conv2d(channels, width, 3, padding=1)
        self.norm = nn.GroupNorm(1, width)
        self.noise = nn.Linear(2, width)
        self.label = nn.Embedding(num_classes, width) if num_classes else None
        self.out = nn.Conv2d(2 * width, channels, 3, padding=1)

    def forward(self, x: Tensor, c_noise: Tensor, cond: Cond, scales: Scales) -> Tensor:
        """F, (B, C, H, W) float32, of x (B, C, H, W) and c_noise (B,)."""
        emb = self.noise(torch.stack([c_noise.sin(), c_noise.cos()], 1))
        if self.label is not None and cond.label is not None:
            emb = emb + self.label(cond.label)
        skip = self.enter(x)
        h = nn.functional.silu(self.norm(skip) + _scaled(emb, "emb.0", scales)[..., None, None])
        return self.out(torch.cat([h, _scaled(skip, "skip.0", scales)], 1)).float()


def _scaled(x: Tensor, site: str, scales: Scales) -> Tensor:
    """x times the scale of `site`, () or (B,); only the product is rounded to the type of x."""
    if site not in scales:
        return x
    return (x * scales[site].view(-1, *[1] * (x.ndim - 1))).to(x.dtype)
