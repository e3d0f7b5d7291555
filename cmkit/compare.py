"""Finished runs side by side, and beside the scores that others published."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from cmkit.errors import RecipeError
from cmkit.run.folder import RunFolder

COMPARED = ("extractor", "weights_sha256", "images", "reference", "protocol", "labels")
"""Keys of provenance that must agree for two numbers to be comparable; the `labels` of a model
without classes are like any other's."""


class Column(NamedTuple):
    """A column of a table of scores: its heading, the score, and how it was measured."""

    heading: str
    score: str
    measured: Mapping[str, str]


@dataclass(frozen=True)
class Entry:
    """The scores of one run with their provenance, and the published ones if any."""

    name: str
    scores: Mapping[str, float]
    facts: Mapping[str, Any]
    provenance: Mapping[str, Mapping[str, Any]]
    expected: Mapping[str, float]
    source: str | None

    def places(self, columns: Sequence[Column]) -> list[str]:
        """The score of each column, "" where this run's was measured in another way."""
        found: list[str] = []
        for column in columns:
            key = column.score
            own = key in self.scores
            fits = not own or (_alike(self.measured(key), column.measured) and key not in found)
            found.append(key if fits else "")
        return found

    def measured(self, key: str) -> dict[str, str]:
        """How the score was measured, which must be the same for two that are compared."""
        record = self.provenance.get(key, {})
        facts = (fact for fact in COMPARED if fact != "labels" or fact in record)
        return {fact: _said(record.get(fact)) for fact in facts}

    @property
    def differences(self) -> dict[str, float]:
        """Ours minus published, of the scores that both have."""
        ours, published = self.scores, self.expected
        return {key: ours[key] - published[key] for key in ours if key in published}


def entries(folders: Sequence[Path]) -> list[Entry]:
    """An entry for each run folder; CheckpointError where one has no measured report, RecipeError
    for smoke runs beside others."""
    found = [_entry(folder) for folder in folders]
    smoke = [folder for folder in folders if RunFolder(folder).report().get("smoke")]
    if 0 < len(smoke) < len(folders):
        raise RecipeError(
            f"{smoke[0]}: a smoke run, whose numbers mean nothing beside those of other runs; leave"
            " it out"
        )
    return found


def unfinished(folders: Sequence[Path]) -> list[Path]:
    """Those of the run folders whose runs have no report yet."""
    runs = {path: RunFolder(path) for path in folders}
    return [path for path, run in runs.items() if run.recipe.is_file() and not run.finished]


def columns(compared: Sequence[Entry]) -> list[Column]:
    """The columns of a table of scores: a score has one for each way that it was measured in, so
    that numbers in one column can be compared."""
    found = []
    for key in dict.fromkeys(key for e in compared for key in (*e.scores, *e.expected)):
        ways: list[Mapping[str, str]] = []
        for way in (entry.measured(key) for entry in compared if key in entry.scores):
            if not any(_alike(way, other) for other in ways):
                ways.append(way)
        for number, how in enumerate(ways or [{}], 1):
            found.append(Column(f"{key} ({number})" if number > 1 else key, key, how))
    return found


def _alike(way: Mapping[str, str], other: Mapping[str, str]) -> bool:
    """Whether two scores were measured alike, by what both say."""
    return all(way[fact] == other[fact] for fact in way.keys() & other.keys())


def caveats(compared: Sequence[Entry]) -> Iterator[str]:
    """One sentence for each score whose values were not measured alike."""
    for key in dict.fromkeys(key for entry in compared for key in entry.scores):
        found = [entry.provenance.get(key, {}) for entry in compared if key in entry.scores]
        for fact in COMPARED:
            known = [r for r in found if fact in r] if fact == "labels" else found
            values = list(dict.fromkeys(_said(record.get(fact)) for record in known))
            if len(values) > 1:
                yield f"{key}: not comparable, {fact} differs: {', '.join(values)}"


def _said(fact: object) -> str:
    """A fact of provenance in a few words."""
    text = "not recorded" if fact is None else str(fact)
    return f"{text[:12]}.." if re.fullmatch(r"[0-9a-f]{64}", text) else text


def _entry(folder: Path) -> Entry:
    with RunFolder(folder).reading_report() as report:
        stages, recipe = report["stages"], report["recipe"]
        measured = stages.get("metric", {"values": {}, "provenance": []})
        sampled = stages.get("sample", {})
        expected = recipe.get("expected", {"scores": {}})
        moved = {k: v for k, v in sampled.get("scales", {}).items() if v != 1}
        classes = (report.get("data") or {}).get("num_classes")
        before = {"labels": "uniform"} if classes and "label_rule" not in sampled else {}
        return Entry(
            name=f"{report['name']}-{report['hash']}",
            scores=dict(measured["values"]),
            facts={"images": sampled.get("images"), "nfe": sampled.get("nfe"), **moved},
            provenance={
                key: {**before, **record}
                for record in measured["provenance"]
                for key in record["numbers"]
            },
            expected=dict(expected["scores"]),
            source=expected.get("source"),
        )
