"""Layers of the networks: norms, attention, changes of resolution, sinusoids."""

from __future__ import annotations

import contextlib
import math
from contextlib import AbstractContextManager
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cmkit_std.backbones.cpu import attention, conv1x1, upsampled

MAX_PERIOD = 10_000
"""Longest period of sinusoids, over 2 pi."""
Resampling = Literal["up", "down"] | None


def attend(qkv: Tensor, heads: int) -> Tensor:
    """Attention (B, C, ...) of queries, keys and values (B, 3 C, ...), channels in the order
    (three, heads, head width); scores are divided by sqrt(head width)."""
    tokens = qkv.movedim(1, -1).flatten(1, -2)  # (B, N, 3 C), a view of channels_last
    q, k, v = tokens.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)  # (B, heads, N, d) each
    out = attention(q, k, v).transpose(1, 2).flatten(2)  # (B, N, C)
    return out.unflatten(1, qkv.shape[2:]).movedim(-1, 1)


class Pointwise(nn.Conv2d):
    """A 1x1 convolution; see `conv1x1` for how it is computed."""

    def forward(self, x: Tensor) -> Tensor:
        """Features (B, C', H, W) of x (B, C, H, W)."""
        return conv1x1(x, self.weight, self.bias)


class Upsample(nn.Module):
    """Twice the side: each pixel four times; then a convolution, if wanted."""

    def __init__(self, in_channels: int = 0, out_channels: int = 0, conv: bool = False):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, padding=1) if conv else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Features (B, C', 2 H, 2 W) of x (B, C, H, W)."""
        if isinstance(self.conv, nn.Identity):
            return F.interpolate(x, scale_factor=2, mode="nearest")
        return upsampled(x, self.conv)


class Downsample(nn.Module):
    """Half the side: a convolution of stride 2, or means of 2 x 2 pixels."""

    def __init__(self, in_channels: int = 0, out_channels: int = 0, conv: bool = False):
        super().__init__()
        self.pool = (
            nn.Conv2d(in_channels, out_channels, 3, stride=2, padding=1)
            if conv
            else nn.AvgPool2d(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Features (B, C', H / 2, W / 2) of x (B, C, H, W)."""
        return self.pool(x)


RESAMPLERS = {None: nn.Identity, "up": Upsample, "down": Downsample}
"""The layer of each `Resampling`."""


class Norm(nn.GroupNorm):
    """GroupNorm computed in float32 at least, and returned in the type of its input; eps 1e-5."""

    def forward(self, x: Tensor) -> Tensor:
        return self.part(x, slice(None))

    def part(self, x: Tensor, channels: slice) -> Tensor:
        """The norm's output for some whole groups, of the input's channels x."""
        groups = x.shape[1] * self.num_groups // self.num_channels
        weight, bias = self.weight[channels], self.bias[channels]
        if x.device.type == "cpu" and x.dtype == torch.bfloat16:  # its kernel sums in float32
            return F.group_norm(x, groups, weight, bias, self.eps)
        return F.group_norm(widened(x), groups, weight, bias, self.eps).to(x.dtype)


def widened(x: Tensor) -> Tensor:
    """x in float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def scaled(skip: Tensor, scale: Tensor | None) -> Tensor:
    """scale () or (B,) times skip (B, C, H, W); the product is rounded, not the scale."""
    # 1.02 is no bfloat16 number: torch multiplies in the wider type.
    return skip if scale is None else (skip * scale.view(-1, 1, 1, 1)).to(skip.dtype)


def sinusoids(t: Tensor, dim: int) -> Tensor:
    """[cos | sin] of t (B,) at dim // 2 frequencies from 1 down towards 1 / MAX_PERIOD, (B, dim).

    An odd `dim` ends in a zero. Computed in float64 for such t, in float32 for any other.
    """
    t = widened(t)
    half = dim // 2
    steps = torch.arange(half, dtype=t.dtype, device=t.device)
    angles = t[:, None] * torch.exp(-math.log(MAX_PERIOD) * steps / half)
    return F.pad(torch.cat([angles.cos(), angles.sin()], dim=1), (0, dim % 2))


def full_precision(device: torch.device) -> AbstractContextManager[None]:
    """A context without autocast, for an outer one on `device`; the meta device has none."""
    if device.type == "meta":
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)
