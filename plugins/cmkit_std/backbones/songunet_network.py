"""The network of backbone `songunet`; its options are those of
`cmkit_std.backbones.songunet.SongUNet`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from cmkit import Cond, Network, Scales
from cmkit_std.backbones.adm_unet import (
    GUIDANCE_WAVES,
    MAX_PERIOD,
    Encoded,
    Half,
    Norm,
    attend,
    encoded,
    full_precision,
    guidance_waves,
    joined,
    scaled,
    silent,
    silu,
    widened,
)
from cmkit_std.backbones.songunet import norm_groups

if TYPE_CHECKING:
    from cmkit_std.backbones.songunet import SongUNet as Options

EPS = 1e-6
HALF = math.sqrt(0.5)
"""Keeps the variance of a sum of two terms of equal variance."""
NEARLY_ZERO = 1e-5
"""Gain of the last layer of a branch, so that a fresh block nearly passes its input on."""
Resampling = Literal["up", "down"] | None
Join = Callable[["Block", Tensor, Tensor], Tensor]
"""A block of the decoder on features and the next skip, with its film."""


class SongUNet(Network):
    """The U-Net F(x, c_noise) of DDPM++ and NCSN++, with its places of rescaling open.

    Norms, embeddings and output pictures keep float32 under autocast.
    """

    def __init__(
        self,
        options: Options,
        in_channels: int,
        out_channels: int,
        resolution: int,
        num_classes: int | None = None,
        guidance: bool = False,
        sigma_to: bool = False,
    ):
        super().__init__()
        self.label_dropout = options.label_dropout
        if options.null_class or options.label_dropout:
            self.null_label = num_classes
        noise_channels = options.channels * options.channel_mult_noise
        emb_channels = options.channels * options.channel_mult_emb
        self.noise = (
            Fourier(noise_channels, options.fourier_scale)
            if options.embedding_type == "fourier"
            else Positional(noise_channels)
        )
        self.label = _xavier(nn.Linear(num_classes, noise_channels)) if num_classes else None
        self.augment = (
            _xavier(nn.Linear(options.augment_dim, noise_channels, bias=False))
            if options.augment_dim
            else None
        )
        self.guidance = None
        if guidance:
            # A condition that is added to trained weights changes nothing at first.
            self.guidance = silent(nn.Linear(GUIDANCE_WAVES, noise_channels, bias=False))
        self.time = _mlp(noise_channels, emb_channels)
        self.time_s = _mlp(noise_channels, emb_channels) if sigma_to else None

        def block(
            before: int, after: int, resample: Resampling = None, attention: bool = False
        ) -> Block:
            return Block(
                before,
                after,
                emb_channels,
                resample=resample,
                taps=options.resample_filter,
                attention=attention,
                dropout=options.dropout,
                sigma_to=sigma_to,
                checkpointed=options.gradient_checkpointing,
            )

        levels = options.levels(resolution)
        last, picture = options.channels, in_channels
        skips = [last]
        self.encoder = nn.ModuleDict()
        for n, (width, side) in enumerate(levels):
            level = EncoderLevel()
            if n == 0:
                level.enter = Conv(in_channels, last, 3)
            else:
                level.down = block(last, last, "down")
                skips.append(last)
                if options.encoder_type == "skip":
                    level.picture_down = Resample("down", options.resample_filter)
                    level.picture_in = Conv(picture, last, 1)
                elif options.encoder_type == "residual":
                    level.residual = Conv(
                        picture, last, 3, "down", options.resample_filter, fused=True
                    )
                    picture = last
            level.blocks = nn.ModuleList()
            for _ in range(options.num_res_blocks):
                level.blocks.append(block(last, width, attention=options.attends(side)))
                last = width
                skips.append(last)
            self.encoder[str(side)] = level
        self.sites = tuple(f"skip.{i}" for i in range(len(skips)))
        self.late = frozenset(self.sites)

        self.decoder = nn.ModuleDict()
        for n, (width, side) in reversed(list(enumerate(levels))):
            level = DecoderLevel()
            coarsest = n == len(levels) - 1
            if coarsest:
                level.middle = nn.ModuleList([block(last, last, attention=True), block(last, last)])
            else:
                level.up = block(last, last, "up")
            level.blocks = nn.ModuleList()
            for i in range(options.num_res_blocks + 1):
                attention = options.attends(side) and i == options.num_res_blocks
                level.blocks.append(block(last + skips.pop(), width, attention=attention))
                last = width
            if options.decoder_type == "skip" or n == 0:
                if not coarsest and options.decoder_type == "skip":
                    level.picture_up = Resample("up", options.resample_filter)
                level.norm_out = Norm(norm_groups(last), last, eps=EPS)
                level.conv_out = Conv(last, out_channels, 3, gain=NEARLY_ZERO)
            self.decoder[str(side)] = level

        # A tuple registers nothing a second time. Registration order is forward order.
        self._blocks = tuple(m for m in self.modules() if isinstance(m, Block))
        self.sites += tuple(f"emb.{j}" for j in range(len(self._blocks)))

    def forward(
        self,
        x: Tensor,
        c_noise: Tensor,
        cond: Cond,
        scales: Scales,
        augment: Tensor | None = None,
    ) -> Tensor:
        """F, (B, C, H, W), of x (B, C, H, W) and c_noise (B,); float32 also under autocast.

        Without a label its vector is zero, and so are the augmentation labels, (B, augment_dim).
        """
        h, skips, films = self._encode(x, c_noise, cond, scales, augment)
        left = list(enumerate(skips))

        def join(block: Block, h: Tensor, film: Tensor) -> Tensor:
            i, skip = left.pop()
            scale = scales.get(f"skip.{i}")
            skip = skip if scale is None else scaled(skip, scale)
            return block(torch.cat([h, skip], dim=1), film)

        return self._decode(h, films, join)

    def encode(self, x: Tensor, c_noise: Tensor, cond: Cond, scales: Scales) -> Encoded:
        """What `decode` needs of x (B, C, H, W), c_noise (B,) and the scales of embeddings.

        Beside the features it holds what every decoder block can compute of its skip alone.
        """
        blocks = [block for level in self.decoder.values() for block in level.blocks]
        return encoded(*self._encode(x, c_noise, cond, scales), blocks)

    def decode(self, encoded: Encoded, scales: Scales) -> Tensor:
        """F as of `forward` for any scales of the skips; the same up to `MAX_SHIFT` of rounding."""
        one = encoded.h.new_ones(())
        shared = encoded.suits({id(s): s for site, s in scales.items() if site in self.late})
        left = list(enumerate(zip(encoded.skips, reversed(encoded.halves), strict=True)))

        def join(block: Block, h: Tensor, film: Tensor) -> Tensor:
            i, (skip, half) = left.pop()
            scale = scales.get(f"skip.{i}", one)
            if shared:
                return block.joined(h, skip, half, scale, film)
            return block(torch.cat([h, scaled(skip, scale)], dim=1), film)

        return self._decode(encoded.h, encoded.films, join)

    def _encode(
        self,
        x: Tensor,
        c_noise: Tensor,
        cond: Cond,
        scales: Scales,
        augment: Tensor | None = None,
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Features of the middle, every skip, and the decoder's further films."""
        with full_precision(x.device):
            films = iter(self._films(c_noise, cond, scales, augment))
        h, picture, skips = x, x, []
        for level in self.encoder.values():
            h, picture = level(h, picture, films, skips)
        coarsest = next(iter(self.decoder.values()))
        for block in coarsest.middle:
            h = block(h, next(films))
        return h, skips, list(films)

    def _decode(self, h: Tensor, films: list[Tensor], join: Join) -> Tensor:
        following, out = iter(films), None
        for level in self.decoder.values():
            h, out = level(h, out, following, join)
        return out

    def _films(
        self, c_noise: Tensor, cond: Cond, scales: Scales, augment: Tensor | None
    ) -> list[Tensor]:
        """What the embedding says to each residual block, (B, k) each, in forward order."""
        context = self._context(cond, augment)
        waves = self._sinusoids(c_noise) + context
        if self.guidance is not None and cond.guidance is not None:
            waves = waves + self.guidance(guidance_waves(cond.guidance).to(waves.dtype))
        emb = self.time(waves)  # (B, emb_channels)
        active_s = None
        if self.time_s is not None and cond.sigma_to is not None:
            c_noise_s = 0.25 * torch.log(cond.sigma_to + 1e-44)
            active_s = F.silu(self.time_s(self._sinusoids(c_noise_s) + context))
        last, active = None, F.silu(emb)
        films = []
        for j, block in enumerate(self._blocks):
            scale = scales.get(f"emb.{j}")
            if scale is not last:
                own = emb if scale is None else emb * scale.to(emb.dtype).view(-1, 1)
                last, active = scale, F.silu(own)
            films.append(block.project(active, active_s))
        return films

    def _context(self, cond: Cond, augment: Tensor | None) -> Tensor | float:
        """What labels add to the sinusoids of the noise level, (B, noise channels)."""
        context: Tensor | float = 0.0
        if self.label is not None:
            context = self.label.bias
            if cond.label is not None:
                # One-hot vectors of mean square 1 through a linear layer; of the null class zeros.
                label, null = cond.label, self.null_label
                inside = label if null is None else label.clamp(max=null - 1)
                rows = F.embedding(inside, self.label.weight.T) * math.sqrt(self.label.in_features)
                if null is not None:
                    rows = rows * (label != null)[:, None]
                if self.training and self.label_dropout:
                    kept = torch.rand(len(rows), 1, device=rows.device) >= self.label_dropout
                    rows = rows * kept
                context = context + rows
        if self.augment is not None and augment is not None:
            context = context + self.augment(augment)
        return context

    def _sinusoids(self, c_noise: Tensor) -> Tensor:
        return self.noise(c_noise).to(self.time[0].weight.dtype)


class EncoderLevel(nn.Module):
    """The layers of one resolution on the way down; absent ones are None."""

    blocks: nn.ModuleList

    def __init__(self):
        super().__init__()
        self.enter: Conv | None = None
        self.down: Block | None = None
        self.picture_down: Resample | None = None
        self.picture_in: Conv | None = None
        self.residual: Conv | None = None

    def forward(
        self, h: Tensor, picture: Tensor, films: Iterator[Tensor], skips: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Features, and the input picture at this resolution; appends to `skips`."""
        h = self.enter(h) if self.enter is not None else self.down(h, next(films))
        if self.picture_in is not None:
            picture = self.picture_down(picture)
            h = h + self.picture_in(picture)
        elif self.residual is not None:
            h = picture = (h + self.residual(picture)) * HALF
        skips.append(h)
        for block in self.blocks:
            h = block(h, next(films))
            skips.append(h)
        return h, picture


class DecoderLevel(nn.Module):
    """The layers of one resolution on the way up; absent ones are None.

    The coarsest has `middle`, through which features pass before they join any skip.
    """

    blocks: nn.ModuleList

    def __init__(self):
        super().__init__()
        self.middle: nn.ModuleList | None = None
        self.up: Block | None = None
        self.picture_up: Resample | None = None
        self.norm_out: Norm | None = None
        self.conv_out: Conv | None = None

    def forward(
        self,
        h: Tensor,
        out: Tensor | None,
        films: Iterator[Tensor],
        join: Join,
    ) -> tuple[Tensor, Tensor | None]:
        """Features, and the output picture up to this resolution, of what came from below."""
        if self.up is not None:
            h = self.up(h, next(films))
        for block in self.blocks:
            h = join(block, h, next(films))
        if self.conv_out is not None:
            with full_precision(h.device):
                picture = self.conv_out(silu(self.norm_out(widened(h))))
                out = picture if self.picture_up is None else self.picture_up(out) + picture
        return h, out


class Block(nn.Module):
    """(shortcut(x) + conv(dropout(silu(norm(film + conv(silu(norm(x)))))))) / sqrt(2), maybe
    resampled; then (y + attention(y)) / sqrt(2), maybe."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        emb_channels: int,
        *,
        resample: Resampling = None,
        taps: tuple[int, ...] = (1, 1),
        attention: bool = False,
        dropout: float = 0.0,
        sigma_to: bool = False,
        checkpointed: bool = False,
    ):
        super().__init__()
        self.checkpointed = checkpointed
        self.norm1 = Norm(norm_groups(in_channels), in_channels, eps=EPS)
        self.conv1 = Conv(in_channels, out_channels, 3, resample, taps)
        self.film = _xavier(nn.Linear(emb_channels, out_channels))
        self.film_s = _xavier(nn.Linear(emb_channels, out_channels)) if sigma_to else None
        self.norm2 = Norm(norm_groups(out_channels), out_channels, eps=EPS)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = Conv(out_channels, out_channels, 3, gain=NEARLY_ZERO)
        self.shortcut = (
            nn.Identity()
            if in_channels == out_channels and resample is None
            else Conv(in_channels, out_channels, 1, resample, taps)
        )
        self.attention = Attention(out_channels) if attention else nn.Identity()

    def project(self, active: Tensor, active_s: Tensor | None = None) -> Tensor:
        """Film (B, k) of silu(embedding) (B, E), and of that of CTM's target level if there."""
        film = self.film(active)
        return film if active_s is None else film + self.film_s(active_s)

    def forward(self, x: Tensor, film: Tensor) -> Tensor:
        """Features (B, C', H', W') of x (B, C, H, W)."""
        if self.checkpointed and torch.is_grad_enabled():
            return checkpoint(self._forward, x, film, use_reentrant=False)
        return self._forward(x, film)

    def joined(self, h: Tensor, skip: Tensor, half: Half, scale: Tensor, film: Tensor) -> Tensor:
        """`forward` of h and the scaled skip, with the terms of `half` taken from there."""
        return self.attention(joined(self, h, skip, half, scale, film) * HALF)

    def second(self, h: Tensor, film: Tensor) -> Tensor:
        """The branch after conv1, (B, C', H', W'), of its output h."""
        h = silu(self.norm2(h + film[:, :, None, None].to(h.dtype)))
        return self.conv2(self.dropout(h))

    def _forward(self, x: Tensor, film: Tensor) -> Tensor:
        h = self.conv1(silu(self.norm1(x)))
        return self.attention((self.shortcut(x) + self.second(h, film)) * HALF)


class Attention(nn.Module):
    """(x + proj(attention(norm(x)))) / sqrt(2), every pixel attending to every other, one head."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = Norm(norm_groups(channels), channels, eps=EPS)
        self.qkv = Conv(channels, 3 * channels, 1, gain=math.sqrt(0.2))
        self.proj = Conv(channels, channels, 1, gain=NEARLY_ZERO)

    def forward(self, x: Tensor) -> Tensor:
        """Features (B, C, H, W) of x (B, C, H, W)."""
        qkv = self.qkv(self.norm(x)).flatten(2)
        return (x + self.proj(attend(qkv, heads=1).unflatten(2, x.shape[2:]))) * HALF


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
        _xavier(self, gain)
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


def _mlp(channels: int, emb_channels: int) -> nn.Sequential:
    return nn.Sequential(
        _xavier(nn.Linear(channels, emb_channels)),
        nn.SiLU(),
        _xavier(nn.Linear(emb_channels, emb_channels)),
    )


Layer = TypeVar("Layer", nn.Linear, nn.Conv2d)


def _xavier(layer: Layer, gain: float = 1.0) -> Layer:
    """`layer` with uniform weights of variance gain^2 2 / (fan in + fan out), and no bias."""
    nn.init.xavier_uniform_(layer.weight, gain)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer
