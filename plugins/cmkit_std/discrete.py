"""Steps of a discrete diffusion model as noise levels on our axis (Luo et al.: Latent Consistency
Models, 2023; huggingface/diffusers)."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cmkit import Noise, RecipeError
from cmkit_std.preconds.schedule import Cosine, Schedule

Stepped = Schedule | Cosine
_TABLES: dict[tuple[Stepped, torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}


def table(of: Stepped, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The noise levels of `of`, (n,), copied to a device once."""
    return _tables(of, device, dtype)[0]


def nearest(of: Stepped, sigma: Tensor) -> Tensor:
    """Which of the noise levels of `of` is nearest to each sigma (B,), (B,) int64."""
    return torch.bucketize(sigma, _tables(of, sigma.device, sigma.dtype)[1])


def rounded(of: Stepped, sigma: Tensor) -> Tensor:
    """The noise levels of `of` that are nearest to sigma (B,), (B,)."""
    return table(of, sigma.device, sigma.dtype)[nearest(of, sigma)]


def _tables(of: Stepped, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The levels, (n,), and the middles between them, (n - 1,).

    In a dictionary, because torch.compile sees through it and not through functools.
    """
    key = (of, device, dtype)
    if key not in _TABLES:
        with torch.inference_mode(False):  # training may come after sampling
            levels = torch.tensor(of.sigmas(), dtype=torch.float64, device="cpu")
            middles = (levels[1:] + levels[:-1]) / 2
            _TABLES[key] = levels.to(device, dtype), middles.to(device, dtype)
    return _TABLES[key]


def zero_terminal_snr(alphas_cumprod: Tensor) -> Tensor:
    """alpha_t^2, (steps,), of alpha_t moved and stretched so that the last is 0 and the first stays
    (Lin, Liu, Li, Yang: Common Diffusion Noise Schedules and Sample Steps are Flawed, 2023,
    algorithm 1). Its last step has no finite sigma, and so no place on our axis."""
    alpha = alphas_cumprod.sqrt()
    moved: Tensor = (alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])
    return moved**2


def lcm_boundary(
    t: Tensor, timestep_scaling: float = 10.0, sigma_data: float = 0.5
) -> tuple[Tensor, Tensor]:
    """(c_skip, c_out) of x_vp and of the estimate at whole steps t, s = timestep_scaling t:
    sigma_data^2 / (s^2 + sigma_data^2) and s / sqrt(s^2 + sigma_data^2).

    The official code, unlike its paper, scales t and has no factor sigma_data in c_out.
    """
    s = timestep_scaling * t
    square = s**2 + sigma_data**2
    return sigma_data**2 / square, s / square.sqrt()


@dataclass(frozen=True)
class DiscreteNoise(Noise):
    """The noise levels of a schedule: a grid of its own steps instead of Karras's."""

    schedule: Schedule = field(default_factory=Schedule)
    unit_start: bool = False
    """Whether sampling starts from x_vp = z, as diffusers does, instead of x = sigma_max z."""

    @classmethod
    def of(cls, schedule: Schedule, unit_start: bool = False) -> DiscreteNoise:
        """The axis from the first of its steps to the last."""
        levels = schedule.sigmas()
        return cls(levels[0], levels[-1], schedule=schedule, unit_start=unit_start)

    @property
    def start(self) -> float:
        """1 / alpha of the last step, sqrt(1 + sigma_max^2), where x_vp has deviation 1."""
        return math.hypot(1, self.sigma_max) if self.unit_start else self.sigma_max

    def steps(self, n: int) -> Tensor:
        """Steps of a grid of n points, (n,) int64, rising: all of them; or, where they divide, 0
        and then the last of each of n - 1 equal parts, LCM's 0, 19, 39, .., 999 for n = 51; or n of
        them as evenly as can be. RecipeError where there are not so many."""
        total = self.schedule.steps
        if not 2 <= n <= total:
            raise RecipeError(
                f"a grid of {n} points: the schedule has {total} steps; ask for 2 to {total}"
            )
        if n < total and total % (n - 1) == 0:
            return torch.cat([torch.zeros(1).long(), torch.arange(1, n) * (total // (n - 1)) - 1])
        return torch.linspace(0, total - 1, n, dtype=torch.float64).round().long()

    @functools.lru_cache(maxsize=64)  # noqa: B019 - equal grids share it
    def sigmas(
        self, n: int, device: torch.device | None = None, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """Levels of `steps(n)`, (n,), rising from sigma_min to sigma_max."""
        levels = table(self.schedule, torch.device("cpu"), torch.float64)
        return levels[self.steps(n)].to(device=device, dtype=dtype)

    def sigma_at(self, u: Tensor) -> Tensor:
        """The levels of steps at fractions u in [0, 1] of the way, of which each has its share."""
        levels = table(self.schedule, u.device, u.dtype)
        return levels[(u * len(levels)).long().clamp(max=len(levels) - 1)]
