"""What a suite's page tells of the runs: gains by rescaling, losses, and how to do them again."""

from __future__ import annotations

import base64
import itertools
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cmkit.report.curve import curve_of
from cmkit.report.figures import number
from cmkit.runs.folder import RunFolder
from cmkit.suite import figures
from cmkit.suite.figures import Style
from cmkit.suite.intervals import mean_interval
from cmkit.suite.results import Line, Results, title_of

LOSS_POINTS = 120
"""Of a loss curve among many: it is smoothed by the averages between them."""


@dataclass(frozen=True)
class Finished:
    """A finished run of a line."""

    line: Line
    seed: int
    folder: RunFolder
    stages: Mapping[str, Any]
    report: Mapping[str, Any]


def gains(runs: Sequence[Finished]) -> list[dict[str, Any]]:
    """By minimized number: rescaled less unscaled of each line and seed whose search confirmed
    it, with places on a common scale of 0 to 100."""
    groups: dict[str, list[tuple[Finished, Mapping[str, Any]]]] = {}
    for run in runs:
        if confirm := run.stages.get("search", {}).get("confirm"):
            key = run.stages["search"]["minimize"]
            groups.setdefault(key, []).append((run, confirm))
    return [{"number": key, **_gain(found)} for key, found in groups.items()]


def _gain(found: Sequence[tuple[Finished, Mapping[str, Any]]]) -> dict[str, Any]:
    differences = [confirm["difference"] for _, confirm in found]
    ends = [0.0, *(d[end] for d in differences for end in ("low", "high"))]
    low, span = min(ends), (max(ends) - min(ends)) or 1.0

    def place(value: float) -> float:
        return float(round(2 + 96 * (value - low) / span, 2))

    lines = []
    for title, group in itertools.groupby(found, lambda pair: pair[0].line.title):
        own = list(group)
        rows = []
        for run, confirm in own:
            search, difference = run.stages["search"], confirm["difference"]
            helps, harms = difference["high"] < 0, difference["low"] > 0
            rows.append(
                {
                    "seed": run.seed,
                    "plain": confirm["plain"]["mean"],
                    "rescaled": confirm["rescaled"]["mean"],
                    "difference": difference,
                    "at": {key: place(difference[key]) for key in ("mean", "low", "high")},
                    "outcome": "better" if helps else "worse" if harms else "open",
                    "scales": [f"{k} {number(search['best'][k])}" for k in [*search["axes"]][:4]],
                    "noise": len(confirm["plain"]["values"]),
                    "images": confirm.get("images"),
                }
            )
        lines.append({"title": title, "rows": rows, **_over_seeds(rows)})
    return {"lines": lines, "zero": place(0.0)}


def _over_seeds(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means over the seeds of a line, and the interval of the difference: that of the only
    checkpoint where there is one."""
    means = {key: statistics.fmean(row[key] for row in rows) for key in ("plain", "rescaled")}
    if len(rows) == 1:
        one = rows[0]["difference"]
        return {**means, "over": {**one, "value": one["mean"], "of": "of one checkpoint"}}
    return {**means, "over": vars(mean_interval([row["difference"]["mean"] for row in rows]))}


def losses_of(results: Results, runs: Sequence[Finished]) -> dict[str, Any] | None:
    """A figure of each training's loss, once however many lines share it."""
    groups: dict[tuple[int, str], list[Finished]] = {}
    for run in sorted(runs, key=lambda run: run.seed):
        if "train" in run.stages:
            key = run.folder.inputs().get("keys", {}).get("train") or str(run.folder.path)
            groups.setdefault((run.seed, key), []).append(run)
    names: dict[str, tuple[str, str]] = {}
    logs: dict[tuple[str, str], list[tuple[list[int], list[float]]]] = {}
    for group in groups.values():
        named = (names[run.line.title] for run in group if run.line.title in names)
        name = next(named, None) or _training([run.line for run in group])
        names |= {run.line.title: name for run in group}
        if curve := curve_of(group[0].folder.log(), LOSS_POINTS):
            logs.setdefault(name, []).append((curve["steps"], _smooth(curve["losses"])))
    if not logs:
        return None
    styles = styles_of(results, list(logs))
    png = figures.losses_png([(name, styles[name], own) for (_, name), own in logs.items()])
    seeds = max(map(len, logs.values()))
    return {"src": data_uri(png), "trainings": sum(map(len, logs.values())), "seeds": seeds}


def _smooth(losses: Sequence[float]) -> list[float]:
    """Running means over a twentieth of a curve."""
    reach = len(losses) // 40
    return [statistics.fmean(losses[max(0, k - reach) : k + reach + 1]) for k in range(len(losses))]


def _training(lines: Sequence[Line]) -> tuple[str, str]:
    """(row, name) of a training that lines share: by the axis values that all of them have."""
    first, rows = lines[0], list(dict.fromkeys(line.row for line in lines))
    shared = [i for i in first.axis.items() if all(i in line.axis.items() for line in lines)]
    more = f" and {len(rows) - 1} more" if len(rows) > 1 else ""
    return first.row, title_of(first.row, dict(shared)) + more


def provenance_of(results: Results, runs: Sequence[Finished]) -> dict[str, Any]:
    """Texts of several lines, such as the suite's file, and one-line facts."""
    facts: dict[str, str] = {}
    texts = []
    for key, value in _flat(results.provenance):
        if "\n" in value.strip():
            texts.append((key, value.strip()))
        else:
            facts[key] = value
    command, date = facts.pop("command", ""), facts.pop("time", "")
    machines: dict[str, Counter[str]] = {}
    for run in runs:
        environment = run.report.get("environment", {})
        for key, value in _flat({**environment, **environment.get("packages", {})}):
            if not key.startswith("packages"):
                machines.setdefault(key, Counter())[value] += 1
    seen = [(key, _several(values)) for key, values in machines.items()]
    found = {"texts": texts, "facts": list(facts.items()), "machines": seen}
    return {"command": command, "date": date, **found}


def _several(values: Mapping[str, int]) -> str:
    if len(values) == 1:
        return next(iter(values))
    return ", ".join(f"{value} ({count} runs)" for value, count in values.items())


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """(key, text) of nested tables; lists of numbers and words in one."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list | tuple):
        yield name, " ".join(map(str, value))
    elif value is not None:
        yield name, str(value)


def styles_of(results: Results, names: Sequence[tuple[str, str]]) -> dict[str, Style]:
    """By name of (row, name): colours by row, variants of one row by order."""
    rows = [r for r in dict.fromkeys(line.row for line in results.lines) if r != results.baseline]
    variants: dict[str, list[str]] = {}
    found = {}
    for row, name in names:
        own = variants.setdefault(row, [])
        if name not in own:
            own.append(name)
        found[name] = Style.of(rows.index(row) if row in rows else None, own.index(name))
    return found


def data_uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
