"""Seconds of a training step, measured once for a suite and kept: what budgets of seconds need."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from cmkit import files
from cmkit.errors import BusyError, RecipeError
from cmkit.plan import plan
from cmkit.plugins import Registry
from cmkit.recipe import Recipe, from_tables
from cmkit.smoke import invented, write_weights
from cmkit.suite.cells import kind_of_step
from cmkit.suite.work import visible_gpus
from cmkit.train import start, train

STEPS, FIRST = 40, 10
"""Steps that are taken, and those of them that are not timed."""


class Pace:
    """Seconds of a training step of each recipe, measured on `device` where `path`, a file of the
    suite that all its workers share, does not have them yet.

    RecipeError for several cells at once on one device, which would take each other's time.
    """

    def __init__(self, path: Path, registry: Registry, device: torch.device, jobs: int):
        devices = len(visible_gpus()) if device.type == "cuda" else 1
        if jobs > devices:
            raise RecipeError(
                f"--jobs {jobs}: a budget of seconds wants one cell at a time on a device, of"
                f" which there {'is 1' if devices == 1 else f'are {devices}'}; lower --jobs"
            )
        self.path, self.registry, self.device = path, registry, device

    def __call__(self, recipe: Recipe) -> float:
        """Seconds a step: the mean of steps FIRST + 1 to STEPS, from weights that are drawn."""
        key = files.digest_of(kind_of_step(recipe))
        while (found := self._kept().get(key)) is None:
            try:
                with files.lock(self.path.parent / ".pace"):
                    found = self._kept().get(key) or self._measured(recipe)
                    content = files.sealed({"seconds": {**self._kept(), key: found}})
                    files.atomic_write(self.path, content)
            except BusyError:  # another worker measures, whose figures are for all
                time.sleep(1.0)
        return found

    def _kept(self) -> dict[str, float]:
        return files.unsealed(self.path)["seconds"] if self.path.exists() else {}

    def _measured(self, recipe: Recipe) -> float:
        tables = {**recipe.resolved}
        tables["train"] = {**tables["train"], "steps": STEPS, "log_every": STEPS}
        tables["train"].pop("start", None)
        for table in ("denoiser", "teacher"):
            if tables.get(table, {}).get("weights"):
                weights = invented(tables, table, self.path.parent)
                tables[table] = {**tables[table], "weights": weights}
        timed = from_tables(tables, recipe.source, self.registry)
        write_weights(timed)
        began = 0.0
        for step in train(start(plan(timed), self.device)):
            if step.step in (FIRST, STEPS):
                if self.device.type == "cuda":
                    torch.cuda.synchronize(self.device)
                began, passed = time.perf_counter(), time.perf_counter() - began
        return passed / (STEPS - FIRST)
