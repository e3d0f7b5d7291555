"""Events that a run yields, in order."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cmkit.search import Cell, CellsDrawn, Comparison
from cmkit.train import Step
from cmkit.weights import Downloaded


@dataclass(frozen=True)
class StageStarted:
    """A stage begins, `done` of `total` units already there from an earlier start."""

    stage: str
    done: int
    total: int


@dataclass(frozen=True)
class Saved:
    """The checkpoint of `step` is on the disk."""

    step: int


@dataclass(frozen=True)
class Scored:
    """The quick score of a step of the training, the number `name` of a metric; `best` so far."""

    step: int
    name: str
    score: float
    best: bool


@dataclass(frozen=True)
class Shown:
    """The picture of [train] show at a step is in the file `path`."""

    step: int
    path: Path


@dataclass(frozen=True)
class Sampled:
    """Images drawn so far."""

    done: int
    total: int


@dataclass(frozen=True)
class Encoded:
    """Pictures and prompts encoded so far."""

    done: int
    total: int


@dataclass(frozen=True)
class Note:
    """A message for the user."""

    text: str


@dataclass(frozen=True)
class StageFinished:
    """A stage is done at this start; `result` is its entry in report.json."""

    stage: str
    result: dict[str, Any]


@dataclass(frozen=True)
class RunFinished:
    """Every stage is done, and the report written."""

    folder: Path
    report: dict[str, Any]


Event = (
    StageStarted
    | Downloaded
    | Step
    | Saved
    | Scored
    | Shown
    | Cell
    | CellsDrawn
    | Comparison
    | Sampled
    | Encoded
    | Note
    | StageFinished
    | RunFinished
)
