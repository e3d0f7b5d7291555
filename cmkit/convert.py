"""Weights in the names, shapes and orders of another project, bit for bit."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from cmkit.denoiser import Network
from cmkit.errors import (
    CheckpointError,
    CmkitError,
    PluginError,
    RecipeError,
    did_you_mean,
    inline,
)
from cmkit.files import atomic_write, new_folder
from cmkit.kinds import Backbone
from cmkit.plan import conditions_of, noise_of, space_of, tensors_digest
from cmkit.plugins import Registry
from cmkit.recipe import Recipe, load, with_values
from cmkit.rescaling import POLICY, Policy, read_policy
from cmkit.runs.events import Event, Note
from cmkit.runs.folder import RunFolder
from cmkit.runs.policies import LEVELS
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
    fold: str | None = None,
    partial: bool = False,
) -> Iterator[Event]:
    """Write the weights `source` to `target` in the layout `to`, after any download.

    The network is the recipe's, or that of the run folder `source`, or the published one that the
    tensors fit. RecipeError for an unknown layout or an existing target, and for a run that samples
    with scales, which no file of weights holds, unless they are to be dropped or folded;
    CheckpointError when the tensors fit no such network.

    `fold` names the policy to fold into the weights, as `read_policy` takes it. RecipeError where
    that is not exact, unless it is to be done in part: then the rest is written beside the target.
    """
    if partial and not fold:
        raise RecipeError("--partial: says how to fold; name the scales with --fold-rescaling")
    policy = read_policy(fold) if fold else None
    beside = target.with_name(f"{target.name}.{POLICY}")
    for path in (target, *([beside] if partial else [])):
        if path.exists():
            raise RecipeError(f"{path}: exists already; name a new file, or remove it")
    folder = RunFolder.of_weights(source)
    if folder.recipe.is_file():
        run = load(folder.recipe, [], registry)
        recipe = recipe or run
        scales = "" if drop_scales or policy else _scales(run, folder)
        if scales:
            raise RecipeError(
                f"{source}: it samples with {scales}, which no file of weights holds; write the"
                " unscaled model with --drop-scales, draw with `cmkit sample`, or see"
                " --fold-rescaling"
            )
    if recipe:
        data = space_of(recipe, recipe.data or recipe.dataset.spec())
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
            rest = None
            if policy:
                said, own, rest = _folded(own, network, policy, source, partial)
                yield from map(Note, said)
            write(own, target, to, layouts)
            if rest:
                atomic_write(beside, rest.text())
                yield Note(
                    f"{target}: draws as the rescaled model only with {beside}:"
                    f' rescaler = {{ use = "saved", path = {inline(str(beside))} }}'
                )
            return
    if recipe:  # name the first differences
        load_weights(network, own, source)
    raise CheckpointError(
        f"{source}: its {len(tensors)} tensors ({', '.join(list(tensors)[:2])}, ..) fit no"
        " published network; name the recipe with their backbone by --recipe"
    )


def _scales(recipe: Recipe, folder: RunFolder) -> str:
    """The fields of the policy with which a run samples; "" where it changes nothing."""
    if not recipe.rescaler:
        return ""
    found = folder.winner()
    rescaler = with_values(recipe, found) if found else recipe.rescaler.settled()
    data = space_of(recipe, recipe.data or recipe.dataset.spec())
    with torch.device("meta"):
        sites = recipe.backbone.build(data, conditions_of(recipe, data)).sites
    scales = rescaler.bind(sites)(noise_of(recipe).sigmas(LEVELS))
    if all(bool((scale == 1).all()) for scale in scales.values()):
        return ""
    fields = rescaler.model_dump(mode="json", exclude_defaults=True)
    return ", ".join(f"{name} = {inline(value)}" for name, value in fields.items())


def _folded(
    own: Mapping[str, Tensor], network: Network, policy: Policy, source: str, partial: bool
) -> tuple[list[str], dict[str, Tensor], Policy | None]:
    """What was folded, the weights `own` with it, and the policy of what is left, if anything."""
    if policy.scales is None:
        raise RecipeError("--fold-rescaling: its scales depend on the noise level; weights do not")
    if tensors_digest(own, network) != policy.model["weights"] or policy.sites != network.sites:
        raise CheckpointError(
            f"--fold-rescaling: its scales were found on other weights than {source}; give those"
        )
    factors, left = network.factors(policy.scales)
    if left and not partial:
        reasons: dict[str, list[str]] = {}
        for site, why in left.items():
            reasons.setdefault(why, []).append(site)
        named = "; ".join(f"{', '.join(sites)} ({why})" for why, sites in reasons.items())
        raise RecipeError(
            f"--fold-rescaling: no weights hold exactly the scales of {named}; draw with"
            " `cmkit sample --rescaler`, or fold the rest alone with --partial"
        )
    rest = {site: policy.scales[site] for site in left}
    done = {s: v for s, v in policy.scales.items() if v != 1 and s not in left}
    shown = (", ".join(f"{s} = {v:g}" for s, v in some.items()) for some in (done, rest))
    said = [
        f"{what}: {sites or 'none'}"
        for what, sites in zip(("folded", "not folded"), shown, strict=True)
    ]
    folded = multiplied(own, factors)
    if not left:
        return said, folded, None
    model = {"weights": tensors_digest(folded, network), "backbone": policy.model["backbone"]}
    table = {"use": "per_layer", "sites": rest}
    found = {**policy.found, "folded": done}
    return said, folded, Policy(table, policy.sites, rest, model, found)


def multiplied(own: Mapping[str, Tensor], factors: Mapping[str, float]) -> dict[str, Tensor]:
    """The weights `own`, with those that have a factor multiplied by it in float64."""
    return {
        name: (tensor.double() * factors[name]).to(tensor.dtype) if name in factors else tensor
        for name, tensor in own.items()
    }


def _published(registry: Registry) -> Iterator[Known]:
    for name in registry.names("backbone"):
        try:
            backbone = registry.load("backbone", name)
        except PluginError:  # a broken part; `cmkit plugins` lists it
            continue
        assert issubclass(backbone, Backbone)
        yield from backbone.known()


def write(own: Mapping[str, Tensor], target: Path, to: str, layouts: tuple[Layout, ...]) -> None:
    """Write our weights in the layout `to`: a file, or a folder where the project wants a
    config.json beside it. RecipeError for an unknown layout, or one that cannot express them."""
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
