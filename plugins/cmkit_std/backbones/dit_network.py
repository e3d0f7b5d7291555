"""The network of backbone `dit`; its options are those of `cmkit_std.backbones.dit.DiT`."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING

import torch
from timm.layers import Mlp, PatchEmbed
from timm.models.vision_transformer import Attention
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from cmkit import Cond, Network, Scales
from cmkit_std.backbones.adm_unet import (
    GUIDANCE_WAVES,
    MAX_PERIOD,
    full_precision,
    guidance_waves,
    sinusoids,
)

if TYPE_CHECKING:
    from cmkit_std.backbones.dit import DiT

WAVES = 256
"""Sinusoids of a noise level."""


class Transformer(Network):
    """The transformer F(x, c_noise) of facebookresearch/DiT, with its places of rescaling open.

    Sites: "emb.i" the embedding as block i, or last of all the final layer, reads it; "attn.i" and
    "mlp.i" the residual branches of block i. Embeddings, the residual stream and the final layer
    keep float32 under autocast. In training a label gives way to the null class with probability
    `class_dropout`; draws come from the default generator, as those of dropout do.
    """

    pos_embed: Tensor

    def __init__(
        self,
        options: DiT,
        channels: int,
        resolution: int,
        num_classes: int | None = None,
        guidance: bool = False,
        sigma_to: bool = False,
    ):
        super().__init__()
        width, patch_size = options.width, options.patch_size
        self.channels, self.patch_size = channels, patch_size
        self.time_scale = options.time_scale
        self.class_dropout = options.class_dropout
        has_null = options.null_class or options.class_dropout > 0
        self.null_label = num_classes if has_null else None
        out_channels = (2 if options.learn_sigma else 1) * channels

        self.register_buffer("pos_embed", positions(width, resolution // patch_size)[None])
        self.patch = PatchEmbed(resolution, patch_size, channels, width)
        self.time = embedder(width)
        rows = (num_classes or 0) + has_null
        self.label = nn.Embedding(rows, width) if num_classes else None
        self.guidance = nn.Linear(GUIDANCE_WAVES, WAVES, bias=False) if guidance else None
        self.time_s = embedder(width) if sigma_to else None
        self.blocks = nn.ModuleList(
            Block(width, options.num_heads, options.mlp_ratio, options.gradient_checkpointing)
            for _ in range(options.depth)
        )
        self.final = Final(width, patch_size**2 * out_channels)
        self._initialise()
        self.sites = (
            *(f"emb.{i}" for i in range(options.depth + 1)),
            *(f"attn.{i}" for i in range(options.depth)),
            *(f"mlp.{i}" for i in range(options.depth)),
        )

    def forward(self, x: Tensor, c_noise: Tensor, cond: Cond, scales: Scales) -> Tensor:
        """F, (B, C, H, W), of x (B, C, H, W) and c_noise (B,); float32 also under autocast."""
        return self.outputs(x, c_noise, cond, scales)[:, : self.channels]

    def outputs(self, x: Tensor, c_noise: Tensor, cond: Cond, scales: Scales) -> Tensor:
        """F and, with `learn_sigma`, after it what official weights say of the variance,
        (B, C or 2 C, H, W)."""
        with full_precision(x.device):
            films = self._films(c_noise, cond, scales)
        h = self.patch(x) + self.pos_embed  # (B, N, width)
        for i, (block, film) in enumerate(zip(self.blocks, films[:-1], strict=True)):
            h = block(h, film, scales.get(f"attn.{i}"), scales.get(f"mlp.{i}"))
        with full_precision(x.device):
            return self._picture(self.final(h, films[-1]))

    def _films(self, c_noise: Tensor, cond: Cond, scales: Scales) -> list[Tensor]:
        """What the embedding says to each block and to the final layer, (B, k) each."""
        emb = self._embedding(c_noise, cond)
        last, active = None, F.silu(emb)
        films = []
        for i, block in enumerate([*self.blocks, self.final]):
            scale = scales.get(f"emb.{i}")
            if scale is not last:
                scaled = emb if scale is None else emb * scale.to(emb.dtype).view(-1, 1)
                last, active = scale, F.silu(scaled)
            films.append(block.film(active))
        return films

    def _embedding(self, c_noise: Tensor, cond: Cond) -> Tensor:
        """Noise level and conditions, (B, width)."""
        waves = self._sinusoids(c_noise)
        if self.guidance is not None and cond.guidance is not None:
            waves = waves + self.guidance(guidance_waves(cond.guidance).to(waves.dtype))
        emb = self.time(waves)
        if self.label is not None:
            emb = emb + self.label(self._labels(cond.label, c_noise))
        if self.time_s is not None and cond.sigma_to is not None:
            emb = emb + self.time_s(self._sinusoids(0.25 * torch.log(cond.sigma_to + 1e-44)))
        return emb

    def _labels(self, label: Tensor | None, c_noise: Tensor) -> Tensor:
        """Rows of the label table, (B,) int64."""
        if self.null_label is None:
            if label is None:
                raise ValueError("this network embeds labels: cond.label must not be None")
            return label
        if label is None:
            return torch.full_like(c_noise, self.null_label, dtype=torch.int64)
        if self.training:
            dropped = torch.rand(label.shape, device=label.device) < self.class_dropout
            label = torch.where(dropped, self.null_label, label)
        return label

    def _sinusoids(self, c_noise: Tensor) -> Tensor:
        return sinusoids(c_noise * self.time_scale, WAVES).to(self.pos_embed.dtype)

    def _picture(self, patches: Tensor) -> Tensor:
        """(B, C, H, W) of patches (B, N, p p C), row by row, and so each of them."""
        p, side = self.patch_size, math.isqrt(patches.shape[1])
        grid = patches.view(-1, side, side, p, p, patches.shape[2] // p**2)
        return grid.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)

    def _initialise(self) -> None:
        """Section 3.2 and facebookresearch/DiT: a fresh block is the identity, and F is 0."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.xavier_uniform_(module.weight.flatten(1))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for path in (self.time, self.time_s):
            if path is not None:
                nn.init.normal_(path[0].weight, std=0.02)
                nn.init.normal_(path[2].weight, std=0.02)
        if self.label is not None:
            nn.init.normal_(self.label.weight, std=0.02)
        silent = [block.film for block in self.blocks] + [self.final.film, self.final.linear]
        # Conditions that are added to trained weights change nothing at first.
        silent += [self.guidance] if self.guidance is not None else []
        silent += [self.time_s[2]] if self.time_s is not None else []
        for layer in silent:
            nn.init.zeros_(layer.weight)


class Block(nn.Module):
    """h + gate attention(film(norm(h))), then h + gate mlp(film(norm(h))) (fig. 3, adaLN-Zero)."""

    def __init__(self, width: int, num_heads: int, mlp_ratio: float, checkpointed: bool = False):
        super().__init__()
        self.checkpointed = checkpointed
        self.norm1, self.norm2 = _norm(width), _norm(width)
        self.attn = Attention(width, num_heads=num_heads, qkv_bias=True)
        self.mlp = Mlp(width, int(width * mlp_ratio), act_layer=partial(nn.GELU, "tanh"))
        self.film = nn.Linear(width, 6 * width)

    def forward(
        self,
        h: Tensor,
        film: Tensor,
        attn_scale: Tensor | None = None,
        mlp_scale: Tensor | None = None,
    ) -> Tensor:
        """Features (B, N, width) of h (B, N, width) and film (B, 6 width); a scale, () or (B,),
        multiplies its branch."""
        if self.checkpointed and torch.is_grad_enabled():
            return checkpoint(self._forward, h, film, attn_scale, mlp_scale, use_reentrant=False)
        return self._forward(h, film, attn_scale, mlp_scale)

    def _forward(
        self, h: Tensor, film: Tensor, attn_scale: Tensor | None, mlp_scale: Tensor | None
    ) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = film[:, None].chunk(6, dim=2)
        h = h + _scaled(gate1, attn_scale) * self.attn(self.norm1(h) * (1 + scale1) + shift1)
        return h + _scaled(gate2, mlp_scale) * self.mlp(self.norm2(h) * (1 + scale2) + shift2)


class Final(nn.Module):
    """linear(film(norm(h)))."""

    def __init__(self, width: int, out_features: int):
        super().__init__()
        self.norm = _norm(width)
        self.linear = nn.Linear(width, out_features)
        self.film = nn.Linear(width, 2 * width)

    def forward(self, h: Tensor, film: Tensor) -> Tensor:
        """Patches (B, N, out_features) of h (B, N, width) and film (B, 2 width)."""
        shift, scale = film[:, None].chunk(2, dim=2)
        return self.linear(self.norm(h) * (1 + scale) + shift)


def embedder(width: int) -> nn.Sequential:
    """The perceptron that turns sinusoids (B, WAVES) into an embedding (B, width)."""
    return nn.Sequential(nn.Linear(WAVES, width), nn.SiLU(), nn.Linear(width, width))


def positions(width: int, side: int) -> Tensor:
    """[sin | cos] of the column, then of the row, of each of side^2 patches, (side^2, width).

    Computed in float64, returned in the default type.
    """
    steps = torch.arange(width // 4, dtype=torch.float64) / (width // 4)
    at = torch.arange(side, dtype=torch.float64)[:, None] * torch.exp(-math.log(MAX_PERIOD) * steps)
    waves = torch.cat([at.sin(), at.cos()], dim=1)  # (side, width / 2)
    columns, rows = waves.repeat(side, 1), waves.repeat_interleave(side, dim=0)
    return torch.cat([columns, rows], dim=1).to(torch.get_default_dtype())


def _norm(width: int) -> nn.LayerNorm:
    return nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)


def _scaled(gate: Tensor, scale: Tensor | None) -> Tensor:
    return gate if scale is None else gate * scale.to(gate.dtype).view(-1, 1, 1)
