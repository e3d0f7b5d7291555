"""Schedulers of huggingface/diffusers that draw what samplers here draw."""

from __future__ import annotations

import math
from typing import Any

from cmkit import Noise, Precond, RecipeError, Scheduler
from cmkit_std.preconds.discrete import Discrete
from cmkit_std.samplers.steps import falling

BETAS = {
    "scaled_linear": "scaled_linear",
    "linear": "linear",
    "cosine": "squaredcos_cap_v2",
}
"""diffusers' names of what rises evenly."""


def discrete_scheduler(precond: Precond, noise: Noise, name: str) -> Scheduler:
    """The scheduler of the class `name` with the steps of precond `discrete`; RecipeError for
    another precond."""
    if not isinstance(precond, Discrete):
        raise RecipeError(
            f"diffusers' {name} draws from networks that know whole steps; set denoiser.precond ="
            ' "discrete" where the network was trained so'
        )
    config: dict[str, Any] = {
        "_class_name": name,
        "num_train_timesteps": precond.steps,
        "beta_start": precond.beta_start,
        "beta_end": precond.beta_end,
        "beta_schedule": BETAS[precond.spacing],
        "prediction_type": precond.prediction,
        "timestep_spacing": "leading",
        "steps_offset": 1,
    }
    return Scheduler(config, math.hypot(1, noise.sigma_max))


def euler_scheduler(steps: int, precond: Precond, noise: Noise) -> Scheduler:
    """EulerDiscreteScheduler, whose steps are those of DDIM without fresh noise, at `steps` points
    of the grid. (diffusers' DDIMScheduler steps from t by 1000 // steps, wherever the next is.)"""
    found = discrete_scheduler(precond, noise, "EulerDiscreteScheduler")
    assert isinstance(precond, Discrete)
    if precond.timestep_scaling is not None:
        raise RecipeError(
            'diffusers draws from consistency models by LCMScheduler; set sampler.use = "lcm"'
        )
    if precond.prediction == "sample":
        raise RecipeError(
            'diffusers\' EulerDiscreteScheduler knows no prediction = "sample"; draw with `cmkit'
            " sample`"
        )
    levels = precond.schedule.sigmas()
    at = [levels.index(sigma) for sigma in falling(noise, steps)]
    return Scheduler(found.config, found.start, {"timesteps": at})


def consistency_scheduler(
    sigmas: list[float], clamp: bool, noise: Noise, sigma_data: float
) -> Scheduler:
    """CMStochasticIterativeScheduler that visits sigma_max and then the falling `sigmas`: points of
    a Karras grid, of as many as it takes to have all within 1e-5 of them, 40 if that is enough."""
    low, high = noise.sigma_min ** (1 / noise.rho), noise.sigma_max ** (1 / noise.rho)
    places = [(high - sigma ** (1 / noise.rho)) / (high - low) for sigma in sigmas]

    def miss(points: int) -> float:
        """The largest relative distance of a sigma from its nearest point."""
        nearest = (round(u * (points - 1)) / (points - 1) for u in places)
        found = ((high + u * (low - high)) ** noise.rho for u in nearest)
        return max((abs(a / b - 1) for a, b in zip(found, sigmas, strict=True)), default=0.0)

    candidates = (40, *range(2, 10_001))
    points = next((n for n in candidates if miss(n) < 1e-5), None) or min(candidates, key=miss)
    config = {
        "_class_name": "CMStochasticIterativeScheduler",
        "num_train_timesteps": points,
        "sigma_min": noise.sigma_min,
        "sigma_max": noise.sigma_max,
        "sigma_data": sigma_data,
        "rho": noise.rho,
        "s_noise": 1.0,
        "clip_denoised": clamp,
    }
    call: dict[str, Any] = {"num_inference_steps": 1}
    if places:
        # Numbers of points, from sigma_max on; the scheduler turns them round.
        at = [round(u * (points - 1)) for u in reversed(places)]
        call = {"num_inference_steps": None, "timesteps": [*at, 0]}
    return Scheduler(config, noise.sigma_max, call)
