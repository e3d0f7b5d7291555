"""Weights in the names, shapes and orders of another project, bit for bit."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from cmkit.errors import CheckpointError, CmkitError, PluginError, RecipeError, did_you_mean
from cmkit.files import atomic_write, new_folder
from cmkit.kinds import Backbone
from cmkit.plan import conditions_of
from cmkit.plugins import Registry
from cmkit.recipe import Recipe, load
from cmkit.run.events import Event, Note
from cmkit.run.folder import RunFolder
from cmkit.tensors import load_weights, same_shapes, save_weights
from cmkit.values import DataSpec, Layout
from cmkit.weights import DIFFUSERS, adapt, download, find, notes, read

OWN = "cmkit"
Known = tuple[Backbone, DataSpec, frozenset[str]]
"""A network that weights may belong to: backbone, data, conditions."""


def convert(
    source: str,
    target: Path,
    to: str,
    registry: Registry,
    recipe: Recipe | None = None,
    drop_scales: bool = False,
) -> Iterator[Event]:
    """Write the weights `source` to `target` in the layout `to`, after any download.

    The network is the recipe's, or that of the run folder `source`, or the published one that the
    tensors fit. RecipeError for an unknown layout or an existing target, and for a run that samples
    with scales, which no file of weights holds, unless they are to be dropped; CheckpointError when
    the tensors fit no such network.
    """
    if target.exists():
        raise RecipeError(f"{target}: exists already; name a new file, or remove it")
    folder = RunFolder.of_weights(source)
    if folder.recipe.is_file():
        run = load(folder.recipe, [], registry)
        recipe = recipe or run
        numbers = {**(run.rescaler.numbers() if run.rescaler else {}), **folder.winner()}
        scales = [f"{name} = {value:g}" for name, value in numbers.items() if value != 1]
        if scales and not drop_scales:
            raise RecipeError(
                f"{source}: it samples with {', '.join(scales)}, which no file of weights holds;"
                " write the unscaled model with --drop-scales, or draw with `cmkit sample`"
            )
    if recipe:
        data = recipe.dataset.spec()
        candidates = [(recipe.backbone, data, conditions_of(recipe, data))]
    else:
        candidates = list(_published(registry))
    named = [known for known in candidates if source in known[0].published]
    weights = find(source, (named or candidates)[0][0])
    if weights.missing:
        yield from download(weights)
    tensors = read(weights)
    for backbone, data, conditions in candidates:
        with torch.device("meta"):
            network = backbone.build(data, conditions)
        layouts = backbone.layouts(data)
        try:
            own = adapt(tensors, network, layouts)
        except CheckpointError:  # they have a layout of this network's, but not its options
            if recipe:
                raise
            continue
        if same_shapes(own, network.state_dict()):
            yield from map(Note, notes(weights, tensors, network, layouts))
            _write(own, target, to, layouts)
            return
    if recipe:  # name the first differences
        load_weights(network, own, source)
    raise CheckpointError(
        f"{source}: its {len(tensors)} tensors ({', '.join(list(tensors)[:2])}, ..) fit no"
        " published network; name the recipe with their backbone by --recipe"
    )


def _published(registry: Registry) -> Iterator[Known]:
    for name in registry.names("backbone"):
        try:
            backbone = registry.load("backbone", name)
        except PluginError:  # a broken part; `cmkit plugins` lists it
            continue
        assert issubclass(backbone, Backbone)
        yield from backbone.known()


def _write(own: Mapping[str, Tensor], target: Path, to: str, layouts: tuple[Layout, ...]) -> None:
    layout = next((layout for layout in layouts if layout.name == to), None)
    if to != OWN and not layout:
        names = [OWN, *(layout.name for layout in layouts)]
        raise RecipeError(f"--to {to}: no layout of this backbone{did_you_mean(to, names)}")
    try:
        tensors = layout.write(own) if layout else dict(own)
        config = layout.config(own) if layout and layout.config else None
    except CmkitError as error:
        raise RecipeError(f"--to {to}: {error}") from error
    if config is None:
        save_weights(target, tensors)
        return
    with new_folder(target) as stage:
        atomic_write(stage / "config.json", json.dumps(config, indent=2) + "\n")
        save_weights(stage / f"{DIFFUSERS}.safetensors", tensors)
