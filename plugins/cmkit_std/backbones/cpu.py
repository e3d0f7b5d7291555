"""Faster ways to compute the same on a CPU, each with its reason."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_LINE = ((0, 0, 1), (0, 1, 1), (1, 1, 0), (1, 0, 0))
TAP_SUMS = [[y * x for y in row for x in column] for row in _LINE for column in _LINE]
"""(16, 9): which taps of a 3x3 convolution on doubled pixels add up to each tap of the 4x4
transposed convolution on the pixels themselves. `_LINE` is the same along one axis."""


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k / sqrt(d)) v, (B, heads, N, d) each: torch's, or `bfloat16_attention`."""
    on_cpu = q.dtype == torch.bfloat16 and q.device.type == "cpu"
    if on_cpu and not (q.requires_grad or torch.compiler.is_compiling()):
        return bfloat16_attention(q, k, v)
    return F.scaled_dot_product_attention(q, k, v)


def bfloat16_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`attention` an image at a time by bfloat16 products; not differentiable.

    torch's fused kernel multiplies in float32 on a CPU and takes twice as long. Scores are rounded
    to bfloat16 here: on Gaussian q and k that adds 0.4 % rms where rounding the inputs costs 0.3 %.
    """
    out = torch.empty_like(q.transpose(1, 2)).transpose(1, 2)
    scores, shares = (q.new_empty(q.shape[1], q.shape[2], k.shape[2]) for _ in range(2))
    scale = q.shape[-1] ** -0.5
    for query, key, value, into in zip(q, k, v, out, strict=True):
        torch.baddbmm(scores, query, key.mT, beta=0, alpha=scale, out=scores)
        torch.softmax(scores, -1, out=shares)
        torch.bmm(shares, value, out=into)
    return out


def conv1x1(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The 1x1 convolution of x (B, C, H, W) with weight (C', C, 1, 1).

    Where memory is channels_last that is a matrix product. In float32 on a CPU torch leaves matrix
    products to MKL, half as fast as oneDNN's convolutions on an AMD processor; so there it is one.
    """
    exact = x.device.type == "cpu" and x.dtype == torch.float32
    if exact and not torch.is_autocast_enabled("cpu"):
        return F.conv2d(x, weight, bias)
    return F.linear(x.permute(0, 2, 3, 1), weight.flatten(1), bias).permute(0, 3, 1, 2)


def upsampled(x: Tensor, conv: nn.Module) -> Tensor:
    """The 3x3 `conv` of x (B, C, H, W) with each pixel doubled in both directions,
    (B, C', 2 H, 2 W).

    On a CPU it is a transposed convolution, whose kernel sums the taps that see the same pixel: 4
    products an output pixel instead of 9.
    """
    if x.device.type != "cpu" or not isinstance(conv, nn.Conv2d):  # one with an adapter beside it
        return conv(F.interpolate(x, scale_factor=2, mode="nearest"))  # type: ignore[no-any-return]
    taps = conv.weight.permute(0, 2, 3, 1).flatten(1, 2)  # (C', 9, C)
    kernel = conv.weight.new_tensor(TAP_SUMS) @ taps
    kernel = kernel.unflatten(1, (4, 4)).permute(3, 0, 1, 2)  # (C, C', 4, 4)
    return F.conv_transpose2d(x, kernel, conv.bias, stride=2, padding=1)


def silu(x: Tensor) -> Tensor:
    """SiLU in place: fresh memory costs a CPU more than the function does."""
    return F.silu(x, inplace=True)


def added(x: Tensor, y: Tensor) -> Tensor:
    """x + y, in the memory of x where its type is that of the sum."""
    return x.add_(y) if torch.promote_types(x.dtype, y.dtype) == x.dtype else x + y
