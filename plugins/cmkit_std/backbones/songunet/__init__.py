"""The U-Nets DDPM++ and NCSN++ (Song et al.: Score-Based Generative Modeling through Stochastic
Differential Equations, 2020) as EDM builds them (Karras, Aittala, Aila, Laine, 2022)."""

from __future__ import annotations

from typing import ClassVar

from cmkit import DataSpec, Layout
from cmkit_std.backbones.published import published
from cmkit_std.backbones.songunet.options import SongUNetOptions

_EDM_DATA = (
    "cifar10-32x32-cond",
    "cifar10-32x32-uncond",
    "ffhq-64x64-uncond",
    "afhqv2-64x64-uncond",
)
_EDM_FILES = tuple(f"{data}-{network}" for data in _EDM_DATA for network in ("vp", "ve"))
"""Files of EDM; those of "vp" are DDPM++, those of "ve" NCSN++. All need augment_dim = 9, those
of 64 pixels channel_mult = [1, 2, 2, 2]."""


class SongUNet(SongUNetOptions):
    """Convolutional U-Net of EDM on CIFAR-10: DDPM++, on which ECT, CTM and iCT build, and NCSN++.

    Embeds labels, the guidance weight of LCM, and the target noise level of CTM by a second path
    beside that of sigma. The weight starts without effect, so that it can be added to trained
    weights.
    """

    network: ClassVar[str] = "cmkit_std.backbones.songunet.network:SongUNet"
    published: ClassVar[dict[str, str]] = published("edm", _EDM_FILES)

    def layouts(self, data: DataSpec) -> tuple[Layout, ...]:
        """The layout of NVlabs/edm, which locuslab/ect and sony/ctm share."""
        from cmkit_std.backbones.songunet.layouts import matches, read, write

        return (Layout("edm", matches, read, write),)
