"""[sample]: images, each by its own seed, kept as they are drawn."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from cmkit.recipe import SampleTable
from cmkit.runs.stages import Stage, saving_first

if TYPE_CHECKING:
    from cmkit.denoiser import Denoiser
    from cmkit.kinds import Sampler
    from cmkit.runs.events import Event
    from cmkit.runs.job import Job
    from cmkit.sample import Batch

FILE_IMAGES = 1000
"""Samples in a file, and up to a batch more; fewer where they take long."""
SHOWN_IMAGES = 100
STEPS_IMAGES = 8
"""Pictures in each number of steps of `show_steps`."""


class Sample(SampleTable, Stage):
    """Sampling from the trained, rescaled model."""

    title: ClassVar[str] = "samples"
    needs: ClassVar[tuple[str, ...]] = ("sampler",)
    reads: ClassVar[tuple[str, ...]] = (
        "dataset",
        "codec",
        "text",
        "backbone",
        "adapter",
        "denoiser",
        "rescaler",
        "sampler",
    )

    def run(self, job: Job, result: dict[str, Any]) -> Iterator[Event]:
        """Draw the images that are not kept yet, and pictures of the first, unscaled and not."""
        import torch

        from cmkit.pictures import grid_png
        from cmkit.runs.events import Note, Sampled, StageStarted
        from cmkit.sample import npz, sample

        folder, sampler = job.folder, job.plan.recipe.sampler
        assert sampler is not None
        denoiser, rescaler = job.denoiser(self.precision), job.rescaler()
        draws = job.draws()
        scaled = denoiser.rescaled(rescaler) if rescaler else denoiser

        def batches(model: Denoiser, indices: range, by: Sampler = sampler) -> Iterator[Any]:
            return sample(model, by, draws, indices, self.batch, job.device, self.precision)

        kept, damaged = folder.intact_samples()
        done = kept
        yield from (Note(f"{name}: damaged; drawn again") for name in damaged)
        yield StageStarted("sample", done, self.images)
        drawn: list[Batch] = []

        def keep() -> None:
            nonlocal kept
            if drawn:
                folder.keep_samples(kept, done - kept, npz(drawn))
                kept, job.saved = done, time.monotonic()
                drawn.clear()

        with saving_first(keep):
            for batch in batches(scaled, range(done, self.images)):
                drawn.append(batch)
                done += len(batch.images)
                yield Sampled(done, self.images)
                if job.save_is_due or done - kept >= FILE_IMAGES or done == self.images:
                    keep()
                job.stop.check(f"{done} of {self.images} samples are kept in {folder.samples}")
        shown = range(min(SHOWN_IMAGES, self.images))
        models = {"before": denoiser, "after": scaled} if rescaler else {"after": denoiser}
        result |= {
            "images": self.images,
            "nfe": job.plan.nfe,
            "label_rule": job.plan.label_rule,
            "scales": rescaler.model_dump(mode="json") if rescaler else {},
        }
        for name, model in models.items():
            images = torch.cat([batch.images for batch in batches(model, shown)])
            result[name] = folder.keep_picture(f"samples_{name}", grid_png(images))
        first = shown[:STEPS_IMAGES]
        for steps in self.show_steps:
            by = job.plan.recipe.sampler_in(steps)
            images = torch.cat([batch.images for batch in batches(scaled, first, by)])
            name = folder.keep_picture(f"samples_steps_{steps}", grid_png(images, len(images)))
            result.setdefault("steps", {})[str(steps)] = name
        if job.plan.label_rule and (labels := draws.labels(shown)) is not None:
            result["labels"] = labels.tolist()
        if prompts := draws.prompts_of(shown):
            result["prompts"] = prompts

    def lost(self, job: Job) -> str:
        return self.undrawn(job.status["sample"]["result"])

    def undrawn(self, result: Mapping[str, Any]) -> str:
        """Which pictures in other numbers of steps `result` lacks, since these were said after it
        was finished: no image is drawn again for them; "" where there are all."""
        missing = [str(n) for n in self.show_steps if str(n) not in result.get("steps", {})]
        return f"no pictures in steps {', '.join(missing)}" if missing else ""

    def line(self, result: Mapping[str, Any]) -> str:
        from cmkit.report.figures import number

        return f"{number(result['images'])} images"
