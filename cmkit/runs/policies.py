"""Rescaling policies between runs: what a search found, and whether it belongs to a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cmkit.errors import CheckpointError
from cmkit.kinds import Rescaler
from cmkit.plan import model_digest, naming_table, noise_of
from cmkit.recipe import Recipe
from cmkit.rescaling import Policy
from cmkit.runs.finished import trained
from cmkit.runs.job import Job

LEVELS = 16
"""Noise levels at which scales are read, to see whether they depend on them."""


def found_policy(job: Job, rescaler: Rescaler, result: Mapping[str, Any]) -> Policy:
    """The winner `rescaler` of the search with this `result`, to be kept."""
    recipe, plan = trained(job.plan.recipe, job.folder), job.plan
    model = {
        "weights": model_digest(recipe, plan.space, plan.conditions),
        "backbone": recipe.resolved["backbone"]["use"],
    }
    if recipe.train:
        model["training"] = job.keys["train"]
    facts = ("minimize", "method", "images", "axes", "label_rule", "precision", "best")
    found = {name: result[name] for name in facts}
    found |= {"seed": recipe.seed, "nfe": plan.nfe, "sampler": recipe.resolved["sampler"]}
    return Policy(
        rescaler={
            "use": recipe.resolved["rescaler"]["use"],
            **rescaler.model_dump(mode="json", exclude_none=True),
        },
        sites=plan.sites,
        scales=constant_scales(rescaler, recipe, plan.sites),
        model=model,
        found={**found, **({"smoke": True} if recipe.smoke else {})},
        confirmed=result["confirm"],
    )


def constant_scales(
    rescaler: Rescaler, recipe: Recipe, sites: tuple[str, ...]
) -> dict[str, float] | None:
    """The number of each site; None where one is given to each image by its noise level."""
    import torch

    sigma = noise_of(recipe).sigmas(LEVELS, dtype=torch.float64)
    scales = rescaler.bind(sites)(sigma)
    if any(scale.ndim for scale in scales.values()):
        return None
    return {site: scale.item() for site, scale in scales.items()}


def check_training(recipe: Recipe, keys: Mapping[str, str]) -> None:
    """CheckpointError where the rescaler was found on another training than that of the recipe,
    whose stages have these `keys`."""
    found_on = recipe.rescaler.found_on() if recipe.rescaler else {}
    if recipe.train and found_on and found_on.get("training") != keys["train"]:
        with naming_table(recipe, "rescaler"):
            raise CheckpointError(
                "its scales were found on another model than the one that [train] makes; draw from"
                " that one by denoiser.weights, or say any_model = true where this is meant"
            )
