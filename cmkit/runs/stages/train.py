"""[train]: an objective trains a network, saved and resumed to the bit."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from cmkit.recipe import TrainTable
from cmkit.runs.stages import Stage

if TYPE_CHECKING:
    from cmkit.plan import Plan
    from cmkit.runs.events import Event
    from cmkit.runs.job import Job


def described(plan: Plan, key: str) -> dict[str, str]:
    """What model.safetensors says of itself: the same for the same training, whose key is `key`,
    wherever it is run."""
    import cmkit

    space, recipe = plan.space, plan.recipe
    shape = (space.channels, space.resolution, space.resolution)
    return {
        "cmkit.format": "cmkit",
        "cmkit.version": cmkit.__version__,
        "cmkit.training": key,
        "cmkit.recipe": recipe.name,
        "cmkit.backbone": recipe.resolved["backbone"]["use"],
        "cmkit.shape": "x".join(map(str, shape)),
        "cmkit.classes": str(space.num_classes or 0),
    }


class Train(TrainTable, Stage):
    """Training. A step takes `batch` images, drawn as `accumulate` equal parts."""

    title: ClassVar[str] = "training"
    needs: ClassVar[tuple[str, ...]] = ("objective",)
    reads: ClassVar[tuple[str, ...]] = (
        "dataset",
        "codec",
        "text",
        "backbone",
        "adapter",
        "denoiser",
        "teacher",
        "objective",
    )

    def run(self, job: Job, result: dict[str, Any]) -> Iterator[Event]:
        """Train from the newest intact checkpoint on, and leave the first average as weights."""
        from cmkit.checkpoint import latest_checkpoint, open_checkpoint, save_checkpoint
        from cmkit.errors import DataError, NonFiniteError
        from cmkit.plan import coding_of
        from cmkit.runs.events import Note, Saved, StageStarted
        from cmkit.runs.scoring import Scores
        from cmkit.runs.showing import Showing
        from cmkit.tensors import save_weights
        from cmkit.train import start, train
        from cmkit.weights import start_checkpoint

        showing = Showing(job) if self.show else None
        # Without pictures to draw or score the prompt encoder is let go with the rest.
        null = (job.coding if showing or self.score_every else coding_of(job.plan, job.device)).null
        folder, training = job.folder, start(job.plan, job.device, null)
        notes: list[str] = []
        found = latest_checkpoint(folder.checkpoints, notes.append)
        spent, loss = 0.0, None
        if not found and self.start:
            notes += training.start_from(open_checkpoint(start_checkpoint(self.start)))
        if found:
            training.restore(found)
            spent, loss = found.state["seconds"], found.state["loss"]
            notes.append(f"resuming from step {found.step}")
        folder.rewind_log(training.step)
        scores = Scores(job, notes.append) if self.score_every else None
        yield from map(Note, notes)
        began = time.perf_counter()
        yield StageStarted("train", training.step, self.steps)

        def state() -> dict[str, Any]:
            seconds = spent + time.perf_counter() - began
            return {**training.state(), "seconds": seconds, "loss": loss}

        def save() -> Saved:
            groups = training.tensors()
            save_checkpoint(folder.checkpoints, training.step, groups, state(), self.keep)
            return Saved(training.step)

        saved, rest = training.step, 60 * (self.save_minutes or math.inf)
        last = time.monotonic()
        try:
            for event in train(training):
                due = event.step % self.save_every == 0 or event.step == self.steps
                due = due or time.monotonic() - last >= rest
                if event.log:
                    loss = event.log["loss"]
                    folder.append_log({"step": event.step, **event.log}, durable=due)
                yield event
                if showing and showing.due(event.step):  # before the save, or a kill might skip it
                    yield from showing.draw(training)
                if scores and scores.due(event.step):
                    yield from scores.score(training, state())
                if due or job.stop.signum:
                    yield save()
                    saved, last = training.step, time.monotonic()
                job.stop.check(f"step {event.step} is saved in {folder.path}")
        except NonFiniteError as error:
            if not folder.steps():
                raise
            said = job.plan.recipe.said("train.lr", "train.start")
            raise NonFiniteError(
                f"{error}: cmkit run {job.plan.recipe.source.file} --from {folder.path}{said} --set"
                f" train.lr={self.lr / 3:.2g}"
            ) from error
        except Exception as error:  # a bad picture, full memory: what is trained is kept first
            if training.whole and training.step > saved:
                yield save()
            if isinstance(error, DataError):
                file, said = job.plan.recipe.source.file, job.plan.recipe.said("train.start")
                # Mended data are other data, so that this run itself cannot go on.
                on = f"; then go on: cmkit run {file} --from {folder.path}{said}"
                more = on if folder.steps() else ""
                raise DataError(f"{error}; cmkit check {file} --data lists all{more}") from error
            raise
        average = training.models.ema[self.ema[0]].network
        if adapter := job.plan.recipe.adapter:
            adapter.write(average, folder.weights)
        else:
            save_weights(
                folder.weights, average.state_dict(), described(job.plan, job.keys["train"])
            )
        seconds = spent + time.perf_counter() - began
        result |= {
            "steps": self.steps,
            "seconds": seconds,
            "parameters": job.plan.parameters,
            "images_per_second": self.steps * self.batch / max(seconds, 1e-9),
            "final_loss": loss,
        }
        if showing and showing.drawn:
            result["shown"] = showing.result()
        if scores and scores.best:
            result["scores"] = scores.result()

    def line(self, result: Mapping[str, Any]) -> str:
        from cmkit.report.figures import number

        return f"{number(result['steps'])} steps, {number(result['images_per_second'])} images/s"
