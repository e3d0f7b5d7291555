"""The state of a training, and how it is kept in a checkpoint and restored."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from cmkit.checkpoint import Checkpoint
from cmkit.denoiser import NO_COND, Cond, Denoiser
from cmkit.errors import CheckpointError
from cmkit.models import Models
from cmkit.plan import Plan, build, build_companions, build_teacher, target_is_average
from cmkit.recipe import TrainTable
from cmkit.tensors import load_weights
from cmkit.train.optimizer import optimizer_of
from cmkit.values import Companion


@dataclass
class Training:
    """The state of a training: all that a step changes, and so all that a checkpoint holds."""

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
    whole: bool = True
    """Whether the state is that of `step`: not while it is being changed to the next."""

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Tensors of the state, by file and name; without frozen parameters."""
        files = {
            name: {key: value for key, value in network.state_dict().items() if key not in frozen}
            for name, (network, frozen) in self._networks().items()
        }
        state, names = self.optimizer.state_dict()["state"], _names(self.optimizer)
        files["optimizer"] = {
            f"{slot}/{names[index]}": torch.as_tensor(value)
            for index, slots in state.items()
            for slot, value in slots.items()
        }
        return files

    def _networks(self) -> dict[str, tuple[nn.Module, set[str]]]:
        """The networks that training changes, by file, with the names of frozen parameters."""
        models, online = self.models, self.models.online.network
        own: dict[str, nn.Module] = {"online": online}
        own |= {f"companion-{name}": made.network for name, made in self.companions.items()}
        copies = {f"ema-{decay}": copied.network for decay, copied in models.ema.items()}
        if models.has_target:
            copies["target"] = models.target.network
        found = {name: (network, frozen_names(network)) for name, network in own.items()}
        found |= {name: (network, frozen_names(online)) for name, network in copies.items()}
        if self.renewed and models.teacher:
            found["teacher"] = (models.teacher.network, set())
        return found

    def state(self) -> dict[str, Any]:
        """The numbers of the state, and the name of the average that is sampled from."""
        terms = {name: kept.tolist() for name, kept in self.models.terms.items()}
        counts = {"step": self.step, "steps": self.table.steps, "counted": self.counted}
        average = f"ema-{self.table.ema[0]}"
        return {**counts, "window": self.window.item(), "terms": terms, "average": average}

    def restore(self, checkpoint: Checkpoint) -> None:
        """Take the state of a checkpoint; CheckpointError when it is of another model."""
        self.renewed = "teacher" in checkpoint.names
        for name in self._networks():
            self._load(name, checkpoint, name)
        self._load_optimizer(checkpoint)
        self.step = checkpoint.step
        self.window = torch.tensor(checkpoint.state["window"], device=self.device)
        self.counted = checkpoint.state["counted"]
        self.models.terms = {
            name: torch.tensor(kept, device=self.device)
            for name, kept in checkpoint.state.get("terms", {}).items()
        }

    def start_from(self, origin: Checkpoint) -> Iterator[str]:
        """Go on from another run's checkpoint under this recipe's numbers; sentences of what that
        changes. CheckpointError when it is of another model, or not before this one's last step."""
        source, phase = str(origin.path), self.plan.recipe.objective
        assert phase is not None
        if origin.step >= self.table.steps:
            raise CheckpointError(
                f"{source}: is at step {origin.step}, and train.steps = {self.table.steps} is not"
                " above it; raise train.steps"
            )
        self.renewed = "teacher" in origin.names
        first = str(origin.state.get("average", "online"))
        for name in self._networks():
            kept = name if name in origin.names else first
            if kept != name:
                yield f"{name}: {source} has none, it starts as its {kept}"
            self._load(name, origin, kept)
        try:
            self._load_optimizer(origin)
        except CheckpointError as error:
            yield f"{error}; the optimizer starts anew"
        self.step = origin.step
        said = f"going on from step {origin.step} of {source}"
        num_sigmas = phase.phase(origin.step, self.table.steps).num_sigmas
        steps = origin.state.get("steps")
        if num_sigmas and steps and steps != self.table.steps:
            before = phase.phase(origin.step, steps).num_sigmas
            said += f"; of {self.table.steps} steps, N there is {num_sigmas}, of {steps} {before}"
        yield said

    def _load(self, name: str, checkpoint: Checkpoint, kept: str) -> None:
        """Load the weights `kept` of a checkpoint into the network `name`."""
        network, frozen = self._networks()[name]
        own = {key: value for key, value in network.state_dict().items() if key in frozen}
        load_weights(network, {**checkpoint.tensors(kept), **own}, str(checkpoint.path))

    def _load_optimizer(self, checkpoint: Checkpoint) -> None:
        """Load the optimizer's state of a checkpoint, but for what the recipe says of it."""
        places = {name: index for index, name in _names(self.optimizer).items()}
        slots: dict[int, dict[str, Tensor]] = {}
        groups = self.optimizer.state_dict()["param_groups"]
        try:
            for key, value in checkpoint.tensors("optimizer").items():
                slot, _, name = key.partition("/")
                slots.setdefault(places[name], {})[slot] = value
            self.optimizer.load_state_dict({"state": slots, "param_groups": groups})
        except (ValueError, KeyError) as error:
            raise CheckpointError(
                f"{checkpoint.path}: its optimizer state does not fit: {error}"
            ) from error
        _lay_out_as_weights(self.optimizer)

    def renew_teacher(self) -> None:
        """Make the online network the teacher; averages and optimizer start anew from it."""
        self.models.restart()
        self.optimizer = optimizer_of(self.table, self.models.online.network, self.companions)
        self.renewed = True


def start(plan: Plan, device: torch.device, null: Cond = NO_COND) -> Training:
    """A training at step 0; `null` is the unconditional prompt, if there is one."""
    recipe = plan.recipe
    assert recipe.train is not None
    assert recipe.objective is not None
    online = build(plan, device)
    online.null = null
    averages = [_average(online) for _ in recipe.train.ema]
    target = online
    if "target" in recipe.needs:
        target = averages[0] if target_is_average(recipe) else _average(online)
    teacher = build_teacher(plan, device, online) if "teacher" in recipe.needs else None
    if teacher:
        teacher.null = null
    companions = build_companions(plan, device)
    models = Models(
        online=online,
        target=target,
        teacher=teacher,
        ema=dict(zip(recipe.train.ema, averages, strict=True)),
        ema_warmup=recipe.train.ema_warmup,
        companions={name: companion.network for name, companion in companions.items()},
    )
    if recipe.train.compile:
        for network in {id(d.network): d.network for d in (online, target, teacher) if d}.values():
            network.compile()
    optimizer = optimizer_of(recipe.train, online.network, companions)
    window = torch.zeros((), device=device)
    return Training(plan, recipe.train, device, models, optimizer, companions, window=window)


def _average(denoiser: Denoiser) -> Denoiser:
    """A copy without gradients, which shares the frozen parameters."""
    shared = {id(p): p for p in denoiser.parameters() if not p.requires_grad}
    return copy.deepcopy(denoiser, shared).requires_grad_(False)


def frozen_names(network: nn.Module) -> set[str]:
    """Names of the parameters that require no gradient."""
    return {name for name, p in network.named_parameters() if not p.requires_grad}


def _names(optimizer: torch.optim.Optimizer) -> dict[int, str]:
    """Names of the parameters by their places in the optimizer's state."""
    groups = optimizer.state_dict()["param_groups"]
    pairs = (zip(group["params"], group["param_names"], strict=True) for group in groups)
    return {index: name for pair in pairs for index, name in pair}


def _lay_out_as_weights(optimizer: torch.optim.Optimizer) -> None:
    """Give the optimizer's loaded tensors the strides of their weights."""
    # Fused kernels take the memory formats of both for equal, and loading does not keep them.
    for weight, slot in optimizer.state.items():
        for name, value in slot.items():
            if value.shape == weight.shape:
                like = torch.empty_like(weight, dtype=value.dtype, device=value.device)
                slot[name] = like.copy_(value)
