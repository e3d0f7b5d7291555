"""The network of backbone `dit`."""

from __future__ import annotations

import math
from functools import partial

import torch
from timm.layers import Mlp, PatchEmbed
from timm.models.vision_transformer import Attention
from torch import Tensor, nn

from cmkit import Cond, DataSpec, Scales
from cmkit_std.backbones.dit.options import DiTOptions
from cmkit_std.backbones.embedding import (
    GUIDANCE_WAVES,
    Conditioned,
    Filmed,
    PromptVector,
    both_of,
    mlp,
)
from cmkit_std.backbones.layers import MAX_PERIOD, full_precision

WAVES = 256
"""Sinusoids of a noise level."""


class Transformer(Conditioned):
    """The transformer F(x, c_noise) of facebookresearch/DiT, with its places of rescaling open.

    Sites: "emb.i" the embedding as block i, or last of all the final layer, reads it; "attn.i" and
    "mlp.i" the residual branches of block i. Embeddings, the residual stream and the final layer
    keep float32 under autocast.
    """

    pos_embed: Tensor

    label_sigma_to = False
    guided_channels = 3
    """As facebookresearch/DiT does it, also of latents with 4."""

    def __init__(self, options: DiTOptions, data: DataSpec, conditions: frozenset[str]):
        super().__init__(options, data, conditions)
        width, patch_size = options.width, options.patch_size
        self.channels, self.patch_size = data.channels, patch_size
        self.time_scale = options.time_scale
        out_channels = (2 if options.learn_sigma else 1) * data.channels

        self.register_buffer("pos_embed", positions(width, data.resolution // patch_size)[None])
        self.patch = PatchEmbed(data.resolution, patch_size, data.channels, width)
        self.time = mlp(WAVES, width)
        self.label = None
        if self.num_classes:
            self.label = nn.Embedding(self.num_classes + options.null_class, width)
        if self.prompted and data.text:
            self.text = PromptVector(data.text.width, width)
        guided, sigma_to = "guidance" in conditions, "sigma_to" in conditions
        self.guidance = nn.Linear(GUIDANCE_WAVES, WAVES, bias=False) if guided else None
        self.time_s = mlp(WAVES, width) if sigma_to else None
        self.blocks = nn.ModuleList(
            Block(width, options.num_heads, options.mlp_ratio, options.gradient_checkpointing)
            for _ in range(options.depth)
        )
        self.final = Final(width, patch_size**2 * out_channels)
        self._initialise()
        self._name_sites(skips=0)
        self.sites += tuple(f"{kind}.{i}" for kind in ("attn", "mlp") for i in range(options.depth))

    def forward(self, x: Tensor, c_noise: Tensor, cond: Cond, scales: Scales) -> Tensor:
        """F, (B, C, H, W), of x (B, C, H, W) and c_noise (B,); float32 also under autocast."""
        return self.outputs(x, c_noise, cond, scales)[:, : self.channels]

    def outputs(self, x: Tensor, c_noise: Tensor, cond: Cond, scales: Scales) -> Tensor:
        """F and, with `learn_sigma`, after it what official weights say of the variance,
        (B, C or 2 C, H, W)."""
        films = self._films(c_noise, cond, scales)
        h = self.patch(x) + self.pos_embed  # (B, N, width)
        for i, (block, film) in enumerate(zip(self.blocks, films[:-1], strict=True)):
            h = block(h, film, scales.get(f"attn.{i}"), scales.get(f"mlp.{i}"))
        with full_precision(x.device):
            return self._picture(self.final(h, films[-1]))

    def _embeddings(self, c_noise: Tensor, cond: Cond) -> tuple[Tensor, None]:
        """One embedding (B, width), the sum of both."""
        emb, emb_s = super()._embeddings(c_noise, cond)
        return emb if emb_s is None else emb + emb_s, None

    def _holding(self, site: str) -> tuple[str, ...] | str:
        """The last layer of a branch; of the embedding, all its terms."""
        kind, _, i = site.partition(".")
        if kind == "attn":
            return both_of(f"blocks.{i}.attn.proj")
        if kind == "mlp":
            return both_of(f"blocks.{i}.mlp.fc2")
        return (*super()._holding(site), *(both_of("time_s.2") if self.time_s is not None else ()))

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


class Block(Filmed):
    """h + gate attention(film(norm(h))), then h + gate mlp(film(norm(h))) (fig. 3, adaLN-Zero)."""

    def __init__(self, width: int, num_heads: int, mlp_ratio: float, checkpointed: bool = False):
        super().__init__()
        self.checkpointed = checkpointed
        self.norm1, self.norm2 = _norm(width), _norm(width)
        self.attn = Attention(width, num_heads=num_heads, qkv_bias=True)
        self.mlp = Mlp(width, int(width * mlp_ratio), act_layer=partial(nn.GELU, "tanh"))
        self.film = nn.Linear(width, 6 * width)

    def compute(
        self,
        h: Tensor,
        film: Tensor,
        attn_scale: Tensor | None = None,
        mlp_scale: Tensor | None = None,
    ) -> Tensor:
        """Features (B, N, width) of h (B, N, width) and film (B, 6 width); a scale, () or (B,),
        multiplies its branch."""
        shift1, scale1, gate1, shift2, scale2, gate2 = film[:, None].chunk(6, dim=2)
        h = h + _scaled(gate1, attn_scale) * self.attn(self.norm1(h) * (1 + scale1) + shift1)
        return h + _scaled(gate2, mlp_scale) * self.mlp(self.norm2(h) * (1 + scale2) + shift2)


class Final(Filmed):
    """linear(film(norm(h)))."""

    def __init__(self, width: int, out_features: int):
        super().__init__()
        self.norm = _norm(width)
        self.linear = nn.Linear(width, out_features)
        self.film = nn.Linear(width, 2 * width)

    def compute(self, h: Tensor, film: Tensor) -> Tensor:
        """Patches (B, N, out_features) of h (B, N, width) and film (B, 2 width)."""
        shift, scale = film[:, None].chunk(2, dim=2)
        return self.linear(self.norm(h) * (1 + scale) + shift)


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
