"""The network of backbone `adm`; its options are those of `cmkit_std.backbones.adm.ADM`."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from cmkit.denoiser import Cond, Network, Scales

if TYPE_CHECKING:
    from cmkit_std.backbones.adm import ADM

MAX_PERIOD = 10_000


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
        sigma_to: bool = False,
    ):
        super().__init__()
        self.channels = options.channels
        self.time_scale = options.time_scale
        emb_channels = 4 * options.channels
        self.time = _mlp(options.channels, emb_channels)
        self.time_s = _mlp(options.channels, emb_channels) if sigma_to else None
        self.label = nn.Embedding(num_classes, emb_channels) if num_classes else None

        def block(before: int, after: int, resample: Resampling = None) -> ResBlock:
            return ResBlock(
                before,
                after,
                emb_channels,
                resample=resample,
                dropout=options.dropout,
                scale_shift=options.use_scale_shift_norm,
                groups=options.norm_groups,
                sigma_to=sigma_to,
                checkpointed=options.gradient_checkpointing,
            )

        def attention(width: int, decoder: bool = False) -> Attention:
            return Attention(width, options.heads(width, decoder), options.norm_groups)

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

        self.norm_out = Norm(options.norm_groups, last)
        self.conv_out = _zeroed(nn.Conv2d(last, out_channels, 3, padding=1))
        # A tuple registers nothing a second time. Registration order is forward order.
        self._blocks = tuple(m for m in self.modules() if isinstance(m, ResBlock))
        self.sites += tuple(f"emb.{j}" for j in range(len(self._blocks)))

    def forward(self, x: Tensor, c_noise: Tensor, cond: Cond, scales: Scales) -> Tensor:
        """F, (B, C, H, W), of x (B, C, H, W) and c_noise (B,); float32 also under autocast."""
        with full_precision(x.device):
            films = iter(self._films(c_noise, cond, scales))
        h, skips = x, []
        for stage in self.encoder:
            h = stage(h, films)
            skips.append(h)
        h = self.middle(h, films)
        for stage in self.decoder:
            scale = scales.get(f"skip.{len(skips) - 1}")
            skip = skips.pop()
            if scale is not None:
                # In the wider of the two types: 1.02 is no bfloat16 number.
                skip = (skip * scale.view(-1, 1, 1, 1)).to(skip.dtype)
            h = stage(torch.cat([h, skip], dim=1), films)
        with full_precision(x.device):
            return self.conv_out(F.silu(self.norm_out(h)))

    def _films(self, c_noise: Tensor, cond: Cond, scales: Scales) -> list[Tensor]:
        """What the embedding says to each residual block, (B, k) each, in forward order."""
        emb = self.time(self._sinusoids(c_noise))  # (B, 4 channels)
        if self.label is not None:
            if cond.label is None:
                raise ValueError("this network embeds labels: cond.label must not be None")
            emb = emb + self.label(cond.label)
        active_s = None
        if self.time_s is not None and cond.sigma_to is not None:
            c_noise_s = 0.25 * torch.log(cond.sigma_to + 1e-44)
            active_s = F.silu(self.time_s(self._sinusoids(c_noise_s)))
        last, active = None, F.silu(emb)
        films = []
        for j, block in enumerate(self._blocks):
            scale = scales.get(f"emb.{j}")
            if scale is not last:
                scaled = emb if scale is None else emb * scale.to(emb.dtype).view(-1, 1)
                last, active = scale, F.silu(scaled)
            films.append(block.project(active, active_s))
        return films

    def _sinusoids(self, c_noise: Tensor) -> Tensor:
        return sinusoids(c_noise * self.time_scale, self.channels).to(self.conv_out.weight.dtype)


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
        groups: int = 32,
        shortcut_kernel: int = 1,
        sigma_to: bool = False,
        checkpointed: bool = False,
    ):
        super().__init__()
        self.scale_shift, self.checkpointed = scale_shift, checkpointed
        film_channels = (2 if scale_shift else 1) * out_channels
        self.norm1 = Norm(groups, in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.film = nn.Linear(emb_channels, film_channels)
        self.film_s = nn.Linear(emb_channels, film_channels) if sigma_to else None
        self.norm2 = Norm(groups, out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = _zeroed(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.shortcut = (
            nn.Identity()
            if in_channels == out_channels
            else nn.Conv2d(in_channels, out_channels, shortcut_kernel, padding=shortcut_kernel // 2)
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
        h = self.conv1(self.resample(F.silu(self.norm1(x)).to(x.dtype)))
        film = film[:, :, None, None]
        if self.scale_shift:
            scale, shift = film.chunk(2, dim=1)
            h = self.norm2(h) * (1 + scale) + shift
        else:
            h = self.norm2(h + film)
        return self.shortcut(self.resample(x)) + self.conv2(self.dropout(F.silu(h)))


class Attention(nn.Module):
    """x + proj(attention(norm(x))), every pixel attending to every other."""

    def __init__(self, channels: int, heads: int, groups: int = 32):
        super().__init__()
        self.heads = heads
        self.norm = Norm(groups, channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = _zeroed(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Features (B, C, H, W) of x (B, C, H, W)."""
        qkv = self.qkv(self.norm(x)).flatten(2)
        return x + self.proj(attend(qkv, self.heads).unflatten(2, x.shape[2:]))


def attend(qkv: Tensor, heads: int) -> Tensor:
    """Attention (B, C, N) of queries, keys and values (B, 3 C, N), channels in the order (three,
    heads, head width); scores are divided by sqrt(head width)."""
    q, k, v = qkv.unflatten(1, (3, heads, -1)).transpose(-1, -2).unbind(1)  # (B, heads, N, d)
    return F.scaled_dot_product_attention(q, k, v).transpose(-1, -2).flatten(1, 2)


class Upsample(nn.Module):
    """Twice the side: each pixel four times; then a convolution, if wanted."""

    def __init__(self, in_channels: int = 0, out_channels: int = 0, conv: bool = False):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, padding=1) if conv else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Features (B, C', 2 H, 2 W) of x (B, C, H, W)."""
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


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
    """GroupNorm computed and returned in float32 at least, eps 1e-5."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(torch.promote_types(x.dtype, torch.float32)))


def sinusoids(t: Tensor, dim: int) -> Tensor:
    """[cos | sin] of t (B,) at dim // 2 frequencies from 1 down towards 1 / MAX_PERIOD, (B, dim).

    An odd `dim` ends in a zero. Computed in float64 for such t, in float32 for any other.
    """
    t = t.to(torch.promote_types(t.dtype, torch.float32))
    half = dim // 2
    steps = torch.arange(half, dtype=t.dtype, device=t.device)
    angles = t[:, None] * torch.exp(-math.log(MAX_PERIOD) * steps / half)
    return F.pad(torch.cat([angles.cos(), angles.sin()], dim=1), (0, dim % 2))


def _mlp(channels: int, emb_channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(channels, emb_channels), nn.SiLU(), nn.Linear(emb_channels, emb_channels)
    )


def _zeroed(layer: nn.Conv2d) -> nn.Conv2d:
    """`layer` with zero weights, so that a fresh block is the identity."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def full_precision(device: torch.device) -> AbstractContextManager[None]:
    """Inside, autocast is off; the `meta` device knows none."""
    if device.type == "meta":
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)
