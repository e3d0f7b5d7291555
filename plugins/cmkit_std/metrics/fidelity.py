"""FID, sFID, Inception score, KID, precision and recall, as torch-fidelity (Obukhov et al., 2020)
and ADM's evaluator (Dhariwal and Nichol, 2021) define them, on features that cmkit extracts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from cmkit import DataSpec, Metric, RecipeError, Reference
from cmkit_std.datasets.emoji import GROUPS
from cmkit_std.metrics.fidelity_options import (
    DIGITS,
    EMOJI,
    INCEPTION,
    NEIGHBOURS,
    NUMBERS,
    RANDOM,
    FidelityOptions,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.utils.data import Dataset as Images

    from cmkit_std.metrics.fidelity_meter import FidelityMeter


class Fidelity(FidelityOptions, Metric):
    """How far samples are from real images, in the features of a network.

    Small grey images (one channel, at most 16x16) are seen by a digit classifier that cmkit ships:
    such numbers compare with each other, never with a paper. All others need the Inception weights
    of torch-fidelity, a grey channel repeated three times: literature-equal FID. For data set
    `emoji` another classifier is shipped, extractor = "cmkit-emoji". It sees any colour pictures at
    32x32, by averaging areas: without another network at hand, its numbers tell which of two models
    of the same pictures is much nearer to them, and no more.

    Published statistics of a reference decide "fid" and "sfid", its images all else (ADM's files
    hold both, and 10,000 images). Features are kept only by KID, precision and recall. Those of a
    reference are stored in `$XDG_CACHE_HOME/cmkit/features` (by default below ~/.cache), at most
    4 GiB, by what they follow from; the folder may be deleted at any time.
    """

    read_by = {"download": ()}
    higher: ClassVar[tuple[str, ...]] = ("is_mean", "precision", "recall")
    neither: ClassVar[tuple[str, ...]] = ("is_std", "kid_std")

    def identity(self) -> dict[str, Any]:
        """The SHA-256 of the extractor's weights, where they are not those of one publication."""
        if not self.weights and not self.extractor.startswith("timm-"):
            return {}
        from cmkit_std.metrics.extractor_weights import find

        name = INCEPTION if self.extractor == "auto" else self.extractor
        return {name: find(name, self.weights, self.download).sha256}

    def smallest(self, data: DataSpec) -> Mapping[str, Any]:
        """The same numbers, in features that need no file: of digits, those of emoji if the recipe
        says so, or random ones."""
        grey = data.channels == 1 and data.resolution <= 16 and not self.sfid
        size = min(self.kid_subset_size, 10)
        none = {"weights": None, "download": False}
        fit = self.extractor if self.extractor == EMOJI and data.channels == 3 else RANDOM
        return {**none, "extractor": DIGITS if grey else fit, "kid_subset_size": size}

    def keys(self) -> tuple[str, ...]:
        """Names of the numbers that are switched on."""
        return tuple(key for flag in self.wanted() for key in NUMBERS[flag])

    def only(self, key: str) -> Fidelity:
        """The same metric with all else switched off; RecipeError for a number it does not give."""
        if key not in self.keys():
            raise RecipeError(
                f"fidelity: no number {key!r} here; it gives {', '.join(self.keys())}"
            )
        return self.model_copy(update={flag: key in keys for flag, keys in NUMBERS.items()})

    def quick(self, images: int) -> Fidelity:
        """The kernel distance alone, which has no bias at few images; in subsets that these fill.
        A reference of published statistics has no images for it: name `score = "fid"` there."""
        size = max(2, min(self.kid_subset_size, images))
        flags = {flag: flag == "kid" for flag in NUMBERS}
        return self.model_copy(update={**flags, "kid_subset_size": size})

    def check(self, data: DataSpec, images: int) -> None:
        """Find the extractor's weights, and count the images.

        Raises DownloadError when they are not on this disk, CheckpointError when they are damaged,
        DataError when the extractor is unfit for `data` or `images` are too few, RecipeError when
        nobody knows it.
        """
        from cmkit_std.metrics.fidelity_meter import network

        self.enough(images, "samples", self.wanted())
        network(self, data.channels, data.resolution)

    def caveats(self, data: DataSpec) -> tuple[str, ...]:
        """What the features of emoji, or of a network of timm, are not."""
        if self.extractor == EMOJI and not set(data.classes or ("",)) <= set(GROUPS):
            return (
                f"fidelity: {EMOJI} is a small classifier of emoji that sees pictures at 32x32; its"
                " numbers compare models of the same pictures, roughly, and are no FID or KID of"
                " the literature",
            )
        if self.extractor.startswith("timm-"):
            return (
                f"fidelity: numbers in the features of {self.extractor} compare with each other,"
                " and are no FID or KID of the literature, which are Inception's",
            )
        return ()

    def check_reference(self, data: DataSpec, reference: Reference, device: torch.device) -> None:
        """DataError for too few reference images, or statistics of other features."""
        import torch

        from cmkit_std.metrics.fidelity_meter import prepare

        image = torch.zeros(data.channels, data.resolution, data.resolution, dtype=torch.uint8)
        prepare(self, reference, image, device)

    def measure(
        self, images: Images[Tensor], reference: Reference, device: torch.device
    ) -> dict[str, float]:
        """The numbers that are switched on, for images[i] (C, H, W) uint8.

        Raises DataError for too few images or statistics of other features, and NonFiniteError for
        a number that is none.
        """
        from cmkit_std.metrics.extract import batches

        count = len(images)  # type: ignore[arg-type]
        self.enough(count, "samples", self.wanted())
        meter = self.meter(count, reference, device)
        place = f"metric extractor {self._used[0] if self._used else self.extractor}"
        for batch in batches(images, self.batch, place, pin=device.type == "cuda"):
            meter.add(batch)
        return meter.values()

    def meter(self, images: int, reference: Reference, device: torch.device) -> FidelityMeter:
        """A meter that gives the same numbers of `images` samples fed in batches; it raises what
        `measure` raises."""
        from cmkit_std.metrics.fidelity_meter import FidelityMeter

        return FidelityMeter(self, images, reference, device)

    def features(
        self, images: Images[Tensor], reference: Reference, device: torch.device
    ) -> dict[str, dict[str, Tensor]]:
        """Those of "fid", "sfid" and "kid_mean", where they are switched on; it raises what
        `measure` raises."""
        from cmkit_std.metrics.fidelity_meter import features

        return features(self, images, reference, device)

    def provenance(self) -> dict[str, Any]:
        """The extractor, its weights, how it resizes, and torch-fidelity's version.

        With extractor "auto" it is the one that the last `check` or `measure` chose.
        """
        from importlib.metadata import version

        name, sha256 = self._used or (self.extractor, None)
        side = {DIGITS: "8x8", EMOJI: "32x32"}.get(name)
        return {
            "extractor": name,
            "weights_sha256": sha256,
            "resize": f"area to {side}, none if {side}"
            if side
            else f"inside {name}, from full size",
            "torch_fidelity": version("torch-fidelity"),
            **({"compared_with": self._compared} if self._compared else {}),
            **({"features": self._widths} if self._widths else {}),
            **({"kid_subset_size": self.kid_subset_size} if self.kid else {}),
            **({"neighbours": NEIGHBOURS} if self.precision_recall else {}),
        }
