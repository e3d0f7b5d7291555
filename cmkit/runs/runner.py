"""Carry out a plan in its folder, or go on with it."""

from __future__ import annotations

import datetime
from collections.abc import Generator, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from cmkit.errors import CmkitError
from cmkit.plan import Plan, check_disk, cut_note, sigma_data_note
from cmkit.plugins import Registry, blame
from cmkit.recipe import Recipe, run_name, stage_keys
from cmkit.report import write_report
from cmkit.runs.environment import changed_environment, citations, describe_environment
from cmkit.runs.events import Event, Note, RunFinished
from cmkit.runs.folder import SCHEMA, RunFolder
from cmkit.runs.inputs import (
    as_begun,
    changes,
    check_inputs,
    chosen_precision,
    inputs_of,
    left_out,
)
from cmkit.runs.integrity import verify
from cmkit.runs.job import Job
from cmkit.runs.places import make_out
from cmkit.runs.policies import check_training
from cmkit.runs.reuse import outlook, run_folder
from cmkit.runs.telling import telling
from cmkit.stop import StopSignal
from cmkit.weights import download


def run(
    plan: Plan, registry: Registry, out: Path, device: torch.device, stop: StopSignal
) -> Iterator[Event]:
    """Carry a plan out, or go on with it, as events; the last one is RunFinished.

    Raises BusyError when another process holds the folder, Interrupted after a stop signal, and
    whatever a stage finds. Every error leaves a folder that the same call resumes. A finished run
    is left as it is.
    """
    recipe, folder = plan.recipe, run_folder(plan.recipe, out, registry)
    if folder.finished:
        yield from shown(recipe, folder, device)
        return
    check_disk(plan, out)
    make_out(folder.path)
    with folder.held():
        folder.keep_recipe(recipe.toml())
        yield from telling(_carried_out(plan, registry, folder, device, stop), recipe, folder)


def _carried_out(
    plan: Plan, registry: Registry, folder: RunFolder, device: torch.device, stop: StopSignal
) -> Generator[Event, None, None]:
    """The events of `run` in a folder that is held."""
    recipe, plan = plan.recipe, as_begun(plan, folder)
    for weights in plan.downloads:
        for event in download(weights):
            yield event
            stop.check("what came of the weights is kept")
    yield from map(Note, plan.notes)
    inputs = inputs_of(plan.recipe, plan.data, device)
    if not folder.checked:
        folder.migrate()
        folder.keep_inputs(inputs, stage_keys(recipe, inputs))
    yield from map(Note, left_out(recipe.dataset))
    status = folder.status()
    yield from map(Note, check_inputs(plan, folder, inputs, list(status)))
    keys, begun_with = folder.inputs()["keys"], folder.inputs()["inputs"]
    check_training(recipe, keys)
    environment = describe_environment(plan, registry, device)
    if sentence := changed_environment(folder.starts(), environment):
        yield Note(sentence)
    folder.append_start(environment)
    if chosen := chosen_precision(plan.recipe, device):
        yield Note(f"precision auto is {chosen}")
    if "train" not in status:
        yield from map(Note, filter(None, [sigma_data_note(plan), cut_note(plan)]))
    stages = list(outlook(recipe, folder, keys, begun_with, registry))
    if stages[0].why or any(stage.origin for stage in stages):
        yield from (Note(str(stage)) for stage in stages)
    job = Job(plan, folder, device, stop, keys, status)
    yield from job.stages()
    results = {name: stage["result"] for name, stage in job.status.items()}
    report = {
        "schema": SCHEMA,
        "name": recipe.name,
        "hash": run_name(recipe).removeprefix(f"{recipe.name}-"),
        **({"smoke": True} if recipe.smoke else {}),
        "recipe": dict(recipe.resolved),
        "environment": environment,
        "starts": folder.starts(),
        "inputs": folder.inputs()["inputs"],
        "data": asdict(plan.data),
        "stages": results,
        "seconds": sum(stage["seconds"] for stage in results.values()),
        "citations": citations(plan, registry),
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    folder.keep_report(report)
    write_report(folder)
    report = folder.report()
    yield from map(Note, _tell_plugins(registry, folder.path, report))
    yield RunFinished(folder.path, report)


def shown(recipe: Recipe, folder: RunFolder, device: torch.device) -> Iterator[Event]:
    """A finished run as it is: notes of what it read that has changed since, then RunFinished."""
    report = folder.report()
    then = report.get("inputs", {})
    try:
        now = inputs_of(recipe, recipe.dataset.spec(), device) if then else {}
    except CmkitError as error:
        yield Note(f"what it read cannot be read now: {error}")
    else:
        for _, _, sentence in changes(then, now):
            yield Note(f"{sentence}; the results shown are those of then")
    for name, fault in verify(folder):
        if fault:
            yield Note(f"{folder.path / name}: {fault}; the results shown are those of report.json")
    sample = recipe.stages.get("sample")
    if sample and (said := sample.undrawn(report["stages"].get("sample", {}))):
        yield Note(f"sample: {said}; to have them remove {folder.path / 'report.json'}, run again")
    if not folder.page.exists():  # it was killed before it had written the page
        yield Note(f"{write_report(folder)}: was missing, written now")
    yield RunFinished(folder.path, report)


def _tell_plugins(registry: Registry, folder: Path, report: dict[str, Any]) -> Iterator[str]:
    told = {"folder": str(folder), "report": report}
    for implementation in registry.manager.hook.cmkit_run_finished.get_hookimpls():
        try:
            implementation.function(**{name: told[name] for name in implementation.argnames})
        except Exception as error:  # a guest's fault must not spoil a finished run
            place = blame(error, registry.rows)
            said = f"cmkit_run_finished failed{f' at {place}' * bool(place)}"
            yield f"plugin {implementation.plugin_name}: {said}: {type(error).__name__}: {error}"
