"""Layers of `songunet`: convolutions after a resampling by a filter, sinusoids, Xavier's start."""

from __future__ import annotations

import math
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cmkit_std.backbones.layers import MAX_PERIOD, Resampling, widened


class Resample(nn.Module):
    """Twice or half the side, by the filter that is the outer product of `taps` with themselves."""

    def __init__(self, direction: Literal["up", "down"], taps: tuple[int, ...]):
        super().__init__()
        self.direction = direction
        self.register_buffer("filter", fir(taps))

    def forward(self, x: Tensor) -> Tensor:
        """Features (B, C, 2 H, 2 W) or (B, C, H / 2, W / 2) of x (B, C, H, W)."""
        return resampled(x, self.filter, self.direction, (self.filter.shape[-1] - 1) // 2)


class Conv(nn.Conv2d):
    """A convolution of odd kernel, after its input was resampled, if wanted.

    `fused` crops and pads once for filter and convolution together: other pixels at the border.
    """

    filter: Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        resample: Resampling = None,
        taps: tuple[int, ...] = (1, 1),
        fused: bool = False,
        gain: float = 1.0,
    ):
        super().__init__(in_channels, out_channels, kernel, padding=kernel // 2)
        xavier(self, gain)
        self.resample, self.fused = resample, fused
        if resample is not None:
            self.register_buffer("filter", fir(taps))

    def forward(self, x: Tensor) -> Tensor:
        """Features (B, C', H', W') of x (B, C, H, W)."""
        if self.resample is None:
            return super().forward(x)
        around, inner = (self.filter.shape[-1] - 1) // 2, self.kernel_size[0] // 2
        if not self.fused:
            return super().forward(resampled(x, self.filter, self.resample, around))
        if self.resample == "up":
            x = resampled(x, self.filter, "up", max(around - inner, 0))
            return F.conv2d(x, self.weight, self.bias, padding=max(inner - around, 0))
        x = F.conv2d(x, self.weight, self.bias, padding=inner + around)
        return resampled(x, self.filter, "down", 0)


def fir(taps: tuple[int, ...]) -> Tensor:
    """The two-dimensional filter of sum 1, (1, 1, k, k), that `taps` make along each axis."""
    row = torch.tensor(taps, dtype=torch.float32)
    return (torch.outer(row, row) / row.sum() ** 2)[None, None]


def resampled(x: Tensor, filter: Tensor, direction: str, padding: int) -> Tensor:
    """Each channel of x (B, C, H, W) filtered to twice or half its side, when padding is
    (k - 1) // 2."""
    kernel = filter.to(x.dtype).expand(x.shape[1], -1, -1, -1)
    if direction == "up":
        # Zeros put between the pixels take three quarters of the mean away.
        return F.conv_transpose2d(x, 4 * kernel, stride=2, padding=padding, groups=x.shape[1])
    return F.conv2d(x, kernel, stride=2, padding=padding, groups=x.shape[1])


class Positional(nn.Module):
    """Sinusoids of frequencies from 1 down to 1 / MAX_PERIOD, both included."""

    def __init__(self, dim: int):
        super().__init__()
        self.dim = dim

    def forward(self, c_noise: Tensor) -> Tensor:
        """[sin | cos], (B, dim), of c_noise (B,); in float32 at least."""
        t = widened(c_noise)
        steps = torch.linspace(0, 1, self.dim // 2, dtype=t.dtype, device=t.device)
        return _waves(t, torch.exp(-math.log(MAX_PERIOD) * steps))


class Fourier(nn.Module):
    """Sinusoids of random, fixed frequencies, in turns."""

    frequencies: Tensor

    def __init__(self, dim: int, scale: float):
        super().__init__()
        self.register_buffer("frequencies", scale * torch.randn(dim // 2))

    def forward(self, c_noise: Tensor) -> Tensor:
        """[sin | cos], (B, dim), of c_noise (B,); in float32 at least."""
        t = widened(c_noise)
        return _waves(t, 2 * math.pi * self.frequencies.to(t.dtype))


def _waves(t: Tensor, frequencies: Tensor) -> Tensor:
    angles = t[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


Layer = TypeVar("Layer", nn.Linear, nn.Conv2d)


def xavier(layer: Layer, gain: float = 1.0) -> Layer:
    """`layer` with uniform weights of variance gain^2 2 / (fan in + fan out), and no bias."""
    nn.init.xavier_uniform_(layer.weight, gain)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer
