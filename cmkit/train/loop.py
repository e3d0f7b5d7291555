"""The training loop: a generator of steps."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import nn

from cmkit.device import autocast
from cmkit.errors import NonFiniteError
from cmkit.models import Models
from cmkit.plan import batches
from cmkit.rng import Rng, shared_dropout
from cmkit.train.optimizer import learning_rate
from cmkit.train.training import Training


@dataclass(frozen=True)
class Step:
    """A finished step; `log` has numbers every `log_every` steps, and is empty between."""

    step: int
    total: int
    log: dict[str, float] = field(default_factory=dict)


def train(training: Training) -> Iterator[Step]:
    """The remaining steps; a checkpoint may be taken of `training` at every yield.

    Raises NonFiniteError when a loss was not finite, at the log line after it: no checkpoint of
    such weights can be written, because saving refuses them as well.
    """
    table, models, device = training.table, training.models, training.device
    recipe = training.plan.recipe
    objective = recipe.objective
    assert objective is not None
    parts = table.accumulate
    stream = batches(training.plan, table.batch // parts, device, start=training.step * parts)
    clock, clocked = time.perf_counter(), training.step
    cast = autocast(table.precision, device)
    for network in (models.online, models.target, *models.companions.values()):
        network.train()
    while training.step < table.steps:
        step = training.step
        phase = objective.phase(step, table.steps)
        models.online.network.settle()
        added = torch.zeros_like(training.window)
        for part in range(parts):
            x0, cond = next(stream)
            rng = Rng(recipe.seed, "train", step * parts + part, device)
            with shared_dropout(rng), cast:
                loss = objective.loss(models, x0, cond, phase, rng).mean() / parts
            loss.backward()
            added += loss.detach()  # .item() would wait for the device at each step
        training.whole = False
        training.window += added
        optimizer = training.optimizer
        for group in optimizer.param_groups:
            group["lr"] = group.get("lr_scale", 1) * learning_rate(table, step)
            if table.clip_norm is not None:
                nn.utils.clip_grad_norm_(group["params"], table.clip_norm, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        models.update(phase)
        if phase.renew_teacher:
            training.renew_teacher()
        training.step = step + 1
        training.counted += 1
        training.whole = True
        log: dict[str, float] = {}
        if training.step % table.log_every == 0 or training.step == table.steps:
            mean = training.window.item() / training.counted
            terms = _means(models)
            if not math.isfinite(mean):
                name = recipe.resolved["objective"]["use"]
                raise NonFiniteError(
                    f"train: the loss of objective {name!r} is {mean} between steps"
                    f" {training.step - training.counted} and {training.step};{_bad_terms(terms)}"
                    f"{_first_bad(models)} lower train.lr or set train.clip_norm, then go on: the"
                    " last checkpoint is finite"
                )
            seconds = time.perf_counter() - clock
            rate = (training.step - clocked) / seconds
            log = {
                "loss": mean,
                **terms,
                "rate": rate,
                "images_per_second": rate * table.batch,
                "lr": learning_rate(table, step),
                **({"num_sigmas": phase.num_sigmas} if phase.num_sigmas else {}),
                **phase.log,
            }
            training.window.zero_()
            for kept in models.terms.values():
                kept.zero_()
            training.counted = 0
            clock, clocked = time.perf_counter(), training.step
        yield Step(training.step, table.steps, log)


def _means(models: Models) -> dict[str, float]:
    """Means of the loss's terms since the last log line; empty unless there are several terms."""
    if len(models.terms) < 2:
        return {}
    sums = {name: kept.tolist() for name, kept in models.terms.items()}
    return {name: total / count for name, (total, count) in sums.items() if count}


def _bad_terms(terms: dict[str, float]) -> str:
    """The names of the terms that are not finite, for an error."""
    bad = [repr(name) for name, mean in terms.items() if not math.isfinite(mean)]
    return f" term {', '.join(bad)};" if bad else ""


def _first_bad(models: Models) -> str:
    """The first weight that is not finite, for an error."""
    # The teacher comes first: no learning rate makes its weights bad, and it spoils the student's.
    denoisers = {"teacher": models.teacher, "online": models.online}
    networks = {name: denoiser.network for name, denoiser in denoisers.items() if denoiser}
    for name, network in {**networks, **models.companions}.items():
        for key, value in network.named_parameters():
            if not value.isfinite().all():
                return f" the {name} weight {key} is not finite;"
    return ""
