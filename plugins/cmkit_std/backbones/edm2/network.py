"""The network of backbone `edm2`.

Equation numbers are those of EDM2 (Karras et al., 2023).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from cmkit import Cond, DataSpec, Scales
from cmkit_std.backbones.edm2 import magnitude as mp
from cmkit_std.backbones.edm2.options import EDM2Options
from cmkit_std.backbones.embedding import GUIDANCE_WAVES, Conditioned, Filmed, class_vectors
from cmkit_std.backbones.layers import (
    RESAMPLERS,
    Resampling,
    attend,
    full_precision,
    scaled,
    widened,
)

BRANCH = 0.3
"""Share of a residual branch and of attention in their sums, t of eq. 88."""
CLIP = 256.0
"""Largest magnitude of what leaves a block, safe in half precision."""
Encoded = tuple[Tensor, list[Tensor], list[Tensor]]
"""Features of the middle, every skip, and the decoder's films."""


class EDM2UNet(Conditioned):
    """The magnitude-preserving U-Net F(x, c_noise), with its places of rescaling open.

    Embeddings and the last convolution keep float32 under autocast.
    """

    paths = ("noise", "noise_s")
    act = staticmethod(mp.silu)

    def __init__(self, options: EDM2Options, data: DataSpec, conditions: frozenset[str]):
        super().__init__(options, data, conditions)
        sigma_to = "sigma_to" in conditions
        levels = options.levels(data.resolution)
        emb_channels = max(width for width, _ in levels)
        last, _ = levels[0]
        self.waves = mp.Fourier(last)
        self.noise = mp.Linear(last, emb_channels)
        self.noise_s = mp.Linear(last, emb_channels) if sigma_to else None
        self.label = mp.Linear(self.num_classes, emb_channels) if self.num_classes else None
        self.guidance = None
        if "guidance" in conditions:
            self.guidance = mp.Linear(GUIDANCE_WAVES, emb_channels)
            self.guidance_gain = mp.gain()

        def block(before: int, after: int, side: int, **flavour: object) -> Block:
            return Block(
                before,
                after,
                emb_channels,
                dropout=options.dropout_at(side),
                sigma_to=sigma_to,
                checkpointed=options.gradient_checkpointing,
                **flavour,
            )

        def heads(width: int, side: int) -> int:
            return options.heads(width) if options.attends(side) else 0

        skips: list[int] = []
        self.encoder = nn.ModuleDict()
        for n, (width, side) in enumerate(levels):
            level = nn.ModuleDict()
            if n == 0:
                level["enter"] = mp.Conv(data.channels + 1, last, 3)
            else:
                level["down"] = block(last, last, side, pixel_norm=True, resample="down")
            skips.append(last)
            level["blocks"] = nn.ModuleList()
            for _ in range(options.num_res_blocks):
                level["blocks"].append(
                    block(last, width, side, pixel_norm=True, heads=heads(width, side))
                )
                last = width
                skips.append(last)
            self.encoder[str(side)] = level
        joins = len(skips)

        self.decoder = nn.ModuleDict()
        for n, (width, side) in reversed(list(enumerate(levels))):
            level = nn.ModuleDict()
            if n == len(levels) - 1:
                first = block(last, last, side, heads=options.heads(last))
                level["middle"] = nn.ModuleList([first, block(last, last, side)])
            else:
                level["up"] = block(last, last, side, resample="up")
            level["blocks"] = nn.ModuleList()
            for _ in range(options.num_res_blocks + 1):
                before = last + skips.pop()
                level["blocks"].append(block(before, width, side, heads=heads(width, side)))
                last = width
            self.decoder[str(side)] = level
        self.conv_out = mp.Conv(last, data.channels, 3)
        self.out_gain = mp.gain()

        self._name_sites(joins)

    def forward(self, x: Tensor, c_noise: Tensor, cond: Cond, scales: Scales) -> Tensor:
        """F, (B, C, H, W), of x (B, C, H, W) and c_noise (B,); float32 also under autocast.

        Without a label its vector is zero.
        """
        return self.decode(self.encode(x, c_noise, cond, scales), scales)

    @torch.no_grad()
    def settle(self) -> None:
        """Forced weight normalization: every stored filter gets length sqrt(fan in) (eq. 66)."""
        for layer in self.modules():
            if isinstance(layer, mp.Weighted):
                layer.weight.copy_(mp.filters(layer.weight))

    @torch.no_grad()
    def lower(self, dtype: torch.dtype) -> None:
        """Rounds all convolutions but the last, whose filters are then stored as they act; see
        `Network.lower`."""
        for layer in self.modules():
            if isinstance(layer, mp.Conv) and layer is not self.conv_out:
                layer.weight = nn.Parameter(layer.acting().to(dtype))
                layer.lowered = True

    def encode(self, x: Tensor, c_noise: Tensor, cond: Cond, scales: Scales) -> Encoded:
        """What `decode` needs of x (B, C, H, W), c_noise (B,) and the scales of embeddings."""
        films = iter(self._films(c_noise, cond, scales))
        # A channel of ones does what biases would.
        h, skips = torch.cat([x, torch.ones_like(x[:, :1])], dim=1), []
        for level in self.encoder.values():
            h = level["enter"](h) if "enter" in level else level["down"](h, next(films))
            skips.append(h)
            for block in level["blocks"]:
                h = block(h, next(films))
                skips.append(h)
        coarsest = next(iter(self.decoder.values()))
        for block in coarsest["middle"]:
            h = block(h, next(films))
        return h, skips, list(films)

    def decode(self, encoded: Encoded, scales: Scales) -> Tensor:
        """F for any scales of the skips."""
        h, skips, following = encoded[0], list(enumerate(encoded[1])), iter(encoded[2])
        for level in self.decoder.values():
            if "up" in level:
                h = level["up"](h, next(following))
            for block in level["blocks"]:
                i, skip = skips.pop()
                skip = scaled(skip, scales.get(f"skip.{i}"))
                h = block(mp.cat(h, skip), next(following))
        with full_precision(h.device):
            return self.conv_out(widened(h)) * self.out_gain

    def _label(self, cond: Cond) -> Tensor | None:
        """The label's vector, (B, E), or (1, E) zeros for no class; None without labels."""
        if self.label is None:
            return None
        table = self.label.acting().T * math.sqrt(self.label.weight.shape[1])  # (classes, E)
        return class_vectors(table, cond.label, self.null_label)

    def _holding(self, site: str) -> str:
        return "its filters act at length 1, whatever is stored of them, and an activation follows"

    def _embed(
        self, path: nn.Module, c_noise: Tensor, label: Tensor | None, guidance: Tensor | None = None
    ) -> Tensor:
        emb = path(self.waves(c_noise).to(path.weight.dtype))
        if label is not None:
            emb = mp.sum(emb, label, 0.5)
        if guidance is not None:
            emb = emb + self.guidance(math.sqrt(2) * guidance) * self.guidance_gain
        return emb


class Block(Filmed):
    """mp.sum(x, conv(dropout(mp.silu(film * conv(mp.silu(x)))))), maybe resampled before, with
    attention after, if wanted; clipped (figure 21).

    A block of the encoder takes x's shortcut and its pixel norm first; one of the decoder takes the
    shortcut at the sum.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        emb_channels: int,
        *,
        pixel_norm: bool = False,
        resample: Resampling = None,
        heads: int = 0,
        dropout: float = 0.0,
        sigma_to: bool = False,
        checkpointed: bool = False,
    ):
        super().__init__()
        self.pixel_norm, self.checkpointed = pixel_norm, checkpointed
        self.resample = RESAMPLERS[resample]()
        self.conv1 = mp.Conv(out_channels if pixel_norm else in_channels, out_channels, 3)
        self.film = mp.Linear(emb_channels, out_channels)
        self.film_gain = mp.gain()
        self.film_s = mp.Linear(emb_channels, out_channels) if sigma_to else None
        if sigma_to:
            self.film_s_gain = mp.gain()
        self.dropout = nn.Dropout(dropout)
        self.conv2 = mp.Conv(out_channels, out_channels, 3)
        same = in_channels == out_channels
        self.shortcut = nn.Identity() if same else mp.Conv(in_channels, out_channels, 1)
        self.attention = Attention(out_channels, heads) if heads else nn.Identity()

    def project(self, active: Tensor, active_s: Tensor | None = None) -> Tensor:
        """Film (B, k) of mp.silu(embedding) (B, E); both layers start without effect."""
        film = 1 + self.film(active) * self.film_gain
        return film if active_s is None else film + self.film_s(active_s) * self.film_s_gain

    def compute(self, x: Tensor, film: Tensor) -> Tensor:
        """Features (B, C', H', W') of x (B, C, H, W)."""
        x = self.resample(x)
        if self.pixel_norm:
            x = mp.normalized(self.shortcut(x), (1,))
        y = self.conv1(mp.silu(x))
        y = mp.silu(y * film[:, :, None, None].to(y.dtype))
        y = self.conv2(self.dropout(y))
        x = x if self.pixel_norm else self.shortcut(x)
        return self.attention(mp.sum(x, y, BRANCH)).clamp(-CLIP, CLIP)


class Attention(nn.Module):
    """mp.sum(x, proj(attention(x))) by cosines: queries, keys and values have one length."""

    def __init__(self, channels: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = mp.Conv(channels, 3 * channels, 1)
        self.proj = mp.Conv(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Features (B, C, H, W) of x (B, C, H, W)."""
        qkv = mp.normalized(self.qkv(x).unflatten(1, (3 * self.heads, -1)), (2,)).flatten(1, 2)
        return mp.sum(x, self.proj(attend(qkv, self.heads)), BRANCH)
