"""The network of backbone `adm`."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cmkit import Cond, DataSpec, Scales
from cmkit_std.backbones.adm.options import ADMOptions
from cmkit_std.backbones.cpu import added, silu, upsampled
from cmkit_std.backbones.embedding import PromptVector, mlp, silent_guidance
from cmkit_std.backbones.layers import (
    RESAMPLERS,
    Norm,
    Pointwise,
    Resampling,
    Upsample,
    attend,
    full_precision,
    widened,
)
from cmkit_std.backbones.shared_encoder import Join, SharedEncoder, SkipBlock


class UNet(SharedEncoder):
    """The U-Net F(x, c_noise) of openai/consistency_models, with its places of rescaling open.

    `data` are pictures as squares of `patch_size` pixels. Norms, embeddings and the last
    convolution keep float32 under autocast.
    """

    def __init__(self, options: ADMOptions, data: DataSpec, conditions: frozenset[str]):
        super().__init__(options, data, conditions)
        width, emb_channels = options.channels, 4 * options.channels
        self.out_channels, self.patch_size = data.channels, options.patch_size
        self.time_scale, self.label_sigma_to = options.time_scale, options.label_sigma_to
        sigma_to = "sigma_to" in conditions
        self.time = mlp(width, emb_channels)
        self.time_s = mlp(width, emb_channels) if sigma_to else None
        self.label = None
        if self.num_classes:
            self.label = nn.Embedding(self.num_classes + options.null_class, emb_channels)
        if self.prompted and data.text:
            self.text = PromptVector(data.text.width, emb_channels)
        self.guidance = silent_guidance(width) if "guidance" in conditions else None
        block = partial(ResBlock, emb_channels=emb_channels, options=options, sigma_to=sigma_to)

        levels = options.levels(data.resolution)
        last = levels[0][0]
        skips = [last]
        self.encoder = nn.ModuleList([Stage([nn.Conv2d(data.channels, last, 3, padding=1)])])
        self.middle = Stage()
        self.decoder = nn.ModuleList()
        for place in options.places(data.resolution):
            width, _ = levels[place.level]
            decoder = place.part == "decoder"
            direction = "up" if decoder else "down"
            if place.kind == "block":
                layer = block(last + skips.pop() if decoder else last, width)
                last = width
            elif place.kind == "attention":
                layer = Attention(width, options.heads(width, decoder), options.groups(width))
            elif options.resblock_updown:
                layer = block(width, width, direction)
            else:
                layer = RESAMPLERS[direction](width, width, options.conv_resample)
            stage, _, i = place.key.rpartition(".")
            if i == "0" and place.part != "middle":
                getattr(self, place.part).append(Stage())
            if i == "0" and place.part == "encoder":
                skips.append(width)
            self.get_submodule(stage).append(layer)

        self.norm_out = Norm(options.groups(last), last)
        outputs = (2 if options.learn_sigma else 1) * data.channels
        self.conv_out = _zeroed(nn.Conv2d(last, outputs, 3, padding=1))
        self._name_sites(skips=len(self.encoder))

    def lower(self, dtype: torch.dtype) -> None:
        """Rounds all convolutions but the last; see `Network.lower`."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and module is not self.conv_out:
                module.to(dtype)

    def _encode(
        self, x: Tensor, c_noise: Tensor, cond: Cond, scales: Scales
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        films = iter(self._films(c_noise, cond, scales))
        h, skips = (F.pixel_unshuffle(x, self.patch_size) if self.patch_size > 1 else x), []
        for stage in self.encoder:
            h = stage(h, films)
            skips.append(h)
        return self.middle(h, films), skips, list(films)

    def _joining(self) -> list[ResBlock]:
        return [stage[0] for stage in self.decoder]

    def _decode(self, h: Tensor, films: list[Tensor], join: Join) -> Tensor:
        """F, without the variances that may follow it."""
        following = iter(films)
        for stage in self.decoder:
            h = stage(h, following, join)
        with full_precision(h.device):
            out = self.conv_out(silu(self.norm_out(widened(h))))[:, : self.out_channels]
        return F.pixel_shuffle(out, self.patch_size) if self.patch_size > 1 else out


class Stage(nn.ModuleList):
    """Layers between two encoder-decoder connections."""

    def forward(self, h: Tensor, films: Iterator[Tensor], join: Join | None = None) -> Tensor:
        """Features (B, C', H', W') of h (B, C, H, W); each residual block takes its own film, and
        `join` gives the first one its skip."""
        for layer in self:
            if join is not None:
                h, join = join(layer, h, next(films)), None
            else:
                h = layer(h, next(films)) if isinstance(layer, ResBlock) else layer(h)
        return h


class ResBlock(SkipBlock):
    """shortcut(x) + conv(dropout(silu(film(norm(conv(silu(norm(x)))))))), maybe resampled."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        resample: Resampling = None,
        *,
        emb_channels: int,
        options: ADMOptions,
        sigma_to: bool = False,
        shortcut_kernel: int = 1,
    ):
        super().__init__()
        self.scale_shift = options.use_scale_shift_norm
        self.checkpointed = options.gradient_checkpointing
        film_channels = (2 if self.scale_shift else 1) * out_channels
        self.norm1 = Norm(options.groups(in_channels), in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.film = nn.Linear(emb_channels, film_channels)
        self.film_s = nn.Linear(emb_channels, film_channels) if sigma_to else None
        self.norm2 = Norm(options.groups(out_channels), out_channels)
        self.dropout = nn.Dropout(options.dropout)
        self.conv2 = _zeroed(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.shortcut: nn.Module = nn.Identity()
        if in_channels != out_channels:
            kind = Pointwise if shortcut_kernel == 1 else nn.Conv2d
            self.shortcut = kind(
                in_channels, out_channels, shortcut_kernel, padding=shortcut_kernel // 2
            )
        self.resample = RESAMPLERS[resample]()

    def compute(self, x: Tensor, film: Tensor) -> Tensor:
        """Features (B, C', H', W') of x (B, C, H, W)."""
        h = silu(self.norm1(x))
        up = isinstance(self.resample, Upsample)
        h = upsampled(h, self.conv1) if up else self.conv1(self.resample(h))
        return added(self.second(h, film), self.shortcut(self.resample(x)))

    def second(self, h: Tensor, film: Tensor) -> Tensor:
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


def _zeroed(layer: nn.Conv2d) -> nn.Conv2d:
    """`layer` with zero weights, so that a fresh block is the identity."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer
