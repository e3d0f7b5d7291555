"""Operations that keep the magnitude of features, and layers whose filters act at length 1.

Equation numbers are those of EDM2 (Karras et al., 2023).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cmkit_std.backbones.cpu import conv1x1
from cmkit_std.backbones.layers import widened

EPS = 1e-4
"""Keeps a vector of zeros from being divided by its length."""
SILU_RMS = 0.596
"""Root mean square of SiLU of a standard normal (eq. 81)."""


class Weighted(nn.Module):
    """A layer of filters that act at length 1, whatever is stored of them (eq. 47).

    `lowered` says that they are stored as they act.
    """

    def __init__(self, in_channels: int, out_channels: int, *kernel: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, *kernel))
        self.lowered = False

    def acting(self) -> Tensor:
        """The filters as they act, (out, in, ...)."""
        if self.lowered:
            return self.weight
        return filters(self.weight) / math.sqrt(math.prod(self.weight.shape[1:]))


class Linear(Weighted):
    """A linear layer without bias."""

    def forward(self, x: Tensor) -> Tensor:
        """Features (B, C') of x (B, C)."""
        return F.linear(x, self.acting())


class Conv(Weighted):
    """A convolution of odd, square kernel without bias."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int):
        super().__init__(in_channels, out_channels, kernel, kernel)

    def forward(self, x: Tensor) -> Tensor:
        """Features (B, C', H, W) of x (B, C, H, W)."""
        kernel = self.weight.shape[-1]
        if kernel == 1:
            return conv1x1(x, self.acting())
        return F.conv2d(x, self.acting(), padding=kernel // 2)


class Fourier(nn.Module):
    """Waves of random, fixed frequency and phase, of mean square 1 (eq. 75)."""

    frequencies: Tensor
    phases: Tensor

    def __init__(self, dim: int):
        super().__init__()
        self.register_buffer("frequencies", 2 * math.pi * torch.randn(dim))
        self.register_buffer("phases", 2 * math.pi * torch.rand(dim))

    def forward(self, c_noise: Tensor) -> Tensor:
        """Waves (B, dim) of c_noise (B,); in float32 at least."""
        t = widened(c_noise)
        angles = t[:, None] * self.frequencies.to(t.dtype) + self.phases.to(t.dtype)
        return math.sqrt(2) * angles.cos()


def gain() -> nn.Parameter:
    """A learned factor of what a fresh network keeps silent, ()."""
    return nn.Parameter(torch.zeros(()))


def filters(weight: Tensor) -> Tensor:
    """Each filter of `weight` (out, in, ...) at root mean square 1."""
    return normalized(weight, tuple(range(1, weight.ndim)))


def normalized(x: Tensor, dim: tuple[int, ...]) -> Tensor:
    """x divided by its root mean square over the axes `dim`, plus EPS; the root in float32."""
    wide = torch.promote_types(x.dtype, torch.float32)
    length = torch.linalg.vector_norm(x, dim=dim, keepdim=True, dtype=wide)
    rms = length / math.sqrt(math.prod([x.shape[axis] for axis in dim]))
    return x / (rms + EPS).to(x.dtype)


def silu(x: Tensor) -> Tensor:
    """SiLU of mean square 1 for standard normal x (eq. 81)."""
    return F.silu(x) / SILU_RMS


def sum(a: Tensor, b: Tensor, t: float) -> Tensor:
    """(1 - t) a + t b, of the variance that a and b share if they are independent (eq. 88)."""
    return a.lerp(b, t) / math.hypot(1 - t, t)


def cat(a: Tensor, b: Tensor) -> Tensor:
    """The channels of a, then those of b, scaled so that both weigh alike in what follows, and the
    whole keeps its mean square (eq. 103, t = 0.5)."""
    half = math.sqrt((a.shape[1] + b.shape[1]) / 2)
    return torch.cat([a * (half / a.shape[1] ** 0.5), b * (half / b.shape[1] ** 0.5)], dim=1)
