"""What this package offers, by name. Imports no torch."""

from __future__ import annotations

import cmkit

TRACKERS = {
    "tensorboard": ("TensorBoard", "Event files in the run's folder"),
    "wandb": ("WandB", "Weights & Biases, offline unless told"),
    "trackio": ("Trackio", "Trackio's local database"),
    "mlflow": ("MLflow", "MLflow, a SQLite file in the run's folder unless told"),
}


@cmkit.hookimpl
def cmkit_register() -> list[cmkit.Plugin]:
    return [
        cmkit.Plugin("tracker", name, f"cmkit_trackers.{name}_tracker:{cls}", summary)
        for name, (cls, summary) in TRACKERS.items()
    ]
