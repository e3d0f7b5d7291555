"""Several adapters as one, or folded into the weights of their network."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from cmkit.errors import RecipeError
from cmkit.kinds import Adapter
from cmkit.plan import attach, built, conditions_of, load_start, space_of
from cmkit.recipe import Recipe
from cmkit.tensors import save_weights


def counted(sources: Sequence[str]) -> dict[str, float]:
    """Adapters and what they count, of words such as "a.safetensors=0.8"; RecipeError for a word
    without a number. The numbers of one that is named twice are added."""
    found: dict[str, float] = {}
    for word in sources:
        name, _, number = word.rpartition("=")
        if not name or not re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?", number):
            raise RecipeError(f"merge {word}: write what it counts, such as {word}=0.8")
        found[name] = found.get(name, 0.0) + float(number)
    return found


def merge(adapter: Adapter, target: Path, fold: Recipe | None = None) -> None:
    """Write what the adapter's weights name to the new file `target`: as one adapter, or where a
    recipe is given added to the weights of its network.

    RecipeError where the file is there already, or the recipe names no weights; errors of
    `Adapter.attach` and `Adapter.mix` for what does not go together.
    """
    if target.exists() or target.suffix != ".safetensors":
        what = "exists already; name a new file" if target.exists() else "name a .safetensors file"
        raise RecipeError(f"{target}: {what}")
    if fold is None:
        adapter.mix(target)
        return
    if fold.denoiser.weights is None:
        raise fold.source.error(("denoiser",), "no weights to add to: say denoiser.weights")
    space = space_of(fold, fold.data or fold.dataset.declared() or fold.dataset.spec())
    conditions = conditions_of(fold, space)
    with torch.random.fork_rng(devices=[]):
        network = built(fold.backbone, space, conditions)
    load_start(fold, network, space, conditions)
    attach(adapter, network, fold.seed)
    adapter.fold(network)
    save_weights(target, network.state_dict())


def options(sources: Mapping[str, float], how: str) -> dict[str, object]:
    """The options of an adapter that mixes `sources`."""
    return {"weights": dict(sources), **({"how": how} if len(sources) > 1 else {})}
