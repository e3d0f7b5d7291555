"""A recipe becomes a folder: stages in order, each finished once, each resumed where it stopped."""

from cmkit.run.draw import draw, redraw
from cmkit.run.environment import peak_memory_mib
from cmkit.run.events import Event, Note, RunFinished, Sampled, Saved, StageFinished, StageStarted
from cmkit.run.finished import drawn_from
from cmkit.run.folder import data_of, read_status, run_folder, trained, winner
from cmkit.run.runner import run

__all__ = [
    "Event",
    "Note",
    "RunFinished",
    "Sampled",
    "Saved",
    "StageFinished",
    "StageStarted",
    "data_of",
    "draw",
    "drawn_from",
    "peak_memory_mib",
    "read_status",
    "redraw",
    "run",
    "run_folder",
    "trained",
    "winner",
]
