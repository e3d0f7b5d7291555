"""Weights & Biases."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import cmkit
from cmkit_trackers.telling import Telling, need


class WandB(cmkit.Tracker):
    """A run of Weights & Biases under the run's own name, offline unless told: `wandb sync` sends
    the folder `trackers/wandb` of the run later."""

    project: str = "cmkit"
    """The project."""
    entity: str | None = None
    """The user or team; absent = that of the key."""
    mode: Literal["offline", "online"] = "offline"
    """"online" sends as the run goes, with the key that `wandb login` keeps; without one the run
    does not start."""

    def check(self) -> None:
        need("wandb")

    def start(self, run: cmkit.RunInfo) -> cmkit.Listener:
        """The run of this name, gone on with where it is there."""
        return Run(run, self)


class Run(Telling):
    """One start of the run."""

    def __init__(self, run: cmkit.RunInfo, options: WandB):
        if options.mode == "offline":  # else it tells its makers of its own errors
            os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        super().__init__(run)
        if options.mode == "online" and not wandb.api.api_key:
            raise cmkit.PluginError('wandb: no key; run `wandb login`, or say mode = "offline"')
        self.run = wandb.init(
            project=options.project,
            entity=options.entity,
            id=run.name,
            name=run.name,
            resume="allow",
            mode=options.mode,
            dir=str(run.folder),
            config=dict(run.recipe),
            settings=wandb.Settings(silent=True, console="off", disable_git=True, save_code=False),
        )
        for group in ("train", "score", "metric", "shown"):
            self.run.define_metric(f"{group}/*", step_metric="step")

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log({"step": step, **values})

    def picture(self, step: int, name: str, path: Path) -> None:
        import wandb

        self.run.log({"step": step, f"{name}/pictures": wandb.Image(str(path))})

    def close(self) -> None:
        self.run.finish()
