"""The check of a data set."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from cmkit.denoiser import Cond
from cmkit.kinds import Dataset
from cmkit.testing.protocol import Report, report_on, shown
from cmkit.testing.subjects import CPU, draws
from cmkit.values import DataSpec, Reference


def check_dataset(dataset: Dataset) -> None:
    """Check the first batches of a data set and its reference images."""
    report = report_on(dataset)
    data = dataset.spec()
    report.require(
        isinstance(data, DataSpec) and data == dataset.spec(),
        "`spec` returns a cmkit.DataSpec, the same each time",
        f"{data!r}, then {dataset.spec()!r}",
        "return DataSpec(channels, resolution, num_classes)",
    )
    said = dataset.declared()
    report.require(
        said is None
        or (
            replace(said, classes=data.classes, counts=data.counts) == data
            and said.classes in ((), data.classes)
            and said.counts in ((), data.counts)
        ),
        "`declared` returns what `spec` does, maybe without names and counts, or None",
        f"{said!r}, and spec() {data!r}",
        "return None where the keys alone do not decide it",
    )

    for key, values in (("classes", data.classes), ("counts", data.counts)):
        report.require(
            not values or len(values) == data.num_classes,
            f"{key} are one for each class, or none",
            f"{len(values)} of {data.num_classes}",
            "give one for each number from 0 to num_classes - 1",
        )

    def draw(seed: int = 0, start: int = 0, count: int = 3, size: int = 4) -> list[Any]:
        with report.untouched("batches"):
            return list(itertools.islice(dataset.batches(size, seed, CPU, start), count))

    first = draw()
    for batch in first:
        _check_batch(report, batch, data)
    for seen, batches, same in (
        ("two streams of one seed differ", draw(), first),
        ("batch 1 of a stream from start = 1 is another", draw(start=1, count=2), first[1:]),
    ):
        report.require(
            _same_batches(batches, same),
            "a batch is a function of (seed, batch number), so that a run resumes to the same bits",
            seen,
            "order by cmkit.permutation(seed, purpose, epoch, n), and count from `start`",
        )
    reference = dataset.reference()
    _check_reference(report, dataset, reference, data)
    count = len(reference.images)  # type: ignore[arg-type]
    if count > 4:
        report.require(
            not _same_batches(first, draw(seed=1)),
            "another seed is another order",
            "seeds 0 and 1 give the same batches",
            "let the order depend on `seed`",
        )
    if count <= 64:
        for batch in draw(count=count // 4 + 3):
            _check_batch(report, batch, data)


def _check_batch(report: Report, batch: Any, data: DataSpec) -> None:
    report.require(
        isinstance(batch, tuple) and len(batch) == 2 and isinstance(batch[1], Cond),
        "a batch is (x0, cmkit.Cond)",
        f"{type(batch).__name__}",
        "yield x0, Cond(label=...)",
    )
    x0, cond = batch
    shape = (4, *draws(data).shape)
    report.require(
        isinstance(x0, Tensor) and tuple(x0.shape) == shape and x0.dtype == torch.float32,
        f"x0 is float32 of shape {shape}, every batch full",
        f"{shown(x0)}",
        "go on into the next epoch when one ends",
    )
    report.require(
        bool((x0.abs() <= 1).all()),
        "x0 lies in [-1, 1]",
        f"from {x0.min().item():g} to {x0.max().item():g}",
        "x0 = pixels / 127.5 - 1",
    )
    if data.num_classes is None:
        report.require(
            cond.label is None,
            "labels are absent where spec().num_classes is None",
            f"{shown(cond.label)}",
            "set num_classes, or give no label",
        )
        return
    report.require(
        isinstance(cond.label, Tensor)
        and cond.label.shape == (4,)
        and cond.label.dtype == torch.int64
        and bool(((cond.label >= 0) & (cond.label < data.num_classes)).all()),
        f"labels are int64 (B,), from 0 to {data.num_classes - 1}",
        f"{cond.label.tolist() if isinstance(cond.label, Tensor) else cond.label!r}",
        "number the classes from 0, and count them in spec()",
    )


def _same_batches(a: list[Any], b: list[Any]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x, y)
        and (c.label is d.label or (c.label is not None and torch.equal(c.label, d.label)))
        for (x, c), (y, d) in zip(a, b, strict=True)
    )


def _check_reference(
    report: Report, dataset: Dataset, reference: Reference, data: DataSpec
) -> None:
    report.require(
        isinstance(reference, Reference) and len(reference.images) > 0,  # type: ignore[arg-type]
        "`reference` returns a cmkit.Reference with images",
        f"{shown(reference)}",
        "return Reference(images, fingerprint)",
    )
    image, shape = reference.images[0], draws(data).shape
    report.require(
        isinstance(image, Tensor) and image.dtype == torch.uint8 and tuple(image.shape) == shape,
        f"reference images are uint8 of shape {shape}, as spec() says",
        f"{shown(image)}",
        "give the pixels before they become x0",
    )
    again = dataset.reference()
    report.require(
        bool(reference.fingerprint)
        and isinstance(reference.fingerprint, str)
        and again.fingerprint == reference.fingerprint
        and torch.equal(again.images[0], image),
        "a fingerprint is a string that follows from the pixels",
        f"{reference.fingerprint!r}, then {again.fingerprint!r}",
        "hash the files or their names, sizes and times",
    )
