"""Quick scores of a network while it trains, of the same noise and labels each time."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch

from cmkit.checkpoint import drop_checkpoints, latest_checkpoint, save_checkpoint
from cmkit.errors import CheckpointError, NonFiniteError
from cmkit.files import digest_of
from cmkit.measure import meter
from cmkit.plan.networks import naming_table
from cmkit.recipe.grid import scored
from cmkit.runs.events import Note, Scored
from cmkit.runs.showing import apart, drawn
from cmkit.sample import to_uint8

if TYPE_CHECKING:
    from cmkit.runs.job import Job
    from cmkit.train import Training


class Scores:
    """The scores of [train] score_every: by the recipe's sampler and guidance, unscaled, from the
    first average, and the checkpoint with the best of them.

    They are records of the training's log. A score is there before the checkpoint of its step is,
    and the best checkpoint before its score, so that a run that was killed has lost none of them
    that it does not find again. No bit of the training changes.
    """

    def __init__(self, job: Job, warn: Callable[[str], None]):
        recipe, table = job.plan.recipe, job.plan.recipe.train
        assert table is not None
        self.job, self.table, self.count = job, table, table.score_images
        metric, _ = scored(recipe, self.count)
        self.reference = job.reference(metric)
        real = len(self.reference.images)  # type: ignore[arg-type]
        self.metric, self.key = scored(recipe, min(self.count, real))
        self.name = f"{self.metric.prefix}{self.key}"
        devices = [job.device] if job.device.type == "cuda" else []
        with naming_table(recipe, "train", "score_every"), torch.random.fork_rng(devices):
            self.metric.check_reference(job.plan.data, self.reference, job.device)
        self.draws = job.draws("score")
        moot = {key for key, stages in self.metric.read_by.items() if not stages}
        about = {
            "of": self.name,
            "metric": self.metric.model_dump(mode="json", exclude=moot),
            "images": self.count,
            "sampler": recipe.resolved["sampler"],
            "guidance": recipe.denoiser.guidance,
            "prompts": list(job.prompts),
            "seed": recipe.seed,
        }
        self.about = digest_of(json.dumps(about, sort_keys=True))
        records = job.folder.log()
        self.known = {r["step"]: r["score"] for r in records if r.get("about") == self.about}
        self.best = self._best(warn)

    def _best(self, warn: Callable[[str], None]) -> tuple[float, int] | None:
        """(score, step) of the best checkpoint that is kept and was scored as it is now."""
        try:
            found = latest_checkpoint(self.job.folder.checkpoint("best"), warn)
        except CheckpointError as error:
            warn(f"{error}; the next score takes its place")
            return None
        same = found and found.state.get("about") == self.about
        return (found.state["score"], found.step) if found and same else None

    def due(self, step: int) -> bool:
        """Whether a step is to be scored, and is not yet."""
        assert self.table.score_every is not None
        last = step == self.table.steps
        return step not in self.known and (step % self.table.score_every == 0 or last)

    def score(self, training: Training, state: Mapping[str, Any]) -> Iterator[Scored | Note]:
        """Score the training's step, and keep its checkpoint with `state` where it is the best; a
        note instead where images or score are not finite."""
        folder, step = self.job.folder, training.step
        try:
            value = self._value(training)
            if not math.isfinite(value):
                raise NonFiniteError(f"{self.name} is {value}")
        except NonFiniteError as error:
            yield Note(f"train.score: no score at step {step}: {error}")
            return
        about = {"score": value, "of": self.name, "images": self.count, "about": self.about}
        if best := self._is_best(value, step):
            if self.best is None or self.best[1] > step:  # by other rules, or of another course
                drop_checkpoints(folder.checkpoint("best"))
            kept = {**state, **about}
            save_checkpoint(folder.checkpoint("best"), step, training.tensors(), kept, keep=1)
            self.best = value, step
        self.known[step] = value
        folder.append_log({"step": step, **about}, durable=True)
        yield Scored(step, self.name, value, best)

    def _is_best(self, value: float, step: int) -> bool:
        """Whether a score is the best so far; of equal ones the first is."""
        if self.best is None:
            return True
        sign = -1 if self.key in self.metric.higher else 1
        return (sign * value, step) <= (sign * self.best[0], self.best[1])

    def _value(self, training: Training) -> float:
        """The score of the training's first average."""
        average, device = training.models.ema[self.table.ema[0]], self.job.device
        finite = torch.ones((), dtype=torch.bool, device=device)
        with apart(average.network, device):
            taken = meter(self.metric, self.count, self.reference, device)
            for _, x0 in drawn(self.job, average, self.draws, self.count):
                finite &= x0.isfinite().all()
                taken.add(to_uint8(x0))
            if not finite:
                raise NonFiniteError("the images hold NaN or infinity")
            return taken.values()[self.key]

    def result(self) -> dict[str, Any]:
        """What report.json says of the scores: of which number, by step, and the best."""
        assert self.best is not None
        return {
            "of": self.name,
            "images": self.count,
            "steps": {str(step): value for step, value in sorted(self.known.items())},
            "best": {"step": self.best[1], "score": self.best[0]},
        }
