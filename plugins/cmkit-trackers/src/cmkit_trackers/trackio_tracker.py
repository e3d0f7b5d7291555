"""Trackio."""

from __future__ import annotations

import random
import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from pathlib import Path

import cmkit
from cmkit_trackers.telling import Telling, flat, need


class Trackio(cmkit.Tracker):
    """A run of Trackio under the run's own name, in its local database: `trackio show`."""

    project: str = "cmkit"
    """The project."""
    space_id: str | None = None
    """A Space of the Hugging Face hub that it is sent to, "OWNER/NAME"; absent = what Trackio's
    variable TRACKIO_SPACE_ID says, or none."""

    def check(self) -> None:
        need("trackio")

    def start(self, run: cmkit.RunInfo) -> cmkit.Listener:
        """The run of this name, gone on with where it is there."""
        return Run(run, self)


class Run(Telling):
    """One start of the run."""

    def __init__(self, run: cmkit.RunInfo, options: Trackio):
        drawn = random.getstate()
        import trackio  # which draws from Python's generator

        random.setstate(drawn)
        super().__init__(run)
        with redirect_stdout(sys.stderr):  # where results are printed
            self.run = trackio.init(
                project=options.project,
                name=run.name,
                space_id=options.space_id,
                config=flat(run.recipe),
                resume="allow",
                embed=False,
            )

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def picture(self, step: int, name: str, path: Path) -> None:
        import trackio

        self.run.log({f"{name}/pictures": trackio.Image(str(path))}, step=step)

    def close(self) -> None:
        import trackio

        with redirect_stdout(sys.stderr):
            trackio.finish()
