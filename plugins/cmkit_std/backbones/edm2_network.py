"""The network of backbone `edm2`; its options are those of `cmkit_std.backbones.edm2.EDM2`.

Equation numbers are those of EDM2 (Karras et al., 2023).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from cmkit import Cond, Network, Scales
from cmkit_std.backbones.adm_unet import (
    GUIDANCE_WAVES,
    Downsample,
    Resampling,
    Upsample,
    attend,
    full_precision,
    guidance_waves,
    mixed,
    scaled,
    widened,
)

if TYPE_CHECKING:
    from cmkit_std.backbones.edm2 import EDM2

EPS = 1e-4
"""Keeps a vector of zeros from being divided by its length."""
SILU_RMS = 0.596
"""Root mean square of SiLU of a standard normal (eq. 81)."""
BRANCH = 0.3
"""Share of a residual branch and of attention in their sums, t of eq. 88."""
CLIP = 256.0
"""Largest magnitude of what leaves a block, safe in half precision."""
Encoded = tuple[Tensor, list[Tensor], list[Tensor]]
"""Features of the middle, every skip, and the decoder's films."""


class EDM2UNet(Network):
    """The magnitude-preserving U-Net F(x, c_noise), with its places of rescaling open.

    Embeddings and the last convolution keep float32 under autocast.
    """

    def __init__(
        self,
        options: EDM2,
        in_channels: int,
        out_channels: int,
        resolution: int,
        num_classes: int | None = None,
        guidance: bool = False,
        sigma_to: bool = False,
    ):
        super().__init__()
        if options.null_class:
            self.null_label = num_classes
        levels = options.levels(resolution)
        emb_channels = max(width for width, _ in levels)
        last, _ = levels[0]
        self.waves = Fourier(last)
        self.noise = Linear(last, emb_channels)
        self.noise_s = Linear(last, emb_channels) if sigma_to else None
        self.label = Linear(num_classes, emb_channels) if num_classes else None
        self.guidance = Linear(GUIDANCE_WAVES, emb_channels) if guidance else None
        if guidance:
            self.guidance_gain = gain()

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
                level["enter"] = Conv(in_channels + 1, last, 3)
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
        self.sites = tuple(f"skip.{i}" for i in range(len(skips)))
        self.late = frozenset(self.sites)

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
        self.conv_out = Conv(last, out_channels, 3)
        self.out_gain = gain()

        # A tuple registers nothing a second time. Registration order is forward order.
        self._blocks = tuple(m for m in self.modules() if isinstance(m, Block))
        self.sites += tuple(f"emb.{j}" for j in range(len(self._blocks)))

    def forward(self, x: Tensor, c_noise: Tensor, cond: Cond, scales: Scales) -> Tensor:
        """F, (B, C, H, W), of x (B, C, H, W) and c_noise (B,); float32 also under autocast.

        Without a label its vector is zero.
        """
        return self.decode(self.encode(x, c_noise, cond, scales), scales)

    @torch.no_grad()
    def settle(self) -> None:
        """Forced weight normalization: every stored filter gets length sqrt(fan in) (eq. 66)."""
        for layer in self.modules():
            if isinstance(layer, Weighted):
                layer.weight.copy_(filters(layer.weight))

    @torch.no_grad()
    def lower(self, dtype: torch.dtype) -> None:
        """As of `Network`: the convolutions but for the last one. Their filters are then stored as
        they act."""
        for layer in self.modules():
            if isinstance(layer, Conv) and layer is not self.conv_out:
                layer.weight = nn.Parameter(layer.acting().to(dtype))
                layer.lowered = True

    def encode(self, x: Tensor, c_noise: Tensor, cond: Cond, scales: Scales) -> Encoded:
        """What `decode` needs of x (B, C, H, W), c_noise (B,) and the scales of embeddings."""
        with full_precision(x.device):
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
        """F as of `forward` for any scales of the skips."""
        h, skips, following = encoded[0], list(enumerate(encoded[1])), iter(encoded[2])
        for level in self.decoder.values():
            if "up" in level:
                h = level["up"](h, next(following))
            for block in level["blocks"]:
                i, skip = skips.pop()
                scale = scales.get(f"skip.{i}")
                skip = skip if scale is None else scaled(skip, scale)
                h = block(mp_cat(h, skip), next(following))
        with full_precision(h.device):
            return self.conv_out(widened(h)) * self.out_gain

    def _films(self, c_noise: Tensor, cond: Cond, scales: Scales) -> list[Tensor]:
        """What the embedding says to each block, (B, k) each, in forward order."""
        label = self._label(c_noise, cond)
        emb = self._embedding(self.noise, c_noise, label)
        if self.guidance is not None and cond.guidance is not None:
            waves = math.sqrt(2) * guidance_waves(cond.guidance).to(emb.dtype)
            emb = emb + self.guidance(waves) * self.guidance_gain
        active_s = None
        if self.noise_s is not None and cond.sigma_to is not None:
            c_noise_s = 0.25 * torch.log(cond.sigma_to + 1e-44)
            active_s = mp_silu(self._embedding(self.noise_s, c_noise_s, label))
        last, active = None, mp_silu(emb)
        films = []
        for j, block in enumerate(self._blocks):
            scale = scales.get(f"emb.{j}")
            if scale is not last:
                own = emb if scale is None else emb * scale.to(emb.dtype).view(-1, 1)
                last, active = scale, mp_silu(own)
            films.append(block.project(active, active_s))
        return films

    def _embedding(self, noise: Linear, c_noise: Tensor, label: Tensor | None) -> Tensor:
        """Of a noise level c_noise (B,) and the label's vector, (B, E)."""
        emb = noise(self.waves(c_noise).to(noise.weight.dtype))
        return emb if label is None else mp_sum(emb, label, 0.5)

    def _label(self, c_noise: Tensor, cond: Cond) -> Tensor | None:
        """The label's vector, (B, E): zeros for none, None where the network embeds no labels."""
        if self.label is None:
            return None
        table = self.label.acting().T * math.sqrt(self.label.weight.shape[1])  # (classes, E)
        label, null = cond.label, self.null_label
        if label is None:
            return table.new_zeros(len(c_noise), table.shape[1])
        if null is None:
            return F.embedding(label, table)
        return F.embedding(label.clamp(max=null - 1), table) * (label != null)[:, None]


class Block(nn.Module):
    """mp_sum(x, conv(dropout(mp_silu(film * conv(mp_silu(x)))))), maybe resampled before, with
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
        self.resample = {None: nn.Identity, "up": Upsample, "down": Downsample}[resample]()
        self.conv1 = Conv(out_channels if pixel_norm else in_channels, out_channels, 3)
        self.film = Linear(emb_channels, out_channels)
        self.film_gain = gain()
        self.film_s = Linear(emb_channels, out_channels) if sigma_to else None
        if sigma_to:
            self.film_s_gain = gain()
        self.dropout = nn.Dropout(dropout)
        self.conv2 = Conv(out_channels, out_channels, 3)
        same = in_channels == out_channels
        self.shortcut = nn.Identity() if same else Conv(in_channels, out_channels, 1)
        self.attention = Attention(out_channels, heads) if heads else nn.Identity()

    def project(self, active: Tensor, active_s: Tensor | None = None) -> Tensor:
        """Film (B, k) of mp_silu(embedding) (B, E), and of that of CTM's target level if there."""
        film = 1 + self.film(active) * self.film_gain
        return film if active_s is None else film + self.film_s(active_s) * self.film_s_gain

    def forward(self, x: Tensor, film: Tensor) -> Tensor:
        """Features (B, C', H', W') of x (B, C, H, W)."""
        if self.checkpointed and torch.is_grad_enabled():
            return checkpoint(self._forward, x, film, use_reentrant=False)
        return self._forward(x, film)

    def _forward(self, x: Tensor, film: Tensor) -> Tensor:
        x = self.resample(x)
        if self.pixel_norm:
            x = normalized(self.shortcut(x), (1,))
        y = self.conv1(mp_silu(x))
        y = mp_silu(y * film[:, :, None, None].to(y.dtype))
        y = self.conv2(self.dropout(y))
        x = x if self.pixel_norm else self.shortcut(x)
        return self.attention(mp_sum(x, y, BRANCH)).clamp(-CLIP, CLIP)


class Attention(nn.Module):
    """mp_sum(x, proj(attention(x))) by cosines: queries, keys and values have one length."""

    def __init__(self, channels: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = Conv(channels, 3 * channels, 1)
        self.proj = Conv(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Features (B, C, H, W) of x (B, C, H, W)."""
        qkv = self.qkv(x).unflatten(1, (3 * self.heads, -1))
        return mp_sum(x, self.proj(attend(normalized(qkv, (2,)).flatten(1, 2), self.heads)), BRANCH)


class Weighted(nn.Module):
    """A layer of filters that act at length 1, whatever is stored of them (eq. 47).

    `lowered` says that they are stored as they act.
    """

    def __init__(self, in_channels: int, out_channels: int, *kernel: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, *kernel))
        self.lowered = False

    def acting(self) -> Tensor:
        """The filters as they act, (out, in, ...)."""
        if self.lowered:
            return self.weight
        return filters(self.weight) / math.sqrt(math.prod(self.weight.shape[1:]))


class Linear(Weighted):
    """A linear layer without bias."""

    def forward(self, x: Tensor) -> Tensor:
        """Features (B, C') of x (B, C)."""
        return F.linear(x, self.acting())


class Conv(Weighted):
    """A convolution of odd, square kernel without bias."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int):
        super().__init__(in_channels, out_channels, kernel, kernel)

    def forward(self, x: Tensor) -> Tensor:
        """Features (B, C', H, W) of x (B, C, H, W)."""
        kernel = self.weight.shape[-1]
        if kernel == 1:
            return mixed(x, self.acting())
        return F.conv2d(x, self.acting(), padding=kernel // 2)


class Fourier(nn.Module):
    """Waves of random, fixed frequency and phase, of mean square 1 (eq. 75)."""

    frequencies: Tensor
    phases: Tensor

    def __init__(self, dim: int):
        super().__init__()
        self.register_buffer("frequencies", 2 * math.pi * torch.randn(dim))
        self.register_buffer("phases", 2 * math.pi * torch.rand(dim))

    def forward(self, c_noise: Tensor) -> Tensor:
        """Waves (B, dim) of c_noise (B,); in float32 at least."""
        t = widened(c_noise)
        angles = t[:, None] * self.frequencies.to(t.dtype) + self.phases.to(t.dtype)
        return math.sqrt(2) * angles.cos()


def gain() -> nn.Parameter:
    """A learned factor of what a fresh network keeps silent, ()."""
    return nn.Parameter(torch.zeros(()))


def filters(weight: Tensor) -> Tensor:
    """Each filter of `weight` (out, in, ...) at root mean square 1."""
    return normalized(weight, tuple(range(1, weight.ndim)))


def normalized(x: Tensor, dim: tuple[int, ...]) -> Tensor:
    """x divided by its root mean square over the axes `dim`, plus EPS; the root in float32."""
    wide = torch.promote_types(x.dtype, torch.float32)
    length = torch.linalg.vector_norm(x, dim=dim, keepdim=True, dtype=wide)
    rms = length / math.sqrt(math.prod([x.shape[axis] for axis in dim]))
    return x / (rms + EPS).to(x.dtype)


def mp_silu(x: Tensor) -> Tensor:
    """SiLU of mean square 1 for standard normal x (eq. 81)."""
    return F.silu(x) / SILU_RMS


def mp_sum(a: Tensor, b: Tensor, t: float) -> Tensor:
    """(1 - t) a + t b, of the variance that a and b share if they are independent (eq. 88)."""
    return a.lerp(b, t) / math.hypot(1 - t, t)


def mp_cat(a: Tensor, b: Tensor) -> Tensor:
    """The channels of a, then those of b, scaled so that both weigh alike in what follows, and the
    whole keeps its mean square (eq. 103, t = 0.5)."""
    half = math.sqrt((a.shape[1] + b.shape[1]) / 2)
    return torch.cat([a * (half / a.shape[1] ** 0.5), b * (half / b.shape[1] ** 0.5)], dim=1)
