"""The loss curve on the page."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cmkit.report.figures import count, number

CURVE_POINTS = 400


def finite_or_none(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def curve_of(
    records: Sequence[Mapping[str, Any]], points: int = CURVE_POINTS
) -> dict[str, Any] | None:
    """The loss over the steps of a training log, averaged to at most so many points."""
    records = list(_finite(records))
    if len(records) < 2:
        return None
    size = math.ceil(len(records) / points)
    chunks = [records[i : i + size] for i in range(0, len(records), size)]
    steps, sigmas = ([chunk[-1][key] for chunk in chunks] for key in ("step", "num_sigmas"))
    losses = [statistics.fmean(record["loss"] for record in chunk) for chunk in chunks]
    return {
        "steps": steps,
        "losses": losses,
        "sigmas": sigmas,
        "marks": _doublings(steps, sigmas),
        "log": min(losses) > 0 and max(losses) >= 10 * min(losses),
    }


def _finite(records: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Step, loss and N of the records with a finite loss; a torn last line may lack any."""
    for record in records:
        step, loss, sigmas = map(finite_or_none, map(record.get, ("step", "loss", "num_sigmas")))
        if step is not None and loss is not None:
            yield {"step": int(step), "loss": loss, "num_sigmas": int(sigmas or 0)}


def _doublings(steps: Sequence[int], sigmas: Sequence[int]) -> list[tuple[int, int]]:
    """(step, N) wherever the number of intervals, N - 1, has at least doubled since the last."""
    marks: list[tuple[int, int]] = []
    for step, sigma in zip(steps, sigmas, strict=True):
        if sigma and (not marks or sigma - 1 >= 2 * (marks[-1][1] - 1)):
            marks.append((step, sigma))
    return marks


def scores_svg(curve: Mapping[str, Any], scores: Mapping[str, Any]) -> dict[str, Any]:
    """The quick scores over the same steps, on a height of their own, and the text of each."""
    values = {int(step): value for step, value in scores["steps"].items()}
    low, high = min(values.values()), max(values.values())
    last, best = curve["steps"][-1] or 1, scores["best"]
    span = (high - low) or 1
    dots = [
        (round(100 * s / last, 3), round(92 - 84 * (v - low) / span, 3)) for s, v in values.items()
    ]
    return {
        "of": scores["of"],
        "line": " ".join(f"{x},{y}" for x, y in dots),
        "dots": [
            {
                "x": x,
                "y": y,
                "best": step == best["step"],
                "text": f"step {number(step)} · {scores['of']} {number(value)}",
            }
            for (x, y), (step, value) in zip(dots, values.items(), strict=True)
        ],
        "low": number(low),
        "high": number(high),
    }


def curve_svg(curve: Mapping[str, Any]) -> dict[str, Any]:
    """Curve, ticks and doublings of N as the template draws them, in per cent of the plot, y down,
    and the text shown at each point."""
    from matplotlib.ticker import LogLocator, MaxNLocator

    steps, losses = curve["steps"], curve["losses"]
    even = MaxNLocator(4, steps=[1, 2, 5, 10])
    height = math.log if curve["log"] else float
    low, high = height(min(losses)), height(max(losses))
    low, high = low - 0.04 * (high - low), high + 0.04 * (high - low) or 1.0

    def x(step: float) -> float:
        return round(100 * step / (steps[-1] or 1), 3)

    def y(loss: float) -> float:
        return round(100 * (high - height(loss)) / ((high - low) or 1), 3)

    locator = LogLocator(subs=(1, 2, 5)) if curve["log"] else even
    ticks = [float(v) for v in locator.tick_values(min(losses), max(losses))]
    levels = [v for v in ticks if v > 0 or not curve["log"]]
    across = [float(v) for v in even.tick_values(0, steps[-1])]
    rows = list(zip(steps, losses, curve["sigmas"], strict=True))
    points = [(x(step), y(loss)) for step, loss, _ in rows]
    return {
        "line": " ".join(f"{a},{b}" for a, b in points),
        "points": points,
        "texts": [
            f"step {number(step)} · loss {number(loss)}" + (f" · N = {sigmas}" if sigmas else "")
            for step, loss, sigmas in rows
        ],
        "levels": [(y(v), number(v)) for v in levels if 4 < y(v) < 100],
        "across": [(x(v), count(v)) for v in across if 0 <= x(v) <= 100],
        "marks": [(x(step), sigma) for step, sigma in curve["marks"]],
    }
