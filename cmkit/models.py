"""The online network, its target and averages, the teacher, and how they follow each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from cmkit.denoiser import Denoiser
from cmkit.errors import PluginError

if TYPE_CHECKING:
    from cmkit.values import Phase


@dataclass
class Models:
    """The copies of one denoiser that training holds; `ema` maps a decay to its copy.

    With `ema_warmup` a decay is capped by (1 + step) / (10 + step), so that the first, untrained
    weights are forgotten. `companions` are the further networks that the objective trains, by name.
    `terms` is what `total` has added up since the last log line: by name,
    the sum of means and their number, (2,) float32.
    """

    online: Denoiser
    target: Denoiser
    teacher: Denoiser | None = None
    ema: dict[float, Denoiser] = field(default_factory=dict)
    ema_warmup: bool = False
    companions: Mapping[str, nn.Module] = field(default_factory=dict)
    terms: dict[str, Tensor] = field(default_factory=dict, init=False)

    @property
    def has_target(self) -> bool:
        """Whether the target has weights of its own: it is neither the online network nor one of
        the averages."""
        return all(self.target is not each for each in (self.online, *self.ema.values()))

    def total(self, **terms: Tensor) -> Tensor:
        """The sum, (B,), of an objective's terms (B,), whose means the training log shows by name.

        An error about a loss that is not finite names the term. Nothing leaves the device.
        """
        for name, term in terms.items():
            if name not in self.terms:
                self.terms[name] = torch.zeros(2, device=term.device)
            kept = self.terms[name]
            kept[0] += term.detach().mean()
            kept[1] += 1
        first, *others = terms.values()
        for term in others:
            first = first + term
        return first

    @torch.no_grad()
    def update(self, phase: Phase) -> None:
        """Move the target and every EMA towards the online weights, one fused call a copy.

        The target takes decay `phase.target_ema`; where the objective keeps no target of its own,
        it is the online network itself and is left alone. PluginError where the target is one of
        the averages, and the objective asks for another decay after all.
        """
        if not phase.update:
            return
        if self.has_target:
            self._move(self.target, 1 - phase.target_ema)
        cap = (1 + phase.step) / (10 + phase.step) if self.ema_warmup else 1.0
        for decay, copied in self.ema.items():
            if copied is self.target and phase.target_ema != min(decay, cap):
                raise PluginError(
                    f"objective: target_ema is {phase.target_ema} at step {phase.step}, and was"
                    f" train.ema = {decay} at others; set train.ema to another number"
                )
            self._move(copied, 1 - min(decay, cap))

    def _move(self, copied: Denoiser, weight: float) -> None:
        """Move what is trained of a copy by `weight` of the way to the online weights."""
        pairs = zip(copied.parameters(), self.online.parameters(), strict=True)
        own, online = zip(*(pair for pair in pairs if pair[1].requires_grad), strict=True)
        torch._foreach_lerp_(own, online, weight)

    @torch.no_grad()
    def restart(self) -> None:
        """Make the online weights those of every other copy, the teacher among them; PluginError
        where that is the online network without its adapter."""
        if self.teacher is not None and self.teacher.network is self.online.network:
            raise PluginError(
                "objective: it makes the student its teacher, which here is the same network"
                " without its adapter; drop [adapter], or choose another objective"
            )
        for copied in (self.target, self.teacher, *self.ema.values()):
            if copied is not None:
                copied.network.load_state_dict(self.online.network.state_dict())
