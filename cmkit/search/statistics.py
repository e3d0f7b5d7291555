"""The best of scored cells, and intervals over noise seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from cmkit.errors import NonFiniteError


def best(scored: Sequence[Mapping[str, Any]], count: int) -> list[Mapping[str, Any]]:
    """The `count` records with the lowest scores; NonFiniteError when no cell has one."""
    finite = [record for record in scored if record["score"] is not None]
    if not finite:
        raise NonFiniteError(
            "search: no cell has a finite score; try values nearer to the rescaler's own, or"
            ' search.precision = "fp32" if it is not'
        )
    return sorted(finite, key=lambda record: record["score"])[:count]


def interval(values: Sequence[float]) -> dict[str, float]:
    """Mean and 95 % confidence interval (Student's t) of independent values."""
    from scipy.stats import t  # type: ignore[import-untyped]

    mean = statistics.fmean(values)
    half = float(t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))
    return {"mean": mean, "low": mean - half, "high": mean + half}


def verdict(key: str, plain: Sequence[float], rescaled: Sequence[float]) -> str:
    """One sentence that says who won on fresh noise, and by how much."""
    difference = interval([b - a for a, b in zip(plain, rescaled, strict=True)])
    before, after = statistics.fmean(plain), statistics.fmean(rescaled)
    numbers = (
        f"{key} {before:.4g} -> {after:.4g}, difference {difference['mean']:+.3g}"
        f" [{difference['low']:+.3g}, {difference['high']:+.3g}] over {len(plain)} noise seeds"
    )
    if difference["high"] < 0:
        return f"Rescaling helps: {numbers}."
    if difference["low"] > 0:
        return f"Rescaling harms: {numbers}."
    return f"No difference that these seeds can show: {numbers}."
