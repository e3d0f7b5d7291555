"""U-Nets whose encoder runs once for models that differ in the scales of their skips alone: a
search over such scales then costs a part of the decoder for each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cmkit import Cond, Scales
from cmkit_std.backbones.cpu import added, conv1x1, silu
from cmkit_std.backbones.embedding import Conditioned, Filmed
from cmkit_std.backbones.layers import Norm, scaled

MAX_SHIFT = 1e-5
"""Relative change of a feature that sharing the decoder's work on skips may bring."""


class SkipBlock(Filmed):
    """A residual block on features and a skip x:
    finish(shortcut(x) + second(conv1(silu(norm1(x)))))."""

    norm1: Norm
    conv1: nn.Conv2d
    shortcut: nn.Module

    def second(self, h: Tensor, film: Tensor) -> Tensor:
        """The branch after conv1, (B, C', H', W'), of its output h."""
        raise NotImplementedError

    def finish(self, y: Tensor) -> Tensor:
        """The block's output, of the sum y of shortcut and branch."""
        return y


Join = Callable[[SkipBlock, Tensor, Tensor], Tensor]
"""Output of a decoder's block, of it, features h and its film; the skip is the next one."""


class SharedEncoder(Conditioned):
    """A U-Net whose encoder runs once for all scales of the skips.

    A subclass has `_encode`, `_decode`, and `_joining`: the decoder's blocks that read a skip.
    """

    def forward(
        self, x: Tensor, c_noise: Tensor, cond: Cond, scales: Scales, **given: Any
    ) -> Tensor:
        """F, (B, C, H, W), of x (B, C, H, W) and c_noise (B,); float32 also under autocast."""
        h, skips, films = self._encode(x, c_noise, cond, scales, **given)
        return self._decode(h, films, by_concatenation(skips, scales))

    def encode(self, x: Tensor, c_noise: Tensor, cond: Cond, scales: Scales) -> Encoded:
        """What `decode` needs of x (B, C, H, W), c_noise (B,) and the scales of embeddings.

        Beside the features it holds what every decoder block can compute of its skip alone.
        """
        return encoded(*self._encode(x, c_noise, cond, scales), self._joining())

    def decode(self, encoded: Encoded, scales: Scales) -> Tensor:
        """F for any scales of the skips: `forward` up to `MAX_SHIFT`, besides rounding."""
        suits = encoded.suits({id(s): s for site, s in scales.items() if site in self.late})
        join = by_halves(encoded, scales) if suits else by_concatenation(encoded.skips, scales)
        return self._decode(encoded.h, encoded.films, join)

    def _encode(
        self, x: Tensor, c_noise: Tensor, cond: Cond, scales: Scales, **given: Any
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Features of the middle, every skip, and the decoder's films."""
        raise NotImplementedError

    def _decode(self, h: Tensor, films: list[Tensor], join: Join) -> Tensor:
        """F of the middle's features h."""
        raise NotImplementedError

    def _joining(self) -> list[SkipBlock]:
        raise NotImplementedError


def by_concatenation(skips: list[Tensor], scales: Scales) -> Join:
    """The block on the concatenation of h and the scaled skip."""
    left = list(enumerate(skips))

    def join(block: SkipBlock, h: Tensor, film: Tensor) -> Tensor:
        i, skip = left.pop()
        return block(torch.cat([h, scaled(skip, scales.get(f"skip.{i}"))], dim=1), film)

    return join


def by_halves(encoded: Encoded, scales: Scales) -> Join:
    """The same by the halves of `encoded`, which need no convolution of the skip."""
    one = encoded.h.new_ones(())
    left = list(enumerate(zip(encoded.skips, reversed(encoded.halves), strict=True)))

    def join(block: SkipBlock, h: Tensor, film: Tensor) -> Tensor:
        i, (skip, half) = left.pop()
        return block.finish(joined(block, h, skip, half, scales.get(f"skip.{i}", one), film))

    return join


@dataclass(frozen=True)
class Half:
    """What a decoder's block computes of its skip alone, for every positive scale of it.

    GroupNorm undoes the scale in groups that hold skip channels alone, and convolutions are linear
    in the halves of their input.
    """

    kept: int
    """Channels of the concatenation, from the first on, that each scale computes anew."""
    weight: Tensor
    """conv1's weight for those channels, in its own memory: a slice would be copied each time."""
    conv1: Tensor
    shortcut: Tensor
    """Terms of conv1 and of the shortcut, the latter for scale 1."""
    shift: Tensor
    """By how much the norm's eps may change features at scale s, over (1 / s^2 - 1); ()."""


@dataclass(frozen=True)
class Encoded:
    """What the encoder computes for one x, c_noise, conditions and scales of embeddings."""

    h: Tensor
    skips: list[Tensor]
    films: list[Tensor]
    halves: list[Half]
    """Empty where a block's norm has no group of skip channels alone."""
    shift: float
    """The largest of the halves' shifts."""

    def suits(self, scales: Mapping[int, Tensor]) -> bool:
        """Whether `halves` serve these scales: positive, and the norms' eps negligible there."""
        if not (scales and self.halves):
            return bool(self.halves)
        bounds = torch.stack([torch.stack(scale.aminmax()) for scale in scales.values()])
        for low, high in bounds.tolist():  # the device is waited for once
            if low <= 0 or self.shift * max(low**-2 - 1, 1 - high**-2) > MAX_SHIFT:
                return False
        return True


def encoded(
    h: Tensor, skips: list[Tensor], films: list[Tensor], blocks: Sequence[SkipBlock]
) -> Encoded:
    """The middle's features h, the encoder's `skips`, the decoder's `films`, and the halves of the
    decoder's `blocks` that join a skip."""
    halves, width = [], h.shape[1]
    for skip, block in zip(reversed(skips), blocks, strict=True):
        if apart(block.norm1, width) == block.norm1.num_channels:
            return Encoded(h, skips, films, [], 0.0)
        halves.append(half(block, skip, width))
        width = block.conv1.out_channels
    shift = torch.stack([own.shift for own in halves]).max().item()
    return Encoded(h, skips, films, halves, shift)


def apart(norm: Norm, width: int) -> int:
    """The first channel behind `width` others with which a group of `norm` begins."""
    group = norm.num_channels // norm.num_groups
    return -(-width // group) * group


def half(block: SkipBlock, skip: Tensor, width: int) -> Half:
    """Terms of `skip`, which follows `width` other channels in the input of `block`."""
    norm, conv1 = block.norm1, block.conv1
    kept = apart(norm, width)
    alone = skip[:, kept - width :]
    normed = norm.part(alone, slice(kept, None))
    group = norm.num_channels // norm.num_groups
    spread = alone.float().unflatten(1, (-1, group)).var(dim=(2, 3, 4), correction=0)
    return Half(
        kept,
        conv1.weight[:, :kept].contiguous(memory_format=torch.channels_last),
        F.conv2d(silu(normed), conv1.weight[:, kept:], padding=1),
        conv1x1(skip, block.shortcut.weight[:, width:]),
        (0.5 * norm.eps / (spread + norm.eps)).amax(),
    )


def joined(
    block: SkipBlock, h: Tensor, skip: Tensor, half: Half, scale: Tensor, film: Tensor
) -> Tensor:
    """Shortcut and branch of `block` on h and the scaled skip, summed, with the terms of `half`
    taken from there."""
    width = h.shape[1]
    x = h
    if half.kept > width:  # a group holds channels of both
        x = torch.cat([h, scaled(skip[:, : half.kept - width], scale)], dim=1)
    active = silu(block.norm1.part(x, slice(half.kept)))
    y = F.conv2d(active, half.weight, block.conv1.bias, padding=1)
    across = conv1x1(h, block.shortcut.weight[:, :width], block.shortcut.bias)
    out = added(block.second(added(y, half.conv1), film), across)
    if out.dtype == scale.dtype:
        return out.addcmul_(half.shortcut, scale.view(-1, 1, 1, 1))
    return added(out, scaled(half.shortcut, scale))
