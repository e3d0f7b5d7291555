"""Weights in the names, shapes and orders of another project, bit for bit."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cmkit.errors import CheckpointError, CmkitError, PluginError, RecipeError, did_you_mean
from cmkit.files import atomic_write, new_folder
from cmkit.kinds import Backbone
from cmkit.plan import conditions_of
from cmkit.plugins import Registry
from cmkit.recipe import Recipe, load
from cmkit.run.folder import RunFolder
from cmkit.tensors import load_weights, same_shapes, save_weights
from cmkit.values import DataSpec, Layout
from cmkit.weights import DIFFUSERS, Downloaded, adapt, download, find, read

if TYPE_CHECKING:
    from cmkit.denoiser import Network

OWN = "cmkit"


@dataclass(frozen=True)
class Known:
    """A network that weights may belong to."""

    backbone: Backbone
    data: DataSpec
    conditions: frozenset[str]

    def network(self) -> Network:
        """The network on the meta device."""
        with torch.device("meta"):
            return self.backbone.build(self.data, self.conditions)


def convert(
    source: str, target: Path, to: str, registry: Registry, recipe: Recipe | None = None
) -> Iterator[Downloaded]:
    """Write the weights `source` to `target` in the layout `to`, after any download.

    The network is the recipe's, or that of the run folder `source`, or the published one that the
    tensors fit. RecipeError for an unknown layout or an existing target, CheckpointError when the
    tensors fit no such network.
    """
    if target.exists():
        raise RecipeError(f"{target}: exists already; name a new file, or remove it")
    if recipe is None and (kept := RunFolder(Path(source)).recipe).is_file():
        recipe = load(kept, [], registry)
    if recipe:
        data = recipe.dataset.spec()
        candidates = [Known(recipe.backbone, data, conditions_of(recipe, data))]
    else:
        candidates = list(_published(registry))
    named = [known for known in candidates if source in known.backbone.published]
    weights = find(source, (named or candidates)[0].backbone)
    if weights.missing:
        yield from download(weights)
    tensors = read(weights)
    for known in candidates:
        network = known.network()
        try:
            own = adapt(tensors, network, known.backbone.layouts(known.data))
        except CheckpointError:  # they have a layout of this network's, but not its options
            if recipe:
                raise
            continue
        if same_shapes(own, network.state_dict()):
            _write(own, target, to, known)
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
        yield from (Known(*known) for known in backbone.known())


def _write(own: Mapping[str, Tensor], target: Path, to: str, known: Known) -> None:
    layouts = {layout.name: layout for layout in known.backbone.layouts(known.data)}
    if to != OWN and to not in layouts:
        names = [OWN, *layouts]
        raise RecipeError(f"--to {to}: no layout of this backbone{did_you_mean(to, names)}")
    layout: Layout | None = layouts.get(to)
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
