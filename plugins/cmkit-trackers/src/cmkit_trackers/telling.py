"""What the trackers of this package share: which numbers and pictures an event has."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cmkit

if TYPE_CHECKING:
    from cmkit import Event, RunInfo


def need(library: str) -> None:
    """PluginError where a library is not installed."""
    if find_spec(library) is None:
        raise cmkit.PluginError(
            f"tracker {library}: the library {library} is not installed; pip install"
            f' "cmkit-trackers[{library}]"'
        )


def flat(recipe: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """A recipe as one table of dotted keys; lists as JSON."""
    found: dict[str, Any] = {}
    for key, value in recipe.items():
        where = f"{path}.{key}" if path else key
        if isinstance(value, Mapping):
            found |= flat(value, where)
        else:
            found[where] = json.dumps(value) if isinstance(value, list | tuple) else value
    return found


class Telling(ABC):
    """A listener that hands numbers and pictures on.

    The last step that was handed on is kept in the tracker's folder, so that steps that come again
    after a kill are not told twice. Metrics of the end come once in a run, as of the last step.
    """

    def __init__(self, run: RunInfo):
        self.told_file = run.folder / "told.json"
        known = json.loads(self.told_file.read_text()) if self.told_file.exists() else {}
        self.told: dict[str, int] = known
        self.step = max(known.values(), default=0)

    @abstractmethod
    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        """Hand numbers of a step on."""

    @abstractmethod
    def picture(self, step: int, name: str, path: Path) -> None:
        """Hand a PNG on."""

    @abstractmethod
    def close(self) -> None:
        """End this start of the run."""

    def goes_on(self, step: int) -> None:
        """The training goes on from a step."""
        self.step = max(self.step, step)

    def on(self, event: Event) -> None:
        """Hand on what an event has."""
        match event:
            case cmkit.StageStarted("train", done, _):
                self.goes_on(done)
            case cmkit.Step(step, _, log) if log:
                if self._new("train", step):
                    self.numbers(step, {f"train/{name}": value for name, value in log.items()})
                    self._keep("train", step)
            case cmkit.Scored(step, name, score, _):
                if self._new("score", step):
                    self.numbers(step, {f"score/{name}": score})
                    self._keep("score", step)
            case cmkit.Shown(step, path):
                if self._new("shown", step):
                    self.picture(step, "shown", path)
                    self._keep("shown", step)
            case cmkit.StageFinished("metric", result):
                values = {f"metric/{name}": value for name, value in result["values"].items()}
                self.numbers(self.step, values)

    def _new(self, what: str, step: int) -> bool:
        return step > self.told.get(what, 0)

    def _keep(self, what: str, step: int) -> None:
        """Note that a step was told; of a kill in between the step is told twice, and not lost."""
        self.told[what] = step
        self.step = max(self.step, step)
        other = self.told_file.with_suffix(".new")
        other.write_text(json.dumps(self.told))
        other.replace(self.told_file)
