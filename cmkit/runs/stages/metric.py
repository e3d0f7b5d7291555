"""[[metric]]: numbers of the samples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from cmkit.runs.stages import Stage

if TYPE_CHECKING:
    from cmkit.runs.events import Event
    from cmkit.runs.job import Job


class Measure(Stage):
    """Every [[metric]] of the recipe, on the run's samples."""

    title: ClassVar[str] = "metrics"
    needs: ClassVar[tuple[str, ...]] = ("sample",)
    reads: ClassVar[tuple[str, ...]] = ("dataset",)

    def run(self, job: Job, result: dict[str, Any]) -> Iterator[Event]:
        """Measure the samples with every metric of the recipe."""
        from cmkit.measure import measure
        from cmkit.runs.events import StageStarted
        from cmkit.sample import SavedImages

        metrics, images = job.plan.recipe.metric, SavedImages(job.folder.sample_files())
        yield StageStarted("metric", 0, len(metrics))
        values, provenance = measure(metrics, images, job.reference, job.device)
        for metric, record in zip(metrics, provenance, strict=True):
            counts = job.plan.recipe.compared_with(metric).spec().counts if metric.heldout else ()
            if counts:
                record["real_classes"] = f"{min(counts):,} to {max(counts):,} images each"
            if job.plan.label_rule:
                record["labels"] = job.plan.label_rule
        result |= {"values": values, "provenance": provenance}

    def line(self, result: Mapping[str, Any]) -> str:
        return ", ".join(result["values"])
