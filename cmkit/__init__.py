"""cmkit: consistency models from swappable parts. Importing it imports no torch."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "cmkit.errors": (
        "BusyError CheckpointError CmkitError DataError DownloadError Interrupted NonFiniteError"
        " PluginError RecipeError ResourceError"
    ),
    "cmkit.plugins": "Plugin Registry api_version discover hookimpl hookspec",
    "cmkit.values": "Companion DataSpec Layout Phase Reference Scheduler TextSpec",
    "cmkit.kinds": (
        "Adapter Backbone Codec Coder Dataset Listener Meter Metric Objective Part Pictures Precond"
        " Prompts Rescaler RunInfo Sampler TextEncoder Tracker"
    ),
    "cmkit.noise": "Noise",
    "cmkit.rng": "Rng image_labels image_noise permutation shared_dropout",
    "cmkit.denoiser": (
        "Cond Denoiser Guided Network Scales Scalings consistency_scalings edm_scalings"
    ),
    "cmkit.models": "Models",
    "cmkit.api": "Pipeline load run",
    "cmkit.runs.events": (
        "Cell CellsDrawn Comparison Downloaded Event Note RunFinished Sampled Saved Scored Shown"
        " StageFinished StageStarted Step"
    ),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names.split()}
__all__ = sorted([*_HOME_OF, "functional"])


def __getattr__(name: str) -> Any:
    if name == "functional":
        return importlib.import_module("cmkit.functional")
    if name not in _HOME_OF:
        raise AttributeError(f"module 'cmkit' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
