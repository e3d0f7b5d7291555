"""Writing a model in one of the forms that others open, and pushing it to the hub."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from cmkit.errors import PluginError, RecipeError
from cmkit.export import diffusers
from cmkit.export.card import Card, alone_in, card
from cmkit.files import atomic_write, new_folder

if TYPE_CHECKING:
    import torch

    from cmkit.plugins import Registry
    from cmkit.recipe import Recipe
    from cmkit.runs.events import Event

Form = Literal["diffusers", "onnx", "torch", "cmkit"]
FORMS: tuple[str, ...] = get_args(Form)


@dataclass(frozen=True)
class Order:
    """What is to be written of a recipe that draws."""

    target: Path
    to: str
    run: Path | None = None
    """The run that it is of."""
    drop_scales: bool = False
    """Whether the model is written without its scales."""
    push: str | None = None
    """OWNER/NAME on the hub."""
    license: str | None = None


def export(
    recipe: Recipe, order: Order, registry: Registry, device: torch.device
) -> Iterator[Event]:
    """Events of writing what `recipe` draws from to a new folder; the last is StageFinished.

    RecipeError where the folder exists, and for what the form has no like of; PluginError without
    the libraries of the form, and for a network that they cannot follow; CheckpointError where what
    is opened again is not the original: the folder is then not there.
    """
    began, target = time.perf_counter(), order.target
    if target.exists():
        raise RecipeError(f"{target}: exists already; name a new folder, or remove it")
    if order.push:
        from cmkit import hub

        hub.require_push(order.push)
    changed = order.drop_scales or recipe.source.overrides
    run = None if changed else order.run  # its figures are not those of another model
    about = Card(order.push or target.name, recipe, registry, run, order.license)
    facts: dict[str, Any]
    if order.to == "cmkit":
        facts = _as_run(order, about)
    else:
        if order.to == "diffusers" and importlib.util.find_spec("diffusers") is None:
            raise PluginError(
                "--to diffusers: needs the package diffusers; pip install 'diffusers>=0.42,<0.44'"
            )
        if recipe.sampler is None:
            raise recipe.source.error(
                ("sampler",), 'say how to draw, such as --set sampler={use="multistep"}'
            )
        recipe = replace(recipe, rescaler=None) if order.drop_scales else recipe
        about = replace(about, recipe=recipe)
        write = diffusers.export if order.to == "diffusers" else _as_graph
        facts = yield from write(recipe, order.target, order.to, about, device)
    facts = {"out": str(target), "to": order.to, **facts}
    if order.push:
        facts["pushed"] = hub.push(target, order.push)
    from cmkit.runs.events import StageFinished

    yield StageFinished("export", {**facts, "seconds": time.perf_counter() - began})


def _as_graph(
    recipe: Recipe, target: Path, to: str, about: Card, device: torch.device
) -> Generator[Any, None, dict[str, Any]]:
    """Events of writing the denoiser as a graph, on the CPU; facts of it in the end."""
    import torch

    from cmkit.export import graph
    from cmkit.plan import check_fit, coding_of, for_sampling
    from cmkit.runs.events import Note
    from cmkit.weights import download

    graph.require(to)
    device = torch.device("cpu")
    plan = check_fit(recipe)
    yield from map(Note, plan.notes)
    for weights in plan.downloads:
        yield from download(weights)
    denoiser = for_sampling(plan, device, "fp32", coding_of(plan, device).null)
    denoiser.requires_grad_(False)
    if recipe.rescaler:
        denoiser = denoiser.rescaled(recipe.rescaler)
    if alone := alone_in(recipe, to):
        yield Note(alone)
    with new_folder(target) as stage:
        facts = graph.write(plan, denoiser, to, stage, target)
        atomic_write(stage / "README.md", card(about, to, facts.pop("about")))
    return facts


def _as_run(order: Order, about: Card) -> dict[str, Any]:
    """The run without its checkpoints and what is of this machine, for `cmkit sample`."""
    from cmkit.hub import RUN_FILES

    if about.run is None:
        raise RecipeError(
            "--to cmkit: writes a finished run as it is; give one, without --set, --rescaler and @"
        )
    if about.recipe.adapter:
        raise RecipeError(
            "--to cmkit: the run holds an adapter alone, beside weights that are not in it; write"
            " the whole model by --to diffusers, onnx or torch"
        )
    with new_folder(order.target) as stage:
        for name in RUN_FILES:
            if (about.run / name).is_file():
                atomic_write(stage / name, (about.run / name).read_bytes())
        atomic_write(stage / "README.md", card(about, "cmkit"))
    return {}
