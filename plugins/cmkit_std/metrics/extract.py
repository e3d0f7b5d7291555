"""Features of images, in a fixed order, with torch-fidelity's networks; the torch half of
`fidelity`."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset
from torch_fidelity import FeatureExtractorBase
from torch_fidelity.metric_fid import fid_features_to_statistics
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

from cmkit import CheckpointError, DataError, DownloadError, NonFiniteError, Reference
from cmkit_std.metrics.digits_net import EXTRACTOR

KEPT_REFERENCES = 2


@dataclass(frozen=True)
class Extractor:
    """Which network gives the features: everything that the numbers depend on."""

    name: str
    weights: str | None
    sha256: str | None

    def layer(self, metric: str) -> str:
        """The features that torch-fidelity takes for `metric`: "isc", "fid", "kid" or "prc"."""
        network = FEATURE_EXTRACTORS_REGISTRY[self.name]
        return network.get_default_feature_layer_for_metric(metric)


@dataclass(frozen=True)
class Features:
    """Features of one set of images, (N, d) float32 on the CPU a layer."""

    layers: dict[str, Tensor]
    gaussians: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)

    def gaussian(self, layer: str) -> dict[str, np.ndarray]:
        """{"mu": (d,), "sigma": (d, d)} of a layer, by torch-fidelity; computed once."""
        if layer not in self.gaussians:
            self.gaussians[layer] = fid_features_to_statistics(self.layers[layer])
        return self.gaussians[layer]


def batches(images: TorchDataset[Tensor], size: int, place: str) -> Iterator[Tensor]:
    """Batches (B, C, H, W) of images[0], images[1], ..; DataError unless they are uint8."""
    loader = DataLoader(
        images,
        batch_size=size,
        generator=torch.Generator(),  # else torch draws from its global generator
    )
    empty = True
    for batch in loader:
        if batch.dtype != torch.uint8 or batch.ndim != 4:
            raise DataError(
                f"{place}: images of type {batch.dtype} and shape {tuple(batch.shape[1:])};"
                " metrics take uint8 (C, H, W)"
            )
        empty = False
        yield batch
    if empty:
        raise DataError(f"{place}: no images; sample or read at least two")


def features(
    extractor: Extractor,
    layers: Sequence[str],
    images: TorchDataset[Tensor],
    device: torch.device,
    size: int,
) -> Features:
    """Features of every image, in order; a single grey channel is repeated for RGB networks."""
    network = _network(extractor, tuple(layers), device)
    found: list[tuple[Tensor, ...]] = []
    with torch.inference_mode():
        for batch in batches(images, size, f"metric extractor {extractor.name}"):
            batch = _fit(batch, extractor.name).to(device)
            found.append(tuple(part.cpu() for part in network(batch)))
    columns = zip(*found, strict=True)
    joined = {layer: torch.cat(part) for layer, part in zip(layers, columns, strict=True)}
    for layer, values in joined.items():
        if not values.isfinite().all():
            raise NonFiniteError(
                f"extractor {extractor.name}: features {layer!r} hold NaN or infinity; are"
                f" {extractor.weights or 'its weights'} whole?"
            )
    return Features(joined)


_references: OrderedDict[tuple[object, ...], Features] = OrderedDict()


def reference_features(
    extractor: Extractor,
    layers: Sequence[str],
    reference: Reference,
    device: torch.device,
    size: int,
) -> Features:
    """`features` of the real images, kept in memory for the next set of samples."""
    key = (reference.fingerprint, extractor, tuple(layers))
    if key not in _references:
        _references[key] = features(extractor, layers, reference.images, device, size)
        while len(_references) > KEPT_REFERENCES:
            _references.popitem(last=False)
    _references.move_to_end(key)
    return _references[key]


def download(url: str, file: str, sha256: str) -> None:
    """Fetch `url` into `file`, whole or not at all; DownloadError when it cannot be had."""
    try:
        torch.hub.download_url_to_file(url, file, hash_prefix=sha256, progress=False)
    except (OSError, RuntimeError) as error:
        raise DownloadError(
            f"{url}: {error}; download it elsewhere and put it at {file}"
        ) from error


def registered() -> list[str]:
    """Names of the extractors that torch-fidelity knows, ours included."""
    return sorted(FEATURE_EXTRACTORS_REGISTRY)


def _fit(batch: Tensor, name: str) -> Tensor:
    channels = batch.shape[1]
    if name == EXTRACTOR and channels != 1:
        raise DataError(f"extractor {name} takes grey images, not {channels} channels")
    return batch.expand(-1, 3, -1, -1) if channels == 1 and name != EXTRACTOR else batch


@functools.lru_cache(maxsize=2)
def _network(
    extractor: Extractor, layers: tuple[str, ...], device: torch.device
) -> FeatureExtractorBase:
    try:
        with torch.random.fork_rng(devices=[]):
            network = FEATURE_EXTRACTORS_REGISTRY[extractor.name](
                extractor.name,
                list(layers),
                feature_extractor_weights_path=extractor.weights,
                verbose=False,
            )
    except RuntimeError as error:
        raise CheckpointError(
            f"{extractor.weights}: not the weights of {extractor.name}"
            f" ({str(error).splitlines()[0]}); see metric.weights"
        ) from error
    return network.requires_grad_(False).eval().to(device)
