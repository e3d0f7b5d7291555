"""A small convolutional network."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from cmkit import Backbone, DataSpec

if TYPE_CHECKING:
    from cmkit import Network


class Mine(Backbone):
    """Two convolutions between which noise level and label enter, and one skip connection."""

    accepts: ClassVar[frozenset[str]] = frozenset({"label"})

    channels: int = Field(32, ge=1, le=4096)
    """Width."""

    def build(self, data: DataSpec, conditions: frozenset[str]) -> Network:
        from cmkit_mine.mine_network import MineNetwork

        return MineNetwork(
            channels=data.channels,
            width=self.channels,
            num_classes=data.num_classes if "label" in conditions else None,
        )
