"""Results as text: a table for the terminal, CSV, Markdown, LaTeX."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from cmkit.errors import RecipeError, did_you_mean
from cmkit.report.figures import count, number, score
from cmkit.suite.results import Line, Results, Score, Verdict, words_of

COSTS = ("images/s", "parameters", "steps", "seen", "evaluations", "train s", "MiB")
"""Headings of what a line took, in the order of the table."""
COUNTS = ("parameters", "seen", "evaluations")
ELSEWHERE = ("images_per_second", "parameters", "training", "peak_memory_mib", "gain")
"""Facts of a line that have headings of their own, or none."""
MANY = ("sigmas", "sites")
"""Facts that are too long for a table; the page of each run has them."""
APART = 6
"""Columns of what differs between runs; a note names further keys."""
LATEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "&": r"\&", "%": r"\%", "$": r"\$",
    "#": r"\#", "_": r"\_", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "±": r"$\pm$", "–": "--",  # noqa: RUF001
}  # fmt: skip


class Table(NamedTuple):
    """Headings, and rows of as many cells."""

    heads: list[str]
    rows: list[list[str]]


def sort(found: Results, by: str) -> Results:
    """The results with the best lines in a number first, those without it last; or in the order of
    their rows, or of a key of the recipe in which runs differ. RecipeError for what no line has."""
    apart = keys_apart(found)
    known = dict.fromkeys(name for name, _ in found.columns)
    if by in ("row", *apart) and by not in known:
        return replace(found, lines=tuple(sorted(found.lines, key=lambda line: _rank(line, by))))
    if by not in known:
        raise RecipeError(f"--sort {by}: no such number{did_you_mean(by, [*known, 'row', *apart])}")
    sign = -1 if found.better.get(by) == "higher" else 1
    places = [index for index, (name, _) in enumerate(found.columns) if name == by]

    def place(line: Line) -> tuple[int, float]:
        for order, index in enumerate(places):  # numbers of one column only can be compared
            if own := found.cells(line)[index]:
                return order, sign * own.mean.value
        return len(places), 0.0

    return replace(found, lines=tuple(sorted(found.lines, key=place)))


def _rank(line: Line, key: str) -> tuple[bool, float, str]:
    """The place of a line by a key: numbers by size, before words."""
    value = line.row if key == "row" else line.differs.get(key, "")
    try:
        return False, float(value), ""
    except ValueError:
        return True, 0.0, value


def keys_apart(found: Results) -> list[str]:
    """The keys of recipes in which runs that were named one by one differ."""
    return list(dict.fromkeys(key for line in found.lines for key in line.differs))


def table(found: Results) -> Table:
    """A row for each line, and below it the scores that others published and the differences."""
    axes = list(dict.fromkeys(axis for line in found.lines for axis in line.axis))
    seeds = any(line.failures or len(line.runs) > 1 for line in found.lines)
    facts, apart = _headings(found.lines), keys_apart(found)[:APART]
    first = ["row" if found.name else "run", *axes, *apart, *["seeds"] * seeds]
    first += _apart(facts, axes)
    judged = [any(_told(line, name) for line in found.lines) for name, _ in found.columns]
    heads, rows = list(first), []
    beside = words_of(found.baseline or "")
    for heading, verdicts in zip(found.headings(), judged, strict=True):
        heads += [heading, *[f"{heading} beside {beside}"] * verdicts]
    for line in found.lines:
        own = [line.axis.get(axis, "") for axis in axes]
        own += [*(line.differs.get(key, "") for key in apart), *[line.seeds] * seeds]
        known = facts_of(line)
        own += [_fact(fact, known, bool(line.runs)) for fact in facts]
        cells = found.cells(line)
        ours, theirs, less = [], [], []
        for (name, _), cell, verdicts in zip(found.columns, cells, judged, strict=True):
            verdict = line.verdicts.get(name) if cell else None
            ours += [_score(cell), *[_verdict(verdict)] * verdicts]
            fits = cell or name not in line.scores
            published = line.expected.get(name) if fits else None
            theirs += [score(published), *[""] * verdicts]
            gap = f"{cell.mean.value - published:+.3g}" if cell and published is not None else ""
            less += [gap, *[""] * verdicts]
        rows.append([line.row, *own, *ours])
        if line.source:
            blank = [""] * len(own)
            rows.append([f"  {line.source}", *blank, *theirs])
            rows.append(["  difference", *blank, *less])
    return Table(heads, rows)


def _told(line: Line, name: str) -> bool:
    """Whether a verdict in a number has an interval; else the notes say why it has none."""
    return name in line.verdicts and line.verdicts[name].difference.low is not None


def facts_of(line: Line) -> dict[str, Any]:
    """The facts of a line by their headings, those that are known."""
    training = line.facts.get("training", {})
    keys = ("steps", "images", "evaluations", "seconds")
    told = (line.facts.get(key) for key in ("images_per_second", "parameters"))
    costs = (*told, *(training.get(key) for key in keys), line.facts.get("peak_memory_mib"))
    own = {key: value for key, value in line.facts.items() if key not in (*ELSEWHERE, *MANY)}
    found = {**own, **dict(zip(COSTS, costs, strict=True))}
    return {key: value for key, value in found.items() if value is not None}


def _headings(lines: Sequence[Line]) -> list[str]:
    """Headings of the facts that any line knows and that no axis tells, what it took last."""
    known = dict.fromkeys(
        key
        for line in lines
        for key, value in facts_of(line).items()
        if str(value) != line.axis.get(key)
    )
    own = [key for key in known if key not in COSTS]
    return [*own, *(key for key in COSTS if key in known)]


def _apart(facts: Sequence[str], axes: Sequence[str]) -> list[str]:
    """Headings of facts, in capitals where an axis is called so: nfe is a name there."""
    return [fact.upper() if fact in axes else fact for fact in facts]


def _fact(heading: str, known: Mapping[str, Any], sampled: bool) -> str:
    scale = heading not in (*COSTS, "images", "nfe")  # a rescaler's number, 1 where it has none
    value = known.get(heading, 1 if scale and sampled else None)
    return count(value) if heading in COUNTS and value is not None else number(value)


def _score(cell: Score | None) -> str:
    """A mean with half the width of its interval, and how many seeds it is of if not all."""
    if cell is None:
        return number(None)
    mean = cell.mean
    half = "" if mean.high is None else f" ±{number(mean.high - mean.value, 2)}"
    some = f" ({len(cell.values)} of {cell.seeds} seeds)" if len(cell.values) < cell.seeds else ""
    return f"{score(mean.value)}{half}{some}"


def _verdict(verdict: Verdict | None) -> str:
    """The word, the difference, and its interval."""
    if verdict is None:
        return ""
    found = verdict.difference
    between = "" if found.low is None else f" [{found.low:+.3g}, {found.high:+.3g}]"
    return f"{verdict.word} {found.value:+.3g}{between}"


def to_csv(found: Results) -> str:
    """Every number in full: a column for the mean, the ends of its interval, the images and seeds,
    and of each verdict, which is beside what "beside" says. Empty where a line has none that is
    comparable with the column's."""
    axes = list(dict.fromkeys(axis for line in found.lines for axis in line.axis))
    facts, apart = _headings(found.lines), keys_apart(found)
    heads = ["row", *axes, *apart, "seeds", "seeds_of", "beside", *_apart(facts, axes)]
    parts = ("", "low", "high", "images", "seeds", "published")
    judged = ("difference", "difference_low", "difference_high", "p", "verdict")
    for heading in found.headings():
        heads += [f"{heading}_{part}".rstrip("_") for part in (*parts, *judged)]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(heads)
    for line in found.lines:
        known = facts_of(line)
        total = len(line.runs) + len(line.failures)
        beside = words_of(found.baseline) if found.baseline and line.verdicts else ""
        row: list[Any] = [line.row, *(line.axis.get(axis, "") for axis in axes)]
        row += [*(line.differs.get(key, "") for key in apart), len(line.runs), total, beside]
        row += [known.get(fact) for fact in facts]
        for (name, _), cell in zip(found.columns, found.cells(line), strict=True):
            published = line.expected.get(name)
            if cell is None:
                row += [None] * 5 + [None if name in line.scores else published] + [None] * 5
                continue
            mean, verdict = cell.mean, line.verdicts.get(name)
            row += [mean.value, mean.low, mean.high, cell.images, len(cell.values), published]
            if verdict:
                ends = verdict.difference
                row += [ends.value, ends.low, ends.high, verdict.p, verdict.word]
            else:
                row += [None] * 5
        writer.writerow(row)
    return text.getvalue()


def to_markdown(found: Results) -> Iterator[str]:
    """A pipe table, and the notes as a list."""
    heads, rows = table(found)
    yield f"| {' | '.join(map(_pipes, heads))} |"
    yield f"|{'---|' * len(heads)}"
    for row in rows:
        yield f"| {' | '.join(map(_pipes, row))} |"
    yield ""
    yield from (f"- {_pipes(note)}" for note in (*found.measured(), *found.notes))


def _pipes(text: str) -> str:
    return re.sub(r"([\\|*_`<])", r"\\\1", text.strip())


def to_latex(found: Results) -> Iterator[str]:
    """A tabular of the package booktabs, and the notes as comments."""
    heads, rows = table(found)
    columns = "l" + "r" * (len(heads) - 1)
    yield from (f"% {note}" for note in (*found.measured(), *found.notes))
    yield from (rf"\begin{{tabular}}{{{columns}}}", r"\toprule", _tex(heads), r"\midrule")
    yield from (*map(_tex, rows), r"\bottomrule", r"\end{tabular}")


def _tex(row: Sequence[str]) -> str:
    cells = ("".join(LATEX.get(c, c) for c in cell.strip()) for cell in row)
    return f"{' & '.join(cells)} \\\\"


def to_text(found: Results) -> Iterator[str]:
    """The table in columns, and the notes below it."""
    heads, rows = table(found)
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    for row in (heads, *rows):
        cells = (text.ljust(width) for text, width in zip(row, widths, strict=True))
        yield "  ".join(cells).rstrip()
    yield from (f"measured: {how}" for how in found.measured())
    yield from (f"note: {note}" for note in found.notes)
