"""The laws of which estimates a loss teaches, by watching every call of its networks."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cmkit.kinds import Objective
from cmkit.models import Models
from cmkit.testing.protocol import Report


@dataclass
class Call:
    """One call of a network: which, its c_noise (B,), whether its images had a gradient; and once
    the loss has gone backward the gradient of its output, where that is not zero."""

    name: str
    level: Tensor
    led: bool
    gradient: Tensor | None = None


def check_estimates(
    report: Report, objective: Objective, models: Models, given: Any, stop_gradient: bool
) -> None:
    """Check that a loss of the arguments `given` teaches the online network alone, that with
    `stop_gradient` one of two estimates that it compares is held fixed, and that those of a
    consistency model ("boundary") learn from noise levels that are not higher.

    `models` are networks of their own that require gradients. In training the target is the online
    network itself where "target" is not needed or its decay is 0, and a gradient that reaches it
    counts. It may pass through the target, as in CTM, to what the online network has said. What
    `cmkit.functional.derivative` says is not watched.
    """
    calls = _watched(objective, models, given)
    for call in calls:
        report.require(
            call.name == "online" or call.led or call.gradient is None,
            "no gradient reaches the target or the teacher",
            f"one reaches the {call.name}",
            f"call models.{call.name} inside torch.no_grad(); where target_ema is 0 it is the"
            " online network",
        )
    taught = [call for call in calls if call.gradient is not None]
    pairs = itertools.combinations(taught, 2)
    opposed = any(a.name == b.name and _opposed(a.gradient, b.gradient) for a, b in pairs)
    report.require(
        not (stop_gradient and opposed),
        "of two estimates that a loss compares, one is held fixed",
        "both get the same gradient, with opposite signs",
        "call the network for the target inside torch.no_grad(), or check with stop_gradient ="
        " False if the paper wants both",
    )
    if "boundary" not in objective.needed() or not taught:
        return
    highest = torch.stack([call.level for call in taught]).amax(0)
    held = [call.level for call in calls if call.gradient is None and call.name != "teacher"]
    report.require(
        all(bool((level <= highest + 1e-5).all()) for level in held),
        "a consistency model learns from noise levels that are not higher, which begin at the data",
        "the estimate that is held fixed is at a higher level than the one that learns",
        "swap them: the online network has the higher level, its target the lower",
    )


def _watched(objective: Objective, models: Models, given: Any) -> list[Call]:
    """The calls that a loss makes, after it has gone backward."""
    calls: list[Call] = []

    def note(name: str) -> Any:
        def hook(network: Any, args: tuple[Any, ...], out: Tensor) -> None:
            call = Call(name, args[1].detach(), args[0].requires_grad)
            calls.append(call)
            if out.requires_grad:
                out.register_hook(lambda gradient: _keep(call, gradient))

        return hook

    named = {"online": models.online, "target": models.target, "teacher": models.teacher}
    watched = [
        denoiser.network.register_forward_hook(note(name))
        for name, denoiser in named.items()
        if denoiser is not None
    ]
    try:
        loss = objective.loss(models, *given)
    finally:
        for handle in watched:
            handle.remove()
    loss.mean().backward()
    return calls


def _keep(call: Call, gradient: Tensor) -> None:
    if gradient.any():
        call.gradient = gradient.detach().flatten(1)


def _opposed(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether two gradients (B, n) are opposite, but for a positive factor of each image, as those
    of two estimates are of which a loss takes the distance."""
    assert a is not None
    assert b is not None
    both = (a.norm(dim=1) > 0) & (b.norm(dim=1) > 0)
    cosine = torch.cosine_similarity(a[both].double(), b[both].double())
    return bool(both.any()) and bool(cosine.mean() < -0.9)
