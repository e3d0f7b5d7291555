"""What the stages of a run share: plan, folder, device, and the model that is drawn from."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from cmkit.denoiser import Denoiser
from cmkit.errors import CheckpointError
from cmkit.kinds import Dataset, Metric, Rescaler
from cmkit.latents.coding import Coding
from cmkit.plan import Plan, coding_of, for_sampling, naming_table, prompts_of
from cmkit.recipe import with_values
from cmkit.runs.environment import peak_memory_mib
from cmkit.runs.events import Event, Note, StageFinished
from cmkit.runs.finished import trained
from cmkit.runs.folder import RunFolder
from cmkit.runs.reuse import reuse, reuse_checkpoint
from cmkit.sample import Draws
from cmkit.stop import StopSignal
from cmkit.values import Reference

SAVE_SECONDS = 60.0
"""Between two saves of images, or of cells that are being drawn."""


@dataclass
class Job:
    """A plan being carried out in a folder that this process holds."""

    plan: Plan
    folder: RunFolder
    device: torch.device
    stop: StopSignal
    keys: Mapping[str, str]
    """Of each stage what it depends on, as `cmkit.recipe.stage_keys` has it."""
    status: dict[str, Any]
    """The finished stages, as `RunFolder.status` has them."""
    saved: float = field(default_factory=time.monotonic)
    """When images or cells were last saved."""

    def stages(self) -> Iterator[Event]:
        """Carry out the recipe's stages that are not finished yet, here or in another run."""
        recipe, folder = self.plan.recipe, self.folder
        for name in recipe.stages:
            yield from self._take_or_check(name)
        if any(name not in self.status for name in {"search", "metric"} & recipe.stages.keys()):
            for index, metric in enumerate(recipe.metric):
                with naming_table(recipe, "metric", index):
                    metric.check_reference(self.plan.data, self.reference(metric), self.device)
        for name, stage in recipe.stages.items():
            if name in self.status and (fault := stage.lost(self)):
                yield Note(f"{name}: {fault}; the stage is done again")
                del self.status[name]
            if name not in self.status:
                self.saved = began = time.monotonic()
                result: dict[str, Any] = {}
                yield from stage.run(self, result)
                result.setdefault("seconds", time.monotonic() - began)
                result |= {
                    "line": stage.line(result),
                    "peak_memory_mib": peak_memory_mib(self.device),
                }
                self._finish(name, {"result": result, "files": folder.digests(name)})
                yield StageFinished(name, result)
            self.stop.check(f"{name} is finished and kept")

    def _finish(self, name: str, entry: Mapping[str, Any]) -> None:
        self.status[name] = {**entry, "key": self.keys[name]}
        self.folder.keep_status(self.status)

    def _take_or_check(self, name: str) -> Iterator[Event]:
        """Take a stage that another run has finished, or the training that one has begun; of one
        that is finished here, see that its files are intact."""
        folder = self.folder
        if name in self.status:
            damage = folder.damage(name, self.status[name])
            if lost := [file for file, what in damage.items() if what == "missing"]:
                yield Note(f"{name}: {lost[0]} is missing; the stage is done again")
                for later in [*self.status][[*self.status].index(name) :]:
                    del self.status[later]
                folder.keep_status(self.status)
            elif damage:
                raise CheckpointError(
                    f"{folder.path / next(iter(damage))}: damaged, its SHA-256 is not that of"
                    f" status.json; restore it, or delete it to do {name} again"
                )
        if name in self.status:
            return
        if found := reuse(folder, name, self.keys[name]):
            self._finish(name, found)
        elif name == "train":
            reuse_checkpoint(self.plan.recipe, folder, self.keys[name])

    @property
    def save_is_due(self) -> bool:
        """Whether to save images or cells now: every SAVE_SECONDS, and when a signal has come."""
        return bool(self.stop.signum) or time.monotonic() - self.saved >= SAVE_SECONDS

    def reference(self, metric: Metric) -> Reference:
        """The real images that a metric compares with."""
        return self._references(self.plan.recipe.compared_with(metric))

    @functools.cached_property
    def _references(self) -> Callable[[Dataset], Reference]:
        return functools.cache(self._reference)

    def _reference(self, dataset: Dataset) -> Reference:
        """The real images of a data set, with the prompts of the samples, if any, as captions."""
        return replace(dataset.reference(), captions=self.prompts or None)

    def denoiser(self, precision: str) -> Denoiser:
        """The model that the run samples from, not rescaled yet, in this precision."""
        plan = replace(self.plan, recipe=trained(self.plan.recipe, self.folder))
        return for_sampling(plan, self.device, precision, self.coding.null)

    @functools.cached_property
    def coding(self) -> Coding:
        """The recipe's codec and prompt encoder."""
        return coding_of(self.plan, self.device)

    @functools.cached_property
    def prompts(self) -> Sequence[str]:
        """What samples are drawn from, in turns: the recipe's prompts, or the captions of the real
        images; none without a prompt encoder."""
        return prompts_of(self.plan.recipe)

    def draws(self, purpose: str = "sample") -> Draws:
        """Noise, labels and prompts of the run's samples."""
        plan, rule = self.plan, self.plan.label_rule
        return Draws(plan.space, plan.recipe.seed, purpose, (), rule, self.prompts, self.coding)

    def rescaler(self) -> Rescaler | None:
        """The winner of the search, or the recipe's own."""
        found = self.folder.winner()
        said = self.plan.recipe.rescaler
        return with_values(self.plan.recipe, found) if found else said and said.settled()
