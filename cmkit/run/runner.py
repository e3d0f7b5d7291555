"""Carry out a plan in its folder, or go on with it."""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from cmkit import files
from cmkit.errors import ResourceError
from cmkit.plan import Plan, check_disk
from cmkit.plugins import Registry
from cmkit.run.environment import citations, describe_environment
from cmkit.run.events import Event, Note, RunFinished
from cmkit.run.folder import keep_recipe, read_status, run_folder, write_json
from cmkit.run.stages import Run
from cmkit.stop import StopSignal
from cmkit.weights import download


def run(
    plan: Plan, registry: Registry, out: Path, device: torch.device, stop: StopSignal
) -> Iterator[Event]:
    """Carry a plan out, or go on with it, as events; the last one is RunFinished.

    Raises BusyError when another process holds the folder, Interrupted after a stop signal, and
    whatever a stage finds. Every error leaves a folder that the same call resumes.
    """
    from cmkit.report import write_report

    folder = run_folder(plan, out)
    check_disk(plan, out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ResourceError(
            f"{folder}: cannot be made: {error.strerror}; name another place with --out"
        ) from error
    with files.lock(folder):
        keep_recipe(plan, folder)
        environment = describe_environment(plan, registry, device)
        write_json(folder / "environment.json", environment)
        status = read_status(folder)
        job = Run(plan, registry, folder, device, stop, status)
        for weights in plan.downloads:
            for event in download(weights):
                yield event
                stop.check("what came of the weights is kept")
        yield from job.stages()
        report = {
            "schema": 1,
            "name": plan.recipe.name,
            "hash": plan.recipe.hash,
            "recipe": dict(plan.recipe.resolved),
            "environment": environment,
            "data": asdict(plan.data),
            "stages": job.status,
            "seconds": sum(stage["seconds"] for stage in job.status.values()),
            "citations": citations(plan, registry),
            "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }
        write_json(folder / "report.json", report)
        write_report(folder)
        yield from map(Note, _tell_plugins(registry, folder, report))
        yield RunFinished(folder, report)


def _tell_plugins(registry: Registry, folder: Path, report: dict[str, Any]) -> Iterator[str]:
    for implementation in registry.manager.hook.cmkit_run_finished.get_hookimpls():
        try:
            implementation.function(
                **{
                    name: value
                    for name, value in {"folder": str(folder), "report": report}.items()
                    if name in implementation.argnames
                }
            )
        except Exception as error:  # a guest's fault must not spoil a finished run
            yield f"plugin {implementation.plugin_name}: cmkit_run_finished failed: {error}"
