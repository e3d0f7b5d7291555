"""FID, sFID, Inception score, KID, precision and recall, as torch-fidelity (Obukhov et al., 2020)
and ADM's evaluator (Dhariwal and Nichol, 2021) define them, on features that cmkit extracts."""

from __future__ import annotations

import functools
import hashlib
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import Field, PrivateAttr, model_validator

from cmkit import (
    CheckpointError,
    DataError,
    DataSpec,
    DownloadError,
    Metric,
    NonFiniteError,
    RecipeError,
    Reference,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.utils.data import Dataset as Images

    from cmkit_std.metrics.extract import Extractor, Features, Streams, Want


class Weights(NamedTuple):
    """A public file of weights. torch-fidelity unpickles it, so no other file is handed over."""

    file: str
    folder: str
    sha256: str

    @property
    def url(self) -> str:
        """Where it can be had."""
        return f"https://{self.folder}/{self.file}"


DIGITS = "cmkit-digits"
INCEPTION = "inception-v3-compat"
PUBLIC = {
    INCEPTION: Weights(
        "weights-inception-2015-12-05-6726825d.pth",
        "github.com/toshas/torch-fidelity/releases/download/v0.2.0",
        "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
    ),
    "vgg16": Weights(
        "vgg16-397923af.pth",
        "download.pytorch.org/models",
        "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0",
    ),
}
NUMBERS = {
    "fid": ("fid",),
    "sfid": ("sfid",),
    "isc": ("is_mean", "is_std"),
    "kid": ("kid_mean", "kid_std"),
    "precision_recall": ("precision", "recall"),
}
WANTED = {
    "fid": ("fid", "gaussian"),
    "sfid": ("sfid", "gaussian"),
    "isc": ("isc", "score"),
    "kid": ("kid", "rows"),
    "precision_recall": ("prc", "rows"),
}
"""torch-fidelity's name of the metric, which decides the layer, and what is kept of a layer."""
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
        if not self._wanted():
            raise ValueError(f"nothing to measure; set one of {', '.join(NUMBERS)} to true")
        return self

    def keys(self) -> tuple[str, ...]:
        """Names of the numbers that are switched on."""
        return tuple(key for flag in self._wanted() for key in NUMBERS[flag])

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
        self._enough(images, "samples", self._wanted())
        self._extractor(data.channels, data.resolution)

    def check_reference(self, data: DataSpec, reference: Reference, device: torch.device) -> None:
        """DataError for too few reference images, or statistics of other features."""
        import torch

        self._prepare(reference, torch.zeros(data.channels, *[data.resolution] * 2).byte(), device)

    def measure(
        self, images: Images[Tensor], reference: Reference, device: torch.device
    ) -> dict[str, float]:
        """The numbers that are switched on, for images[i] (C, H, W) uint8.

        Raises DataError for too few images or statistics of other features, and NonFiniteError for
        a number that is none.
        """
        from cmkit_std.metrics.extract import batches

        count = len(images)  # type: ignore[arg-type]
        self._enough(count, "samples", self._wanted())
        meter = self.meter(count, reference, device)
        place = f"metric extractor {self._used.name if self._used else self.extractor}"
        for batch in batches(images, self.batch, place, pin=device.type == "cuda"):
            meter.add(batch)
        return meter.values()

    def meter(self, images: int, reference: Reference, device: torch.device) -> FidelityMeter:
        """The same numbers of `images` samples as they come; errors as of `measure`."""
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

    def _prepare(
        self, reference: Reference, image: Tensor, device: torch.device
    ) -> tuple[Extractor, dict[str, dict[str, Any]], list[str]]:
        """The extractor for such images, published statistics by flag, and the flags that need the
        reference's images; errors as of `check_reference`."""
        flags = self._wanted()
        given = _published(reference)
        seen = [flag for flag in flags if flag != "isc" and flag not in given]
        self._enough(len(reference.images), "reference images", seen)  # type: ignore[arg-type]
        channels, _, resolution = image.shape
        extractor = self._extractor(channels, resolution)
        for flag in set(given) & set(flags):
            _fits(flag, given[flag], extractor, self._want(extractor, flag).layer, image, device)
        return extractor, given, seen

    def _wanted(self) -> list[str]:
        return [flag for flag in NUMBERS if getattr(self, flag)]

    @staticmethod
    def _want(extractor: Extractor, flag: str) -> Want:
        from cmkit_std.metrics.extract import Want

        metric, stream = WANTED[flag]
        return Want(extractor.layer(metric), stream)

    def _values(
        self, flag: str, ours: Mapping[str, Tensor], real: Mapping[str, Any], device: torch.device
    ) -> tuple[float, ...]:
        """The numbers of a flag, of what was kept of the samples' and of the real features."""
        from torch_fidelity import metric_kid

        from cmkit_std.metrics.frechet import frechet
        from cmkit_std.metrics.manifold import precision_recall

        if flag == "isc":
            scores = ours["scores"]
            return scores.mean().item(), scores.std(correction=0).item()
        if flag == "precision_recall":
            return precision_recall(ours["rows"], real["rows"], NEIGHBOURS, device)
        if flag == "kid":
            size = self.kid_subset_size
            found = metric_kid.kid_features_to_metric(
                ours["rows"], real["rows"], kid_subset_size=size, verbose=False
            )
            return found[metric_kid.KEY_METRIC_KID_MEAN], found[metric_kid.KEY_METRIC_KID_STD]
        return (frechet(ours, real),)

    def _enough(self, count: int, what: str, flags: list[str]) -> None:
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

    def _extractor(self, channels: int, resolution: int) -> Extractor:
        """The extractor for such images, its weights found; see `check` for what it raises."""
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
        weights = self._weights(name)
        from cmkit_std.metrics.extract import Extractor

        if name == DIGITS:
            from cmkit_std.metrics.digits_net import SHA256

            self._used = Extractor(name, None, SHA256["digits_features"])
        else:
            self._used = Extractor(name, weights, _sha256(weights) if weights else None)
        return self._used

    def _weights(self, name: str) -> str | None:
        """The file of weights for extractor `name`, None where it needs no file."""
        if name == DIGITS:
            if self.weights:
                raise RecipeError(f"metric.weights: {DIGITS} ships its own weights; leave it out")
            return None
        if name not in PUBLIC:
            return self._other_weights(name)
        public = PUBLIC[name]
        file = _given(self.weights) if self.weights else _hub_folder() / public.file
        if not file.is_file():
            self._fetch(name, public, file)
        if (found := _sha256(str(file))) != public.sha256:
            raise CheckpointError(
                f"{file}: SHA-256 {found[:12]}.. is not that of {public.file},"
                f" {public.sha256[:12]}..; remove it and download {public.url}"
            )
        return str(file)

    def _fetch(self, name: str, public: Weights, file: Path) -> None:
        if not self.download:
            raise DownloadError(
                f"fidelity: extractor {name} needs {public.file}: put {public.url} into"
                f" {file.parent}, or name a copy in metric.weights, or set metric.download = true"
            )
        from cmkit_std.metrics.extract import download

        file.parent.mkdir(parents=True, exist_ok=True)
        download(public.url, str(file), public.sha256)

    def _other_weights(self, name: str) -> str | None:
        """The file for an extractor that only torch-fidelity or another package knows."""
        from cmkit_std.metrics.extract import registered

        if name.startswith("timm-"):
            from cmkit_std.metrics.timm_extractor import register
            from cmkit_std.timm_network import weights_of

            register(name)
            network, own = name.removeprefix("timm-"), self.weights
            files = None if own is None else {network: str(Path(own).expanduser())}
            return str(weights_of(network, files, "fidelity.extractor", "metric.weights"))
        if name not in registered():
            raise RecipeError(
                f"fidelity.extractor = {name!r}: nobody registered it with torch-fidelity; known:"
                f" auto, timm-NAME, {', '.join(registered())}"
            )
        if self.weights:
            return str(_given(self.weights))
        if name.startswith(("clip-", "dinov2-")) and not self.download:
            raise DownloadError(
                f"fidelity: extractor {name} needs weights that torch-fidelity would download;"
                " name a copy in metric.weights, or set metric.download = true"
            )
        return None


class FidelityMeter:
    """The numbers of a `Fidelity` for images that are taken as they are drawn."""

    def __init__(self, metric: Fidelity, images: int, reference: Reference, device: torch.device):
        self.metric, self.images, self.reference, self.device = metric, images, reference, device
        self.streams: Streams | None = None
        self.restored: Mapping[str, Tensor] = {}

    def add(self, images: Tensor) -> None:
        """Take the next images, uint8 (B, C, H, W)."""
        from cmkit_std.metrics.extract import Streams

        if self.streams is None:
            extractor, self.given, self.seen = self.metric._prepare(
                self.reference, images[0], self.device
            )
            self.wants = {
                flag: self.metric._want(extractor, flag) for flag in self.metric._wanted()
            }
            self.streams = Streams(extractor, set(self.wants.values()), self.images, self.device)
            if self.restored:
                self.streams.restore(self.restored)
        for part in images.split(self.metric.batch):
            self.streams.add(part)

    def values(self) -> dict[str, float]:
        """The numbers that are switched on; NonFiniteError for one that is none."""
        from cmkit_std.metrics.extract import reference_features

        metric, reference, streams = self.metric, self.reference, self.streams
        assert streams is not None, "no image was added"
        ours = streams.tensors()
        theirs: Features = {}
        if self.seen:
            wanted = {self.wants[flag] for flag in self.seen}
            theirs = reference_features(
                streams.extractor, wanted, reference, self.device, metric.batch
            )
        numbers: dict[str, float] = {}
        for flag, want in self.wants.items():
            real = self.given.get(flag) or theirs.get(want, {})
            values = metric._values(flag, ours[want], real, self.device)
            numbers |= dict(zip(NUMBERS[flag], values, strict=True))
        for key, value in numbers.items():
            if not math.isfinite(value):
                raise NonFiniteError(f"metric {key} = {value}; look at the samples and the weights")
        published = [flag for flag in self.wants if flag in self.given]
        metric._compared = "; ".join(
            f"{', '.join(names)}: {what}"
            for names, what in (
                (published, "published statistics"),
                (self.seen, f"{len(reference.images)} images"),  # type: ignore[arg-type]
            )
            if names
        )
        return numbers

    def state(self) -> dict[str, Tensor]:
        """What the streams hold; nothing of no image."""
        return self.streams.state() if self.streams else dict(self.restored)

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a state; at least one image is still to come."""
        self.restored = state


def _published(reference: Reference) -> dict[str, dict[str, Any]]:
    """{flag: {"mu": (d,), "sigma": (d, d)}} of those Frechet distances that have statistics."""
    found = reference.statistics or {}
    return {
        flag: {"mu": found[mu], "sigma": found[sigma]}
        for flag, (mu, sigma) in PUBLISHED.items()
        if mu in found and sigma in found
    }


def _fits(
    flag: str,
    given: Mapping[str, Any],
    extractor: Extractor,
    layer: str,
    image: Tensor,
    device: torch.device,
) -> None:
    """DataError unless the statistics are of as many features as the extractor gives."""
    from cmkit_std.metrics.extract import width

    count, known = width(extractor, layer, image, device), len(given["mu"])
    if given["mu"].shape != (count,) or given["sigma"].shape != (count, count):
        raise DataError(
            f"fidelity.{flag}: reference statistics have {known} features, extractor"
            f" {extractor.name} gives {count}; name the extractor that they were made with"
        )


def _given(weights: str) -> Path:
    file = Path(weights).expanduser()
    if not file.is_file():
        raise CheckpointError(f"metric.weights = {weights!r}: no such file")
    return file


def _hub_folder() -> Path:
    """Where torch.hub keeps its downloads, found without importing torch."""
    cache = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    home = os.environ.get("TORCH_HOME", os.path.join(cache, "torch"))
    return Path(home).expanduser() / "hub" / "checkpoints"


def _sha256(file: str) -> str:
    """SHA-256 of a file, read again only when its size or time changed."""
    info = os.stat(file)
    return _digest(file, info.st_size, info.st_mtime_ns)


@functools.lru_cache(maxsize=16)
def _digest(file: str, size: int, mtime_ns: int) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
