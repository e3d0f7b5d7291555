"""The network of backbone `adm`; its options are those of `cmkit_std.backbones.adm.ADM`."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from cmkit import Cond, Network, Scales

if TYPE_CHECKING:
    from cmkit_std.backbones.adm import ADM
    from cmkit_std.backbones.songunet_network import Block

MAX_PERIOD = 10_000
GUIDANCE_WAVES = 256
"""Sinusoids of a guidance weight."""
MAX_SHIFT = 1e-5
"""Relative change of a feature that sharing the decoder's work on skips may bring."""
_MEETING = ((0, 0, 1), (0, 1, 1), (1, 1, 0), (1, 0, 0))
MEETING = [[y * x for y in row for x in column] for row in _MEETING for column in _MEETING]
"""Taps of a 3x3 convolution (9) of pixels doubled that meet in each tap (16) of `upsampled`."""


class UNet(Network):
    """The U-Net F(x, c_noise) of openai/consistency_models, with its places of rescaling open.

    Norms, embeddings and the last convolution keep float32 under autocast.
    """

    def __init__(
        self,
        options: ADM,
        in_channels: int,
        out_channels: int,
        resolution: int,
        num_classes: int | None = None,
        guidance: bool = False,
        sigma_to: bool = False,
    ):
        super().__init__()
        self.channels, self.out_channels = options.channels, out_channels
        self.time_scale = options.time_scale
        emb_channels = 4 * options.channels
        self.time = _mlp(options.channels, emb_channels)
        self.time_s = _mlp(options.channels, emb_channels) if sigma_to else None
        self.label = None
        if num_classes:
            self.null_label = num_classes if options.null_class else None
            self.label = nn.Embedding(num_classes + options.null_class, emb_channels)
        self.guidance = None
        if guidance:
            # A condition that is added to trained weights changes nothing at first.
            self.guidance = silent(nn.Linear(GUIDANCE_WAVES, options.channels, bias=False))
        self.label_sigma_to = options.label_sigma_to

        def block(before: int, after: int, resample: Resampling = None) -> ResBlock:
            return ResBlock(
                before,
                after,
                emb_channels,
                resample=resample,
                dropout=options.dropout,
                scale_shift=options.use_scale_shift_norm,
                groups=(options.groups(before), options.groups(after)),
                sigma_to=sigma_to,
                checkpointed=options.gradient_checkpointing,
            )

        def attention(width: int, decoder: bool = False) -> Attention:
            return Attention(width, options.heads(width, decoder), options.groups(width))

        levels = options.levels(resolution)
        last = levels[0][0]
        self.encoder = nn.ModuleList([Stage([nn.Conv2d(in_channels, last, 3, padding=1)])])
        skips = [last]
        for level, (width, side) in enumerate(levels):
            for _ in range(options.num_res_blocks):
                stage = Stage([block(last, width)])
                if options.attends(side):
                    stage.append(attention(width))
                self.encoder.append(stage)
                last = width
                skips.append(last)
            if level < len(levels) - 1:
                down = (
                    block(last, last, "down")
                    if options.resblock_updown
                    else Downsample(last, last, options.conv_resample)
                )
                self.encoder.append(Stage([down]))
                skips.append(last)

        self.middle = Stage([block(last, last), attention(last), block(last, last)])

        self.decoder = nn.ModuleList()
        self.sites = tuple(f"skip.{i}" for i in range(len(skips)))
        self.late = frozenset(self.sites)
        for level, (width, side) in reversed(list(enumerate(levels))):
            for i in range(options.num_res_blocks + 1):
                stage = Stage([block(last + skips.pop(), width)])
                last = width
                if options.attends(side):
                    stage.append(attention(last, decoder=True))
                if level and i == options.num_res_blocks:
                    up = (
                        block(last, last, "up")
                        if options.resblock_updown
                        else Upsample(last, last, options.conv_resample)
                    )
                    stage.append(up)
                self.decoder.append(stage)

        self.norm_out = Norm(options.groups(last), last)
        outputs = (2 if options.learn_sigma else 1) * out_channels
        self.conv_out = _zeroed(nn.Conv2d(last, outputs, 3, padding=1))
        # A tuple registers nothing a second time. Registration order is forward order.
        self._blocks = tuple(m for m in self.modules() if isinstance(m, ResBlock))
        self.sites += tuple(f"emb.{j}" for j in range(len(self._blocks)))

    def forward(self, x: Tensor, c_noise: Tensor, cond: Cond, scales: Scales) -> Tensor:
        """F, (B, C, H, W), of x (B, C, H, W) and c_noise (B,); float32 also under autocast."""
        return self._decode(*self._encode(x, c_noise, cond, scales), scales)

    def lower(self, dtype: torch.dtype) -> None:
        """As of `Network`: the convolutions but for the last one."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and module is not self.conv_out:
                module.to(dtype)

    def encode(self, x: Tensor, c_noise: Tensor, cond: Cond, scales: Scales) -> Encoded:
        """What `decode` needs of x (B, C, H, W), c_noise (B,) and the scales of embeddings.

        Beside the features it holds what every decoder block can compute of its skip alone.
        """
        h, skips, films = self._encode(x, c_noise, cond, scales)
        return encoded(h, skips, films, [stage[0] for stage in self.decoder])

    def decode(self, encoded: Encoded, scales: Scales) -> Tensor:
        """F as of `forward` for any scales of the skips; the same up to `MAX_SHIFT` of rounding."""
        h, films = encoded.h, encoded.films
        if not encoded.suits({id(s): s for site, s in scales.items() if site in self.late}):
            return self._decode(h, encoded.skips, films, scales)
        one, following = h.new_ones(()), iter(films)
        sites = reversed(range(len(encoded.skips)))
        for i, stage, own in zip(sites, self.decoder, encoded.halves, strict=True):
            first, *rest = stage
            scale = scales.get(f"skip.{i}", one)
            h = joined(first, h, encoded.skips[i], own, scale, next(following))
            for layer in rest:
                h = layer(h, next(following)) if isinstance(layer, ResBlock) else layer(h)
        return self._out(h)

    def _decode(
        self, h: Tensor, skips: list[Tensor], films: list[Tensor], scales: Scales
    ) -> Tensor:
        following = iter(films)
        for i, stage in zip(reversed(range(len(skips))), self.decoder, strict=True):
            scale = scales.get(f"skip.{i}")
            skip = skips[i] if scale is None else scaled(skips[i], scale)
            h = stage(torch.cat([h, skip], dim=1), following)
        return self._out(h)

    def _encode(
        self, x: Tensor, c_noise: Tensor, cond: Cond, scales: Scales
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Features of the middle, of every encoder stage, and the decoder's films."""
        with full_precision(x.device):
            all_films = self._films(c_noise, cond, scales)
        h, skips, films = x, [], iter(all_films)
        for stage in self.encoder:
            h = stage(h, films)
            skips.append(h)
        return self.middle(h, films), skips, list(films)

    def _out(self, h: Tensor) -> Tensor:
        """F, without the variances that may follow it."""
        with full_precision(h.device):
            return self.conv_out(silu(self.norm_out(widened(h))))[:, : self.out_channels]

    def _films(self, c_noise: Tensor, cond: Cond, scales: Scales) -> list[Tensor]:
        """What the embedding says to each residual block, (B, k) each, in forward order."""
        waves = self._sinusoids(c_noise)
        if self.guidance is not None and cond.guidance is not None:
            waves = waves + self.guidance(guidance_waves(cond.guidance).to(waves.dtype))
        emb = self.time(waves)  # (B, 4 channels)
        label = None
        if self.label is not None:
            chosen = cond.label
            if chosen is None:
                if self.null_label is None:
                    raise ValueError("this network embeds labels: cond.label must not be None")
                chosen = torch.full_like(c_noise, self.null_label, dtype=torch.int64)
            label = self.label(chosen)
            emb = emb + label
        active_s = None
        if self.time_s is not None and cond.sigma_to is not None:
            emb_s = self.time_s(self._sinusoids(0.25 * torch.log(cond.sigma_to + 1e-44)))
            if self.label_sigma_to and label is not None:
                emb_s = emb_s + label
            active_s = F.silu(emb_s)
        last, active = None, F.silu(emb)
        films = []
        for j, block in enumerate(self._blocks):
            scale = scales.get(f"emb.{j}")
            if scale is not last:
                own = emb if scale is None else emb * scale.to(emb.dtype).view(-1, 1)
                last, active = scale, F.silu(own)
            films.append(block.project(active, active_s))
        return films

    def _sinusoids(self, c_noise: Tensor) -> Tensor:
        return sinusoids(c_noise * self.time_scale, self.channels).to(self.conv_out.weight.dtype)


@dataclass(frozen=True)
class Half:
    """What the first block of a decoder stage computes of its skip, whatever its positive scale.

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
    """The encoder's work for one x, c_noise and set of embedding scales."""

    h: Tensor
    skips: list[Tensor]
    films: list[Tensor]
    halves: list[Half]
    shift: float
    """The largest of the halves' shifts."""

    def suits(self, scales: Mapping[int, Tensor]) -> bool:
        """Whether the halves hold for these scales: positive, and the norms' eps negligible."""
        if not scales:
            return True
        bounds = torch.stack([torch.stack(scale.aminmax()) for scale in scales.values()])
        for low, high in bounds.tolist():  # the device is waited for once
            if low <= 0 or self.shift * max(low**-2 - 1, 1 - high**-2) > MAX_SHIFT:
                return False
        return True


def encoded(
    h: Tensor, skips: list[Tensor], films: list[Tensor], blocks: Sequence[ResBlock | Block]
) -> Encoded:
    """The middle's features h, the encoder's `skips`, the decoder's `films`, and the halves of the
    decoder's `blocks` that join a skip."""
    halves, width = [], h.shape[1]
    for skip, block in zip(reversed(skips), blocks, strict=True):
        halves.append(half(block, skip, width))
        width = block.conv1.out_channels
    shift = torch.stack([own.shift for own in halves]).max().item()
    return Encoded(h, skips, films, halves, shift)


def half(block: ResBlock | Block, skip: Tensor, width: int) -> Half:
    """Terms of `skip`, which follows `width` other channels in the input of `block`."""
    norm, conv1 = block.norm1, block.conv1
    group = norm.num_channels // norm.num_groups
    kept = -(-width // group) * group
    alone = skip[:, kept - width :]
    normed = norm.part(alone, slice(kept, None))
    spread = alone.float().unflatten(1, (-1, group)).var(dim=(2, 3, 4), correction=0)
    return Half(
        kept,
        conv1.weight[:, :kept].contiguous(memory_format=torch.channels_last),
        F.conv2d(silu(normed), conv1.weight[:, kept:], padding=1),
        mixed(skip, block.shortcut.weight[:, width:]),
        (0.5 * norm.eps / (spread + norm.eps)).amax(),
    )


def joined(
    block: ResBlock | Block, h: Tensor, skip: Tensor, half: Half, scale: Tensor, film: Tensor
) -> Tensor:
    """Shortcut and branch of `block` on h and the scaled skip, summed, with the terms of `half`
    taken from there."""
    width = h.shape[1]
    x = h
    if half.kept > width:  # a group holds channels of both
        x = torch.cat([h, scaled(skip[:, : half.kept - width], scale)], dim=1)
    active = silu(block.norm1.part(x, slice(half.kept)))
    y = F.conv2d(active, half.weight, block.conv1.bias, padding=1)
    across = mixed(h, block.shortcut.weight[:, :width], block.shortcut.bias)
    out = added(block.second(added(y, half.conv1), film), across)
    if out.dtype == scale.dtype:
        return out.addcmul_(half.shortcut, scale.view(-1, 1, 1, 1))
    return added(out, scaled(half.shortcut, scale))


Resampling = Literal["up", "down"] | None


class Stage(nn.ModuleList):
    """Layers between two encoder-decoder connections."""

    def forward(self, h: Tensor, films: Iterator[Tensor]) -> Tensor:
        """Features (B, C', H', W') of h (B, C, H, W); each residual block takes its own film."""
        for layer in self:
            h = layer(h, next(films)) if isinstance(layer, ResBlock) else layer(h)
        return h


class ResBlock(nn.Module):
    """shortcut(x) + conv(dropout(silu(film(norm(conv(silu(norm(x)))))))), maybe resampled."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        emb_channels: int,
        *,
        resample: Resampling = None,
        dropout: float = 0.0,
        scale_shift: bool = False,
        groups: tuple[int, int] = (32, 32),
        shortcut_kernel: int = 1,
        sigma_to: bool = False,
        checkpointed: bool = False,
    ):
        super().__init__()
        self.scale_shift, self.checkpointed = scale_shift, checkpointed
        film_channels = (2 if scale_shift else 1) * out_channels
        self.norm1 = Norm(groups[0], in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.film = nn.Linear(emb_channels, film_channels)
        self.film_s = nn.Linear(emb_channels, film_channels) if sigma_to else None
        self.norm2 = Norm(groups[1], out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = _zeroed(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.shortcut: nn.Module = nn.Identity()
        if in_channels != out_channels:
            kind = Pointwise if shortcut_kernel == 1 else nn.Conv2d
            self.shortcut = kind(
                in_channels, out_channels, shortcut_kernel, padding=shortcut_kernel // 2
            )
        resamplings = {None: nn.Identity, "up": Upsample, "down": Downsample}
        self.resample = resamplings[resample]()

    def project(self, active: Tensor, active_s: Tensor | None = None) -> Tensor:
        """Film (B, k) of silu(embedding) (B, E), and of that of CTM's target level if there."""
        film = self.film(active)
        return film if active_s is None else film + self.film_s(active_s)

    def forward(self, x: Tensor, film: Tensor) -> Tensor:
        """Features (B, C', H', W') of x (B, C, H, W)."""
        if self.checkpointed and torch.is_grad_enabled():
            return checkpoint(self._forward, x, film, use_reentrant=False)
        return self._forward(x, film)

    def _forward(self, x: Tensor, film: Tensor) -> Tensor:
        h = silu(self.norm1(x))
        up = isinstance(self.resample, Upsample)
        h = upsampled(h, self.conv1) if up else self.conv1(self.resample(h))
        return added(self.second(h, film), self.shortcut(self.resample(x)))

    def second(self, h: Tensor, film: Tensor) -> Tensor:
        """The branch after conv1, (B, C', H', W'), of its output h."""
        film = film[:, :, None, None]
        if self.scale_shift:
            scale, shift = film.chunk(2, dim=1)
            h = torch.addcmul(shift.to(h.dtype), self.norm2(h), (1 + scale).to(h.dtype))
        else:
            h = self.norm2(h + film.to(h.dtype))
        return self.conv2(self.dropout(silu(h)))


class Attention(nn.Module):
    """x + proj(attention(norm(x))), every pixel attending to every other."""

    def __init__(self, channels: int, heads: int, groups: int = 32):
        super().__init__()
        self.heads = heads
        self.norm = Norm(groups, channels)
        self.qkv = Pointwise(channels, 3 * channels, 1)
        self.proj = _zeroed(Pointwise(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Features (B, C, H, W) of x (B, C, H, W)."""
        return added(self.proj(attend(self.qkv(self.norm(x)), self.heads)), x)


def attend(qkv: Tensor, heads: int) -> Tensor:
    """Attention (B, C, ...) of queries, keys and values (B, 3 C, ...), channels in the order
    (three, heads, head width); scores are divided by sqrt(head width)."""
    tokens = qkv.movedim(1, -1).flatten(1, -2)  # (B, N, 3 C), a view of channels_last
    q, k, v = tokens.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)  # (B, heads, N, d) each
    on_cpu = q.dtype == torch.bfloat16 and q.device.type == "cpu"
    eager = not (q.requires_grad or torch.compiler.is_compiling())
    weigh = weighted if on_cpu and eager else F.scaled_dot_product_attention
    out = weigh(q, k, v).transpose(1, 2).flatten(2)  # (B, N, C)
    return out.unflatten(1, qkv.shape[2:]).movedim(-1, 1)


def weighted(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k / sqrt(d)) v, (B, heads, N, d) each, an image at a time by bfloat16 products.

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


class Pointwise(nn.Conv2d):
    """A 1x1 convolution, by the faster of two ways; see `mixed`."""

    def forward(self, x: Tensor) -> Tensor:
        """Features (B, C', H, W) of x (B, C, H, W)."""
        return mixed(x, self.weight, self.bias)


def mixed(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The 1x1 convolution of x (B, C, H, W) with weight (C', C, 1, 1).

    It is a matrix product where memory is channels_last. In float32 on a CPU torch leaves those to
    MKL, which reaches half the speed of oneDNN's convolutions on an AMD processor.
    """
    exact = x.device.type == "cpu" and x.dtype == torch.float32
    if exact and not torch.is_autocast_enabled("cpu"):
        return F.conv2d(x, weight, bias)
    return F.linear(x.permute(0, 2, 3, 1), weight.flatten(1), bias).permute(0, 3, 1, 2)


class Upsample(nn.Module):
    """Twice the side: each pixel four times; then a convolution, if wanted."""

    def __init__(self, in_channels: int = 0, out_channels: int = 0, conv: bool = False):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, padding=1) if conv else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Features (B, C', 2 H, 2 W) of x (B, C, H, W)."""
        if isinstance(self.conv, nn.Conv2d):
            return upsampled(x, self.conv)
        return F.interpolate(x, scale_factor=2, mode="nearest")


def upsampled(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """What the 3x3 `conv` makes of each pixel of x (B, C, H, W) four times, (B, C', 2 H, 2 W).

    On a CPU as a transposed convolution, whose kernel sums the taps that meet the same pixel: 4 in
    place of 9 products an output pixel.
    """
    if x.device.type != "cpu":
        return conv(F.interpolate(x, scale_factor=2, mode="nearest"))
    taps = conv.weight.permute(0, 2, 3, 1).flatten(1, 2)  # (C', 9, C)
    kernel = conv.weight.new_tensor(MEETING) @ taps
    kernel = kernel.unflatten(1, (4, 4)).permute(3, 0, 1, 2)  # (C, C', 4, 4)
    return F.conv_transpose2d(x, kernel, conv.bias, stride=2, padding=1)


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


def silu(x: Tensor) -> Tensor:
    """SiLU in place: fresh memory costs a CPU more than the function does."""
    return F.silu(x, inplace=True)


def added(x: Tensor, y: Tensor) -> Tensor:
    """x + y, in the memory of x where its type is that of the sum."""
    return x.add_(y) if torch.promote_types(x.dtype, y.dtype) == x.dtype else x + y


def scaled(skip: Tensor, scale: Tensor) -> Tensor:
    """scale () or (B,) times skip, in the wider of their types: 1.02 is no bfloat16 number."""
    return (skip * scale.view(-1, 1, 1, 1)).to(skip.dtype)


def sinusoids(t: Tensor, dim: int) -> Tensor:
    """[cos | sin] of t (B,) at dim // 2 frequencies from 1 down towards 1 / MAX_PERIOD, (B, dim).

    An odd `dim` ends in a zero. Computed in float64 for such t, in float32 for any other.
    """
    t = widened(t)
    half = dim // 2
    steps = torch.arange(half, dtype=t.dtype, device=t.device)
    angles = t[:, None] * torch.exp(-math.log(MAX_PERIOD) * steps / half)
    return F.pad(torch.cat([angles.cos(), angles.sin()], dim=1), (0, dim % 2))


def guidance_waves(w: Tensor, dim: int = GUIDANCE_WAVES) -> Tensor:
    """[sin | cos] of 1000 w (B,) at dim // 2 frequencies from 1 down to 1 / MAX_PERIOD, (B, dim)
    (Latent Consistency Models; luosiallen/latent-consistency-model).

    An odd `dim` ends in a zero. Computed in float64 for such w, in float32 for any other.
    """
    w = w.to(torch.promote_types(w.dtype, torch.float32))
    half = dim // 2
    steps = torch.arange(half, dtype=w.dtype, device=w.device) / (half - 1)
    angles = 1000 * w[:, None] * torch.exp(-math.log(MAX_PERIOD) * steps)
    return F.pad(torch.cat([angles.sin(), angles.cos()], dim=1), (0, dim % 2))


def _mlp(channels: int, emb_channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(channels, emb_channels), nn.SiLU(), nn.Linear(emb_channels, emb_channels)
    )


def _zeroed(layer: nn.Conv2d) -> nn.Conv2d:
    """`layer` with zero weights, so that a fresh block is the identity."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def silent(layer: nn.Linear) -> nn.Linear:
    """`layer`, without a bias, with zero weights."""
    nn.init.zeros_(layer.weight)
    return layer


def full_precision(device: torch.device) -> AbstractContextManager[None]:
    """Inside, autocast is off; the `meta` device knows none."""
    if device.type == "meta":
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)
