"""The networks of a recipe: student, teacher and companions, with their weights."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace

import torch

from cmkit.denoiser import NO_COND, Cond, Denoiser, Guided, Network
from cmkit.device import precision
from cmkit.errors import CheckpointError, PluginError, RecipeError
from cmkit.files import cached_digest, digest_of
from cmkit.kinds import Adapter, Backbone, Precond
from cmkit.latents.coding import Coding
from cmkit.noise import Noise
from cmkit.plan.record import Plan
from cmkit.recipe import DenoiserTable, Recipe, Teacher
from cmkit.recipe.parts import naming
from cmkit.tensors import digest, load_weights
from cmkit.values import Companion, DataSpec
from cmkit.weights import adapt, find, identity, notes, read, shapes


def build(plan: Plan, device: torch.device) -> Denoiser:
    """The recipe's denoiser on `device`, with its given weights or fresh ones drawn by its seed,
    and its adapter, if any, attached."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(plan.recipe.seed)
        network = built(plan.recipe.backbone, plan.space, plan.conditions)
    load_start(plan.recipe, network, plan.space, plan.conditions)
    if plan.recipe.adapter:
        with naming_table(plan.recipe, "adapter"):
            attach(plan.recipe.adapter, network, plan.recipe.seed)
    network = network.to(device).to(memory_format=torch.channels_last)
    return denoiser_of(plan.recipe, network)


def coding_of(plan: Plan, device: torch.device, negative: str | None = None) -> Coding:
    """The recipe's codec and prompt encoder, to be loaded on `device`."""
    return Coding(plan.data, plan.recipe.codec, plan.recipe.text, device, negative)


def prompts_of(recipe: Recipe) -> Sequence[str]:
    """What samples are drawn from, in turns: the recipe's prompts, or the captions of the real
    images; none without a prompt encoder. RecipeError where there are neither."""
    if recipe.text is None:
        return ()
    if recipe.sample and recipe.sample.prompts:
        return recipe.sample.prompts
    if captions := recipe.dataset.reference().captions:
        return captions
    raise recipe.source.error(
        ("text",),
        "nothing to draw from: the data set has no captions; say --prompt, or"
        " sample.prompts in the recipe",
    )


def for_sampling(plan: Plan, device: torch.device, name: str, null: Cond = NO_COND) -> Denoiser:
    """The recipe's denoiser as samples are drawn from it, but for rescaling: its weights rounded to
    the `precision` key `name`, and guided where the recipe says so, away from `null`."""
    check_policy(plan.recipe, plan.space, plan.conditions)
    denoiser = build(plan, device)
    denoiser.null = null
    if plan.recipe.adapter:
        plan.recipe.adapter.fold(denoiser.network)
    if precision(name, device) == "bf16":
        denoiser.network.lower(torch.bfloat16)
    return guided_as_said(plan.recipe, denoiser.eval())


def attach(adapter: Adapter, network: Network, seed: int) -> None:
    """Attach an adapter to a network, with fresh weights drawn by the seed where it has none."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapter.attach(network)


class Unadapted(Denoiser):
    """A denoiser whose network's adapter is off, and which is not in training, while it runs."""

    adapter: Adapter

    def forward(self, x: torch.Tensor, sigma: torch.Tensor, cond: Cond = NO_COND) -> torch.Tensor:
        """x0_hat, (B, C, H, W); arguments of `Denoiser.forward`."""
        training = self.network.training
        self.network.eval()
        try:
            with self.adapter.off(self.network):
                return super().forward(x, sigma, cond)
        finally:
            self.network.train(training)


def base_of(recipe: Recipe) -> str | None:
    """The weights that the recipe's network starts from, its own or its teacher's, if any."""
    if recipe.denoiser.init == "teacher" and recipe.teacher:
        return recipe.teacher.table.weights
    return recipe.denoiser.weights


def teacher_is_base(recipe: Recipe, space: DataSpec, conditions: frozenset[str]) -> bool:
    """Whether the teacher is the student's network without its adapter: then one is both."""
    given = recipe.teacher
    return (
        recipe.adapter is not None
        and given is not None
        and given.table.weights == base_of(recipe)
        and given.backbone == recipe.backbone
        and conditions_of_teacher(given, space) == conditions
    )


def build_teacher(plan: Plan, device: torch.device, online: Denoiser | None = None) -> Denoiser:
    """The recipe's teacher on `device`, frozen; where that is the student `online` without its
    adapter, in the very network of it."""
    given = plan.recipe.teacher
    assert given is not None
    if online and plan.recipe.adapter and teacher_is_base(plan.recipe, plan.space, plan.conditions):
        with torch.device("meta"):
            like = teacher_of(given, plan.recipe.denoiser, plan.space)
        same = Unadapted(online.network, like.noise, like.scalings, like.sigma_data)
        same.adapter = plan.recipe.adapter
        # Autocast rounds shared weights as `lower` would those of a copy.
        same.dtype = torch.bfloat16 if given.table.dtype == "bf16" else None
        return same
    with torch.random.fork_rng(devices=[]):
        teacher = teacher_of(given, plan.recipe.denoiser, plan.space)
    load_into(teacher.network, given.table.weights, given.backbone, plan.space)
    if given.table.dtype == "bf16":
        teacher.network.lower(torch.bfloat16)
        teacher.dtype = torch.bfloat16
    teacher.network.to(device).to(memory_format=torch.channels_last)
    return teacher.eval().requires_grad_(False)


def build_companions(plan: Plan, device: torch.device) -> dict[str, Companion]:
    """The objective's companions on `device`, with fresh weights drawn by the recipe's seed."""
    objective = plan.recipe.objective
    assert objective is not None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(plan.recipe.seed)
        companions = dict(objective.companions(plan.space))
    for companion in companions.values():
        companion.network.to(device)
    return companions


def space_of(recipe: Recipe, data: DataSpec) -> DataSpec:
    """Shape of what the recipe's network sees of pictures like `data`, as `Plan.space`."""
    space = data
    if recipe.codec:
        with naming_table(recipe, "codec"):
            space = recipe.codec.spec(data)
            if min(space.channels, space.resolution) < 1:
                raise PluginError(f"spec() gives latents of {space.channels}x{space.resolution}")
    if recipe.text:
        with naming_table(recipe, "text"):
            space = replace(space, text=recipe.text.spec())
    return space


def target_is_average(recipe: Recipe) -> bool:
    """Whether the target network of the objective is the average that samples come from, of the
    same decay at every step: then one copy is both."""
    table, objective = recipe.train, recipe.objective
    if not table or not objective or table.ema_warmup or "target" not in recipe.needs:
        return False
    steps = (0, table.steps // 3, table.steps - 1)
    return all(objective.phase(k, table.steps).target_ema == table.ema[0] for k in steps)


def noise_of(recipe: Recipe) -> Noise:
    """The noise axis of a recipe; RecipeError for levels that its precond does not know."""
    table = recipe.denoiser
    with naming_table(recipe, "denoiser"):
        return _axis(recipe.precond, table.sigma_min, table.sigma_max, table.rho)


def _axis(precond: Precond, low: float, high: float, rho: float) -> Noise:
    known = precond.known
    if not known[0] <= low < high <= known[1]:
        raise RecipeError(
            f"sigma_min {low:g}, sigma_max {high:g}: its precond knows noise levels {known[0]:g} to"
            f" {known[1]:g}; set both within, or drop them"
        )
    return precond.noise(low, high, rho) or Noise(low, high, rho)


def built(backbone: Backbone, data: DataSpec, conditions: frozenset[str]) -> Network:
    """A fresh network; PluginError where the backbone returns something else."""
    network = backbone.build(data, conditions)
    if not isinstance(network, Network):
        raise PluginError(f"backbone.build returned {type(network).__name__}, not cmkit.Network")
    return network


def denoiser_of(recipe: Recipe, network: Network) -> Denoiser:
    """The recipe's denoiser around `network`."""
    scalings, sigma_data = recipe.precond.scalings, recipe.denoiser.sigma_data
    denoiser = Denoiser(network, noise_of(recipe), scalings, sigma_data)
    denoiser.bounds = None if recipe.codec else denoiser.bounds
    return denoiser


def guided_as_said(recipe: Recipe, denoiser: Denoiser) -> Denoiser:
    """`denoiser`, guided where the recipe samples so; RecipeError where its network cannot be."""
    w = recipe.denoiser.guidance
    embedded = recipe.denoiser.embeds_guidance or "guidance" in recipe.needs
    if w is None:
        drawn = (
            recipe.search
            or recipe.sample
            or (recipe.train and (recipe.train.show or recipe.train.score_every))
        )
        if embedded and drawn:
            raise recipe.source.error(
                ("denoiser",), "the network embeds a guidance weight: say with which guidance to"
                " sample, such as guidance = 1.0"
            )  # fmt: skip
        return denoiser
    if not embedded and denoiser.network.null_label is None and not recipe.text:
        raise recipe.source.error(
            ("denoiser", "guidance"),
            "guidance compares with no condition, and the backbone has no null class; set its"
            " null_class = true, with weights that were trained so, or drop guidance",
            f" = {w}",
        )
    return Guided(denoiser, w, embedded)


def teacher_of(teacher: Teacher, student: DenoiserTable, data: DataSpec) -> Denoiser:
    """The teacher with fresh weights; what its table leaves open is as the student's."""
    table, precond = teacher.table, teacher.precond
    network = built(teacher.backbone, data, conditions_of_teacher(teacher, data))
    known_low, known_high = precond.known
    low = (known_low or student.sigma_min) if table.sigma_min is None else table.sigma_min
    high = table.sigma_max or (known_high if known_high < math.inf else student.sigma_max)
    noise = _axis(precond, low, high, student.rho)
    return Denoiser(network, noise, precond.scalings, table.sigma_data or student.sigma_data)


def conditions_of_teacher(teacher: Teacher, data: DataSpec) -> frozenset[str]:
    """What the teacher's network embeds."""
    said, known = teacher.table.conditions, told(data, teacher.backbone)
    if said is None:
        return known
    return frozenset(name for name in known if ("label" if name == "label" else "text") in said)


def told(space: DataSpec, backbone: Backbone) -> frozenset[str]:
    """What the data and the prompts tell a network: labels beside prompts only where it can embed
    them."""
    text = space.text.conditions if space.text else frozenset[str]()
    label = space.num_classes and (not text or "label" in backbone.accepts)
    return text | ({"label"} if label else set())


def load_start(
    recipe: Recipe, network: Network, data: DataSpec, conditions: frozenset[str]
) -> tuple[str, ...]:
    """Load the weights that the recipe gives `network`, its own or its teacher's, if any; notes.

    Where the student embeds more than its teacher, those embeddings keep their fresh weights.
    """
    weights, kept = base_of(recipe), {}
    teacher = recipe.teacher if recipe.denoiser.init == "teacher" else None
    if teacher and conditions - conditions_of_teacher(teacher, data):
        kept = network.state_dict()
    return load_into(network, weights, recipe.backbone, data, kept) if weights else ()


def load_into(
    network: Network,
    weights: str,
    backbone: Backbone,
    data: DataSpec,
    kept: Mapping[str, torch.Tensor] = {},
) -> tuple[str, ...]:
    """Load `weights` into `network`, whatever their layout, with `kept` where they lack names;
    notes of what is not taken as their author wrote it.

    On a network without memory only names and shapes are tried, and nothing of weights that are
    still to be downloaded.
    """
    found, dry = find(weights, backbone), next(network.parameters()).is_meta
    if found.missing and dry:
        return ()
    given, layouts = shapes(found) if dry else read(found), backbone.layouts(data)
    load_weights(network, {**kept, **adapt(given, network, layouts)}, weights)
    return tuple(notes(found, given, network, layouts))


def model_digest(recipe: Recipe, data: DataSpec, conditions: frozenset[str]) -> str:
    """SHA-256 of the weights that a recipe gives its network: of their names there, shapes and
    values in its types, whatever the file and its layout, and of its adapter; "" before they are
    downloaded.

    It is computed once for each file.
    """
    assert recipe.denoiser.weights
    backbone, found = recipe.backbone, find(recipe.denoiser.weights, recipe.backbone)
    if found.missing:
        return ""

    def compute() -> str:
        with torch.device("meta"):
            network = built(backbone, data, conditions)
        return tensors_digest(adapt(read(found), network, backbone.layouts(data)), network)

    file = identity(recipe.denoiser.weights, backbone)["weights"]
    shape = (data.channels, data.resolution, data.num_classes, *sorted(conditions))
    table = {"use": recipe.resolved["backbone"]["use"], **backbone.model_dump(mode="json")}
    own = cached_digest(json.dumps([file, shape, table], sort_keys=True), compute)
    if recipe.adapter is None:
        return own
    options = recipe.adapter.model_dump(mode="json", exclude={"weights"})
    return digest_of(json.dumps([own, options, dict(recipe.adapter.identity())], sort_keys=True))


def tensors_digest(tensors: Mapping[str, torch.Tensor], network: Network) -> str:
    """The `model_digest` of tensors under the names of `network`, which may be without memory."""
    own = network.state_dict()
    return digest({name: tensor.to(own[name].dtype) for name, tensor in tensors.items()})


def check_policy(recipe: Recipe, data: DataSpec, conditions: frozenset[str]) -> None:
    """CheckpointError where the recipe's rescaler was found on other weights than the recipe's."""
    expected = recipe.rescaler.found_on().get("weights") if recipe.rescaler else None
    if expected is None:
        return
    with naming_table(recipe, "rescaler"):
        given = model_digest(recipe, data, conditions)
        if given not in ("", expected):
            raise CheckpointError(
                f"its scales were found on other weights, {expected[:12]}.., than"
                f" {recipe.denoiser.weights}, {given[:12]}..; draw from those, or say"
                " any_model = true where this is meant"
            )


def naming_table(recipe: Recipe, *path: str | int) -> AbstractContextManager[None]:
    """Inside, an error of ours names the recipe's line of the table at `path`."""
    return naming(recipe.source, path)
