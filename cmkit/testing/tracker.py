"""The check of a tracker."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from cmkit.errors import PluginError, ResourceError
from cmkit.kinds import Tracker
from cmkit.kinds.tracker import RunInfo
from cmkit.pictures import grid_png
from cmkit.runs.events import (
    Event,
    Note,
    RunFinished,
    Saved,
    Scored,
    Shown,
    StageFinished,
    StageStarted,
)
from cmkit.testing.protocol import Report, report_on
from cmkit.train import Step

SECONDS = 5.0
"""That a tracker may take for one event."""
RECIPE = {"name": "toy", "seed": 0, "train": {"steps": 4, "lr": 1e-3, "ema": [0.999]}}


def check_tracker(tracker: Tracker) -> None:
    """Check a tracker: it takes every event of a run that is killed and goes on, draws from no
    global generator, and writes below the folder that it is given."""
    report = report_on(tracker)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "tracker"
        folder.mkdir()
        picture = Path(place) / "step.png"
        picture.write_bytes(_picture())
        run = RunInfo("toy-00000000", RECIPE, folder)
        try:
            tracker.check()
        except PluginError as error:  # a library that is not here: such a part is "not checked"
            raise ResourceError(str(error)) from error
        # The first start is killed behind the checkpoint of step 2.
        for first, steps in ((0, (1, 2, 3)), (2, (3, 4)), (4, ())):
            with report.untouched("start, on and close"):
                _told(report, tracker, run, _events(picture, first, steps))


def _told(report: Report, tracker: Tracker, run: RunInfo, events: Sequence[Event]) -> None:
    with report.trying("it starts, again in the same folder as well", "go on with what is there"):
        listener = tracker.start(run)
    for event in events:
        began = time.perf_counter()
        with report.trying("it takes every event", "ignore those that it has no use for"):
            listener.on(event)
        taken = time.perf_counter() - began
        report.require(
            taken < SECONDS,
            f"the run waits for `on`, at most {SECONDS:g} s",
            f"{type(event).__name__} took {taken:.1f} s",
            "hand it to a thread",
        )
    with report.trying("it is closed", "let `close` end what `start` began"):
        listener.close()


def _events(picture: Path, first: int, steps: Sequence[int]) -> list[Event]:
    """The events of a start from the step `first`."""
    log = {"loss": 0.5, "rate": 2.0, "images_per_second": 16.0, "lr": 1e-3, "num_sigmas": 3}
    told: list[Event] = [Note("a note"), StageStarted("train", first, 4)]
    for step in steps:
        told.append(Step(step, 4, {**log, "loss": 1 / step}))
        told += [Shown(step, picture), Scored(step, "kid_mean", 0.1 / step, best=True)]
        told += [Saved(step)] if step == 2 else []
    told.append(Step(4, 4))
    finished = {"seconds": 1.0, "values": {"fid": 3.0}}
    return [*told, StageFinished("metric", finished), RunFinished(picture.parent, {"stages": {}})]


def _picture() -> bytes:
    import torch

    return grid_png(torch.zeros(4, 3, 8, 8, dtype=torch.uint8), 2)
