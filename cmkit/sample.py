"""Images from a denoiser, each by its own seed."""

from __future__ import annotations

import bisect
import io
import itertools
import math
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset

from cmkit.denoiser import Cond, Denoiser
from cmkit.device import autocast
from cmkit.errors import NonFiniteError
from cmkit.files import reading, require_regular
from cmkit.kinds import Sampler
from cmkit.latents.coding import Coding
from cmkit.rng import image_labels, image_noise
from cmkit.values import DataSpec


@dataclass(frozen=True)
class Batch:
    """Samples `first` .. `first + len(images) - 1`: uint8 (B, C, H, W) and labels on the CPU."""

    first: int
    images: Tensor
    labels: Tensor | None


@dataclass(frozen=True)
class Draws:
    """Noise, labels and prompts of samples: functions of (seed, purpose, image index)."""

    data: DataSpec
    """Shape of what the network sees."""
    seed: int
    purpose: str = "sample"
    classes: tuple[int, ...] = ()
    """Labels instead of drawn ones: image k gets the one at k modulo their number."""
    rule: str | None = "data"
    """How labels are drawn, as `Plan.label_rule` says."""
    prompts: Sequence[str] = ()
    """Image k gets the one at k modulo their number."""
    coding: Coding | None = None
    """What makes conditions of prompts, and pictures of samples."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the noise of an image."""
        return self.data.channels, self.data.resolution, self.data.resolution

    def noise(self, indices: Sequence[int], k: int) -> Tensor:
        """The k-th standard normal draw of these images, (B, C, H, W), k = 0 for the first."""
        return image_noise(self.seed, self.purpose, indices, k, self.shape)

    def labels(self, indices: Sequence[int]) -> Tensor | None:
        """Labels of these images, (B,), or None without classes: those given, or drawn in the
        data's proportions, or uniformly where the rule says so or these are not known."""
        if self.classes:
            return torch.tensor([self.classes[index % len(self.classes)] for index in indices])
        if not self.data.num_classes:
            return None
        counts = self.data.counts if self.rule == "data" else ()
        return image_labels(self.seed, self.purpose, indices, self.data.num_classes, counts)

    def prompts_of(self, indices: Sequence[int]) -> list[str]:
        """The prompts of these images; none without any."""
        return [self.prompts[k % len(self.prompts)] for k in indices] if self.prompts else []

    def pictures(self, x0: Tensor) -> Tensor:
        """Pictures (B, C, H, W), about [-1, 1], of samples x0 (B, c, h, w)."""
        return x0 if self.coding is None else self.coding.pictures(x0)


@dataclass(frozen=True)
class RepeatedDraws(Draws):
    """Draws for models that are compared on the same noise: the first `most` bytes of them are kept
    in memory, the others drawn anew."""

    kept: dict[tuple[Sequence[int], int], Tensor] = field(default_factory=dict, compare=False)
    most: int = 2**30

    def noise(self, indices: Sequence[int], k: int) -> Tensor:
        """The k-th draw of these images."""
        if (indices, k) in self.kept:
            return self.kept[indices, k]
        drawn = super().noise(indices, k)
        if sum(kept.nbytes for kept in self.kept.values()) + drawn.nbytes <= self.most:
            self.kept[indices, k] = drawn
        return drawn


@torch.inference_mode()
def sample(
    denoiser: Denoiser,
    sampler: Sampler,
    draws: Draws,
    indices: range,
    batch: int,
    device: torch.device,
    precision: str = "auto",
) -> Iterator[Batch]:
    """Batches of samples in the order of `indices`; the samples do not depend on `batch`.

    Raises NonFiniteError when a pixel is not finite.
    """
    for start, x0 in pictures(denoiser, sampler, draws, indices, batch, device, precision):
        yield Batch(start.rows.start, finite_uint8(x0, start.rows), start.labels)


@dataclass(frozen=True)
class Start:
    """The inputs of a sampler for the images `rows`, and their labels on the CPU."""

    rows: range
    x: Tensor
    cond: Cond
    noise: Callable[[int], Tensor]
    labels: Tensor | None


def starts(
    draws: Draws, std: float, indices: range, batch: int, device: torch.device
) -> Iterator[Start]:
    """Inputs of a sampler for each batch of `indices`, on `device`: noise of deviation `std`."""
    for first in range(indices.start, indices.stop, batch):
        rows = range(first, min(first + batch, indices.stop))
        labels = draws.labels(rows)

        def noise(k: int, rows: range = rows) -> Tensor:
            drawn = draws.noise(rows, k)
            return drawn.to(device, memory_format=torch.channels_last, non_blocking=True)

        cond = Cond(label=labels).to(device)
        if draws.coding and draws.prompts:
            cond = draws.coding.conditions(draws.prompts_of(rows), cond.label)
        yield Start(rows, std * noise(0), cond, noise, labels)


def pictures(
    denoiser: Denoiser,
    sampler: Sampler,
    draws: Draws,
    indices: range,
    batch: int,
    device: torch.device,
    precision: str,
) -> Iterator[tuple[Start, Tensor]]:
    """What each batch of `indices` starts from, and its pictures, about [-1, 1], (B, C, H, W) on
    `device`."""
    cast = autocast(precision, device)
    for start in starts(draws, denoiser.noise.start, indices, batch, device):
        with cast:
            x0 = sampler.sample(denoiser, start.x, start.cond, start.noise)
        yield start, draws.pictures(x0)


def finite_uint8(x0: Tensor, rows: range) -> Tensor:
    """`to_uint8` of the images `rows`, on the CPU; NonFiniteError where a pixel is not finite."""
    if not x0.isfinite().all():
        raise NonFiniteError(
            f"sample: images {rows.start} to {rows.stop - 1} hold NaN or infinity;"
            ' try precision = "fp32" and scales nearer to 1'
        )
    return to_uint8(x0).cpu()


def to_uint8(x0: Tensor) -> Tensor:
    """[-1, 1] -> uint8 from 0 to 255."""
    # Rounded to the nearest as EDM does: x0 = pixels / 127.5 - 1 then gives the pixels again.
    return (x0.float() * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)


class SavedImages(TorchDataset[Tensor]):
    """Images of a folder of `.npz` files in ADM's format: `arr_0` uint8 (N, H, W, C).

    One file is held in memory at a time, so read in order. CheckpointError for a damaged file.
    """

    def __init__(self, files: Sequence[Path]):
        self.files = list(files)
        self.starts: list[int] = [
            0,
            *itertools.accumulate(_read(file, _length) for file in self.files),
        ]
        self._held: tuple[int, np.ndarray] = (-1, np.empty(0))

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, index: int) -> Tensor:
        if not 0 <= index < len(self):
            raise IndexError(index)
        part = bisect.bisect_right(self.starts, index) - 1
        if self._held[0] != part:
            self._held = (part, _read(self.files[part], _images))
        return torch.from_numpy(self._held[1][index - self.starts[part]]).permute(2, 0, 1)


def _read(file: Path, read: Callable[[zipfile.ZipFile], Any]) -> Any:
    """What `read` finds in a `.npz` file; CheckpointError where it is damaged."""
    with reading(file):
        require_regular(file)
        try:
            with zipfile.ZipFile(file) as archive:
                return read(archive)
        except OSError:
            raise
        except Exception as error:  # zipfile and numpy raise almost anything
            raise ValueError(error) from error


def _length(archive: zipfile.ZipFile) -> int:
    """Number of images, by the header of `arr_0`; ValueError unless it is uint8 (N, H, W, C)."""
    with archive.open("arr_0.npy") as stream:
        np.lib.format.read_magic(stream)
        shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
        held = archive.getinfo("arr_0.npy").file_size - stream.tell()
    if dtype != np.uint8 or len(shape) != 4 or min(shape) < 1 or math.prod(shape) != held:
        raise ValueError(f"arr_0 is {dtype} {shape} in {held} bytes, not images")
    return shape[0]


def _images(archive: zipfile.ZipFile) -> np.ndarray:
    _length(archive)
    with archive.open("arr_0.npy") as stream:
        return np.lib.format.read_array(stream, allow_pickle=False)


def npz(batches: Sequence[Batch]) -> bytes:
    """The bytes of one `.npz` file: images `arr_0` (N, H, W, C), and labels `arr_1` if any."""
    buffer = io.BytesIO()
    count = sum(len(batch.images) for batch in batches)
    for _ in write_npz(buffer, batches, (count, *batches[0].images.shape[1:])):
        pass
    return buffer.getvalue()


def write_npz(
    file: IO[bytes], batches: Iterable[Batch], shape: tuple[int, int, int, int]
) -> Iterator[Batch]:
    """Each of `batches`, after its images are in `file`, as of `npz`; `shape` (N, C, H, W) is that
    of all images together."""
    n, channels, height, width = shape
    header = {"descr": "|u1", "fortran_order": False, "shape": (n, height, width, channels)}
    labels = []
    with zipfile.ZipFile(file, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as stream:
            np.lib.format.write_array_header_1_0(stream, header)
            for batch in batches:
                stream.write(batch.images.permute(0, 2, 3, 1).contiguous().numpy().data)
                labels += [] if batch.labels is None else [batch.labels]
                yield batch
        if labels:
            with archive.open("arr_1.npy", "w", force_zip64=True) as stream:
                np.lib.format.write_array(stream, torch.cat(labels).numpy())
