"""Finished runs side by side, and beside the scores that others published."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cmkit.run.folder import RunFolder

COMPARED = ("extractor", "weights_sha256", "images", "reference", "protocol", "labels")
"""Keys of provenance that must agree for two numbers to be comparable; that of a model without
classes has no `labels`."""


@dataclass(frozen=True)
class Entry:
    """The scores of one run with their provenance, and the published ones if any."""

    name: str
    scores: Mapping[str, float]
    facts: Mapping[str, Any]
    provenance: Mapping[str, Mapping[str, Any]]
    expected: Mapping[str, float]
    source: str | None

    @property
    def differences(self) -> dict[str, float]:
        """Ours minus published, of the scores that both have."""
        ours, published = self.scores, self.expected
        return {key: ours[key] - published[key] for key in ours if key in published}


def entries(folders: Sequence[Path]) -> list[Entry]:
    """An entry for each run folder; CheckpointError where one has no measured report."""
    return [_entry(folder) for folder in folders]


def caveats(compared: Sequence[Entry]) -> Iterator[str]:
    """One sentence for each score whose values were not measured alike."""
    for key in dict.fromkeys(key for entry in compared for key in entry.scores):
        found = [entry.provenance.get(key, {}) for entry in compared if key in entry.scores]
        for fact in COMPARED:
            known = [r for r in found if fact in r] if fact == "labels" else found
            values = list(dict.fromkeys(str(record.get(fact)) for record in known))
            if len(values) > 1:
                yield f"{key}: not comparable, {fact} differs: {', '.join(values)}"


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
