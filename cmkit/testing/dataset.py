"""The check of a data set."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from cmkit.batches import drawn
from cmkit.denoiser import Cond
from cmkit.kinds import Dataset, Pictures
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

    texts = _captions(report, dataset)
    first = draw()
    for batch in first:
        _check_batch(report, batch, data, texts)
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
    _check_said(report, reference, texts)
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
            _check_batch(report, batch, data, texts)
    if (pictures := dataset.pictures()) is not None:
        _check_pictures(report, pictures, data, texts)
        _check_numbers(report, pictures, first)


def _check_batch(report: Report, batch: Any, data: DataSpec, texts: int | None) -> None:
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
    else:
        report.require(
            _numbers(cond.label, 0, data.num_classes),
            f"labels are int64 (B,), from 0 to {data.num_classes - 1}",
            f"{cond.label.tolist() if isinstance(cond.label, Tensor) else cond.label!r}",
            "number the classes from 0, and count them in spec()",
        )
    said = cond.caption
    report.require(
        said is None if texts is None else _numbers(said, -1, texts),
        "`Cond.caption` is absent without captions, or int64 (B,), from -1 to their number - 1",
        f"{said.tolist() if isinstance(said, Tensor) else said!r}, and captions() has {texts}",
        "number captions() from 0; -1 is the unconditional prompt",
    )


def _numbers(given: Any, low: int, high: int) -> bool:
    """Whether `given` is (4,) int64, from `low` to `high` - 1."""
    return (
        isinstance(given, Tensor)
        and given.shape == (4,)
        and given.dtype == torch.int64
        and bool(((given >= low) & (given < high)).all())
    )


def _captions(report: Report, dataset: Dataset) -> int | None:
    """How many captions a data set has."""
    texts = dataset.captions()
    if texts is None:
        return None
    report.require(
        all(isinstance(text, str) for text in texts)
        and 0 < len(texts) == len(set(texts))
        and list(texts) == list(dataset.captions() or ()),
        "`captions` returns distinct texts, the same each time",
        f"{len(texts)} of which {len(set(texts))} differ: {list(texts[:3])!r} ..",
        "give each text once, and let pictures of one caption share its number",
    )
    return len(texts)


def _check_said(report: Report, reference: Reference, texts: int | None) -> None:
    """What is said of each image of the reference."""
    said, count = reference.captions, len(reference.images)  # type: ignore[arg-type]
    report.require(
        said is None if texts is None else said is not None and len(said) == count,
        "`Reference.captions` has a text for each image, of a data set with captions only",
        f"{'none' if said is None else len(said)} for {count} images, and captions() has {texts}",
        "Reference(images, fingerprint, captions=[what is said of image i, ..])",
    )


def _check_pictures(report: Report, pictures: Pictures, data: DataSpec, texts: int | None) -> None:
    """Laws of `pictures()` by itself."""
    for key, given, known in (
        ("labels", pictures.labels, data.num_classes),
        ("captions", pictures.captions, texts),
    ):
        report.require(
            given is None
            if known is None
            else given is not None
            and len(given) == len(pictures)
            and all(0 <= number < known for number in given),
            f"`pictures().{key}` has a number for each image, or is None where there are none",
            f"{'none' if given is None else len(given)} for {len(pictures)} images, of {known}",
            "number them from 0, one for each image",
        )
    report.require(
        0 <= pictures.empty <= 1 and isinstance(pictures.flip, bool),
        "`pictures().empty` is a probability, and `flip` true or false",
        f"{pictures.empty!r} and {pictures.flip!r}",
        "empty = 0.0 where batches keep every caption",
    )


def _check_numbers(report: Report, pictures: Pictures, batches: list[Any]) -> None:
    """Whether `cmkit.batches.drawn` of `pictures()` is what `batches` yields."""
    for (x0, cond), batch in zip(batches, drawn(pictures, 4, 0), strict=False):
        images = torch.stack([pictures[int(i)] for i in batch.index]).float() / 127.5 - 1
        if batch.mirrored is not None:
            mirrored = torch.from_numpy(batch.mirrored).view(-1, 1, 1, 1)
            images = torch.where(mirrored, images.flip(-1), images)
        for what, given, own in (
            ("images", images, x0),
            ("labels", batch.label, cond.label),
            ("captions", batch.caption, cond.caption),
        ):
            report.require(
                (given is None) == (own is None)
                and (given is None or torch.allclose(torch.as_tensor(given), own, 0, 1e-6)),
                "`batches` are those that cmkit.batches.drawn tells of `pictures()`, so that"
                " training on kept latents sees the same",
                f"other {what}",
                "let `batches` take its numbers from cmkit.batches.drawn(self.pictures(), ..)",
            )


def _same_batches(a: list[Any], b: list[Any]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x, y) and _same(c.label, d.label) and _same(c.caption, d.caption)
        for (x, c), (y, d) in zip(a, b, strict=True)
    )


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b or (a is not None and b is not None and torch.equal(a, b))


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
