"""FID, Inception score, KID, precision and recall, by the formulas of torch-fidelity (Obukhov et
al., 2020) on features that cmkit extracts itself."""

from __future__ import annotations

import functools
import hashlib
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import Field, PrivateAttr, model_validator

from cmkit import CheckpointError, DataError, DownloadError, NonFiniteError, RecipeError
from cmkit.kinds import DataSpec, Metric, Reference

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.utils.data import Dataset as Images

    from cmkit_std.metrics.extract import Extractor, Features


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
PUBLIC = {
    "inception-v3-compat": Weights(
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
    "isc": ("is_mean", "is_std"),
    "kid": ("kid_mean", "kid_std"),
    "precision_recall": ("precision", "recall"),
}
COMPARED = ("fid", "kid", "prc")
"""torch-fidelity's names of the metrics that look at real images."""
IS_SPLITS = 10
NEIGHBOURS = 3


class Fidelity(Metric):
    """How far samples are from real images, in the features of a network.

    Small grey images (one channel, at most 16x16) are seen by a digit classifier that cmkit ships:
    such numbers compare with each other, never with a paper. All others need the Inception weights
    of torch-fidelity, a grey channel repeated three times: literature-equal FID.
    """

    fid: bool = True
    """Frechet distance: number "fid"."""
    isc: bool = False
    """Inception score in 10 splits: "is_mean", "is_std"."""
    kid: bool = False
    """Kernel distance over 100 subsets: "kid_mean", "kid_std"."""
    precision_recall: bool = False
    """Precision and recall with 3 neighbours: "precision", "recall"."""
    extractor: str = "auto"
    """"auto", or any extractor that torch-fidelity knows: "cmkit-digits", "inception-v3-compat"."""
    weights: str | None = None
    """The public file of the extractor's weights; by default where torch keeps its downloads."""
    download: bool = False
    """Fetch missing weights when the recipe is checked; else they are an error."""
    batch: int = Field(64, ge=1, le=65536)
    """Images that the extractor sees at once."""
    kid_subset_size: int = Field(1000, ge=2, le=10**6)
    """Images in a subset of KID; neither set of images may be smaller."""

    _used: Extractor | None = PrivateAttr(None)

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
        self._enough(images, "samples")
        self._extractor(data.channels, data.resolution)

    def measure(
        self, images: Images[Tensor], reference: Reference, device: torch.device
    ) -> dict[str, float]:
        """The numbers that are switched on, for images[i] (C, H, W) uint8.

        Raises DataError for too few images and NonFiniteError for a number that is none.
        """
        from cmkit_std.metrics.extract import features, reference_features

        self._enough(len(images), "samples")  # type: ignore[arg-type]
        given = reference.statistics if self.fid else None
        with_images = self.model_copy(update={"fid": False}) if given else self
        with_images._enough(len(reference.images), "reference images")  # type: ignore[arg-type]
        channels, _, resolution = images[0].shape
        extractor = self._extractor(channels, resolution)
        compared = sorted({extractor.layer(m) for m in COMPARED if self._compares(m)})
        scored = {extractor.layer("isc")} if self.isc else set()
        fake = features(extractor, sorted({*compared, *scored}), images, device, self.batch)
        real = None
        seen = sorted({extractor.layer(m) for m in COMPARED if with_images._compares(m)})
        if seen:
            real = reference_features(extractor, seen, reference, device, self.batch)
        numbers = self._numbers(extractor, fake, real, given)
        for key, value in numbers.items():
            if not math.isfinite(value):
                raise NonFiniteError(f"metric {key} = {value}; look at the samples and the weights")
        return {key: numbers[key] for key in self.keys()}

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
            **({"kid_subset_size": self.kid_subset_size} if self.kid else {}),
            **({"neighbours": NEIGHBOURS} if self.precision_recall else {}),
        }

    def _wanted(self) -> list[str]:
        return [flag for flag in NUMBERS if getattr(self, flag)]

    def _compares(self, metric: str) -> bool:
        return {"fid": self.fid, "kid": self.kid, "prc": self.precision_recall}[metric]

    def _numbers(
        self,
        extractor: Extractor,
        fake: Features,
        real: Features | None,
        given: Mapping[str, Any] | None,
    ) -> dict[str, float]:
        from torch_fidelity import metric_isc, metric_kid, metric_prc

        numbers: dict[str, float] = {}
        if self.isc:
            logits = fake.layers[extractor.layer("isc")]
            found = metric_isc.isc_features_to_metric(logits, splits=IS_SPLITS)
            numbers["is_mean"] = found[metric_isc.KEY_METRIC_ISC_MEAN]
            numbers["is_std"] = found[metric_isc.KEY_METRIC_ISC_STD]
        if self.fid:
            layer = extractor.layer("fid")
            theirs = given or (real.gaussian(layer) if real else {})
            numbers["fid"] = _fid(fake, layer, theirs, extractor.name)
        if real is None:
            return numbers
        if self.kid:
            layer = extractor.layer("kid")
            found = metric_kid.kid_features_to_metric(
                fake.layers[layer],
                real.layers[layer],
                kid_subset_size=self.kid_subset_size,
                verbose=False,
            )
            numbers["kid_mean"] = found[metric_kid.KEY_METRIC_KID_MEAN]
            numbers["kid_std"] = found[metric_kid.KEY_METRIC_KID_STD]
        if self.precision_recall:
            layer = extractor.layer("prc")
            found = metric_prc.prc_features_to_metric(
                fake.layers[layer],
                real.layers[layer],
                prc_neighborhood=NEIGHBOURS,
                save_cpu_ram=True,
                verbose=False,
            )
            numbers["precision"] = found[metric_prc.KEY_METRIC_PRECISION]
            numbers["recall"] = found[metric_prc.KEY_METRIC_RECALL]
        return numbers

    def _enough(self, count: int, what: str) -> None:
        """DataError when a number needs more images than `count`."""
        least = {
            "fid": 2,
            "isc": IS_SPLITS if what == "samples" else 0,
            "kid": self.kid_subset_size,
            "precision_recall": NEIGHBOURS + 1,
        }
        for flag in self._wanted():
            if count < least[flag]:
                cure = ", or lower metric.kid_subset_size" if flag == "kid" else ""
                raise DataError(
                    f"fidelity.{flag}: {count} {what}; it needs at least {least[flag]}{cure}"
                )

    def _extractor(self, channels: int, resolution: int) -> Extractor:
        """The extractor for such images, its weights found; see `check` for what it raises."""
        name, small = self.extractor, channels == 1 and resolution <= 16
        if name == "auto":
            name = DIGITS if small else "inception-v3-compat"
        if name == DIGITS and not small:
            raise DataError(
                f"fidelity.extractor = {name!r}: images of {channels} channels and {resolution}"
                " pixels; it knows grey digits of at most 16x16: use inception-v3-compat"
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

        if name not in registered():
            raise RecipeError(
                f"fidelity.extractor = {name!r}: nobody registered it with torch-fidelity; known:"
                f" auto, {', '.join(registered())}"
            )
        if self.weights:
            return str(_given(self.weights))
        if name.startswith(("clip-", "dinov2-")) and not self.download:
            raise DownloadError(
                f"fidelity: extractor {name} needs weights that torch-fidelity would download;"
                " name a copy in metric.weights, or set metric.download = true"
            )
        return None


def _fid(fake: Features, layer: str, real: Mapping[str, Any], extractor: str) -> float:
    """torch-fidelity's distance, or the same number by the Gram matrix of few images."""
    from torch_fidelity import metric_fid

    from cmkit_std.metrics.frechet import frechet_of_few

    count, width = fake.layers[layer].shape
    if width != len(real["mu"]):
        raise DataError(
            f"reference statistics have {len(real['mu'])} features, extractor {extractor} gives"
            f" {width}; name the extractor that they were made with"
        )
    if count <= width:
        return frechet_of_few(fake.layers[layer].numpy(), real)
    ours = fake.gaussian(layer)
    real = {name: values.astype(ours[name].dtype) for name, values in real.items()}
    found = metric_fid.fid_statistics_to_metric(ours, real, verbose=False)
    return float(found[metric_fid.KEY_METRIC_FID])


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
