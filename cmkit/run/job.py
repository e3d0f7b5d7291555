"""What the stages of a run share: plan, folder, device, and the model that is drawn from."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from cmkit.denoiser import Denoiser
from cmkit.kinds import Rescaler
from cmkit.plan import Plan, for_sampling, naming_table, with_values
from cmkit.run.environment import peak_memory_mib
from cmkit.run.events import Event, StageFinished
from cmkit.run.finished import trained
from cmkit.run.folder import RunFolder
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
    status: dict[str, Any]
    """Results of the finished stages, by name."""
    saved: float = field(default_factory=time.monotonic)
    """When images or cells were last saved."""

    def stages(self) -> Iterator[Event]:
        """Carry out the recipe's stages that are not finished yet."""
        recipe = self.plan.recipe
        if any(name not in self.status for name in {"search", "metric"} & recipe.stages.keys()):
            for index, metric in enumerate(recipe.metric):
                with naming_table(recipe, "metric", index):
                    metric.check_reference(self.plan.data, self.reference, self.device)
        for name, stage in recipe.stages.items():
            if name not in self.status:
                self.saved = began = time.monotonic()
                result: dict[str, Any] = {}
                yield from stage.run(self, result)
                result.setdefault("seconds", time.monotonic() - began)
                result |= {
                    "line": stage.line(result),
                    "peak_memory_mib": peak_memory_mib(self.device),
                }
                self.status[name] = result
                self.folder.keep("status", self.status)
            yield StageFinished(name, self.status[name])
            self.stop.check(f"{name} is finished and kept")

    @property
    def save_is_due(self) -> bool:
        """Whether to save images or cells now: every SAVE_SECONDS, and when a signal has come."""
        return bool(self.stop.signum) or time.monotonic() - self.saved >= SAVE_SECONDS

    @functools.cached_property
    def reference(self) -> Reference:
        """The real images of the recipe's data set."""
        return self.plan.recipe.dataset.reference()

    def denoiser(self, precision: str) -> Denoiser:
        """The model that the run samples from, not rescaled yet, in this precision."""
        plan = replace(self.plan, recipe=trained(self.plan.recipe, self.folder))
        return for_sampling(plan, self.device, precision)

    def rescaler(self) -> Rescaler | None:
        """The winner of the search, or the recipe's own."""
        found = self.folder.winner()
        return with_values(self.plan.recipe, found) if found else self.plan.recipe.rescaler
