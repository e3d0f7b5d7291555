"""The plan of a recipe: all checks in order, on networks without memory."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from cmkit.denoiser import Denoiser
from cmkit.plan import checks, networks
from cmkit.plan.networks import naming_table
from cmkit.plan.record import Plan
from cmkit.plan.trial import dry_run
from cmkit.recipe import Recipe
from cmkit.recipe.grid import cells, minimized, scored, with_values
from cmkit.values import DataSpec
from cmkit.weights import Weights, find


def plan(recipe: Recipe) -> Plan:
    """The plan of a recipe to run; raises the error of the first check that fails."""
    checks.check_stages(recipe)
    return check_fit(recipe)


def check_fit(recipe: Recipe) -> Plan:
    """The plan of a recipe whose parts fit each other, whatever its stages; errors as of `plan`.

    Reads the data set's headers, builds the network without memory (on the `meta` device) and
    runs the sampler once on it, so that shapes, sites and conditions are tried, not assumed.
    """
    data = recipe.data or recipe.dataset.spec()
    space, conditions, denoiser = check_network(recipe, data)
    checks.check_training_start(recipe)
    if recipe.train and recipe.objective:
        with naming_table(recipe, "objective"):
            recipe.objective.check(space)
            for step in (0, recipe.train.steps - 1):
                if n := recipe.objective.phase(step, recipe.train.steps).num_sigmas:
                    denoiser.noise.sigmas(n)  # raises where the noise axis has no such grid
        with naming_table(recipe, "train", "batch"):
            recipe.objective.check_batch(recipe.train.batch // recipe.train.accumulate)
    notes: tuple[str, ...] = ()
    for index, metric in enumerate(recipe.metric):
        with naming_table(recipe, "metric", index):
            notes += tuple(metric.caveats(data))
            metric.check(data, recipe.sample.images if recipe.sample else 0)
    if recipe.train and recipe.train.score_every:
        few = recipe.train.score_images
        metric, _ = scored(recipe, few)
        with naming_table(recipe, "train", "score_images"):
            metric.check(data, few)
    if recipe.search:
        with naming_table(recipe, "search", "images"):
            minimized(recipe).check(data, recipe.search.images)
        with naming_table(recipe, "search", "halving"):
            minimized(recipe).check(data, recipe.search.rung_images[0])
        for key in ("rerank_images", "confirm_images"):
            if images := getattr(recipe.search, key):
                with naming_table(recipe, "search", key):
                    minimized(recipe).check(data, images)
        if recipe.search.method == "surrogate" and recipe.search.tolerance is None:
            checks.check_standard_error(recipe, data)
    if recipe.denoiser.weights:
        with naming_table(recipe, "denoiser", "weights"):
            checks.check_weights(recipe.denoiser.weights, recipe.backbone, recipe.precond)
            notes += networks.load_start(recipe, denoiser.network, space, conditions)
        if not recipe.train:
            networks.check_policy(recipe, space, conditions)
    if recipe.teacher:
        notes += checks.check_teacher(recipe, recipe.teacher, denoiser, space, conditions)
    elif recipe.train and recipe.objective:
        with naming_table(recipe, "objective"):
            recipe.objective.check_networks(denoiser.network, None)
    if recipe.adapter:
        checks.check_adapter(recipe, denoiser.network)
    checks.check_shown(recipe, denoiser, space, conditions)
    notes += checks.guidance_note(recipe)
    notes += tuple(checks.lost_of_prompts(recipe))
    flops = dry_run(recipe, denoiser, space, conditions)
    memory = checks.memory_of(recipe, denoiser, space)
    kept = memory
    if recipe.adapter:  # of which checkpoints hold what is trained
        trained = sum(p.numel() for p in denoiser.parameters() if p.requires_grad)
        kept = 4 * trained * (4 + len(recipe.train.ema) if recipe.train else 1)
    train = recipe.train
    disk = (train.keep + 1 + bool(train.score_every)) * kept if train else 0
    if recipe.sample:
        disk += recipe.sample.images * data.channels * data.resolution**2
    return Plan(
        recipe=recipe,
        data=data,
        space=space,
        conditions=conditions,
        sites=denoiser.network.sites,
        parameters=sum(p.numel() for p in denoiser.parameters()),
        trained=sum(p.numel() for p in denoiser.parameters() if p.requires_grad),
        flops=flops,
        disk=disk,
        memory=memory,
        downloads=tuple(_downloads(recipe)),
        nfe=recipe.sampler.nfe * networks.guided_as_said(recipe, denoiser).passes
        if recipe.sampler
        else None,
        notes=tuple(dict.fromkeys(notes)),
    )


def check_network(recipe: Recipe, data: DataSpec) -> tuple[DataSpec, frozenset[str], Denoiser]:
    """What the network sees, conditions and denoiser, without memory, of a recipe for images of
    `data`, once its codec, prompt encoder, backbone, sampler, rescaler and the cells of its search
    fit each other."""
    checks.check_classes(data)
    space = networks.space_of(recipe, data)
    conditions = checks.conditions_of(recipe, space)
    with naming_table(recipe, "backbone"), torch.device("meta"):
        network = networks.built(recipe.backbone, space, conditions)
    denoiser = networks.denoiser_of(recipe, network)
    checks.check_sampler(recipe)
    if recipe.rescaler:
        with naming_table(recipe, "rescaler"):
            recipe.rescaler.check_noise(denoiser.noise)
            denoiser.rescaled(recipe.rescaler)
    if recipe.search and not network.sites:
        raise recipe.source.error(
            ("search",), "the backbone has no sites to rescale; choose another, or drop [search]"
        )
    for values in cells(recipe):
        cell = with_values(recipe, values)
        with naming_table(recipe, "search", "grid"):
            cell.bind(network.sites)
    return space, conditions, denoiser


def _downloads(recipe: Recipe) -> Iterator[Weights]:
    named = {}
    if recipe.denoiser.weights:
        named[recipe.denoiser.weights] = recipe.backbone
    if recipe.teacher:
        named[recipe.teacher.table.weights] = recipe.teacher.backbone
    for weights, backbone in named.items():
        if (found := find(weights, backbone)).missing:
            yield found
