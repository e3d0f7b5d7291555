"""The keys of `fidelity`, and what follows from them alone."""

from __future__ import annotations

from typing import Self

from pydantic import Field, PrivateAttr, model_validator

from cmkit import DataError, Part

DIGITS = "cmkit-digits"
EMOJI = "cmkit-emoji"
INCEPTION = "inception-v3-compat"
RANDOM = "cmkit-random"
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


class FidelityOptions(Part):
    """Which numbers, in the features of which network."""

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
    "cmkit-digits", "cmkit-emoji", "inception-v3-compat", or "cmkit-random", whose numbers mean
    nothing."""
    weights: str | None = None
    """The public file of the extractor's weights; by default where torch keeps its downloads, or
    for timm-NAME the user's `cmkit/weights/timm/NAME.safetensors`."""
    download: bool = False
    """Fetch missing weights when the recipe is checked; else they are an error."""
    batch: int = Field(64, ge=1, le=65536)
    """Images that the extractor sees at once."""
    kid_subset_size: int = Field(1000, ge=2, le=10**6)
    """Images in a subset of KID; neither set of images may be smaller."""

    _used: tuple[str, str | None] | None = PrivateAttr(None)
    """Name and SHA-256 of the extractor that the last check or measurement chose."""
    _compared: str | None = PrivateAttr(None)
    _widths: dict[str, int] = PrivateAttr({})
    """Features of each Frechet distance that was measured last."""

    @model_validator(mode="after")
    def _something(self) -> Self:
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
