"""The kind of part that is told what happens in a run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from cmkit.kinds.part import Part


@dataclass(frozen=True)
class RunInfo:
    """The run that a tracker is told of."""

    name: str
    """NAME-KEY, the same at every start of the run."""
    recipe: Mapping[str, Any]
    """The resolved recipe."""
    folder: Path
    """A folder of the tracker's own in that of the run; it is there, and stays."""


class Listener(Protocol):
    """What is told one start of a run."""

    def on(self, event: Any) -> None:
        """Take a `cmkit.Event`, and hand on what is slow: the run waits. Of steps those are told
        that have numbers. `StageStarted("train", done, total)` says from which step the training
        goes on: what was told of later ones is told again."""

    def close(self) -> None:
        """The last call, after an error or a signal as well."""


class Tracker(Part, ABC):
    """Is told a run's events; it decides no bit of the run, and is no part of its name."""

    def check(self) -> None:
        """Raise, before the run does anything, what would stop `start`: a library that is not
        installed, a missing setting."""

    @abstractmethod
    def start(self, run: RunInfo) -> Listener:
        """What is told this start of `run`. It asks nobody for a key, and opens no network unless
        the recipe says so."""
