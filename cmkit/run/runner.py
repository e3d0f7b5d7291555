"""Carry out a plan in its folder, or go on with it."""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from cmkit.plan import Plan, check_disk
from cmkit.plugins import Registry
from cmkit.report import write_report
from cmkit.run.environment import citations, describe_environment
from cmkit.run.events import Event, Note, RunFinished
from cmkit.run.folder import SCHEMA, RunFolder, make_out
from cmkit.run.job import Job
from cmkit.stop import StopSignal
from cmkit.weights import download


def run_folder(plan: Plan, out: Path) -> RunFolder:
    """Where a plan's run lives: `<out>/<name>-<hash of the resolved recipe>`."""
    return RunFolder(out / f"{plan.recipe.name}-{plan.recipe.hash}")


def run(
    plan: Plan, registry: Registry, out: Path, device: torch.device, stop: StopSignal
) -> Iterator[Event]:
    """Carry a plan out, or go on with it, as events; the last one is RunFinished.

    Raises BusyError when another process holds the folder, Interrupted after a stop signal, and
    whatever a stage finds. Every error leaves a folder that the same call resumes.
    """
    recipe, folder = plan.recipe, run_folder(plan, out)
    check_disk(plan, out)
    make_out(folder.path)
    with folder.held():
        folder.keep_recipe(recipe.toml())
        environment = describe_environment(plan, registry, device)
        folder.keep("environment", environment)
        for weights in plan.downloads:
            for event in download(weights):
                yield event
                stop.check("what came of the weights is kept")
        job = Job(plan, folder, device, stop, folder.status())
        yield from job.stages()
        report = {
            "schema": SCHEMA,
            "name": recipe.name,
            "hash": recipe.hash,
            "recipe": dict(recipe.resolved),
            "environment": environment,
            "data": asdict(plan.data),
            "stages": job.status,
            "seconds": sum(stage["seconds"] for stage in job.status.values()),
            "citations": citations(plan, registry),
            "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }
        folder.keep("report", report)
        write_report(folder)
        report = folder.report()
        yield from map(Note, _tell_plugins(registry, folder.path, report))
        yield RunFinished(folder.path, report)


def _tell_plugins(registry: Registry, folder: Path, report: dict[str, Any]) -> Iterator[str]:
    told = {"folder": str(folder), "report": report}
    for implementation in registry.manager.hook.cmkit_run_finished.get_hookimpls():
        try:
            implementation.function(**{name: told[name] for name in implementation.argnames})
        except Exception as error:  # a guest's fault must not spoil a finished run
            yield f"plugin {implementation.plugin_name}: cmkit_run_finished failed: {error}"
