"""Features of images by torch-fidelity's networks, in the order of the images."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

from cmkit import CheckpointError, DataError, NonFiniteError, Reference
from cmkit_std.metrics import stored
from cmkit_std.metrics.fidelity_options import DIGITS, EMOJI
from cmkit_std.metrics.streams import STREAMS, whole

KEPT_REFERENCES = 2
SPATIAL = "spatial"
SPATIAL_CHANNELS = 7
BEHIND_SPATIAL = "768"
"""The first layer of torch-fidelity's Inception that lies behind the spatial features."""


@dataclass(frozen=True)
class Extractor:
    """Which network gives the features: everything that the numbers depend on."""

    name: str
    weights: str | None
    sha256: str | None


class Want(NamedTuple):
    """A layer of an extractor, and what to keep of it: a key of `STREAMS`."""

    layer: str
    stream: str


Features = dict[Want, dict[str, Tensor]]
"""Tensors of each stream, on the CPU."""


def batches(
    images: TorchDataset[Tensor], size: int, place: str, pin: bool = False
) -> Iterator[Tensor]:
    """Batches (B, C, H, W) of images[0], images[1], ..; DataError unless they are uint8."""
    loader = DataLoader(
        images,
        batch_size=size,
        pin_memory=pin,
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


class Streams:
    """Features of images that come in batches, in order, reduced to what `wanted` asks for. Grey
    images are repeated to three channels for RGB networks."""

    def __init__(
        self, extractor: Extractor, wanted: Collection[Want], count: int, device: torch.device
    ):
        self.extractor, self.device = extractor, device
        self.network = _network(extractor, frozenset(want.layer for want in wanted), device)
        self.streams = {want: STREAMS[want.stream](count) for want in sorted(wanted)}

    @torch.inference_mode()
    def add(self, images: Tensor) -> None:
        """Take the next images, uint8 (B, C, H, W)."""
        found = self.network(_fit(images.to(self.device, non_blocking=True), self.extractor.name))
        for want, stream in self.streams.items():
            stream.add(found[want.layer])

    def tensors(self) -> Features:
        """The tensors of every stream; NonFiniteError when a feature is NaN or infinite."""
        joined = {want: stream.tensors() for want, stream in self.streams.items()}
        for want, tensors in joined.items():
            if not all(values.isfinite().all() for values in tensors.values()):
                raise NonFiniteError(
                    f"extractor {self.extractor.name}: features {want.layer!r} hold NaN or"
                    f" infinity; are {self.extractor.weights or 'its weights'} whole?"
                )
        return joined

    def state(self) -> dict[str, Tensor]:
        """What `restore` needs, on the CPU, by layer, stream and name."""
        return {
            "/".join((want.layer, want.stream, name)): values.cpu()
            for want, stream in self.streams.items()
            for name, values in stream.state().items()
        }

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a state, before the first `add`."""
        for want, stream in self.streams.items():
            prefix = f"{want.layer}/{want.stream}/"
            own = {n.removeprefix(prefix): x for n, x in state.items() if n.startswith(prefix)}
            stream.restore({name: values.to(self.device) for name, values in own.items()})


def features(
    extractor: Extractor,
    wanted: Collection[Want],
    images: TorchDataset[Tensor],
    device: torch.device,
    size: int,
) -> Features:
    """Features of all `images`, in one pass, reduced to what `wanted` asks for."""
    streams = Streams(extractor, wanted, len(images), device)  # type: ignore[arg-type]
    place = f"metric extractor {extractor.name}"
    for batch in batches(images, size, place, pin=device.type == "cuda"):
        streams.add(batch)
    return streams.tensors()


def width(extractor: Extractor, layer: str, image: Tensor, device: torch.device) -> int:
    """How many features `layer` gives of `image` (C, H, W)."""
    network = _network(extractor, frozenset([layer]), device)
    with torch.inference_mode():
        return int(network(_fit(image[None].to(device), extractor.name))[layer].shape[1])


@functools.lru_cache(KEPT_REFERENCES)
def _references(fingerprint: str, extractor: Extractor, device_type: str) -> Features:
    """The features of a reference that are in memory, to be filled by who asks."""
    return {}


def reference_features(
    extractor: Extractor,
    wanted: Collection[Want],
    reference: Reference,
    device: torch.device,
    size: int,
) -> Features:
    """`features` of the real images, kept in memory for the next set of samples, and on disk for
    the next process (see `stored`) where the extractor's weights are known by their SHA-256."""
    held = _references(reference.fingerprint, extractor, device.type)
    count = len(reference.images)
    names = {
        want: stored.name(reference.fingerprint, extractor.name, extractor.sha256, device, *want)
        for want in wanted
        if extractor.sha256 and want not in held
    }
    for want, name in names.items():
        tensors = stored.load(name)
        if tensors and whole(want.stream, tensors, count):
            held[want] = tensors
    if missing := set(wanted) - set(held):
        held |= features(extractor, missing, reference.images, device, size)
        for want in missing & set(names):
            stored.save(names[want], held[want])
    return {want: held[want] for want in wanted}


def _fit(batch: Tensor, name: str) -> Tensor:
    channels = batch.shape[1]
    if (wanted := {DIGITS: 1, EMOJI: 3}.get(name, channels)) != channels:
        raise DataError(f"extractor {name} takes images of {wanted} channels, not {channels}")
    return batch.expand(-1, 3, -1, -1) if channels == 1 and name != DIGITS else batch


@functools.lru_cache(maxsize=2)
def _network(
    extractor: Extractor, layers: frozenset[str], device: torch.device
) -> Callable[[Tensor], dict[str, Tensor]]:
    """uint8 images (B, C, H, W) -> {layer: (B, d)}, one forward pass."""
    made = FEATURE_EXTRACTORS_REGISTRY[extractor.name]
    hooked = layers & {SPATIAL} - set(made.get_provided_features_list())
    asked = sorted(layers - hooked) or [BEHIND_SPATIAL]
    try:
        with torch.random.fork_rng(devices=[]):
            network = made(
                extractor.name,
                asked,
                feature_extractor_weights_path=extractor.weights,
                verbose=False,
            )
    except RuntimeError as error:
        raise CheckpointError(
            f"{extractor.weights}: not the weights of {extractor.name}"
            f" ({str(error).splitlines()[0]}); see metric.weights"
        ) from error
    network.requires_grad_(False).eval().to(device)
    seen: dict[str, Tensor] = {}
    if hooked:
        network.Mixed_6d.branch1x1.register_forward_hook(
            lambda module, inputs, found: seen.update({SPATIAL: spatial(found)})
        )

    def run(images: Tensor) -> dict[str, Tensor]:
        return {**dict(zip(asked, network(images), strict=True)), **seen}

    return run


def spatial(found: Tensor) -> Tensor:
    """The features of sFID, (B, 17 * 17 * 7), of what Mixed_6d.branch1x1 gives, (B, 192, 17, 17).

    ADM's evaluator takes `mixed_6/conv:0` of the 2015 graph, its first 7 channels, channels last.
    In that graph the blocks are mixed, mixed_1, .. mixed_10, in torch-fidelity's network Mixed_5b,
    5c, .. 7c: mixed_6 is the seventh, Mixed_6d, and `conv` its 1x1 branch. The node named `conv` is
    the end of that layer, after batch normalisation (`conv/batchnorm`) and ReLU, as in OpenAI's own
    port to torch (consistency_models, evaluations/inception_v3.py).
    """
    return found[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1).float()
