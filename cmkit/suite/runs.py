"""A finished run as its report tells it, and how each of its numbers was measured."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cmkit.errors import CheckpointError, PluginError
from cmkit.kinds import Metric
from cmkit.plugins import Registry
from cmkit.report import figures
from cmkit.runs.folder import RunFolder

COMPARED = (
    "extractor",
    "weights_sha256",
    "images",
    "reference",
    "protocol",
    "resize",
    "precision",
    "tf32",
    "torch_fidelity",
    "labels",
)
"""Facts that must agree for two numbers to be comparable; the `labels` of a model without classes
are like any other's."""
OF_ONE_NUMBER = ("numbers", "features", "compared_with", "neighbours", "kid_subset_size")
"""Keys of provenance that say nothing of the metric's other numbers, or follow from COMPARED."""


Better = Literal["lower", "higher", "neither"]
"""Which direction of a number is; "neither" of what says nothing of quality by itself."""
NOT_RECORDED = "not recorded"
COSTS = ("images_per_second", "parameters", "peak_memory_mib", "steps", "images", "seconds")
"""Images drawn a second, and of the training its steps, the images that it saw, and seconds."""


@dataclass(frozen=True)
class Run:
    """The scores of a finished run with their provenance, and the published ones if any."""

    folder: RunFolder
    name: str
    """NAME-KEY, the name of its folder as it was begun."""
    recipe: Mapping[str, Any]
    """As it was resolved."""
    scores: Mapping[str, float]
    facts: Mapping[str, Any]
    """Images drawn, nfe, and the rescaler's values other than 1."""
    provenance: Mapping[str, Mapping[str, Any]]
    metrics: Mapping[str, str]
    """The metric that gave each number."""
    expected: Mapping[str, float]
    source: str | None
    stages: Mapping[str, Mapping[str, Any]]
    environment: Mapping[str, Any]
    inputs: Mapping[str, Mapping[str, Any]]
    smoke: bool
    seed: int
    cost: Mapping[str, float | None]
    """What it took, by the keys of COSTS."""

    def measured(self, number: str) -> dict[str, str]:
        """How the number was measured, which must be the same for two that are compared."""
        said = self.provenance[number]
        own = (fact for fact in said if fact not in (*COMPARED, *OF_ONE_NUMBER))
        known = (fact for fact in COMPARED if fact != "labels" or fact in said)
        return {fact: _said(said.get(fact)) for fact in (*known, *own)}

    def beside(self, number: str) -> str:
        """The pictures that the number was measured beside, in words; "" where nothing is said."""
        table = self.recipe.get("dataset")
        heldout = "held out of " * number.startswith("heldout_")
        return f"{heldout}{data_words(table)}" if table else ""

    @property
    def differences(self) -> dict[str, float]:
        """Ours minus published, of the scores that both have."""
        ours, published = self.scores, self.expected
        return {key: ours[key] - published[key] for key in ours if key in published}

    @property
    def start(self) -> frozenset[str]:
        """What the training, or the sampling, begins with: its teacher and the weights of its
        network, by their digests where these are known."""
        found = set()
        for table in ("teacher", "denoiser"):
            if weights := self.recipe.get(table, {}).get("weights"):
                found.add(str(self.inputs.get(table, {}).get("weights", weights)))
        return frozenset(found)

    def shares(self, other: Run) -> bool:
        """Whether the trainings of both begin with the same weights (a teacher's or the network's,
        or none), and their step k takes the same images."""
        return self._begun_with == other._begun_with

    @property
    def _begun_with(self) -> tuple[object, ...]:
        train = self.recipe.get("train") or {}
        contents = self.inputs.get("dataset", {}).get("contents")
        data = (self.recipe.get("dataset"), contents)
        return self.seed, self.start, data, train.get("batch"), train.get("accumulate")

    def document(self) -> dict[str, Any]:
        """The run as JSON."""
        keys = ("name", "scores", "facts", "provenance", "expected", "source", "differences")
        return {**{key: getattr(self, key) for key in keys}, "folder": str(self.folder.path)}


def alike(way: Mapping[str, str], other: Mapping[str, str]) -> bool:
    """Whether two numbers were measured alike, by what both say."""
    return all(way[fact] == other[fact] for fact in way.keys() & other.keys())


def caveats(runs: Sequence[Run]) -> Iterator[str]:
    """One sentence for each number, and fact that its values were not measured alike in."""
    for number in dict.fromkeys(number for run in runs for number in run.scores):
        found = [run.measured(number) for run in runs if number in run.scores]
        for fact in dict.fromkeys(fact for way in found for fact in way):
            values = list(dict.fromkeys(way[fact] for way in found if fact in way))
            if len(values) > 1 and fact == "reference":
                yield _other_references(number, [run for run in runs if number in run.scores])
            elif len(values) > 1:
                yield f"{number}: not comparable, {fact} differs: {', '.join(values)}"


def _other_references(number: str, runs: Sequence[Run]) -> str:
    """The sentence that a number of these runs was measured beside other pictures, and which."""
    found: dict[str, list[str]] = {}
    for run in runs:
        found.setdefault(run.measured(number)["reference"], []).append(run.beside(number))
    each = []
    for value, said in found.items():
        words = " or ".join(filter(None, dict.fromkeys(said)))
        each.append(f"{value} ({words})" if words else value)
    cure = "`cmkit measure RUN.. --data DATA` measures all beside the same"
    return f"{number}: not comparable, reference differs: {', '.join(each)}; {cure}"


def data_words(table: Mapping[str, Any]) -> str:
    """A data set in a few words: its part, split, and folder or published file."""
    place = table.get("reference_npz") or table.get("path")
    return " ".join(str(word) for word in (table["use"], table.get("split"), place) if word)


def directions(runs: Sequence[Run], registry: Registry, notes: list[str]) -> dict[str, Better]:
    """By number, from the metric that gave it; a note where that is not installed."""
    found: dict[str, Better] = {}
    for run in runs:
        for number in run.scores:
            if number in found or number not in run.metrics:
                continue
            try:
                metric = registry.load("metric", run.metrics[number])
            except PluginError as error:
                notes.append(f"{number}: nobody knows whether lower is better: {error}")
                continue
            assert issubclass(metric, Metric)
            names = {number, number.removeprefix("heldout_")}
            found[number] = "neither" if names & {*metric.neither} else "lower"
            if names & {*metric.higher}:
                found[number] = "higher"
    return found


def read_run(folder: Path) -> Run:
    """The run in `folder`; CheckpointError where it has no intact report, or one that does not say
    how its numbers were measured."""
    place = RunFolder(folder)
    with place.reading_report() as report:
        stages, recipe = report["stages"], report["recipe"]
        measured = stages.get("metric", {"values": {}, "provenance": []})
        sampled = stages.get("sample", {})
        expected = recipe.get("expected", {"scores": {}})
        scales = {k: _short(v) for k, v in sampled.get("scales", {}).items()}
        moved = {k: v for k, v in scales.items() if v not in (1, "")}
        classes = (report.get("data") or {}).get("num_classes")
        before = {"labels": "uniform"} if classes and "label_rule" not in sampled else {}
        environment, inputs = report.get("environment") or {}, report.get("inputs") or {}
        precision = (inputs.get("sample") or recipe.get("sample", {})).get("precision")
        precision = None if precision == "auto" else precision
        how = {"precision": precision, "tf32": environment.get("tf32")}
        if data := recipe.get("dataset"):  # an earlier cmkit did not record the reference
            contents = inputs.get("dataset", {}).get("contents")
            how["reference"] = contents or data_words(data)
        records = [{**before, **how, **record} for record in measured["provenance"]]
        used = [table["use"] for table in recipe.get("metric", [])]
        provenance = {n: record for record in records for n in record["numbers"]}
        scores = {n: float(value) for n, value in measured["values"].items()}
        if lost := [number for number in scores if number not in provenance]:
            raise CheckpointError(
                f"{folder}/report.json: does not say how {', '.join(lost)} was measured; run the"
                " recipe again"
            )
        return Run(
            folder=place,
            name=f"{report['name']}-{report['hash']}",
            recipe=recipe,
            scores=scores,
            facts={"images": sampled.get("images"), "nfe": sampled.get("nfe"), **moved},
            provenance=provenance,
            metrics={n: use for use, r in zip(used, records, strict=False) for n in r["numbers"]},
            expected=dict(expected["scores"]),
            source=expected.get("source"),
            stages=stages,
            environment=environment,
            inputs=inputs,
            smoke=report.get("smoke", False),
            seed=int(recipe.get("seed", 0)),
            cost=dict(zip(COSTS, _cost(recipe, stages), strict=True)),
        )


def cost_of(runs: Sequence[Run]) -> dict[str, Any]:
    """What the runs of a line took, each: means over them, of the memory the most; "steps",
    "images" and "seconds" in "training"."""
    known = {key: [run.cost[key] for run in runs] for key in COSTS}
    found: dict[str, Any] = {key: _mean(values) for key, values in known.items()}
    found["peak_memory_mib"] = max(filter(None, known["peak_memory_mib"]), default=None)
    training = {key: found.pop(key) for key in COSTS[3:]}
    found["training"] = training if any(training.values()) else None
    return {key: value for key, value in found.items() if value is not None}


def _cost(recipe: Mapping[str, Any], stages: Mapping[str, Any]) -> tuple[float | None, ...]:
    drawn, trained = stages.get("sample", {}), stages.get("train", {})
    rate = drawn["images"] / drawn["seconds"] if drawn.get("seconds") else None
    peaks = filter(None, (stage.get("peak_memory_mib") for stage in stages.values()))
    steps, batch = trained.get("steps"), recipe.get("train", {}).get("batch")
    seen = steps * batch if steps and batch else None
    return (
        *(rate, trained.get("parameters"), max(peaks, default=None)),
        *(steps, seen, trained.get("seconds")),
    )


def _mean(values: Sequence[float | None]) -> float | None:
    """The mean of those that are known, whole where all are whole and equal."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    return known[0] if len(set(known)) == 1 else statistics.fmean(known)


def _short(value: Any) -> Any:
    """A number of a rescaler, or several as text: "0.9/1" of a list, "skip.3 0.9" of sites."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {figures.number(inner)}" for key, inner in value.items())
    if isinstance(value, list):
        return "/".join(map(figures.number, value)) if set(value) != {1} else 1
    return value


def _said(fact: object) -> str:
    """A fact of provenance in a few words."""
    text = NOT_RECORDED if fact is None else str(fact)
    return f"{text[:12]}.." if re.fullmatch(r"[0-9a-f]{64}", text) else text
