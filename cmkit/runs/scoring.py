"""Quick scores of a network while it trains, of the same noise and labels each time."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from cmkit.checkpoint import open_checkpoint, save_checkpoint
from cmkit.device import autocast
from cmkit.errors import CheckpointError, NonFiniteError
from cmkit.files import digest_of
from cmkit.measure import meter
from cmkit.plan.networks import guided_as_said, naming_table
from cmkit.recipe.grid import scored
from cmkit.runs.events import Note, Scored
from cmkit.runs.showing import apart
from cmkit.sample import RepeatedDraws, starts, to_uint8

if TYPE_CHECKING:
    from cmkit.runs.job import Job
    from cmkit.train import Training


class Scores:
    """The scores of [train] score_every: by the recipe's sampler and guidance, unscaled, from the
    first average, and the checkpoint of the best of them.

    They are records of the training's log. A step's score is there before its checkpoint is, so
    that a run that was killed scores again what its log has lost. No bit of the training changes.
    """

    def __init__(self, job: Job):
        recipe, table = job.plan.recipe, job.plan.recipe.train
        assert table is not None
        assert recipe.sampler is not None
        self.job, self.table, self.sampler = job, table, recipe.sampler
        self.count = table.score_images
        metric, self.key = scored(recipe, self.count)
        self.reference = job.reference(metric)
        real = self.reference.images
        if real is not None and not table.score:
            metric, self.key = scored(recipe, min(self.count, len(real)))  # type: ignore[arg-type]
        self.metric, self.name = metric, f"{metric.prefix}{self.key}"
        with naming_table(recipe, "train", "score_every"), torch.random.fork_rng():
            metric.check_reference(job.plan.data, self.reference, job.device)
        rule = job.plan.label_rule
        said = (job.plan.space, recipe.seed, "score", (), rule, job.prompts, job.coding)
        self.draws = RepeatedDraws(*said)
        parts = {"sampler": recipe.resolved["sampler"], "guidance": recipe.denoiser.guidance}
        about = {"metric": metric.model_dump(mode="json"), "images": self.count, **parts}
        about |= {"of": self.name, "prompts": list(job.prompts), "seed": recipe.seed}
        self.about = digest_of(json.dumps(about, sort_keys=True))
        records = job.folder.log()
        self.known = {r["step"]: r["score"] for r in records if r.get("about") == self.about}
        self.best = self._best()

    def _best(self) -> tuple[float, int] | None:
        """(score, step) of the best checkpoint that is kept and was scored as it is now."""
        path = self.job.folder.checkpoint("best")
        if not path.is_dir():
            return None
        try:
            found = open_checkpoint(path)
        except CheckpointError:  # `cmkit verify` names it; the next score takes its place
            return None
        same = found.state.get("about") == self.about
        return (found.state["score"], found.step) if same else None

    def due(self, step: int) -> bool:
        """Whether a step is to be scored, and is not yet."""
        last = step == self.table.steps
        assert self.table.score_every is not None
        return step not in self.known and (step % self.table.score_every == 0 or last)

    def better(self, score: float, step: int) -> bool:
        """Whether a score is the best so far; of equal ones the first is."""
        if self.best is None:
            return True
        sign = -1 if self.key in self.metric.higher else 1
        return (sign * score, step) < (sign * self.best[0], self.best[1])

    def score(self, training: Training, state: dict[str, Any]) -> Iterator[Scored | Note]:
        """Score the training's step, and keep its checkpoint with `state` where it is the best; a
        note instead where images or score are not finite."""
        try:
            value = self._value(training)
            if not math.isfinite(value):
                raise NonFiniteError(f"{self.name} is {value}")
        except NonFiniteError as error:
            yield Note(f"train.score: no score at step {training.step}: {error}")
            return
        folder, step = self.job.folder, training.step
        about = {"score": value, "of": self.name, "images": self.count, "about": self.about}
        if best := self.better(value, step):
            groups, state = training.tensors(), {**state, **about}
            save_checkpoint(folder.checkpoints, step, groups, state, name="best")
            self.best = value, step
        self.known[step] = value
        folder.append_log({"step": step, **about}, durable=True)
        yield Scored(step, self.name, value, best)

    def _value(self, training: Training) -> float:
        """The score of the training's first average."""
        average = training.models.ema[self.table.ema[0]]
        denoiser = guided_as_said(self.job.plan.recipe, average)
        batch, device = self.table.batch // self.table.accumulate, self.job.device
        finite = torch.ones((), dtype=torch.bool, device=device)
        with apart(average.network, device):
            taken = meter(self.metric, self.count, self.reference, device)
            for start in starts(self.draws, denoiser.noise.start, range(self.count), batch, device):
                with autocast(self.table.precision, device):
                    x0 = self.sampler.sample(denoiser, start.x, start.cond, start.noise)
                finite &= x0.isfinite().all()
                taken.add(to_uint8(self.draws.pictures(x0)))
            if not finite:
                raise NonFiniteError("the images hold NaN or infinity")
            return taken.values()[self.key]

    def result(self) -> dict[str, Any]:
        """What report.json says of the scores: of which number, by step, and the best."""
        steps = {str(step): value for step, value in sorted(self.known.items())}
        about = {"of": self.name, "images": self.count, "steps": steps}
        assert self.best is not None
        return {**about, "best": {"step": self.best[1], "score": self.best[0]}}
