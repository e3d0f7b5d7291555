"""[search]: the rescaler's numbers, and the winner beside the unscaled model on fresh noise."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from cmkit.recipe import SearchTable
from cmkit.runs.stages import Stage, saving_first
from cmkit.runs.stages.sample import Sample

if TYPE_CHECKING:
    from cmkit.runs.events import Event
    from cmkit.runs.folder import RunFolder
    from cmkit.runs.job import Job
    from cmkit.search import Interpolated, PartialCells


class Search(SearchTable, Stage):
    """The search of the rescaler's numbers, on the same noise and labels in every cell."""

    title: ClassVar[str] = "search"
    needs: ClassVar[tuple[str, ...]] = ("rescaler", "sampler", "metric")
    reads: ClassVar[tuple[str, ...]] = (*Sample.reads, "minimized")

    def run(self, job: Job, result: dict[str, Any]) -> Iterator[Event]:
        """Score the cells that have no record yet, the best again, then the winner and (1, 1)."""
        from cmkit import search
        from cmkit.device import precision
        from cmkit.pictures import grid_png
        from cmkit.recipe import minimized, with_values
        from cmkit.report.search import interpolation_text
        from cmkit.runs.events import Cell, Comparison, Note, StageStarted
        from cmkit.runs.policies import found_policy

        folder, recipe = job.folder, job.plan.recipe
        model, begun = job.denoiser(self.precision), _unfinished(job)
        reference = job.reference(minimized(recipe))
        drawing = (job.device, begun, job.prompts, job.coding)
        scoring = search.Scoring(job.plan, self, model, reference, *drawing)
        scored, lost = folder.scores("cells")
        yield from _lost("cells", lost)
        before: list[dict[str, Any]] = []
        if self.method == "surrogate":
            known, lost = folder.scores("surrogate")
            yield from _lost("surrogate", lost)
            before = [known[index] for index in sorted(known)]
        cells = tuple(scored.values())
        yield StageStarted("search", len(scored), search.most_cells(recipe))
        for event in _keeping(
            job,
            search.interpolate(scoring, cells, before)
            if self.method == "surrogate"
            else search.search(scoring, cells),
        ):
            if isinstance(event, search.Interpolated):
                before = [*before, _with_pictures(folder, event)]
                folder.append_score("surrogate", before[-1])
                yield Note(interpolation_text(before[-1], self.minimize))
                continue
            yield event
            if isinstance(event, Cell):
                name = f"search/cell-{event.index:04d}"
                picture = folder.keep_picture(name, grid_png(event.thumbnails))
                record = {"index": event.index, **event.values, "score": event.score}
                rung = {"images": event.images} if self.halving else {}
                scored[event.index] = {**record, **rung, **event.about, "samples": picture}
                folder.append_score("cells", scored[event.index])
        records = [scored[index] for index in sorted(scored)]
        if before:
            records = _of_last_nodes(records, len(before[-1]["nodes"]))
        whole = [record for record in records if record.get("images", self.images) == self.images]
        top = search.best(whole, self.rerank or 1)
        reranked, lost = folder.scores("rerank")
        finalists = []
        if self.rerank:
            yield from _lost("rerank", lost)
            left = [record for record in top if record["index"] not in reranked]
            yield StageStarted("rerank", len(top) - len(left), len(top))
            for event in _keeping(job, search.rerank(scoring, left)):
                yield event
                if isinstance(event, Cell):
                    record = {"index": event.index, **event.values, "score": event.score}
                    reranked[event.index] = record
                    folder.append_score("rerank", record)
            finalists = [reranked[record["index"]] for record in top]
            top = search.best(finalists, 1)
        winning = {axis: top[0][axis] for axis in self.grid}
        rescaler = with_values(recipe, winning)
        confirmed, lost = folder.scores("confirm")
        yield from _lost("confirm", lost)
        fresh = [k for k in range(self.confirm_seeds) if k not in confirmed]
        yield StageStarted("confirm", self.confirm_seeds - len(fresh), self.confirm_seeds)
        for event in _keeping(job, search.confirm(scoring, rescaler, fresh)):
            yield event
            if isinstance(event, Comparison):
                record = {"index": event.index, "plain": event.plain, "rescaled": event.rescaled}
                confirmed[event.index] = record
                folder.append_score("confirm", record)
        seeds = [confirmed[k] for k in range(self.confirm_seeds)]
        plain, rescaled = ([seed[name] for seed in seeds] for name in ("plain", "rescaled"))
        difference = [after - before for before, after in zip(plain, rescaled, strict=True)]
        result |= {
            "minimize": self.minimize,
            "images": self.images,
            "label_rule": job.plan.label_rule,
            "precision": precision(self.precision, job.device),
            "method": self.method or "grid",
            **({"rungs": list(self.rung_images)} if self.halving else {}),
            "axes": {axis: list(values) for axis, values in self.grid.items()},
            "labels": dict(rescaler.labels),
            "descent": search.trace(recipe, [_as_predicted(record) for record in records]),
            "cells": _without_index(records),
            "rerank": {
                "images": self.rerank_images or 4 * self.images,
                "cells": _without_index(finalists),
            },
            "best": {**winning, "score": top[0]["score"]},
            "confirm": {
                "images": self.confirm_images or self.images,
                "seeds": [f"confirm-{seed['index']}" for seed in seeds],
                "plain": {"values": plain, **search.interval(plain)},
                "rescaled": {"values": rescaled, **search.interval(rescaled)},
                "difference": search.interval(difference),
                "verdict": search.verdict(self.minimize, plain, rescaled),
            },
        }
        if before:
            result["surrogate"] = {k: v for k, v in before[-1].items() if k != "index"}
        folder.keep_search(result, found_policy(job, rescaler, result).text())
        folder.drop_unfinished()

    def line(self, result: Mapping[str, Any]) -> str:
        from cmkit.report.figures import number
        from cmkit.report.search import interpolation_text

        said = f"{len(result['cells'])} cells of {number(result['images'])} images"
        if by := result.get("surrogate"):
            said += f"; {interpolation_text(by, result['minimize'])}"
        return said


def _lost(name: str, lines: int) -> Iterator[Any]:
    """A note where lines of a log of the search were damaged."""
    from cmkit.runs.events import Note

    if lines:
        yield Note(f"search/{name}.jsonl: {lines} damaged lines; what they held is drawn again")


def _with_pictures(folder: RunFolder, event: Interpolated) -> dict[str, Any]:
    """The record of an interpolation, with a picture of each node's first images."""
    from cmkit.pictures import grid_png

    nodes = [
        {**values, "samples": folder.keep_picture(f"search/node-{k:04d}", grid_png(images))}
        for k, (values, images) in enumerate(zip(event.record["nodes"], event.nodes, strict=True))
    ]
    return {"index": event.index, **event.record, "nodes": nodes}


def _of_last_nodes(records: list[dict[str, Any]], nodes: int) -> list[dict[str, Any]]:
    """The records of the grid's cells that belong to the last nodes of an interpolation."""
    return [r for r in records if r["nodes"] == nodes and r.get("candidate", True)]


def _as_predicted(record: dict[str, Any]) -> dict[str, Any]:
    """A cell with the score by which the search went on."""
    return {**record, "score": record.get("predicted", record["score"])}


def _without_index(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in r.items() if key != "index"} for r in records]


def _keeping(job: Job, found: Iterator[Any]) -> Iterator[Any]:
    """The events `found`, with cells that are being drawn kept whenever a save is due, and
    when an error comes."""
    from cmkit.runs.events import CellsDrawn

    last: CellsDrawn | None = None

    def keep() -> None:
        if last and last.unfinished and (partial := last.unfinished()):
            about = {
                "labels": json.dumps(partial.labels),
                "drawn": json.dumps(partial.drawn),
                "stage": job.keys["search"],
            }
            job.folder.keep_unfinished(partial.tensors, about)
            job.saved = time.monotonic()

    with saving_first(keep):
        for event in found:
            last = event if isinstance(event, CellsDrawn) else None
            if last:
                if job.save_is_due:
                    keep()
                job.stop.check(f"what is drawn so far is kept in {job.folder.path}")
            yield event


def _unfinished(job: Job) -> PartialCells | None:
    """The cells that an earlier start was drawing."""
    from cmkit.search import PartialCells

    found = job.folder.unfinished()
    if found is None or found[1].get("stage") != job.keys["search"]:
        return None
    tensors, about = found
    labels, drawn = (tuple(json.loads(about[key])) for key in ("labels", "drawn"))
    return PartialCells(labels, drawn, tensors)
