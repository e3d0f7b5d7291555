"""The check of an objective."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from cmkit.denoiser import Cond, Denoiser, edm_scalings
from cmkit.kinds import Objective
from cmkit.models import Models
from cmkit.noise import Noise
from cmkit.plan.record import CONDITIONS
from cmkit.rng import Rng
from cmkit.testing.estimates import check_estimates
from cmkit.testing.gaussian import check_gaussian
from cmkit.testing.protocol import Report, report_on, shown
from cmkit.testing.subjects import (
    CPU,
    DIGITS,
    PROMPTS,
    Small,
    companions,
    draws,
    scalings_for,
    told,
)
from cmkit.traits import TRAITS
from cmkit.values import DataSpec, Phase


def check_objective(
    objective: Objective, data: DataSpec = DIGITS, stop_gradient: bool = True
) -> None:
    """Check an objective on images like `data`, with small networks that have dropout, under their
    classes and, where it does not need those, under prompts; and on Gaussian ones, whose solution
    is known (`cmkit.testing.gaussian`).

    `stop_gradient` = False is for a loss that means to teach both of two estimates that it
    compares.
    """
    report = report_on(objective)
    known = {"target", "teacher", *TRAITS, *CONDITIONS}
    report.require(
        objective.needs <= known,
        '`needs` holds "target", "teacher", traits of scalings and fields of cmkit.Cond',
        f"it has {sorted(objective.needs - known)}",
        f"choose among {', '.join(sorted(known))}",
    )
    objective.check(data)
    _check_phase(report, objective)
    labels = Cond(label=draws(data).labels(range(4)))
    given = [(step, labels) for step in (0, 60, 99)]
    if "label" not in objective.needed():
        given.append((0, Cond(text=told(data.text or PROMPTS, 4)["text"])))
    for step, cond in given:
        _check_loss(report, objective, data, objective.phase(step, 100), cond)
    x0 = _images(data)
    for step in (0, 99):
        models, rng = _models(objective, data, apart=True), Rng(0, "testing", 0, CPU)
        phase = objective.phase(step, 100)
        check_estimates(report, objective, models, (x0, labels, phase, rng), stop_gradient)
    check_gaussian(report, objective, data)


class _NoTorch(TorchFunctionMode):
    """A context in which every call of torch raises TypeError."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise TypeError(f"torch.{getattr(func, '__name__', func)} was called")


def _check_phase(report: Report, objective: Objective) -> None:
    steps = (0, 1, 50, 99, 1, 0)
    with (
        report.trying("`phase` is pure Python", "use the math module"),
        report.untouched("phase"),
        _NoTorch(),
    ):
        phases = [objective.phase(step, 100) for step in steps]
    for step, phase in zip(steps, phases, strict=True):
        report.require(
            isinstance(phase, Phase) and phase.step == step,
            "`phase` returns a cmkit.Phase of that step",
            f"{phase!r} at step {step}",
            "return Phase(step, ...)",
        )
        numbers = [phase.target_ema, *phase.log.values()]
        report.require(
            all(type(number) in (int, float) for number in numbers)
            and type(phase.num_sigmas) in (int, type(None)),
            "a phase holds plain Python numbers",
            f"{phase!r}",
            "convert with int() or float()",
        )
        report.require(
            0 <= phase.target_ema <= 1 and (phase.num_sigmas is None or phase.num_sigmas >= 2),
            "target_ema lies in [0, 1], and a grid has at least two points",
            f"{phase!r}",
            "clip the schedule at its ends",
        )
    report.require(
        phases[0] == phases[5] and phases[1] == phases[4],
        "a phase follows from (step, total) alone, so that a run resumes to the same bits",
        "step 1 after step 99 has another phase",
        "keep no state between calls",
    )


def _models(objective: Objective, data: DataSpec, apart: bool = False) -> Models:
    """The networks that training would hold; the teacher's weights are not the student's.

    With `apart` the target is always a copy, and it and the teacher require gradients.
    """
    online = Denoiser(Small(data), Noise(), scalings_for(objective)).train()
    target, teacher = online, None
    if "target" in objective.needed() or apart:
        target = copy.deepcopy(online).requires_grad_(apart)
    if "teacher" in objective.needed():
        teacher = Denoiser(Small(data), Noise(), edm_scalings).eval().requires_grad_(False)
        for parameter in teacher.parameters():
            parameter.mul_(0.9)
        teacher.requires_grad_(apart)
    return Models(online, target, teacher, companions=companions(objective, data))


def _images(data: DataSpec) -> Tensor:
    return draws(data).noise(range(4), 0).clamp(-1, 1)


def _check_loss(
    report: Report, objective: Objective, data: DataSpec, phase: Phase, cond: Cond
) -> None:
    x0 = _images(data)
    given = x0.clone()

    def computed(index: int = 0, seed: int = 0) -> tuple[Tensor, Models]:
        models = _models(objective, data)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            rng = Rng(0, "testing", index, CPU)
            with report.untouched("loss"):
                return objective.loss(models, x0, cond, phase, rng), models

    loss, models = computed()
    report.require(
        isinstance(loss, Tensor) and loss.shape == (len(x0),) and loss.dtype == torch.float32,
        "`loss` returns one float32 number an image, (B,), unreduced",
        f"{shown(loss)}",
        "average over pixels: .flatten(1).mean(1)",
    )
    report.require(
        bool(loss.isfinite().all()),
        "a loss is finite",
        f"{loss.tolist()} at step {phase.step}",
        "look for a division by 0 at the ends of the grid",
    )
    report.require(
        torch.equal(x0, given), "x0 is left alone", "`loss` wrote into it", "work on a new tensor"
    )
    report.require(
        torch.equal(loss, computed()[0]) and torch.equal(loss, computed(seed=1)[0]),
        "a loss follows from its arguments: rng is where all draws come from",
        "two calls with equal rng differ",
        "use rng, and call the models inside `with cmkit.shared_dropout(rng)`",
    )
    report.require(
        not torch.equal(loss, computed(index=1)[0]),
        "another step draws other noise",
        "rng of another step gives the same loss",
        "draw from rng: rng.normal_like(x0)",
    )
    unseen = {name for name, value in vars(cond).items() if value is not None}
    unseen -= models.online.network.seen  # type: ignore[arg-type]
    report.require(
        not unseen,
        "the online network sees the conditions",
        f"it was called without the {', '.join(unseen)}",
        "pass cond on: models.online(x, sigma, cond)",
    )
    with report.trying("a loss has a gradient", "call models.online outside torch.no_grad()"):
        loss.mean().backward()
    report.require(
        any(p.grad is not None and bool(p.grad.any()) for p in models.online.parameters()),
        "the gradient reaches the online network",
        "it is zero everywhere",
        "call models.online outside torch.no_grad(), and do not detach it",
    )
    with torch.autocast("cpu", torch.bfloat16):
        low, _ = computed()
    report.require(
        low.dtype == torch.float32 and bool(low.isfinite().all()),
        "a loss under autocast is finite float32",
        f"{low.dtype} {low.tolist()}",
        "sum squares in float32",
    )
