"""The kind of part that puts numbers on pictures."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from cmkit.kinds.part import Part
from cmkit.values import DataSpec, Reference

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.utils.data import Dataset as Images


class Meter(Protocol):
    """Computes a metric of images while they are drawn, without keeping them."""

    def add(self, images: Tensor) -> None:
        """Take the next images, uint8 (B, C, H, W) on any device."""

    def values(self) -> dict[str, float]:
        """The numbers, once all images are taken."""

    def state(self) -> dict[str, Tensor]:
        """What is computed of the images so far, on the CPU, for `restore` in another process."""

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from `state`, before the first `add`: the same numbers, bit for bit. Until the next
        `add`, `state()` returns it again. It may be that of a meter of fewer images, all of which
        were added; ValueError where that is no beginning of more."""


class Metric(Part, ABC):
    """Numbers about images, of which less is better.

    `higher` names those of which more is better, `neither` those that say nothing of quality by
    themselves, such as a spread.
    """

    higher: ClassVar[tuple[str, ...]] = ()
    neither: ClassVar[tuple[str, ...]] = ()

    heldout: bool = False
    """Compare with images that no training saw, such as the data set's test split. The numbers have
    "heldout_" before their names: "heldout_fid"."""

    @property
    def prefix(self) -> str:
        """What a recipe has before the names of `keys`."""
        return "heldout_" if self.heldout else ""

    @abstractmethod
    def keys(self) -> tuple[str, ...]:
        """Names of the numbers that `measure` returns."""

    def only(self, key: str) -> Metric:
        """The cheapest metric that still returns `key`."""
        return self

    def quick(self, images: int) -> Metric:
        """The metric whose first number scores a training while it runs, on so few images and as
        few real ones."""
        return self

    def check(self, data: DataSpec, images: int) -> None:
        """Raise now what would stop `measure` later on `images` samples like `data`: missing
        weights, an unfit image size, too few images."""

    def caveats(self, data: DataSpec) -> Sequence[str]:
        """What the numbers of images like `data` do not mean, a sentence each, said by checks and
        runs."""
        return ()

    def check_reference(self, data: DataSpec, reference: Reference, device: torch.device) -> None:
        """Raise, before the first stage of a run, if `measure` cannot compare with `reference`."""

    @abstractmethod
    def measure(
        self, images: Images[Tensor], reference: Reference, device: torch.device
    ) -> dict[str, float]:
        """`keys()` with their values, for images[i] (C, H, W) uint8."""

    def meter(self, images: int, reference: Reference, device: torch.device) -> Meter | None:
        """A meter for `images` images that are not kept; None where the metric has to see them all
        at once. It gives what `measure` gives, up to rounding."""
        return None

    def features(
        self, images: Images[Tensor], reference: Reference, device: torch.device
    ) -> dict[str, dict[str, Tensor]]:
        """What the distances of features among the numbers are computed of, on the CPU: "rows"
        (N, d) of the images, and of the reference "mu" (d,) and "sigma" (d, d) for a Frechet
        distance, or "real" (M, d) for a kernel distance.

        It tells two single checkpoints apart on the same noise; nothing else can for other numbers.
        """
        return {}

    def provenance(self) -> dict[str, Any]:
        """What must stand beside the numbers so that they can be compared: extractor, weights.

        cmkit adds the number of images and the reference's fingerprint. "features", the width d by
        number, marks the Frechet distances, which are biased where images are few.
        """
        return {}
