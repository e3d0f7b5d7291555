"""The check of a metric."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from cmkit.kinds import Metric
from cmkit.measure import Images
from cmkit.testing.protocol import report_on
from cmkit.testing.subjects import CPU, DIGITS, draws, same
from cmkit.values import DataSpec, Reference


def check_metric(
    metric: Metric,
    data: DataSpec = DIGITS,
    images: Tensor | None = None,
    reference: Tensor | None = None,
    captions: Sequence[str] | None = None,
) -> None:
    """Check a metric on uint8 images (N, C, H, W), by default 32 random ones like `data`, which
    were drawn from the prompts `captions`, if any."""
    report = report_on(metric)
    ours = Images(_pictures(0, data) if images is None else images)
    real = Images(_pictures(1, data) if reference is None else reference)
    given = Reference(real, "cmkit-testing", captions=captions), CPU
    names = metric.keys()
    report.require(
        isinstance(names, tuple) and 0 < len(set(names)) == len(names),
        "`keys` is a tuple of different names",
        f"{names!r}",
        "return a tuple such as ('score',)",
    )
    metric.check(data, len(ours))
    with report.untouched("measure"):
        found = metric.measure(ours, *given)
    report.require(
        set(found) == set(names),
        "`measure` returns the numbers that `keys` names",
        f"keys {sorted(names)}, numbers {sorted(found)}",
        "make the two agree",
    )
    report.require(
        all(type(value) in (int, float) and math.isfinite(value) for value in found.values()),
        "numbers are finite Python floats",
        f"{found}",
        "call .item() on a tensor; raise cmkit.NonFiniteError for a number that is none",
    )
    again = metric.measure(ours, *given)
    report.require(
        again == found,
        "the same images have the same numbers",
        f"{found}, then {again}",
        "seed what you draw: cmkit.Rng(0, 'my-metric', 0, device)",
    )
    meter, resumed = (metric.meter(len(ours), *given) for _ in range(2))
    if meter and resumed:
        first, rest = ours.images.split([5, len(ours) - 5])
        meter.add(first)
        state = {name: value.clone() for name, value in meter.state().items()}
        meter.add(rest)
        taken = meter.values()
        report.require(
            set(taken) == set(found)
            and all(math.isclose(taken[key], found[key], rel_tol=1e-4) for key in found),
            "a meter returns what `measure` does, in whatever batches the images come",
            f"{found}, then {taken}",
            "count images, not batches, and take every one",
        )
        resumed.restore(state)
        kept = resumed.state()
        resumed.add(rest)
        report.require(
            same(kept, state) and resumed.values() == taken,
            "a meter that is given another's `state` goes on from there, bit for bit",
            f"{taken}, then {resumed.values()}",
            "return every tensor that `add` changes, on the CPU",
        )
        fewer, more = metric.meter(len(ours) // 2, *given), metric.meter(len(ours), *given)
        assert fewer is not None
        assert more is not None
        first, rest = ours.images.split([len(ours) // 2, len(ours) - len(ours) // 2])
        fewer.add(first)
        try:
            more.restore(fewer.state())
        except ValueError:  # a search draws those images again
            more = None
        if more:
            more.add(rest)
            taken = more.values()
            report.require(
                all(math.isclose(taken[key], found[key], rel_tol=1e-4) for key in found),
                "a meter goes on from the state of one of fewer images, or `restore` refuses it",
                f"{found}, then {taken}",
                "raise ValueError in `restore` where a number depends on how many will come",
            )
    said = metric.features(ours, *given)
    wrong = [name for name, sets in said.items() if len(sets["rows"]) != len(ours)]
    unknown = {*metric.higher, *metric.neither, *said} - {*names}
    report.require(
        not wrong and not unknown,
        "`higher`, `neither` and `features` name numbers of `keys`, with a row an image",
        f"no number {', '.join(sorted(unknown)) or 'missing'}, rows of {wrong}",
        "take the names that `keys` returns",
    )
    for name in names:
        one = metric.only(name)
        report.require(
            name in one.keys(),  # noqa: SIM118 - a method of Metric, not of a mapping
            "only(key) still returns the key",
            f"only({name!r}).keys() is {one.keys()}",
            "keep that number switched on",
        )
        value = one.measure(ours, *given)[name]
        report.require(
            math.isclose(value, found[name], rel_tol=1e-6, abs_tol=1e-12),
            "only(key) returns the same number",
            f"{name} = {value} alone and {found[name]} among all",
            "let the numbers not depend on each other",
        )
    with report.trying("`provenance` can be written as JSON", "return plain numbers and strings"):
        json.dumps(metric.provenance(), allow_nan=False)


def _pictures(seed: int, data: DataSpec) -> Tensor:
    noise = draws(data, seed).noise(range(32), 0)
    return (noise * 60 + 128).clamp(0, 255).to(torch.uint8)
