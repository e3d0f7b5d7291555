"""The magnitude-preserving U-Net of EDM2, configuration G (Karras, Aittala, Lehtinen, Hellsten,
Aila, Laine: Analyzing and Improving the Training Dynamics of Diffusion Models, 2023)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from cmkit import DataSpec, Layout
from cmkit_std.backbones.edm2.options import EDM2Options
from cmkit_std.backbones.published import published

_EDM2_FILES = (
    "img64-xs-0134217-0.110",
    "img64-xs-0134217-0.175",
    "img64-s-1073741-0.045",
    "img64-s-1073741-0.075",
    "img64-s-1073741-0.105",
    "img64-m-2147483-0.060",
    "img64-l-1073741-0.040",
    "img64-xl-0671088-0.040",
)
"""ImageNet-64, by size, thousands of training images, and relative width of their average."""


class EDM2(EDM2Options):
    """Convolutional U-Net of EDM2, in which weights and activations keep their magnitude.

    No biases, no norms with parameters: a filter acts at length 1, whatever its stored length, and
    training stores all of them anew at equal length before each step. As they cannot grow, the
    learning rate has to fall: see train.sqrt_decay.

    Embeds labels, the guidance weight of LCM, and the target noise level of CTM by a second path
    beside that of sigma; both start without effect, so that they can be added to trained weights.
    """

    network: ClassVar[str] = "cmkit_std.backbones.edm2.network:EDM2UNet"
    published: ClassVar[dict[str, str]] = published("edm2", _EDM2_FILES)

    @classmethod
    def known(cls) -> Iterator[tuple[EDM2, DataSpec, frozenset[str]]]:
        """The networks of the presets, with labels of ImageNet-64."""
        for size in cls.presets:
            options = cls.model_validate({"preset": size})
            yield options, DataSpec(3, 64, 1000), frozenset({"label"})

    def layouts(self, data: DataSpec) -> tuple[Layout, ...]:
        """The layout of NVlabs/edm2, which locuslab/ect shares."""
        from cmkit_std.backbones.edm2.layouts import layout

        return (layout(self),)
