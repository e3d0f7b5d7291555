"""Batches of latents with the features of their prompts."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from cmkit.batches import drawn
from cmkit.denoiser import Cond
from cmkit.errors import DataError
from cmkit.kinds import Codec, Dataset, TextEncoder
from cmkit.latents import encode
from cmkit.latents.encode import Kept
from cmkit.latents.memo import Memo
from cmkit.latents.store import Store, ahead
from cmkit.rng import Rng
from cmkit.values import DataSpec

BATCHES_AHEAD = 4


def batches(
    dataset: Dataset,
    data: DataSpec,
    codec: Codec | None,
    text: TextEncoder | None,
    kept: Kept,
    size: int,
    seed: int,
    device: torch.device,
    start: int = 0,
) -> Iterator[tuple[Tensor, Cond]]:
    """The batches of `dataset` with latents mean + std z in the place of pictures, and features in
    the place of the captions' numbers; endless, from batch `start` on, a function of (seed, batch).

    What is `kept` is read, the rest is encoded. Pictures, mirroring, classes and captions are the
    same, and so is z. `Cond.size` is that of the pictures, not cropped, where the network wants it
    and the data set does not say it.
    """
    said = text and _Said(dataset, data, text, kept.text, device)
    stream = dataset.batches(size, seed, device, start)
    if codec and kept.latents:
        stream = _read(dataset, kept.latents, size, seed, device, start)
    elif codec:
        stream = _coded(stream, codec, seed, device, start)
    for x0, cond in stream:
        yield x0, said(cond) if said else dataclasses.replace(cond, caption=None)


def _coded(
    stream: Iterator[tuple[Tensor, Cond]],
    codec: Codec,
    seed: int,
    device: torch.device,
    start: int,
) -> Iterator[tuple[Tensor, Cond]]:
    """Latents of the pictures of batches."""
    coder = codec.load(device)
    for batch, (x0, cond) in enumerate(stream, start):
        mean, std = encode.encode(coder, x0, encode.CODED)
        yield _posterior(mean, std, seed, batch), cond


def _read(
    dataset: Dataset, store: Store, size: int, seed: int, device: torch.device, start: int
) -> Iterator[tuple[Tensor, Cond]]:
    """Latents that are kept, read ahead in a thread."""
    pictures, rows = dataset.pictures(), store.read()
    assert pictures is not None

    def read() -> Iterator[tuple[dict[str, Tensor], Cond]]:
        for batch in drawn(pictures, size, seed, start):
            mirrored = np.zeros(size, bool) if batch.mirrored is None else batch.mirrored
            numbers = {"label": batch.label, "caption": batch.caption}
            told = {k: torch.from_numpy(v) for k, v in numbers.items() if v is not None}
            yield rows(batch.index, mirrored.astype(np.int64)), Cond(**told)

    for batch, (values, cond) in enumerate(ahead(read(), BATCHES_AHEAD), start):
        moved = {name: _moved(value, device).float() for name, value in values.items()}
        if cond.label is not None:
            cond = dataclasses.replace(cond, label=_moved(cond.label, device))
        yield _posterior(moved["mean"], moved.get("std"), seed, batch), cond


def _posterior(mean: Tensor, std: Tensor | None, seed: int, batch: int) -> Tensor:
    """Latents mean + std z, z drawn by (seed, batch)."""
    if std is not None:
        mean = mean + std * Rng(seed, "latents", batch, mean.device).normal_like(mean)
    return mean.contiguous(memory_format=torch.channels_last)


class _Said:
    """A batch's conditions with the features of its captions, kept or encoded."""

    def __init__(
        self,
        dataset: Dataset,
        data: DataSpec,
        text: TextEncoder,
        store: Store | None,
        device: torch.device,
    ):
        self.device, self.side = device, data.resolution if text.spec().size else None
        self.captions = encode.captions_of(dataset)
        self.rows = store.read() if store else None
        self.memo = Memo(text.load(device)) if store is None else None

    def __call__(self, cond: Cond) -> Cond:
        if cond.caption is None:
            raise DataError("dataset: a batch says no captions, though the data set has some")
        index = cond.caption.cpu().numpy()
        if self.memo:
            rows = self.memo([None if one < 0 else self.captions[one] for one in index.tolist()])
        else:
            assert self.rows
            rows = self.rows(np.where(index < 0, len(self.captions), index))
        told = {name: _moved(row, self.device).float() for name, row in rows.items()}
        size = cond.size
        if self.side is not None and size is None:
            size = encode.whole(self.side, len(index), self.device)
        return dataclasses.replace(cond, caption=None, size=size, **told)


def _moved(value: Tensor, device: torch.device) -> Tensor:
    """`value` on `device`, without waiting for it."""
    pinned = value.pin_memory() if device.type == "cuda" and not value.is_cuda else value
    return pinned.to(device, non_blocking=True)
