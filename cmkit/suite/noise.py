"""Two finished runs told apart by their images of the same noise."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import numpy as np

from cmkit import files
from cmkit.errors import CheckpointError, CmkitError
from cmkit.plugins import Registry
from cmkit.suite.intervals import (
    CHECKPOINTS,
    Influence,
    Interval,
    frechet_influence,
    kid_influence,
    same_noise_difference,
)
from cmkit.suite.runs import Run


class SameNoise:
    """The differences between runs, each on its own kept samples, of which image i is drawn from
    the same noise and label in both.

    What is computed of a run's samples is kept in `$XDG_CACHE_HOME/cmkit/influences`; the folder
    may be deleted at any time.
    """

    def __init__(
        self, registry: Registry, device: str = "auto", tell: Callable[[str], None] = lambda _: None
    ):
        self.registry, self.device, self.tell = registry, device, tell
        self.known: dict[str, dict[str, Influence] | str] = {}

    def difference(self, a: Run, b: Run, number: str) -> Interval:
        """Of a number, a's less b's. Without an interval, and why in `of`, where their noise or
        labels differ, samples are not there, or the number is no distance of features."""
        value = a.scores[number] - b.scores[number]
        if why := _unlike(a, b):
            return _none(value, why)
        found = []
        for run in (a, b):
            influences = self._influences(run)
            if isinstance(influences, str):
                return _none(value, influences)
            if number not in influences:
                return _none(value, "it is no distance of features")
            found.append(influences[number])
        return same_noise_difference(*found)

    def _influences(self, run: Run) -> dict[str, Influence] | str:
        """Of each number that has them, or why there are none."""
        place = str(run.folder.path)
        if place not in self.known:
            try:
                self.known[place] = self._stored(run)
            except CmkitError as error:
                self.known[place] = str(error)
        return self.known[place]

    def _stored(self, run: Run) -> dict[str, Influence]:
        status = run.folder.status()
        if "metric" not in status or "key" not in status["metric"]:
            raise CheckpointError(f"{run.folder.path}: no status.json that says what is sound")
        if damage := run.folder.damage("sample", status["sample"]):
            name, fault = next(iter(damage.items()))
            raise CheckpointError(f"{run.folder.path / name}: {fault}")
        place = files.cache_folder("influences") / f"{status['metric']['key']}.json"
        if place.exists():
            with contextlib.suppress(CheckpointError, KeyError, TypeError):
                return {n: _read(said) for n, said in files.unsealed(place)["numbers"].items()}
        self.tell(f"{run.name}: how much each of its images counts")
        found = _computed(run, self.registry, self.device)
        files.fresh_cache(place.parent)
        numbers = {number: _document(influence) for number, influence in found.items()}
        files.atomic_write(place, files.sealed({"numbers": numbers}))
        return found


def _unlike(a: Run, b: Run) -> str:
    """Why the images of two runs are not of the same noise, "" where they are."""
    if a.seed != b.seed:
        return f"seeds {a.seed} and {b.seed}"
    one, other = (run.stages.get("sample", {}) for run in (a, b))
    for key in ("images", "labels"):
        if one.get(key) != other.get(key):
            return f"their {key} differ"
    return ""


def _none(value: float, why: str) -> Interval:
    return Interval(value, None, None, None, f"{CHECKPOINTS}: no interval, {why}")


def _document(influence: Influence) -> dict[str, Any]:
    halves = [half.tolist() for half in influence.halves]
    return {"value": influence.value, "whole": influence.whole.tolist(), "halves": halves}


def _read(said: dict[str, Any]) -> Influence:
    whole, first, second = (np.asarray(v) for v in (said["whole"], *said["halves"]))
    return Influence(said["value"], whole, (first, second))


def _computed(run: Run, registry: Registry, on: str) -> dict[str, Influence]:
    from cmkit.device import pick_device
    from cmkit.recipe import load
    from cmkit.sample import SavedImages

    recipe, device = load(run.folder.recipe, [], registry), pick_device(on)
    images, every = SavedImages(run.folder.sample_files()), recipe.metric
    references = {m.heldout: recipe.compared_with(m).reference() for m in every}
    known = {str(record.get("reference")) for record in run.provenance.values()}
    if known != {reference.fingerprint for reference in references.values()}:
        raise CheckpointError(f"{run.name}: its data set is no longer what it was measured on")
    found = {}
    for metric in every:
        for key, sets in metric.features(images, references[metric.heldout], device).items():
            number = f"{metric.prefix}{key}"
            if "real" in sets:
                found[number] = kid_influence(sets["rows"], sets["real"])
            else:
                found[number] = frechet_influence(sets["rows"], sets["mu"], sets["sigma"])
    return found
