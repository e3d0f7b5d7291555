"""A recipe becomes a folder: stages in order, each finished once, each resumed where it stopped."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from cmkit import checkpoint, files, tensors
from cmkit.denoiser import Denoiser
from cmkit.device import precision
from cmkit.kinds import Rescaler
from cmkit.measure import measure
from cmkit.pictures import grid_png
from cmkit.plan import Plan, for_sampling, naming_table, with_values
from cmkit.plugins import Registry
from cmkit.run.environment import peak_memory_mib
from cmkit.run.events import Event, Note, Sampled, Saved, StageFinished, StageStarted
from cmkit.run.folder import keep_partial, kept_samples, partial_cells, trained, winner, write_json
from cmkit.sample import Draws, SavedImages, npz, sample
from cmkit.search import (
    Cell,
    CellsDrawn,
    best,
    confirm,
    interval,
    most_cells,
    rerank,
    search,
    trace,
    verdict,
)
from cmkit.stop import StopSignal
from cmkit.train import Training, start, train
from cmkit.values import Reference

STAGES = ("train", "search", "sample", "metric")
SHARD_IMAGES = 1000
"""Samples in a file, and up to a batch more; fewer where they take long."""
SHOWN_IMAGES = 100
SAVE_SECONDS = 60.0
"""Between two saves of images, or of cells that are being drawn."""


@dataclass
class Run:
    """A plan being carried out in a folder that this process holds."""

    plan: Plan
    registry: Registry
    folder: Path
    device: torch.device
    stop: StopSignal
    status: dict[str, Any]

    @functools.cached_property
    def reference(self) -> Reference:
        """The real images of the recipe's data set."""
        return self.plan.recipe.dataset.reference()

    def stages(self) -> Iterator[Event]:
        """The recipe's stages that are not finished yet."""
        recipe = self.plan.recipe
        steps = {
            "train": self._train,
            "search": self._search,
            "sample": self._sample,
            "metric": self._metric,
        }
        if any(getattr(recipe, s) and s not in self.status for s in ("search", "metric")):
            for index, metric in enumerate(recipe.metric):
                with naming_table(recipe, "metric", index):
                    metric.check_reference(self.plan.data, self.reference, self.device)
        for stage in STAGES:
            if not getattr(recipe, stage):
                continue
            if stage not in self.status:
                began = time.perf_counter()
                result: dict[str, Any] = {}
                yield from steps[stage](result)
                result.setdefault("seconds", time.perf_counter() - began)
                result["peak_memory_mib"] = peak_memory_mib(self.device)
                self.status[stage] = result
                write_json(self.folder / "status.json", self.status)
            yield StageFinished(stage, self.status[stage])
            self.stop.check(f"{stage} is finished and kept")

    def _train(self, result: dict[str, Any]) -> Iterator[Event]:
        root, log = self.folder / "checkpoints", self.folder / "log.jsonl"
        training = start(self.plan, self.device)
        warnings: list[str] = []
        found = checkpoint.latest_checkpoint(root, warnings.append)
        yield from map(Note, warnings)
        spent = 0.0
        if found:
            training.restore(found)
            spent = found.state["seconds"]
            yield Note(f"resuming from step {found.step}")
        files.truncate_jsonl(log, lambda record: record["step"] <= training.step)
        table = training.table
        began = time.perf_counter()
        loss = found.state["loss"] if found else None
        yield StageStarted("train", training.step, table.steps)
        for event in train(training):
            due = event.step % table.save_every == 0 or event.step == table.steps
            if event.log:
                loss = event.log["loss"]
                files.append_jsonl(log, {"step": event.step, **event.log}, durable=due)
            yield event
            if due or self.stop.signum:
                extra = {"seconds": spent + time.perf_counter() - began, "loss": loss}
                yield self._save(training, root, extra)
            self.stop.check(f"step {event.step} is saved in {self.folder}")
        chosen = training.models.ema[table.ema[0]].network
        tensors.save_weights(self.folder / "model.safetensors", chosen.state_dict())
        seconds = spent + time.perf_counter() - began
        result |= {
            "steps": table.steps,
            "seconds": seconds,
            "parameters": self.plan.parameters,
            "images_per_second": table.steps * table.batch / max(seconds, 1e-9),
            "final_loss": loss,
        }

    def _save(self, training: Training, root: Path, extra: dict[str, Any]) -> Saved:
        state = {**training.state(), **extra}
        checkpoint.save_checkpoint(
            root, training.step, training.tensors(), state, training.table.keep
        )
        return Saved(training.step)

    def _search(self, result: dict[str, Any]) -> Iterator[Event]:
        recipe, folder = self.plan.recipe, self.folder / "search"
        table = recipe.search
        assert table is not None
        folder.mkdir(exist_ok=True)
        denoiser, reference = self._denoiser(table.precision), self.reference
        cells, reranked, duels = (folder / f"{n}.jsonl" for n in ("cells", "rerank", "confirm"))
        for log in (cells, reranked, duels):
            files.truncate_jsonl(log, lambda record: True)  # a torn last line
        partial = folder / "unfinished.safetensors"
        begun = partial_cells(partial)
        records = files.read_jsonl(cells)
        yield StageStarted("search", len(records), most_cells(recipe))
        found = search(self.plan, denoiser, reference, self.device, tuple(records), begun)
        for cell in self._keeping(partial, found):
            yield cell
            if isinstance(cell, CellsDrawn):
                continue
            picture = f"search/cell-{cell.index:04d}.png"
            files.atomic_write(self.folder / picture, grid_png(cell.thumbnails))
            record = {"index": cell.index, **cell.values, "score": cell.score, "samples": picture}
            files.append_jsonl(cells, record)
            records.append(record)
        records.sort(key=lambda record: record["index"])
        axes = {axis: list(values) for axis, values in table.grid.items()}
        finalists = files.read_jsonl(reranked)
        top = best(records, table.rerank or 1)
        if table.rerank:
            yield StageStarted("rerank", len(finalists), len(top))
            again = top[len(finalists) :]
            found = rerank(self.plan, denoiser, again, reference, self.device, begun)
            for cell in self._keeping(partial, found):
                yield cell
                if isinstance(cell, Cell):
                    record = {"index": cell.index, **cell.values, "score": cell.score}
                    files.append_jsonl(reranked, record)
                    finalists.append(record)
            top = best(finalists, 1)
        chosen = top[0]
        winning = {axis: chosen[axis] for axis in axes}
        fought = files.read_jsonl(duels)
        yield StageStarted("confirm", len(fought), table.confirm_seeds)
        rescaler = with_values(recipe, winning)
        versus = confirm(self.plan, denoiser, rescaler, reference, self.device, len(fought), begun)
        for duel in self._keeping(partial, versus):
            yield duel
            if isinstance(duel, CellsDrawn):
                continue
            record = {"index": duel.index, "plain": duel.plain, "rescaled": duel.rescaled}
            files.append_jsonl(duels, record)
            fought.append(record)
        plain = [record["plain"] for record in fought]
        rescaled = [record["rescaled"] for record in fought]
        difference = [after - before for before, after in zip(plain, rescaled, strict=True)]
        result |= {
            "minimize": table.minimize,
            "images": table.images,
            "precision": precision(table.precision, self.device),
            "method": table.method or "grid",
            "axes": axes,
            "descent": trace(recipe, records),
            "cells": [{k: v for k, v in record.items() if k != "index"} for record in records],
            "rerank": {
                "images": table.rerank_images or 4 * table.images,
                "cells": [{k: v for k, v in r.items() if k != "index"} for r in finalists],
            },
            "best": {**winning, "score": chosen["score"]},
            "confirm": {
                "images": table.confirm_images or table.images,
                "seeds": [f"confirm-{record['index']}" for record in fought],
                "plain": {"values": plain, **interval(plain)},
                "rescaled": {"values": rescaled, **interval(rescaled)},
                "difference": interval(difference),
                "verdict": verdict(table.minimize, plain, rescaled),
            },
        }
        write_json(self.folder / "search.json", result)
        partial.unlink(missing_ok=True)

    def _keeping(self, path: Path, found: Iterator[Any]) -> Iterator[Any]:
        """The events `found`, with cells that are being drawn kept in the file `path`: every
        SAVE_SECONDS, and when a signal stops the run."""
        saved = time.monotonic()
        for event in found:
            if isinstance(event, CellsDrawn):
                due = self.stop.signum or time.monotonic() - saved >= SAVE_SECONDS
                if due and event.unfinished:
                    keep_partial(path, event.unfinished())
                    saved = time.monotonic()
                self.stop.check(f"what is drawn so far is kept in {path.parent}")
            yield event

    def _sample(self, result: dict[str, Any]) -> Iterator[Event]:
        recipe, folder = self.plan.recipe, self.folder / "samples"
        table, sampler = recipe.sample, recipe.sampler
        assert table is not None
        assert sampler is not None
        folder.mkdir(exist_ok=True)
        denoiser, rescaler = self._denoiser(table.precision), self._rescaler()
        draws = Draws(self.plan.data, recipe.seed)
        scaled = denoiser.rescaled(rescaler) if rescaler else denoiser

        def batches(model: Denoiser, indices: range) -> Iterator[Any]:
            return sample(model, sampler, draws, indices, table.batch, self.device, table.precision)

        kept = done = kept_samples(folder)
        yield StageStarted("sample", done, table.images)
        drawn, saved = [], time.monotonic()
        for batch in batches(scaled, range(done, table.images)):
            drawn.append(batch)
            done += len(batch.images)
            yield Sampled(done, table.images)
            due = self.stop.signum or time.monotonic() - saved >= SAVE_SECONDS
            if due or done - kept >= SHARD_IMAGES or done == table.images:
                files.atomic_write(folder / f"{kept:07d}.npz", npz(drawn))
                kept, drawn, saved = done, [], time.monotonic()
            self.stop.check(f"{done} of {table.images} samples are kept in {folder}")
        shown = range(min(SHOWN_IMAGES, table.images))
        pictures = {"before": denoiser, "after": scaled} if rescaler else {"after": denoiser}
        for name, model in pictures.items():
            images = torch.cat([batch.images for batch in batches(model, shown)])
            files.atomic_write(self.folder / f"samples_{name}.png", grid_png(images))
        result |= {
            "images": table.images,
            "nfe": self.plan.nfe,
            "scales": rescaler.model_dump(mode="json") if rescaler else {},
            **{name: f"samples_{name}.png" for name in pictures},
        }

    def _metric(self, result: dict[str, Any]) -> Iterator[Event]:
        recipe = self.plan.recipe
        images = SavedImages(sorted((self.folder / "samples").glob("*.npz")))
        yield StageStarted("metric", 0, len(recipe.metric))
        values, provenance = measure(recipe.metric, images, self.reference, self.device)
        result |= {"values": values, "provenance": provenance}

    def _denoiser(self, name: str) -> Denoiser:
        """What the run samples from, its weights rounded to the `precision` key `name`."""
        plan = replace(self.plan, recipe=trained(self.plan.recipe, self.folder))
        return for_sampling(plan, self.device, name)

    def _rescaler(self) -> Rescaler | None:
        """The search's winner, or the recipe's own numbers."""
        found = winner(self.status)
        return with_values(self.plan.recipe, found) if found else self.plan.recipe.rescaler
