"""The diffusion transformer (Peebles, Xie: Scalable Diffusion Models with Transformers, 2022)."""

from __future__ import annotations

from typing import ClassVar

from cmkit import DataSpec, Layout, Precond
from cmkit_std.backbones.dit.options import DiTOptions
from cmkit_std.backbones.published import check_published, published


class DiT(DiTOptions):
    """Vision transformer on patches of a picture or of its latents, steered by adaptive norms.

    Embeds labels, prompts as one vector of their tokens, the guidance weight of LCM, and the target
    noise level of CTM; the last two start as the identity, so that they can be added to trained
    weights.
    """

    accepts: ClassVar[frozenset[str]] = DiTOptions.accepts | {"text"}

    network: ClassVar[str] = "cmkit_std.backbones.dit.network:Transformer"
    published: ClassVar[dict[str, str]] = published("dit", ["DiT-XL-2-256x256", "DiT-XL-2-512x512"])

    def layouts(self, data: DataSpec) -> tuple[Layout, ...]:
        """The layout of facebookresearch/DiT."""
        from cmkit_std.backbones.dit.layouts import layout

        return (layout(self),)

    def check_published(self, weights: str, precond: Precond) -> None:
        check_published(weights, self, precond, time_scale=1)
