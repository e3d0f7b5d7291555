"""Training: one loop, a generator; progress, saving and stopping belong to its caller."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from cmkit.checkpoint import Checkpoint
from cmkit.denoiser import Denoiser
from cmkit.device import autocast
from cmkit.errors import CheckpointError, NonFiniteError
from cmkit.models import Models
from cmkit.plan import Plan, build, build_companions, build_teacher
from cmkit.recipe import TrainTable
from cmkit.rng import Rng, shared_dropout
from cmkit.tensors import load_weights
from cmkit.values import Companion


@dataclass(frozen=True)
class Step:
    """A finished step. `log` is filled every `log_every` steps, and is empty between."""

    step: int
    total: int
    log: dict[str, float] = field(default_factory=dict)


@dataclass
class Training:
    """All that a step changes, and so all that a checkpoint holds."""

    plan: Plan
    table: TrainTable
    device: torch.device
    models: Models
    optimizer: torch.optim.Optimizer
    companions: Mapping[str, Companion] = field(default_factory=dict)
    step: int = 0
    window: Tensor = field(default_factory=lambda: torch.zeros(()))
    """Sum of the losses since the last log line; it stays on the device."""
    counted: int = 0
    """Losses in `window`."""
    renewed: bool = False
    """Whether the teacher is no longer the recipe's."""

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Every tensor of the state, by file and name."""
        files = {"online": self.models.online.network.state_dict()}
        if self.models.target is not self.models.online:
            files["target"] = self.models.target.network.state_dict()
        for decay, denoiser in self.models.ema.items():
            files[f"ema-{decay}"] = denoiser.network.state_dict()
        if self.renewed:
            assert self.models.teacher is not None
            files["teacher"] = self.models.teacher.network.state_dict()
        for name, companion in self.companions.items():
            files[f"companion-{name}"] = _kept(companion.network)
        slots = self.optimizer.state_dict()["state"]
        files["optimizer"] = {
            f"{index}.{name}": torch.as_tensor(value)
            for index, slot in slots.items()
            for name, value in slot.items()
        }
        return files

    def state(self) -> dict[str, Any]:
        """The rest of the state."""
        terms = {name: kept.tolist() for name, kept in self.models.terms.items()}
        return {
            "step": self.step,
            "window": self.window.item(),
            "counted": self.counted,
            "terms": terms,
        }

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go back to a checkpoint; CheckpointError when it is of another model."""
        source = str(checkpoint.path)
        load_weights(self.models.online.network, checkpoint.tensors("online"), source)
        if self.models.target is not self.models.online:
            load_weights(self.models.target.network, checkpoint.tensors("target"), source)
        for decay, denoiser in self.models.ema.items():
            load_weights(denoiser.network, checkpoint.tensors(f"ema-{decay}"), source)
        if "teacher" in checkpoint.names:
            assert self.models.teacher is not None
            load_weights(self.models.teacher.network, checkpoint.tensors("teacher"), source)
            self.renewed = True
        for name, companion in self.companions.items():
            state, kept = companion.network.state_dict(), _kept(companion.network)
            frozen = {key: value for key, value in state.items() if key not in kept}
            tensors = checkpoint.tensors(f"companion-{name}")
            load_weights(companion.network, {**tensors, **frozen}, source)
        slots: dict[int, dict[str, Tensor]] = {}
        for key, value in checkpoint.tensors("optimizer").items():
            index, _, name = key.partition(".")
            slots.setdefault(int(index), {})[name] = value
        groups = self.optimizer.state_dict()["param_groups"]
        try:
            self.optimizer.load_state_dict({"state": slots, "param_groups": groups})
        except (ValueError, KeyError) as error:
            raise CheckpointError(f"{source}: its optimizer state does not fit: {error}") from error
        _lay_out_as_weights(self.optimizer)
        self.step = checkpoint.step
        self.window = torch.tensor(checkpoint.state["window"], device=self.device)
        self.counted = checkpoint.state["counted"]
        self.models.terms = {
            name: torch.tensor(kept, device=self.device)
            for name, kept in checkpoint.state.get("terms", {}).items()
        }

    def renew_teacher(self) -> None:
        """Make the online network the teacher, and begin anew from it."""
        self.models.restart()
        self.optimizer = _optimizer(self.table, self.models.online.network, self.companions)
        self.renewed = True


def start(plan: Plan, device: torch.device) -> Training:
    """A training at step 0."""
    recipe = plan.recipe
    assert recipe.train is not None
    assert recipe.objective is not None
    online = build(plan, device)
    frozen = [_frozen(online) for _ in recipe.train.ema]
    target = _frozen(online) if "target" in recipe.objective.needs else online
    teacher = build_teacher(plan, device) if "teacher" in recipe.objective.needs else None
    companions = build_companions(plan, device)
    models = Models(
        online=online,
        target=target,
        teacher=teacher,
        ema=dict(zip(recipe.train.ema, frozen, strict=True)),
        ema_warmup=recipe.train.ema_warmup,
        companions={name: companion.network for name, companion in companions.items()},
    )
    if recipe.train.compile:
        for denoiser in {id(d): d for d in (online, target, teacher) if d}.values():
            denoiser.network.compile()
    optimizer = _optimizer(recipe.train, online.network, companions)
    window = torch.zeros((), device=device)
    return Training(plan, recipe.train, device, models, optimizer, companions, window=window)


def train(training: Training) -> Iterator[Step]:
    """Each step from the current one on; the state of `training` is consistent at every yield.

    Raises NonFiniteError when a loss was not finite, at the log line after it: no checkpoint of
    such weights can be written, because saving refuses them as well.
    """
    table, models, device = training.table, training.models, training.device
    recipe = training.plan.recipe
    objective = recipe.objective
    assert objective is not None
    parts = table.accumulate
    batches = recipe.dataset.batches(
        table.batch // parts, recipe.seed, device, start=training.step * parts
    )
    clock, clocked = time.perf_counter(), training.step
    cast = autocast(table.precision, device)
    models.online.train()
    models.target.train()
    for network in models.companions.values():
        network.train()
    while training.step < table.steps:
        step = training.step
        phase = objective.phase(step, table.steps)
        models.online.network.settle()
        for part in range(parts):
            x0, cond = next(batches)
            rng = Rng(recipe.seed, "train", step * parts + part, device)
            with shared_dropout(rng), cast:
                loss = objective.loss(models, x0, cond, phase, rng).mean() / parts
            loss.backward()
            training.window += loss.detach()
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
        log: dict[str, float] = {}
        if training.step % table.log_every == 0 or training.step == table.steps:
            mean = training.window.item() / training.counted
            terms = _means(models)
            if not math.isfinite(mean):
                name = recipe.resolved["objective"]["use"]
                raise NonFiniteError(
                    f"train: the loss of objective {name!r} is {mean} between steps"
                    f" {training.step - training.counted} and {training.step};{_bad_terms(terms)}"
                    f"{_first_bad(models)} lower train.lr or set train.clip_norm, then run again:"
                    " the last checkpoint is finite"
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


def learning_rate(table: TrainTable, step: int) -> float:
    """The rate of a step: a linear warm-up, then constant, a half cosine to 0, or constant and then
    as 1 / sqrt(step) (EDM2)."""
    if step < table.warmup:
        return table.lr * (step + 1) / table.warmup
    if table.sqrt_decay is not None:
        return table.lr / math.sqrt(max(step / table.sqrt_decay, 1))
    if not table.decay:
        return table.lr
    done = (step - table.warmup) / max(table.steps - table.warmup, 1)
    return table.lr * 0.5 * (1 + math.cos(math.pi * done))


def _means(models: Models) -> dict[str, float]:
    """The mean since the last log line of each term that the loss had, if it has several."""
    if len(models.terms) < 2:
        return {}
    sums = {name: kept.tolist() for name, kept in models.terms.items()}
    return {name: total / count for name, (total, count) in sums.items() if count}


def _bad_terms(terms: dict[str, float]) -> str:
    """Which terms of the loss are not finite."""
    bad = [repr(name) for name, mean in terms.items() if not math.isfinite(mean)]
    return f" term {', '.join(bad)};" if bad else ""


def _first_bad(models: Models) -> str:
    """Which weights are not finite any more, if any: a bad teacher is never the rate's fault."""
    denoisers = {"teacher": models.teacher, "online": models.online}
    networks = {name: denoiser.network for name, denoiser in denoisers.items() if denoiser}
    for name, network in {**networks, **models.companions}.items():
        for key, value in network.named_parameters():
            if not value.isfinite().all():
                return f" the {name} weight {key} is not finite;"
    return ""


def _frozen(denoiser: Denoiser) -> Denoiser:
    return copy.deepcopy(denoiser).requires_grad_(False)


def _lay_out_as_weights(optimizer: torch.optim.Optimizer) -> None:
    """Give loaded averages the strides of their weights: fused kernels take both to be alike."""
    for weight, slot in optimizer.state.items():
        for name, value in slot.items():
            if value.shape == weight.shape:
                like = torch.empty_like(weight, dtype=value.dtype, device=value.device)
                slot[name] = like.copy_(value)


def _kept(network: nn.Module) -> dict[str, Tensor]:
    """What a checkpoint holds of a companion: its state without frozen parameters."""
    frozen = {name for name, p in network.named_parameters() if not p.requires_grad}
    return {name: tensor for name, tensor in network.state_dict().items() if name not in frozen}


def _optimizer(
    table: TrainTable, network: nn.Module, companions: Mapping[str, Companion] = {}
) -> torch.optim.Optimizer:
    """The recipe's optimizer, with a group of parameters for each network."""
    groups: list[dict[str, Any]] = [{"params": list(network.parameters())}]
    for companion in companions.values():
        trained = [p for p in companion.network.parameters() if p.requires_grad]
        lr_scale = 1 if companion.lr is None else companion.lr / table.lr
        betas = companion.betas or table.betas
        groups.append({"params": trained, "betas": betas, "lr_scale": lr_scale})
    options: dict[str, Any] = {
        "lr": table.lr,
        "betas": table.betas,
        "weight_decay": table.weight_decay,
    }
    if table.optimizer == "adamw":
        return torch.optim.AdamW(groups, fused=True, **options)
    return torch.optim.RAdam(groups, decoupled_weight_decay=True, foreach=True, **options)
