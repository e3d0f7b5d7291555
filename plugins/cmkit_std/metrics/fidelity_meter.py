"""The numbers of `fidelity` from features; its torch half."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset as Images
from torch_fidelity import metric_kid
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

from cmkit import DataError, NonFiniteError, RecipeError, Reference
from cmkit_std.metrics.extract import (
    SPATIAL,
    Extractor,
    Streams,
    Want,
    reference_features,
    width,
)
from cmkit_std.metrics.extract import features as features_of
from cmkit_std.metrics.extractor_weights import find
from cmkit_std.metrics.fidelity_options import (
    DIGITS,
    EMOJI,
    INCEPTION,
    NEIGHBOURS,
    NUMBERS,
    PUBLISHED,
    RANDOM,
    FidelityOptions,
)
from cmkit_std.metrics.frechet import frechet
from cmkit_std.metrics.manifold import precision_recall

WANTED = {
    "fid": ("fid", "gaussian"),
    "sfid": ("sfid", "gaussian"),
    "isc": ("isc", "score"),
    "kid": ("kid", "rows"),
    "precision_recall": ("prc", "rows"),
}
"""torch-fidelity's name of the metric, which decides the layer, and what is kept of a layer;
sFID has one of its own, that of ADM's evaluator."""


class FidelityMeter:
    """The numbers of a `Fidelity` for images that come in batches."""

    def __init__(
        self, metric: FidelityOptions, images: int, reference: Reference, device: torch.device
    ):
        self.metric, self.images, self.reference, self.device = metric, images, reference, device
        self.streams: Streams | None = None
        self.restored: Mapping[str, Tensor] = {}

    def add(self, images: Tensor) -> None:
        """Take the next images, uint8 (B, C, H, W)."""
        if self.streams is None:
            extractor, self.given, self.seen = prepare(
                self.metric, self.reference, images[0], self.device
            )
            self.wants = {flag: _want(extractor, flag) for flag in self.metric.wanted()}
            self.streams = Streams(extractor, set(self.wants.values()), self.images, self.device)
            if self.restored:
                self.streams.restore(self.restored)
        for part in images.split(self.metric.batch):
            self.streams.add(part)

    def values(self) -> dict[str, float]:
        """The numbers that are switched on; NonFiniteError for one that is none."""
        metric, reference, streams = self.metric, self.reference, self.streams
        assert streams is not None, "no image was added"
        ours = streams.tensors()
        wanted = {self.wants[flag] for flag in self.seen}
        theirs = reference_features(streams.extractor, wanted, reference, self.device, metric.batch)
        numbers: dict[str, float] = {}
        for flag, want in self.wants.items():
            real = self.given.get(flag) or theirs.get(want, {})
            values = _values(metric, flag, ours[want], real, self.device)
            numbers |= dict(zip(NUMBERS[flag], values, strict=True))
        for key, value in numbers.items():
            if not math.isfinite(value):
                raise NonFiniteError(f"metric {key} = {value}; look at the samples and the weights")
        metric._widths = {
            flag: next(iter(ours[want].values())).shape[-1]
            for flag, want in self.wants.items()
            if flag in PUBLISHED
        }
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
        """What `restore` needs to go on from here; empty before the first image."""
        return self.streams.state() if self.streams else dict(self.restored)

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a state; at least one image is still to come. ValueError for an Inception
        score of another number of images, which were split otherwise."""
        splits = (int(value) for name, value in state.items() if name.endswith("/score/count"))
        if any(count != self.images for count in splits):
            raise ValueError(f"an Inception score is of all {self.images} images from the start")
        self.restored = state


def prepare(
    metric: FidelityOptions, reference: Reference, image: Tensor, device: torch.device
) -> tuple[Extractor, dict[str, dict[str, Any]], list[str]]:
    """The extractor for such images, published statistics by flag, and the flags that need the
    reference's images. It raises what `Fidelity.check_reference` raises."""
    flags = metric.wanted()
    known = reference.statistics or {}
    given = {
        flag: {"mu": known[mu], "sigma": known[sigma]}
        for flag, (mu, sigma) in PUBLISHED.items()
        if mu in known and sigma in known
    }
    seen = [flag for flag in flags if flag != "isc" and flag not in given]
    metric.enough(len(reference.images), "reference images", seen)  # type: ignore[arg-type]
    channels, _, resolution = image.shape
    extractor = network(metric, channels, resolution)
    for flag in set(given) & set(flags):
        count = width(extractor, _want(extractor, flag).layer, image, device)
        if given[flag]["mu"].shape != (count,) or given[flag]["sigma"].shape != (count, count):
            raise DataError(
                f"fidelity.{flag}: reference statistics have {len(given[flag]['mu'])} features,"
                f" extractor {extractor.name} gives {count}; name the extractor that they were"
                " made with"
            )
    return extractor, given, seen


def features(
    metric: FidelityOptions, images: Images[Tensor], reference: Reference, device: torch.device
) -> dict[str, dict[str, Tensor]]:
    """What `Fidelity.features` gives."""
    extractor, given, _ = prepare(metric, reference, images[0], device)
    flags = [flag for flag in metric.wanted() if flag in (*PUBLISHED, "kid")]
    layers = {flag: _want(extractor, flag).layer for flag in flags}
    wanted = {Want(layer, "rows") for layer in layers.values()}
    ours = features_of(extractor, wanted, images, device, metric.batch) if wanted else {}
    found: dict[str, dict[str, Tensor]] = {}
    for flag, layer in layers.items():
        want = _want(extractor, flag)
        real = given.get(flag)
        if real is None:
            real = reference_features(extractor, {want}, reference, device, metric.batch)[want]
        if flag == "kid":
            real = {"real": real["rows"]}
        elif "rows" in real:
            rows = real["rows"].double()
            real = {"mu": rows.mean(0), "sigma": rows.T.cov()}
        found[NUMBERS[flag][0]] = {**ours[Want(layer, "rows")], **real}
    return found


def network(metric: FidelityOptions, channels: int, resolution: int) -> Extractor:
    """The extractor for such images, with its weights found; it raises what `Fidelity.check`
    raises."""
    name, small = metric.extractor, channels == 1 and resolution <= 16
    if name == "auto":
        name = DIGITS if small else INCEPTION
    if name == DIGITS and not small:
        raise DataError(
            f"fidelity.extractor = {name!r}: images of {channels} channels and {resolution}"
            f" pixels; it knows grey digits of at most 16x16: use {INCEPTION}"
        )
    if name == EMOJI and channels != 3:
        raise DataError(
            f"fidelity.extractor = {name!r}: images of {channels} channels; it knows emoji in RGB:"
            f" use {INCEPTION}"
        )
    if metric.sfid and name not in (INCEPTION, RANDOM):
        raise RecipeError(
            f"fidelity.sfid: extractor {name} has no spatial features; set"
            f' metric.extractor = "{INCEPTION}", or metric.sfid = false'
        )
    found = find(name, metric.weights, metric.download)
    metric._used = found.name, found.sha256
    return found


def _want(extractor: Extractor, flag: str) -> Want:
    metric, stream = WANTED[flag]
    network = FEATURE_EXTRACTORS_REGISTRY[extractor.name]
    layer = SPATIAL if flag == "sfid" else network.get_default_feature_layer_for_metric(metric)
    return Want(layer, stream)


def _values(
    metric: FidelityOptions,
    flag: str,
    ours: Mapping[str, Tensor],
    real: Mapping[str, Any],
    device: torch.device,
) -> tuple[float, ...]:
    """The numbers of `flag`, from what its stream gives of the samples and of the real images."""
    if flag == "isc":
        scores = ours["scores"]
        return scores.mean().item(), scores.std(correction=0).item()
    if flag == "precision_recall":
        return precision_recall(ours["rows"], real["rows"], NEIGHBOURS, device)
    if flag == "kid":
        found = metric_kid.kid_features_to_metric(
            ours["rows"], real["rows"], kid_subset_size=metric.kid_subset_size, verbose=False
        )
        return found[metric_kid.KEY_METRIC_KID_MEAN], found[metric_kid.KEY_METRIC_KID_STD]
    return (frechet(ours, real),)
