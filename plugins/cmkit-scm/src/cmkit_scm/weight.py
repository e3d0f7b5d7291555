"""The learned weight of noise levels (Karras, Aittala, Lehtinen, Hellsten, Aila, Laine: Analyzing
and Improving the Training Dynamics of Diffusion Models, 2024), as sCM takes it over."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class LogWeight(nn.Module):
    """w(sigma), linear in random Fourier features of ln(sigma) / 4; fresh, it is 0 everywhere."""

    def __init__(self, features: int = 128):
        super().__init__()
        self.register_buffer("frequencies", 2 * math.pi * torch.randn(features))
        self.register_buffer("phases", 2 * math.pi * torch.rand(features))
        self.weight = nn.Parameter(torch.zeros(features))

    def forward(self, sigma: Tensor) -> Tensor:
        """w, (B,), at noise levels sigma (B,)."""
        c_noise = 0.25 * sigma.log().view(-1, 1)
        waves = (c_noise * self.frequencies + self.phases).cos()  # (B, features)
        return (waves * self.weight).sum(1) * (2 / len(self.weight)) ** 0.5
