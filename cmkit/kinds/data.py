"""The kind of part that pictures come from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from cmkit.kinds.part import Part
from cmkit.values import DataSpec, Reference

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from cmkit.denoiser import Cond


class Pictures(Protocol):
    """The images of training by number."""

    labels: Sequence[int] | None
    """Their classes."""
    captions: Sequence[int] | None
    """The numbers of their captions in `Dataset.captions`."""
    flip: bool
    """Whether half of the images of batches are mirrored."""
    empty: float
    """Probability with which a batch has the unconditional prompt in the place of a caption."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Tensor:
        """Image `index`, uint8 (C, H, W)."""

    def fingerprint(self) -> str:
        """What changes whenever an image does."""


class Dataset(Part, ABC):
    """Images and labels."""

    @abstractmethod
    def spec(self) -> DataSpec:
        """Shape and classes, with their names and counts where they are known; DataError when the
        files are missing or corrupt."""

    def declared(self) -> DataSpec | None:
        """What `spec` returns, maybe without names and counts of classes, where the keys alone
        decide it, so that a model is drawn from without the data; None where files must be read."""
        return None

    def smallest(self, data: DataSpec | None = None) -> Mapping[str, Any]:
        """Invented images in place of the files, at most 32 pixels wide: of the shape of `data`,
        where it is absent of what `declared` returns, or else `spec`."""
        data = data or self.declared() or self.spec()
        return {
            "use": "invented",
            "channels": data.channels,
            "resolution": min(data.resolution, 32),
            "classes": data.num_classes,
        }

    @abstractmethod
    def batches(
        self, size: int, seed: int, device: torch.device, start: int = 0
    ) -> Iterator[tuple[Tensor, Cond]]:
        """Endless (x0 in [-1, 1], cond) from batch `start` on, a function of (seed, batch)."""

    def captions(self) -> Sequence[str] | None:
        """What is said of the pictures: distinct texts, to which `Cond.caption` refers; None
        without any."""
        return None

    def pictures(self) -> Pictures | None:
        """The images of `batches` by number, whose latents are encoded once and kept; None where
        they have no numbers."""
        return None

    @abstractmethod
    def reference(self) -> Reference:
        """The real images that metrics compare with."""

    def heldout(self) -> Dataset | None:
        """Images of the same kind that are in no batch, for metrics that compare with those: of a
        training split the test split. None where there are none."""
        return None

    def faults(self) -> Iterator[str]:
        """What is wrong with single images, each by its place, found by reading them all."""
        return iter(())

    def left_out(self) -> Sequence[str]:
        """Images that are not used, each by its place and why not."""
        return ()
