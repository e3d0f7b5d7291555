"""What a sampler of a few steps does, as numbers: at which levels it calls the denoiser, and with
how much fresh noise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cmkit.denoiser import NO_COND, Cond, Denoiser

if TYPE_CHECKING:
    from cmkit.plan import Plan

DRAWING = "model.json"
MOST = 64
"""Steps that are written out."""


@dataclass(frozen=True)
class Level:
    """One step: x = x0 + noise * z with fresh z, then x0 = f(x, sigma); x0 is 0 at first."""

    sigma: float
    noise: float


@dataclass(frozen=True)
class Steps:
    """The steps of a sampler; estimates are clamped to `clamp`, if anything."""

    levels: tuple[Level, ...]
    clamp: tuple[float, float] | None


class _Probe(Denoiser):
    """Answers every call with one number, and keeps what it was asked."""

    def __init__(self, like: Denoiser, answer: float):
        super().__init__(like.network, like.noise, like.scalings, like.sigma_data)
        self.null, self.bounds, self.answer = like.null, like.bounds, answer
        self.asked: list[tuple[float, float]] = []

    def forward(self, x: Tensor, sigma: Tensor, cond: Cond = NO_COND) -> Tensor:
        if cond.sigma_to is not None or len(self.asked) >= MOST:
            raise _OtherError
        self.asked.append((sigma[0].item(), x.flatten()[0].item()))
        return torch.full_like(x, self.answer)


class _OtherError(Exception):
    """The sampler does something else than `Steps` say."""


def steps_of(plan: Plan, denoiser: Denoiser) -> Steps | None:
    """The steps of the recipe's sampler, found by asking it; None where it does more than draw
    fresh noise around each estimate, or takes more than 64 steps."""
    sampler = plan.recipe.sampler
    assert sampler is not None

    def asked(answer: float, noise: float) -> tuple[list[tuple[float, float]], float]:
        probe = _Probe(denoiser, answer)
        z = torch.full((1, plan.space.channels, 1, 1), noise, dtype=torch.float64)
        x0 = sampler.sample(probe, denoiser.noise.start * z, NO_COND, lambda k: z)
        return probe.asked, x0.flatten()[0].item()

    try:
        fresh, _ = asked(0.0, 1.0)
        still, last = asked(0.5, 0.0)
        _, far = asked(1000.0, 0.0)
    except _OtherError:
        return None
    if last != 0.5 or any(x != 0.5 for _, x in still[1:]) or far not in (1000.0, 1.0):
        return None
    if len(fresh) != sampler.nfe:
        return None
    clamp = denoiser.bounds if far == 1.0 else None
    return Steps(tuple(Level(sigma, x) for sigma, x in fresh), clamp)


def drawn(steps: Steps, f: Callable[[Tensor, Tensor], Tensor], draws: Sequence[Tensor]) -> Tensor:
    """x0 that `steps` draw with x0_hat = f(x, sigma) from standard normal `draws`, one a step."""
    x0 = torch.zeros_like(draws[0])
    for level, z in zip(steps.levels, draws, strict=True):
        x0 = f(x0 + level.noise * z, x0.new_full((len(x0),), level.sigma))
        x0 = x0.clamp(*steps.clamp) if steps.clamp else x0
    return x0
