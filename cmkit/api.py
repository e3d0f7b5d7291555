"""From Python: a model to draw from, and recipes carried out."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from pydantic import ValidationError

from cmkit.errors import RecipeError, inline, toml_key
from cmkit.kinds import Part, Rescaler
from cmkit.plugins import discover

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from cmkit.denoiser import Denoiser
    from cmkit.latents.coding import Coding
    from cmkit.plan import Plan
    from cmkit.recipe import Recipe
    from cmkit.runs.events import Event
    from cmkit.values import DataSpec


P = TypeVar("P", bound=Part)


@dataclass(frozen=True)
class Pipeline:
    """A model with all that drawing takes: sampler, scales, guidance, codec and prompt encoder.

    `load` makes it. Images follow from the seed and their number alone: they are those of
    `cmkit sample`.
    """

    plan: Plan
    """The recipe, and what was found of it."""
    unscaled: Denoiser
    """x0_hat = unscaled(x, sigma, cond), as the weights are."""
    coding: Coding
    """Prompts as conditions, latents as pictures."""
    device: torch.device

    @property
    def recipe(self) -> Recipe:
        """The recipe, with the scales that are drawn with."""
        return self.plan.recipe

    @property
    def data(self) -> DataSpec:
        """Shape and classes of the images."""
        return self.plan.data

    @property
    def denoiser(self) -> Denoiser:
        """x0_hat = denoiser(x, sigma, cond), rescaled: x (B, C, H, W), sigma (B,)."""
        rescaler = self.recipe.rescaler
        return self.unscaled.rescaled(rescaler) if rescaler else self.unscaled

    def rescaled(self, policy: Rescaler | None = None, /, **numbers: float) -> Pipeline:
        """The same weights with other scales: a policy, or numbers such as skip=1.1, emb=1.4, which
        change those of the recipe's policy, or of `global` where it has none. Without any they are
        not rescaled.

        RecipeError for a number that the policy does not have, CheckpointError for a saved policy
        of another model.
        """
        if numbers:
            fresh = cast(type[Rescaler], discover().load("rescaler", "global"))
            before = policy or self.recipe.rescaler or fresh()
            policy = _changed(before.settled(), numbers, "rescaler")
        recipe = replace(self.recipe, rescaler=policy)
        if policy:
            from cmkit.plan.networks import check_policy

            check_policy(recipe, self.plan.space, self.plan.conditions)
            self.unscaled.rescaled(policy)
        return replace(self, plan=replace(self.plan, recipe=recipe))

    def sample(
        self,
        count: int = 1,
        *,
        label: str | int | Sequence[str | int] | None = None,
        prompt: str | Sequence[str] | None = None,
        steps: int | None = None,
        seed: int | None = None,
        batch: int | None = None,
    ) -> Tensor:
        """`count` images, uint8 (B, C, H, W) on the CPU.

        Classes, by number or name, and prompts go round, image k with the one at k modulo their
        number; without them labels are drawn, and prompts are the recipe's, as is the seed. `steps`
        is that of the sampler, `batch` how many are drawn at a time. RecipeError for what the model
        does not know; a warning names words of a prompt that say nothing to it, or are cut off.
        """
        import torch

        from cmkit.plan import prompts_of
        from cmkit.plan.checks import lost_of_prompts
        from cmkit.runs.drawing import numbered
        from cmkit.sample import Draws, sample

        if count < 1:
            raise RecipeError(f"count {count}: draw at least one")
        recipe = self._with_steps(steps)
        prompts = list(prompts_of(recipe)) if prompt is None else _several(prompt)
        if prompts and recipe.text is None:
            raise RecipeError(f"prompt {prompts[0]!r}: the model knows no prompts; leave it out")
        labels = [] if label is None else _several(label)
        assert recipe.sampler
        assert recipe.sample
        if prompt is not None:
            given = recipe.sample.model_copy(update={"prompts": tuple(prompts)})
            stages = {**recipe.stages, "sample": given}
            _warn(lost_of_prompts(replace(recipe, stages=stages)))
        draws = Draws(
            self.plan.space,
            recipe.seed if seed is None else seed,
            classes=tuple(numbered(one, self.plan) for one in labels),
            rule=self.plan.label_rule,
            prompts=prompts,
            coding=self.coding,
        )
        table = recipe.sample
        parts = sample(
            self.denoiser,
            recipe.sampler,
            draws,
            range(count),
            batch or table.batch,
            self.device,
            table.precision,
        )
        return torch.cat([part.images for part in parts])

    def _with_steps(self, steps: int | None) -> Recipe:
        """The recipe with another number of steps of its sampler."""
        recipe, sampler = self.recipe, self.recipe.sampler
        if sampler is None:
            raise recipe.source.error(
                ("sampler",), 'say how to draw, such as load(.., sampler={"use": "multistep"})'
            )
        if steps is None:
            return recipe
        return replace(recipe, sampler=_changed(sampler, {"steps": steps}, "sampler"))


def load(
    source: str | Path,
    *,
    device: str = "auto",
    rescaler: str | Mapping[str, Any] | None = None,
    **changes: Any,
) -> Pipeline:
    """A model to draw from: a finished run, by name ("digits", "digits@latest") or folder, with
    "@STEP:ema-0.9999" behind for other weights of it; a recipe with `denoiser.weights`; or a
    pipeline of diffusers.

    `rescaler` is a file or run with other scales, "off", or a change of the recipe's as `changes`
    are, which `run` explains. Weights that are not there are downloaded.
    CheckpointError where there are none; errors of the recipe as `cmkit sample` has them.
    """
    from cmkit.device import pick_device
    from cmkit.plan import check_fit, coding_of, for_sampling
    from cmkit.recipe import find_recipe
    from cmkit.runs.finished import drawn_from
    from cmkit.runs.places import find_run, run_names
    from cmkit.weights import download

    chosen, registry = pick_device(device), discover()
    if isinstance(rescaler, Mapping):
        changes, rescaler = {**changes, "rescaler": rescaler}, None
    place = find_run(str(source)) or str(find_recipe(str(source), others=run_names()))
    recipe = drawn_from(place, overrides(changes), registry, 1, rescaler)
    plan = check_fit(recipe)
    _warn(plan.notes)
    for weights in plan.downloads:
        for _ in download(weights):
            pass
    coding = coding_of(plan, chosen)
    assert recipe.sample
    denoiser = for_sampling(plan, chosen, recipe.sample.precision, coding.null)
    return Pipeline(plan, denoiser.requires_grad_(False), coding, chosen)


def run(
    recipe: str | Path, *, out: str | Path = "runs", device: str = "auto", **changes: Any
) -> Iterator[Event]:
    """Carry a recipe out as `cmkit run` does, and yield its events; the last is RunFinished, with
    the run's folder.

    `changes` are keys of the recipe: run("ct.toml", seed=1, train={"steps": 500}) changes one key
    of [train], and a table with "use" takes the place of a whole part. Ctrl-C finishes the step,
    saves and raises Interrupted; called again, the run goes on from there.
    """
    from cmkit.device import pick_device
    from cmkit.plan import plan
    from cmkit.recipe import find_recipe, load
    from cmkit.runs import run as carry_out
    from cmkit.runs import run_folder, shown
    from cmkit.stop import StopSignal

    registry, chosen = discover(), pick_device(device)
    loaded = load(find_recipe(str(recipe)), overrides(changes), registry)
    folder = run_folder(loaded, Path(out), registry)
    if folder.finished:
        yield from shown(loaded, folder, chosen)
        return
    stop = StopSignal()
    events = carry_out(plan(loaded), registry, Path(out), chosen, stop)
    while True:
        with stop.within():
            event = next(events, None)
        if event is None:
            return
        yield event


def overrides(changes: Mapping[str, Any], *path: str) -> list[str]:
    """Changes of a recipe as `--set` says them: {"train": {"steps": 5}} is "train.steps=5"."""
    said = []
    for key, value in changes.items():
        where = (*path, toml_key(key) if path else key)
        if isinstance(value, Mapping) and "use" not in value:
            said += overrides(value, *where)
        elif value is None:
            raise RecipeError(f"{'.'.join(where)}: None is no value of a recipe; leave it out")
        else:
            said.append(f"{'.'.join(where)}={inline(value)}")
    return said


def _changed(part: P, values: Mapping[str, Any], kind: str) -> P:
    """The part with other values; RecipeError where it refuses them."""
    try:
        return type(part).model_validate({**part.model_dump(), **values})
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or ", ".join(values)
        raise RecipeError(f"{place}: the {kind} refuses it: {first['msg']}") from error


def _warn(notes: Iterable[str]) -> None:
    """What the commands print as notes, as warnings."""
    for note in notes:
        warnings.warn(note, stacklevel=3)


def _several(value: Any) -> list[Any]:
    return [value] if isinstance(value, (str, int)) else list(value)
