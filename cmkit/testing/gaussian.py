"""The law that a loss leads back to its solution, on Gaussian data, whose solutions are known.

For x0 ~ N(0, S^2) the denoiser is D(x, sigma) = x S^2 / (S^2 + sigma^2), the probability-flow ODE
keeps x / sqrt(S^2 + sigma^2) (EDM, eq. 4), and so the consistency function is f(x, sigma) =
x sqrt((S^2 + eps^2) / (S^2 + sigma^2)) (Consistency Models, definition 1). The online network is
such a solution but for one number, by which it says too much or too little; its target is its copy,
the teacher exact. The gradient in that number must not lead further away.

The value of a loss could not tell this: an optimizer lowers it whatever its sign, and where targets
are held fixed or errors normalised it says nothing of the distance to the solution. Noise levels
that are swapped leave the exact function at rest as well, but not what is around it: a wrong
estimate then spreads from high levels, where nothing holds it, and not from the lowest up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cmkit.denoiser import Cond, Denoiser, Network, Scaling, edm_scalings
from cmkit.kinds import Objective
from cmkit.models import Models
from cmkit.noise import Noise
from cmkit.rng import Rng
from cmkit.testing.protocol import Report
from cmkit.testing.subjects import CPU, DIGITS, companions, draws, scalings_for
from cmkit.values import DataSpec, Phase

S = 0.4
"""Standard deviation of the data; not sigma_data, so that no coefficient is 0 by chance."""
AWAY = 0.2
"""How much too much or too little, in units of what the network is given."""
BATCHES, IMAGES = 8, 64
STEPS = 10**6
SURE = 5.0
"""Standard errors. Honest losses of ours lead back by 8 and more, swapped ones away by 7."""


def consistency_function(sigma: Tensor, sigma_to: Tensor, low: float) -> Tensor:
    """f / x, with eps = `low`."""
    return ((S**2 + low**2) / (S**2 + sigma**2)).sqrt()


def jump(sigma: Tensor, sigma_to: Tensor, low: float) -> Tensor:
    """Of x, the estimate along which one straight step arrives where the ODE does at sigma_to (CTM,
    eq. 9), without its 0 / 0 where that is sigma; there it is D."""
    kept = ((S**2 + sigma_to**2) / (S**2 + sigma**2)).sqrt()
    return S**2 * (sigma + sigma_to) / ((S**2 + sigma**2) * (sigma * kept + sigma_to))


def denoiser(sigma: Tensor, sigma_to: Tensor, low: float) -> Tensor:
    """D / x."""
    return S**2 / (S**2 + sigma**2)


Solution = Callable[[Tensor, Tensor, float], Tensor]
"""x0_hat / x, (B,), at noise levels sigma and sigma_to (B,), with sigma_min."""


def solutions(objective: Objective) -> dict[str, Solution]:
    """What an objective may claim to make, by name: one of them is its solution."""
    needed = objective.needed()
    if "sigma_to" in needed:
        return {"jump": jump}
    if "boundary" in needed:
        return {"consistency function": consistency_function}
    return {"denoiser": denoiser, "consistency function": consistency_function}


class Exact(Network):
    """F of a solution, and `shift` times what it is given more."""

    sites = ("skip.0", "emb.0")

    def __init__(self, solution: Solution, scalings: Scaling, noise: Noise, shift: float = 0.0):
        super().__init__()
        self.solution, self.scalings, self.noise = solution, scalings, noise
        self.shift = nn.Parameter(torch.full((1, 1), shift))  # a weight has two axes

    def forward(
        self, x: Tensor, c_noise: Tensor, cond: Cond, scales: Mapping[str, Tensor]
    ) -> Tensor:
        sigma = (4 * c_noise).exp()
        sigma_to = sigma if cond.sigma_to is None else (4 * cond.sigma_to).exp()
        c_skip, c_out, c_in, _ = self.scalings(sigma, 0.5, self.noise.sigma_min)
        c_out = torch.where(c_out < 1e-6, 1.0, c_out)  # at sigma_min, where F does not count
        f = (self.solution(sigma, sigma_to, self.noise.sigma_min) - c_skip) / (c_in * c_out)
        return (f + self.shift[0])[:, None, None, None] * x


@dataclass(frozen=True)
class Trial:
    """An objective on Gaussian images like `data`."""

    objective: Objective
    data: DataSpec
    phase: Phase

    def gradient(
        self, solution: Solution, shift: float, batch: int, images: int, seed: int = 0
    ) -> float:
        """d loss / d shift of one batch, with fresh companions of `seed`."""
        noise, scalings = Noise(), scalings_for(self.objective)
        online = Denoiser(Exact(solution, scalings, noise, shift), noise, scalings)
        exact = Denoiser(Exact(denoiser, edm_scalings, noise), noise, edm_scalings)
        target = Denoiser(Exact(solution, scalings, noise, shift), noise, scalings)
        held = "target" in self.objective.needed()
        models = Models(
            online,
            target.requires_grad_(False) if held else online,
            exact.requires_grad_(False) if "teacher" in self.objective.needed() else None,
            companions=companions(self.objective, self.data, seed),
        )
        indices = range(batch * images, (batch + 1) * images)
        given = draws(self.data)
        cond = Cond(label=given.labels(indices))
        rng = Rng(0, "testing", batch, CPU)
        loss = self.objective.loss(models, S * given.noise(indices, 1), cond, self.phase, rng)
        (found,) = torch.autograd.grad(loss.mean(), online.network.shift, allow_unused=True)
        return 0.0 if found is None else found.item()

    def back(self, solution: Solution, shift: float) -> float:
        """How surely a step of gradient descent makes |shift| smaller, in standard errors."""
        size = self.data.channels * self.data.resolution**2
        images = min(IMAGES, max(16, 2**16 // size))
        found = [self.gradient(solution, shift, k, images) for k in range(BATCHES)]
        mean = math.copysign(1, shift) * sum(found) / BATCHES
        error = torch.tensor(found, dtype=torch.float64).std().item() / math.sqrt(BATCHES)
        return mean / max(error, 1e-12)


def check_gaussian(report: Report, objective: Objective, data: DataSpec = DIGITS) -> None:
    """Check that a loss leads back to its solution where its grid is finest.

    The solution is the jump to `sigma_to` if that is needed, else the consistency function if
    "boundary" is; of others, which claim neither, either that or the denoiser. Nothing is claimed
    of an objective whose gradient depends on fresh weights of its companions, such as a critic that
    has learned nothing yet: check it without its adversarial term as well.
    """
    steps = (0, 1, 2, STEPS - 3, STEPS - 2, STEPS - 1)
    phases = [phase for step in steps if (phase := objective.phase(step, STEPS)).update]
    if not phases:
        return
    trial = Trial(objective, data, max(phases, key=lambda each: (each.num_sigmas or 0, each.step)))
    known = solutions(objective)
    if objective.companions(data):
        first = next(iter(known.values()))
        if trial.gradient(first, AWAY, 0, 4, 0) != trial.gradient(first, AWAY, 0, 4, 1):
            return
    seen = []
    for name, solution in known.items():
        found = {sign: trial.back(solution, sign * AWAY) for sign in (1, -1)}
        if min(found.values()) > -SURE:
            return
        sign = min(found, key=lambda each: found[each])
        seen.append(
            f"where a network says too {'much' if sign > 0 else 'little'} for the {name}, the"
            f" gradient makes it worse, by {-found[sign]:.0f} standard errors"
        )
    report.require(
        False,
        "on Gaussian images, whose solution is known, a loss leads back to it",
        f"at step {trial.phase.step}, {'; '.join(seen)}",
        "look for a wrong sign, and for images or noise levels that are swapped between the online"
        " network and its target",
    )
