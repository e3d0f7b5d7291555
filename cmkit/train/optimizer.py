"""The optimizer of a recipe and its learning rate."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from cmkit.recipe import TrainTable
from cmkit.values import Companion


def learning_rate(table: TrainTable, step: int) -> float:
    """The learning rate of a step: a linear warm-up, then constant, along a half cosine to 0, or
    constant and then as 1 / sqrt(step) (EDM2)."""
    if step < table.warmup:
        return table.lr * (step + 1) / table.warmup
    if table.sqrt_decay is not None:
        return table.lr / math.sqrt(max(step / table.sqrt_decay, 1))
    if not table.decay:
        return table.lr
    done = (step - table.warmup) / max(table.steps - table.warmup, 1)
    return table.lr * 0.5 * (1 + math.cos(math.pi * done))


def optimizer_of(
    table: TrainTable, network: nn.Module, companions: Mapping[str, Companion] = {}
) -> torch.optim.Optimizer:
    """The optimizer of all parameters that require gradients, with a group for each network."""
    groups: list[dict[str, Any]] = [{"params": _trained("online", network)}]
    for name, companion in companions.items():
        trained = _trained(f"companion-{name}", companion.network)
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


def _trained(prefix: str, network: nn.Module) -> list[tuple[str, nn.Parameter]]:
    named = network.named_parameters()
    return [(f"{prefix}/{name}", p) for name, p in named if p.requires_grad]
