"""Schedules of the step alone: how many noise levels, and how slowly the target follows."""

from __future__ import annotations

import math
from typing import Literal


def adaptive_num_sigmas(step: int, total: int, s0: int, s1: int) -> int:
    """N(k) = ceil(sqrt(k/K ((s1 + 1)^2 - s0^2) + s0^2) - 1) + 1 (Consistency Models, appendix C).

    It goes on growing past K, as in the official code.
    """
    scales = math.ceil(math.sqrt(step / total * ((s1 + 1) ** 2 - s0**2) + s0**2) - 1)
    return max(scales, 1) + 1


def adaptive_target_ema(
    num_sigmas: int, s0: int, mu0: float, denominator: Literal["n_minus_1", "n"] = "n_minus_1"
) -> float:
    """mu(k) = exp(s0 ln(mu0) / (N(k) - 1)) as the official code, or / N(k) as the paper."""
    return math.exp(s0 * math.log(mu0) / (num_sigmas - (denominator == "n_minus_1")))


def halving_num_steps(step: int, s0: int, steps_each: int) -> int:
    """Sampling steps of progressive distillation: s0 halved every `steps_each` steps down to 2,
    which lasts twice as long, then 1 (openai/consistency_models, mode "progdist")."""
    # 2^40 is above every s0: a late step must not build an integer of thousands of digits.
    steps = s0 // 2 ** min(step // steps_each, 40)
    if steps > 2:
        return steps
    return 2 if step < steps_each * (math.log2(s0) + 1) else 1
