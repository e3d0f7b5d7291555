"""Images of no meaning, for trying a recipe without its data."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from pydantic import Field

from cmkit import DataSpec
from cmkit_std.datasets.on_disk import OnDisk

if TYPE_CHECKING:
    from cmkit_std.datasets.pixels import Pixels


class Invented(OnDisk):
    """Waves of random length, phase and colour, whose direction is that of their class or caption.

    `cmkit run --smoke` puts them in the place of a recipe's data. They are made, not read.
    """

    channels: int = Field(3, ge=1, le=64)
    """1 for grey, 3 for RGB."""
    resolution: int = Field(32, ge=1, le=4096)
    """Height and width."""
    classes: int | None = Field(None, ge=1, le=10**6)
    """Number of classes; absent = no labels."""
    images: int = Field(64, ge=2, le=10**4)
    """How many; the first is of class 0, the next of class 1, and so on."""

    texts: int | None = Field(None, ge=1, le=10**4)
    """Number of different captions, such as "waves of kind 3", shared out as classes are; absent =
    no captions."""

    other: bool = False
    """Draw others of the same law."""

    def spec(self) -> DataSpec:
        return DataSpec(self.channels, self.resolution, self.classes)

    declared = spec

    def captions(self) -> list[str] | None:
        """One for each kind of waves."""
        return [f"waves of kind {kind}" for kind in range(self.texts)] if self.texts else None

    def heldout(self) -> Invented | None:
        """Others of the same law."""
        return None if self.other else self.model_copy(update={"other": True})

    def _images(self) -> Pixels:
        from cmkit_std.datasets.pixels import Pixels

        draws = np.random.default_rng(int(self.other))
        kinds = self.classes or self.texts or self.images
        angle = (np.pi * (np.arange(self.images) % kinds) / kinds)[:, None, None]
        y, x = np.mgrid[: self.resolution, : self.resolution] / self.resolution
        across = (np.cos(angle) * x + np.sin(angle) * y)[:, None]  # (N, 1, H, W)
        length = draws.uniform(0.3, 1, (self.images, 1, 1, 1))
        phase = draws.uniform(0, 1, (self.images, self.channels, 1, 1))
        waves = np.sin(2 * np.pi * (across / length + phase))
        pixels = np.round(127.5 + 90 * waves).astype(np.uint8)  # of deviation 0.5 in [-1, 1]
        made = Pixels(pixels, self._shared(self.classes))
        made.captions = self._shared(self.texts)
        return made

    def _shared(self, among: int | None) -> np.ndarray | None:
        return np.arange(self.images) % among if among else None
