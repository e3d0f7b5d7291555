"""A recipe becomes a folder: stages in order, each finished once, each resumed where it stopped.

Names are imported when they are asked for: `folder` is below the rooms that a run is made of, since
weights and plans read folders of other runs.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "cmkit.runs.drawing": "draw redraw",
    "cmkit.runs.events": (
        "Cell CellsDrawn Comparison Downloaded Encoded Event Note RunFinished Sampled Saved"
        " Scored Shown StageFinished StageStarted Step"
    ),
    "cmkit.runs.finished": "drawn_from",
    "cmkit.runs.folder": "RunFolder",
    "cmkit.runs.reuse": "Outlook outlook run_folder",
    "cmkit.runs.inputs": "as_begun changes inputs_of left_out",
    "cmkit.runs.integrity": "verify",
    "cmkit.runs.measuring": "Measurement measure_run to_measure",
    "cmkit.runs.runner": "run shown",
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names.split()}
__all__ = sorted(_HOME_OF)


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'cmkit.runs' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME_OF[name]), name)
