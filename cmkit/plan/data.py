"""The data of a training as its network sees them, and what is kept of them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from cmkit import latents
from cmkit.denoiser import Cond
from cmkit.latents import Kept
from cmkit.plan.networks import naming_table
from cmkit.plan.record import Plan


def kept(plan: Plan) -> Kept:
    """What the stage [cache] keeps, if any; RecipeError where the data set cannot be kept so."""
    recipe = plan.recipe
    if recipe.cache is None:
        return Kept()
    with naming_table(recipe, "dataset"):
        return latents.kept_of(
            recipe.dataset,
            plan.data,
            recipe.codec if recipe.cache.latents else None,
            recipe.text if recipe.cache.text else None,
            recipe.cache.dtype,
        )


def batches(
    plan: Plan, size: int, device: torch.device, start: int = 0
) -> Iterator[tuple[Tensor, Cond]]:
    """Endless (x0, cond) from batch `start` on, a function of the recipe's seed and the batch:
    pictures in [-1, 1] or their latents, and the features of prompts.

    What the stage [cache] keeps is read, the rest encoded. CheckpointError where it is not there.
    """
    recipe = plan.recipe
    dataset, codec, text, numbers = recipe.dataset, recipe.codec, recipe.text, (size, recipe.seed)
    if not (codec or text):
        return dataset.batches(*numbers, device, start)
    return latents.batches(dataset, plan.data, codec, text, kept(plan), *numbers, device, start)


def cache_bytes(plan: Plan) -> tuple[int, int]:
    """About how many bytes the stage [cache] keeps, and how many of them it has yet to write."""
    every, missing = 0, 0
    for store in kept(plan).stores:
        every += store.rows * store.row_bytes
        missing += sum(len(store.shards[shard]) * store.row_bytes for shard in store.missing())
    return every, missing
