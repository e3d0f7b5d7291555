"""FID, sFID, Inception score, KID, precision and recall, as torch-fidelity (Obukhov et al., 2020)
and ADM's evaluator (Dhariwal and Nichol, 2021) define them, on features that cmkit extracts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import Field, PrivateAttr, model_validator

from cmkit import DataError, DataSpec, Metric, RecipeError, Reference

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.utils.data import Dataset as Images

    from cmkit_std.metrics.extract import Extractor
    from cmkit_std.metrics.fidelity_meter import FidelityMeter

DIGITS = "cmkit-digits"
INCEPTION = "inception-v3-compat"
NUMBERS = {
    "fid": ("fid",),
    "sfid": ("sfid",),
    "isc": ("is_mean", "is_std"),
    "kid": ("kid_mean", "kid_std"),
    "precision_recall": ("precision", "recall"),
}
PUBLISHED = {"fid": ("mu", "sigma"), "sfid": ("mu_s", "sigma_s")}
"""Names of the statistics in a reference that stand for its images."""
IS_SPLITS = 10
NEIGHBOURS = 3


class Fidelity(Metric):
    """How far samples are from real images, in the features of a network.

    Small grey images (one channel, at most 16x16) are seen by a digit classifier that cmkit ships:
    such numbers compare with each other, never with a paper. All others need the Inception weights
    of torch-fidelity, a grey channel repeated three times: literature-equal FID.

    Published statistics of a reference decide "fid" and "sfid", its images all else (ADM's files
    hold both, and 10,000 images). Features are kept only by KID, precision and recall. Those of a
    reference are stored in `$XDG_CACHE_HOME/cmkit/features` (by default below ~/.cache), at most
    4 GiB, by what they follow from; the folder may be deleted at any time.
    """

    fid: bool = True
    """Frechet distance: number "fid"."""
    sfid: bool = False
    """Frechet distance of spatial features, 7 channels of Inception's mixed_6: number "sfid"."""
    isc: bool = False
    """Inception score in 10 splits: "is_mean", "is_std"."""
    kid: bool = False
    """Kernel distance over 100 subsets: "kid_mean", "kid_std"."""
    precision_recall: bool = False
    """Precision and recall with 3 neighbours, one definition in ADM's evaluator and in
    torch-fidelity: "precision", "recall"."""
    extractor: str = "auto"
    """"auto", "timm-NAME" for a network of timm, or any extractor that torch-fidelity knows:
    "cmkit-digits", "inception-v3-compat"."""
    weights: str | None = None
    """The public file of the extractor's weights; by default where torch keeps its downloads, or
    for timm-NAME the user's `cmkit/weights/timm/NAME.safetensors`."""
    download: bool = False
    """Fetch missing weights when the recipe is checked; else they are an error."""
    batch: int = Field(64, ge=1, le=65536)
    """Images that the extractor sees at once."""
    kid_subset_size: int = Field(1000, ge=2, le=10**6)
    """Images in a subset of KID; neither set of images may be smaller."""

    _used: Extractor | None = PrivateAttr(None)
    _compared: str | None = PrivateAttr(None)

    @model_validator(mode="after")
    def _something(self) -> Fidelity:
        if not self.wanted():
            raise ValueError(f"nothing to measure; set one of {', '.join(NUMBERS)} to true")
        return self

    def wanted(self) -> list[str]:
        """Names of the fields of NUMBERS that are switched on."""
        return [flag for flag in NUMBERS if getattr(self, flag)]

    def enough(self, count: int, what: str, flags: list[str]) -> None:
        """DataError when a number of `flags` needs more images than `count`."""
        least = {
            "fid": 2,
            "sfid": 2,
            "isc": IS_SPLITS,
            "kid": self.kid_subset_size,
            "precision_recall": NEIGHBOURS + 1,
        }
        cures = {"kid": ", or lower metric.kid_subset_size"}
        if what != "samples":
            cures |= {
                flag: f", or a reference file with {' and '.join(names)}"
                for flag, names in PUBLISHED.items()
            }
        for flag in flags:
            if count < least[flag]:
                raise DataError(
                    f"fidelity.{flag}: {count} {what}; it needs at least {least[flag]}"
                    f"{cures.get(flag, '')}"
                )

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

    def check(self, data: DataSpec, images: int) -> None:
        """Find the extractor's weights, and count the images.

        Raises DownloadError when they are not on this disk, CheckpointError when they are damaged,
        DataError when the extractor is unfit for `data` or `images` are too few, RecipeError when
        nobody knows it.
        """
        self.enough(images, "samples", self.wanted())
        self.network(data.channels, data.resolution)

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
        place = f"metric extractor {self._used.name if self._used else self.extractor}"
        for batch in batches(images, self.batch, place, pin=device.type == "cuda"):
            meter.add(batch)
        return meter.values()

    def meter(self, images: int, reference: Reference, device: torch.device) -> FidelityMeter:
        """A meter that gives the same numbers of `images` samples fed in batches; it raises what
        `measure` raises."""
        from cmkit_std.metrics.fidelity_meter import FidelityMeter

        return FidelityMeter(self, images, reference, device)

    def provenance(self) -> dict[str, Any]:
        """The extractor, its weights, how it resizes, and torch-fidelity's version.

        With extractor "auto" it is the one that the last `check` or `measure` chose.
        """
        from importlib.metadata import version

        name = self._used.name if self._used else self.extractor
        shipped = name == DIGITS
        return {
            "extractor": name,
            "weights_sha256": self._used.sha256 if self._used else None,
            "resize": "area to 8x8, none if 8x8" if shipped else f"inside {name}, from full size",
            "torch_fidelity": version("torch-fidelity"),
            **({"compared_with": self._compared} if self._compared else {}),
            **({"kid_subset_size": self.kid_subset_size} if self.kid else {}),
            **({"neighbours": NEIGHBOURS} if self.precision_recall else {}),
        }

    def network(self, channels: int, resolution: int) -> Extractor:
        """The extractor for such images, with its weights found; it raises what `check` raises."""
        name, small = self.extractor, channels == 1 and resolution <= 16
        if name == "auto":
            name = DIGITS if small else INCEPTION
        if name == DIGITS and not small:
            raise DataError(
                f"fidelity.extractor = {name!r}: images of {channels} channels and {resolution}"
                f" pixels; it knows grey digits of at most 16x16: use {INCEPTION}"
            )
        if self.sfid and name != INCEPTION:
            raise RecipeError(
                f"fidelity.sfid: extractor {name} has no spatial features; set"
                f' metric.extractor = "{INCEPTION}", or metric.sfid = false'
            )
        from cmkit_std.metrics.extractor_weights import find

        self._used = find(name, self.weights, self.download)
        return self._used
