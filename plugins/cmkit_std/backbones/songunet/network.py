"""The network of backbone `songunet`."""

from __future__ import annotations

import math
from functools import partial

from torch import Tensor, nn

from cmkit import Cond, DataSpec, Scales
from cmkit_std.backbones.cpu import silu
from cmkit_std.backbones.embedding import both_of, class_vectors, mlp, silent_guidance
from cmkit_std.backbones.layers import Norm, Resampling, attend, full_precision, widened
from cmkit_std.backbones.shared_encoder import Join, SharedEncoder, SkipBlock
from cmkit_std.backbones.songunet.layers import Conv, Fourier, Positional, Resample, xavier
from cmkit_std.backbones.songunet.options import SongUNetOptions, norm_groups

EPS = 1e-6
HALF = math.sqrt(0.5)
"""Keeps the variance of a sum of two terms of equal variance."""
NEARLY_ZERO = 1e-5
"""Gain of the last layer of a branch, so that a fresh block nearly passes its input on."""


class SongUNet(SharedEncoder):
    """The U-Net F(x, c_noise) of DDPM++ and NCSN++, with its places of rescaling open.

    Norms, embeddings and output pictures keep float32 under autocast.
    """

    def __init__(self, options: SongUNetOptions, data: DataSpec, conditions: frozenset[str]):
        super().__init__(options, data, conditions)
        sigma_to = "sigma_to" in conditions
        noise_channels = options.channels * options.channel_mult_noise
        emb_channels = options.channels * options.channel_mult_emb
        self.noise = (
            Fourier(noise_channels, options.fourier_scale)
            if options.embedding_type == "fourier"
            else Positional(noise_channels)
        )
        self.label = (
            xavier(nn.Linear(self.num_classes, noise_channels)) if self.num_classes else None
        )
        self.augment = (
            xavier(nn.Linear(options.augment_dim, noise_channels, bias=False))
            if options.augment_dim
            else None
        )
        self.guidance = silent_guidance(noise_channels) if "guidance" in conditions else None
        self.time = mlp(noise_channels, emb_channels, xavier)
        self.time_s = mlp(noise_channels, emb_channels, xavier) if sigma_to else None

        taps = options.resample_filter
        block = partial(Block, emb_channels=emb_channels, options=options, sigma_to=sigma_to)
        levels = options.levels(data.resolution)
        last, picture = options.channels, data.channels
        skips = [last]
        self.encoder = nn.ModuleDict()
        for n, (width, side) in enumerate(levels):
            level = nn.ModuleDict()
            if n == 0:
                level["enter"] = Conv(data.channels, last, 3)
            else:
                level["down"] = block(last, last, resample="down")
                skips.append(last)
                if options.encoder_type == "skip":
                    level["picture_down"] = Resample("down", taps)
                    level["picture_in"] = Conv(picture, last, 1)
                elif options.encoder_type == "residual":
                    level["residual"] = Conv(picture, last, 3, "down", taps, fused=True)
                    picture = last
            level["blocks"] = nn.ModuleList()
            for _ in range(options.num_res_blocks):
                level["blocks"].append(block(last, width, attention=options.attends(side)))
                last = width
                skips.append(last)
            self.encoder[str(side)] = level
        joins = len(skips)

        self.decoder = nn.ModuleDict()
        for n, (width, side) in reversed(list(enumerate(levels))):
            level = nn.ModuleDict()
            coarsest = n == len(levels) - 1
            if coarsest:
                first = block(last, last, attention=True)
                level["middle"] = nn.ModuleList([first, block(last, last)])
            else:
                level["up"] = block(last, last, resample="up")
            level["blocks"] = nn.ModuleList()
            for i in range(options.num_res_blocks + 1):
                attention = options.attends(side) and i == options.num_res_blocks
                level["blocks"].append(block(last + skips.pop(), width, attention=attention))
                last = width
            if options.decoder_type == "skip" or n == 0:
                if not coarsest and options.decoder_type == "skip":
                    level["picture_up"] = Resample("up", taps)
                level["norm_out"] = Norm(norm_groups(last), last, eps=EPS)
                level["conv_out"] = Conv(last, data.channels, 3, gain=NEARLY_ZERO)
            self.decoder[str(side)] = level

        self._name_sites(joins)

    def _encode(
        self, x: Tensor, c_noise: Tensor, cond: Cond, scales: Scales, augment: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """`augment` (B, augment_dim) are EDM's augmentation labels; absent ones are zeros."""
        films = iter(self._films(c_noise, cond, scales, augment=augment))
        h, picture, skips = x, x, []
        for level in self.encoder.values():
            h = level["enter"](h) if "enter" in level else level["down"](h, next(films))
            if "picture_in" in level:
                picture = level["picture_down"](picture)
                h = h + level["picture_in"](picture)
            elif "residual" in level:
                h = picture = (h + level["residual"](picture)) * HALF
            skips.append(h)
            for block in level["blocks"]:
                h = block(h, next(films))
                skips.append(h)
        coarsest = next(iter(self.decoder.values()))
        for block in coarsest["middle"]:
            h = block(h, next(films))
        return h, skips, list(films)

    def _joining(self) -> list[Block]:
        return [block for level in self.decoder.values() for block in level["blocks"]]

    def _decode(self, h: Tensor, films: list[Tensor], join: Join) -> Tensor:
        following, out = iter(films), None
        for level in self.decoder.values():
            if "up" in level:
                h = level["up"](h, next(following))
            for block in level["blocks"]:
                h = join(block, h, next(following))
            if "conv_out" in level:
                with full_precision(h.device):
                    picture = level["conv_out"](silu(level["norm_out"](widened(h))))
                    out = level["picture_up"](out) + picture if "picture_up" in level else picture
        return out

    def _label(self, cond: Cond, augment: Tensor | None = None) -> Tensor | None:
        """What labels add to the sinusoids of a noise level, (B, C) or (1, C): one-hot vectors of
        mean square 1 through a linear layer, zeros for no class."""
        label = None
        if self.label is not None:
            rows = class_vectors(self.label.weight.T, cond.label, self.null_label)
            label = self.label.bias + rows * math.sqrt(self.label.in_features)
        if self.augment is None or augment is None:
            return label
        return self.augment(augment) if label is None else label + self.augment(augment)

    def _holding(self, site: str) -> tuple[str, ...] | str:
        """Labels go into the embedding before its last layer."""
        return both_of("time.2") if site.startswith("emb.") else super()._holding(site)

    def _embed(
        self, path: nn.Module, c_noise: Tensor, label: Tensor | None, guidance: Tensor | None = None
    ) -> Tensor:
        waves = self.noise(c_noise).to(path[0].weight.dtype)
        if label is not None:
            waves = waves + label
        if guidance is not None:
            waves = waves + self.guidance(guidance)
        return path(waves)


class Block(SkipBlock):
    """(shortcut(x) + conv(dropout(silu(norm(film + conv(silu(norm(x)))))))) / sqrt(2), maybe
    resampled; then (y + attention(y)) / sqrt(2), maybe."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        resample: Resampling = None,
        attention: bool = False,
        *,
        emb_channels: int,
        options: SongUNetOptions,
        sigma_to: bool = False,
    ):
        super().__init__()
        self.checkpointed = options.gradient_checkpointing
        taps = options.resample_filter
        self.norm1 = Norm(norm_groups(in_channels), in_channels, eps=EPS)
        self.conv1 = Conv(in_channels, out_channels, 3, resample, taps)
        self.film = xavier(nn.Linear(emb_channels, out_channels))
        self.film_s = xavier(nn.Linear(emb_channels, out_channels)) if sigma_to else None
        self.norm2 = Norm(norm_groups(out_channels), out_channels, eps=EPS)
        self.dropout = nn.Dropout(options.dropout)
        self.conv2 = Conv(out_channels, out_channels, 3, gain=NEARLY_ZERO)
        self.shortcut = (
            nn.Identity()
            if in_channels == out_channels and resample is None
            else Conv(in_channels, out_channels, 1, resample, taps)
        )
        self.attention = Attention(out_channels) if attention else nn.Identity()

    def second(self, h: Tensor, film: Tensor) -> Tensor:
        h = silu(self.norm2(h + film[:, :, None, None].to(h.dtype)))
        return self.conv2(self.dropout(h))

    def compute(self, x: Tensor, film: Tensor) -> Tensor:
        """Features (B, C', H', W') of x (B, C, H, W)."""
        h = self.conv1(silu(self.norm1(x)))
        return self.finish(self.shortcut(x) + self.second(h, film))

    def finish(self, y: Tensor) -> Tensor:
        return self.attention(y * HALF)


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
