"""What the cells of a suite came to: a line for each row and axis value, over all seeds."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from cmkit.suite.intervals import Interval
from cmkit.suite.runs import NOT_RECORDED, Better, alike

SCHEMA = 1
"""Of `Results.document`."""
Baseline = str | Mapping[str, str]
"""What lines are compared with: a row, or {axis: value}, each line's own row at that value."""


def words_of(baseline: Baseline) -> str:
    """The baseline in words: "ct", or "rescaling off"."""
    return baseline if isinstance(baseline, str) else ", ".join(map(" ".join, baseline.items()))


def is_baseline(baseline: Baseline | None, row: str, axis: Mapping[str, str]) -> bool:
    """Whether a line is one that others are compared with."""
    if baseline is None or isinstance(baseline, str):
        return row == baseline
    return baseline.items() <= axis.items()


def title_of(row: str, axis: Mapping[str, str]) -> str:
    """The row and its axis values, such as "ct, nfe 2"."""
    return ", ".join([row, *(f"{name} {value}" for name, value in axis.items())])


@dataclass(frozen=True)
class Score:
    """A number of a metric over the seeds of a line."""

    values: Mapping[int, float]
    """By seed, of the cells that are finished."""
    seeds: int
    """How many seeds the suite has; fewer `values` are said: "2 of 3 seeds"."""
    mean: Interval
    images: int
    """Samples that each value is measured on."""
    measured: Mapping[str, str]
    """How: extractor, weights, reference, resize rule, labels, precision, TF32, images, ..."""


@dataclass(frozen=True)
class Verdict:
    """A line beside the baseline in one number."""

    word: Literal["better", "worse", "cannot tell"]
    difference: Interval
    """The line's less the baseline's."""
    p: float | None
    """Corrected by Holm for all comparisons of the table in this number."""
    comparisons: int


@dataclass(frozen=True)
class Line:
    """A row at one value of each axis."""

    row: str
    axis: Mapping[str, str]
    note: str
    runs: Mapping[int, str]
    """Folder of the run of each seed that is finished."""
    failures: Mapping[int, str]
    """Why a seed has none: "SampleError ..; see LOG", "not finished"."""
    scores: Mapping[str, Score]
    verdicts: Mapping[str, Verdict]
    facts: Mapping[str, Any]
    """nfe, images_per_second, parameters, peak_memory_mib, training: steps, images, evaluations,
    seconds; values found by a search, such as skip and emb; the gain by rescaling."""
    expected: Mapping[str, float] = field(default_factory=dict)
    """Scores that others published for this setting."""
    source: str | None = None
    """Where they did."""
    differs: Mapping[str, str] = field(default_factory=dict)
    """What sets it apart from the other runs of a table of runs, by dotted keys of the recipe."""

    @property
    def title(self) -> str:
        """What it is called, as `title_of`."""
        return title_of(self.row, self.axis)

    @property
    def seeds(self) -> str:
        """How many are finished: "3", or "2 of 3"."""
        some = f" of {len(self.runs) + len(self.failures)}" if self.failures else ""
        return f"{len(self.runs)}{some}"


@dataclass(frozen=True)
class Results:
    """The table of a suite, or of runs that were named one by one."""

    name: str
    baseline: Baseline | None
    lines: tuple[Line, ...]
    columns: tuple[tuple[str, Mapping[str, str]], ...]
    """(number, how it is measured) of each column: values that were measured in other ways never
    stand in one."""
    notes: tuple[str, ...]
    """Sentences below the table: what cannot be compared and why, FID of few images, lost seeds."""
    provenance: Mapping[str, Any]
    """cmkit, torch, device, command, suite file and its digest, date."""
    better: Mapping[str, Better] = field(default_factory=dict)
    """Which direction of a number is; "neither" of what says nothing of quality by itself."""

    def cells(self, line: Line) -> list[Score | None]:
        """The line's score in each column, None where it was measured in another way."""
        found: list[Score | None] = []
        placed = set()
        for number, way in self.columns:
            score = line.scores.get(number)
            fits = score and number not in placed and alike(score.measured, way)
            placed |= {number} if fits else set()
            found.append(score if fits else None)
        return found

    def headings(self) -> list[str]:
        """The number of each column, "fid (2)" where it is the second of its name."""
        names = [number for number, _ in self.columns]
        nth = [names[: index + 1].count(name) for index, name in enumerate(names)]
        return [f"{name} ({n})" if n > 1 else name for name, n in zip(names, nth, strict=True)]

    def measured(self) -> list[str]:
        """How the columns were measured, a sentence for those that were so alike."""
        found: dict[str, list[str]] = {}
        for heading, (_, way) in zip(self.headings(), self.columns, strict=True):
            known = {fact: value for fact, value in way.items() if value != NOT_RECORDED}
            text = ", ".join(f"{fact.replace('_', ' ')} {value}" for fact, value in known.items())
            found.setdefault(text, []).append(heading)
        return [f"{', '.join(names)}: {text}" for text, names in found.items() if text]

    def document(self) -> dict[str, Any]:
        """The results as JSON."""
        found = dataclasses.asdict(self)
        columns = [{"number": number, "measured": dict(way)} for number, way in self.columns]
        return {"schema": SCHEMA, **found, "columns": columns}
