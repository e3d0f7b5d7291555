"""`suite.html`: one page of what the lines of a suite came to, and of what their runs drew."""

from __future__ import annotations

import itertools
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from cmkit import files
from cmkit.errors import CheckpointError
from cmkit.report.figures import number
from cmkit.report.page import render, scrub
from cmkit.runs.folder import RunFolder
from cmkit.suite import figures
from cmkit.suite.figures import Curve, Point, Style
from cmkit.suite.page_runs import (
    Finished,
    data_uri,
    gains,
    losses_of,
    provenance_of,
    styles_of,
)
from cmkit.suite.results import Line, Results, Score, Verdict, is_baseline, title_of, words_of
from cmkit.suite.tables import MANY
from cmkit.suite.work import SuiteFolder

HERE = Path(__file__).parent
COSTS = {
    "evaluations": "network evaluations of training",
    "images": "images seen in training",
    "seconds": "seconds of training",
    "steps": "steps of training",
}
FACTS = ("nfe", "images", "gain", "training", "parameters", "images_per_second", "peak_memory_mib")
"""Those that have columns of their own."""
DRAWN = 8
"""Numbers that have figures."""


@dataclass(frozen=True)
class _Column:
    """A number as it was measured in one way."""

    key: str
    title: str
    measured: Mapping[str, str]

    def score(self, line: Line) -> Score | None:
        """The line's, where it was measured in this way."""
        return None if self.other(line) else line.scores.get(self.key)

    def other(self, line: Line) -> str:
        """How else the line's was measured; "" where it was not, or in this way."""
        score = line.scores.get(self.key)
        facts = score.measured.items() if score else ()
        return ", ".join(f"{k} {v}" for k, v in facts if self.measured.get(k, v) != v)

    def verdict(self, line: Line) -> Verdict | None:
        return line.verdicts.get(self.key) if self.score(line) else None


def write_page(results: Results, folder: SuiteFolder) -> Path:
    """The path of `suite.html`, written into a suite's folder; errors as of `page`."""
    files.atomic_write(folder.page, page(results, folder))
    return folder.page


def page(results: Results, folder: SuiteFolder) -> str:
    """The page of a suite's results as HTML; its links lead from the suite's folder.

    A run whose folder is gone, and damaged samples, are said to be so. CheckpointError where the
    report of one is damaged.
    """
    runs = list(_runs(results, folder))
    columns = _columns(results)
    curves = _curves(results.lines, lambda line: line.facts.get("nfe"))
    styles = styles_of(results, [(line.row, curves[line.title]) for line in results.lines])
    keys = list(dict.fromkeys(styles.values()))
    drawn = {
        title: {"key": keys.index(styles[curve]), "marker": styles[curve].path}
        for title, curve in curves.items()
    }
    text = {
        "name": results.name,
        "baseline": words_of(results.baseline or ""),
        "own_row": isinstance(results.baseline, Mapping),
        "lede": next(filter(None, (_lede(results, column) for column in columns)), ""),
        "headlines": list(_headlines(results, columns)),
        "columns": [_heading(results, column) for column in columns],
        "lines": [
            {
                **_line(line, columns, folder),
                **drawn[line.title],
                "is_baseline": is_baseline(results.baseline, line.row, line.axis),
            }
            for line in results.lines
        ],
        "notes": [*results.notes, *_scopes(results)],
        "left_out": [key for key, better in results.better.items() if better == "neither"],
        "found": any(set(line.facts) - set(FACTS) for line in results.lines),
        "gains": gains(runs),
        **provenance_of(results, runs),
    }
    variables = {
        **scrub(text),
        "smoke": any(run.report.get("smoke") for run in runs),
        "quality": _quality(results, columns, curves, styles),
        "samples": _samples(results, runs, drawn),
        "losses": losses_of(results, runs),
    }
    rules = (f".k{k} {{ color: {s.colour}; fill: {s.fill} }}\n" for k, s in enumerate(keys))
    return render(HERE, "suite", variables, "".join(rules))


def _place(path: str, folder: SuiteFolder) -> Path:
    """The folder of a run that is named in the suite's folder, or by its path."""
    return folder.path / path if (folder.path / path).exists() else Path(path)


def _runs(results: Results, folder: SuiteFolder) -> Iterator[Finished]:
    """The runs that are there, by line and seed."""
    for line in results.lines:
        for seed, path in sorted(line.runs.items()):
            run = RunFolder(_place(path, folder))
            if run.reported:
                with run.reading_report() as report:
                    found = Finished(line, seed, run, report["stages"], report)
                yield found


def _href(path: Path, folder: SuiteFolder) -> str:
    """A relative link to a file, which no name can turn into one with a scheme; "" where there is
    no such file."""
    if not path.is_file():
        return ""
    relative = os.path.relpath(path.resolve(), folder.path.resolve())
    return quote(f"./{Path(relative).as_posix()}")


def _columns(results: Results) -> list[_Column]:
    """The numbers of which more or less is better: the others, such as spreads, stand in
    results.json and in the tables of `cmkit compare`."""
    seen: Counter[str] = Counter()
    found = []
    for key, measured in results.columns:
        seen[key] += 1
        title = f"{key} ({seen[key]})" if seen[key] > 1 else key
        if results.better.get(key) != "neither":
            found.append(_Column(key, title, measured))
    return found


def _heading(results: Results, column: _Column) -> dict[str, Any]:
    scores = list(filter(None, map(column.score, results.lines)))
    verdicts = list(filter(None, map(column.verdict, results.lines)))
    images = {score.images for score in scores}
    return {
        "title": column.title,
        "measured": dict(column.measured),
        "images": images.pop() if len(images) == 1 else None,
        "comparisons": max((verdict.comparisons for verdict in verdicts), default=0),
    }


def _curves(lines: Sequence[Line], x: Callable[[Line], Any]) -> dict[str, str]:
    """By a line's title the name of the curve over `x` that it is a point of: its row, and its
    values on the axes along which x stays the same."""
    names = {}
    for _, group in itertools.groupby(lines, lambda line: line.row):
        own = list(group)
        for line in own:
            others = [
                (axis, value) for axis, value in line.axis.items() if not _moves(own, axis, x)
            ]
            names[line.title] = title_of(line.row, dict(others))
    return names


def _moves(lines: Sequence[Line], axis: str, x: Callable[[Line], Any]) -> bool:
    """Whether x differs between some lines that differ on the axis alone."""
    found: dict[Any, set[Any]] = {}
    for line in lines:
        rest = tuple(item for item in line.axis.items() if item[0] != axis)
        found.setdefault(rest, set()).add(x(line))
    return any(len(values) > 1 for values in found.values())


def _words(results: Results, column: _Column) -> Counter[str]:
    return Counter(v.word for line in results.lines if (v := column.verdict(line)))


def _lede(results: Results, column: _Column) -> str:
    """How many lines are better and worse than the baseline; "" without comparisons."""
    words = _words(results, column)
    than = f" than {words_of(results.baseline)}" if results.baseline else ""
    said = [f"{words[word]} {word}{than}" for word in ("better", "worse") if words[word]]
    said += [f"of {words['cannot tell']} nothing can be told"] if words["cannot tell"] else []
    return f"{column.title}: {', '.join(said)}." if said else ""


def _headlines(results: Results, columns: Sequence[_Column]) -> Iterator[tuple[str, str, str]]:
    """(label, value, note) of what a reader wants to know first."""
    lines = results.lines
    rows = len({line.row for line in lines})
    yield "lines", str(len(lines)), f"of {rows} row{'s' * (rows > 1)}"
    done = sum(len(line.runs) for line in lines)
    missing = sum(len(line.failures) for line in lines)
    seeds = sorted({seed for line in lines for seed in (*line.runs, *line.failures)})
    yield "runs finished", f"{done} of {done + missing}", _seeds(seeds)
    for column in [column for column in columns if _words(results, column)][1:3]:
        words = _words(results, column)
        note = f"of {words.total()} lines; of {words['cannot tell']} nothing can be told"
        yield column.title, f"{words['better']} better, {words['worse']} worse", note


def _line(line: Line, columns: Sequence[_Column], folder: SuiteFolder) -> dict[str, Any]:
    """What the tables say of a line."""
    training = line.facts.get("training") or {}
    return {
        "title": line.title,
        "row": line.row,
        "axis": [f"{name} {value}" for name, value in line.axis.items()],
        "note": line.note,
        "cells": [_cell(line, column) for column in columns],
        "failures": [
            {"seeds": _seeds(seeds), "why": why, "log": _log(why, folder)}
            for why, seeds in _by_reason(line.failures).items()
        ],
        "runs": [
            {"seed": seed, "href": _href(_place(path, folder) / "report.html", folder)}
            for seed, path in sorted(line.runs.items())
        ],
        "facts": {key: line.facts.get(key) for key in FACTS},
        "training": {unit: training.get(unit) for unit in COSTS},
        "found": [
            f"{key} {number(value)}"
            for key, value in line.facts.items()
            if key not in (*FACTS, *MANY) and isinstance(value, str | int | float)
        ],
    }


def _by_reason(failures: Mapping[int, str]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for seed, why in sorted(failures.items()):
        found.setdefault(why, []).append(seed)
    return found


def _seeds(seeds: Sequence[int]) -> str:
    return f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"


def _cell(line: Line, column: _Column) -> dict[str, Any]:
    score, verdict = column.score(line), column.verdict(line)
    return {
        "title": column.title,
        "other": column.other(line),
        "score": score and {"mean": vars(score.mean), "images": score.images},
        "seeds": score and len(score.values),
        "of": score and score.seeds,
        "verdict": verdict and {**vars(verdict), "difference": vars(verdict.difference)},
    }


def _log(why: str, folder: SuiteFolder) -> str:
    """A link to the log that a failure's reason ends with; "" where it names none."""
    match = re.search(r"; see (\S+)$", why)
    return _href(_place(match[1], folder), folder) if match else ""


def _scopes(results: Results) -> Iterator[str]:
    """What the intervals of the table are of."""
    means = Counter(s.mean.of for line in results.lines for s in line.scores.values())
    differences = Counter(v.difference.of for ln in results.lines for v in ln.verdicts.values())
    for what, found in (("Intervals of the means", means), ("Differences", differences)):
        said = [f"{of} ({count} numbers)" if len(found) > 1 else of for of, count in found.items()]
        if said:
            yield f"{what}, 95 %: {'; '.join(said)}."


def _quality(
    results: Results,
    columns: Sequence[_Column],
    curves: Mapping[str, str],
    styles: Mapping[str, Style],
) -> dict[str, Any]:
    """Figures of each number that has values: by network evaluations, and by cost of training."""
    unit = _unit(results.lines)
    drawn: list[dict[str, Any]] = []
    left: list[str] = []
    for column in columns:
        scored = [(line, score) for line in results.lines if (score := column.score(line))]
        if len(drawn) == DRAWN:
            left += [column.title] if scored else []
            continue
        pictures = []
        for nfe, label in ((True, "network evaluations a sample"), (False, COSTS.get(unit, ""))):

            def x(line: Line, nfe: bool = nfe) -> Any:
                return line.facts.get("nfe") if nfe else _cost(line, unit)

            points = [(line, _point(x(line), line, s, nfe)) for line, s in scored if x(line)]
            if points and label:
                groups: dict[str, list[Point]] = {}
                for line, point in points:
                    groups.setdefault(curves[line.title], []).append(point)
                drawn_curves = [
                    Curve(name, styles[name], tuple(sorted(group, key=lambda p: (p.x, p.note))))
                    for name, group in groups.items()
                ]
                png = figures.quality_png(drawn_curves, label, column.title, nfe)
                pictures.append({"src": data_uri(png), "label": label})
        if pictures:
            drawn.append({"title": column.title, "pictures": pictures})
    return {"numbers": drawn, "left": left, "cost": COSTS.get(unit, "")}


def _point(x: float, line: Line, score: Score, nfe: bool) -> Point:
    mean, note = score.mean, "" if nfe else str(line.facts.get("nfe", ""))
    return Point(x, mean.value, mean.low, mean.high, tuple(score.values.values()), note)


def _cost(line: Line, unit: str) -> Any:
    return (line.facts.get("training") or {}).get(unit)


def _unit(lines: Sequence[Line]) -> str:
    """The unit of cost that most lines have and in which they differ; "" where there is none."""
    known = {unit: [c for line in lines if (c := _cost(line, unit))] for unit in COSTS}

    def differ(costs: Sequence[float]) -> bool:
        return bool(costs) and max(costs) > 1.05 * min(costs)

    best = max(COSTS, key=lambda unit: (differ(known[unit]), len(known[unit])))
    return best if differ(known[best]) else ""


def _samples(
    results: Results, runs: Sequence[Finished], drawn: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any] | None:
    """Rows of the same image numbers of one seed, that of which most lines have samples."""
    seeds = Counter(run.seed for run in runs if run.folder.sample_files())
    if not seeds:
        return None
    seed = max(seeds, key=lambda seed: (seeds[seed], -seed))
    own = {run.line.title: run for run in runs if run.seed == seed}
    most = figures.ROWS_BYTES // len(results.lines)
    rows: list[dict[str, Any]] = []
    count, above = 0, ""
    for line in results.lines:
        row = {"title": line.title, "picture": None, "labels": None, **drawn[line.title]}
        row["first"], above = line.row != above, line.row
        row["gone"] = f"No samples of seed {seed}."
        if (run := own.get(line.title)) and (paths := run.folder.sample_files()):
            try:
                images = figures.first_samples(paths)
            except CheckpointError as error:
                row["gone"] = str(error)
                rows.append(row)
                continue
            count = max(count, len(images))
            row["picture"] = figures.sample_row(images, most)
            labels = run.stages.get("sample", {}).get("labels")
            names = run.report.get("data", {}).get("classes")
            shown = labels[: len(images)] if labels else []
            row["labels"] = [str(names[k]) if names else str(k) for k in shown]
        rows.append(row)
    kinds = Counter(tuple(row["labels"]) for row in rows if row["picture"])
    classes = kinds.most_common(1)[0][0] if kinds else ()
    for row in rows:
        row["unlike"] = row["picture"] and tuple(row["labels"]) != classes
    return {"seed": seed, "rows": rows, "count": count, "classes": list(classes)}
