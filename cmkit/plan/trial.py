"""A forward pass and a draw on tensors without data: does a recipe's network run, at what cost?"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from cmkit.denoiser import Cond, Denoiser, Network
from cmkit.errors import PluginError
from cmkit.plan import networks
from cmkit.plan.networks import naming_table
from cmkit.plugins import blame, discover
from cmkit.recipe import Recipe
from cmkit.values import DataSpec


def dry_run(recipe: Recipe, denoiser: Denoiser, data: DataSpec, conditions: frozenset[str]) -> int:
    """FLOPs of a forward pass of one image; the sampler, if any, is run through on the way."""
    x, cond = dry_input(data, conditions)
    denoiser.null = Cond(text=cond.text, pooled=cond.pooled)
    with (
        naming_table(recipe, "backbone"),
        trying("backbone"),
        FlopCounterMode(display=False) as counter,
    ):
        denoiser(x, x.new_empty(1), cond)
    if recipe.sampler:
        with naming_table(recipe, "sampler"), trying("sampler"), _quick(denoiser.network):
            guided = networks.guided_as_said(recipe, denoiser)
            out = recipe.sampler.sample(guided, x, cond, lambda k: torch.empty_like(x))
        if out.shape != x.shape:
            raise PluginError(
                f"the sampler returned {tuple(out.shape)} for images {tuple(x.shape)}"
            )
    return int(counter.get_total_flops())


def dry_input(data: DataSpec, conditions: frozenset[str]) -> tuple[torch.Tensor, Cond]:
    """One image and its conditions without data."""
    x = torch.empty(1, data.channels, data.resolution, data.resolution, device="meta")
    label = torch.empty(1, dtype=torch.int64, device="meta") if "label" in conditions else None
    levels = conditions & {"guidance", "sigma_to"}
    return x, Cond(label, **{name: x.new_empty(1) for name in levels}, **_dry_text(data, x))


def _dry_text(data: DataSpec, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """What a prompt encoder tells of one prompt, without data."""
    if (text := data.text) is None:
        return {}
    shapes = {"text": (1, text.length, text.width), "pooled": (1, text.pooled or 0), "size": (1, 6)}
    return {name: x.new_empty(shapes[name]) for name in text.conditions}


@contextlib.contextmanager
def _quick(network: Network) -> Iterator[None]:
    """Inside, all evaluations of a network behind the second, which guidance takes, return at once
    what has the shape of their input: a sampler of hundreds of steps is tried in seconds."""
    own, calls = network.forward, itertools.count()

    def forward(x: torch.Tensor, *rest: Any) -> torch.Tensor:
        return own(x, *rest) if next(calls) < 2 else torch.empty_like(x)

    vars(network)["forward"] = forward
    try:
        yield
    finally:
        del vars(network)["forward"]


@contextlib.contextmanager
def trying(kind: str) -> Iterator[None]:
    """Turn errors of a dry run on meta tensors into PluginError."""
    try:
        with torch.inference_mode():
            yield
    except (RuntimeError, TypeError, ValueError, AttributeError, LookupError) as error:
        reason = "".join(str(error).strip().splitlines()[:1])
        place = blame(error, discover().rows)
        raise PluginError(
            f"the {kind} fails on a tensor without data ({type(error).__name__}: {reason}"
            f"{f'; at {place}' * bool(place)}); does it make all its tensors on x.device?"
        ) from error
