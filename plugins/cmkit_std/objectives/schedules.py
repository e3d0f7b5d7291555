"""How the number of noise levels N and the target's decay mu change with the training step."""

from __future__ import annotations

import math


def growing(step: int, total: int, start_scales: int, end_scales: int) -> int:
    """N(k) = ceil(sqrt(k / K ((s1 + 1)^2 - s0^2) + s0^2) - 1) + 1 (Consistency Models, appendix C).

    From step K on it grows past s1 + 1.
    """
    s0, s1 = start_scales, end_scales
    scales = math.ceil(math.sqrt(step / total * ((s1 + 1) ** 2 - s0**2) + s0**2) - 1)
    return max(scales, 1) + 1


def rising_ema(start_ema: float, start_scales: int, denominator: int) -> float:
    """mu = exp(s0 ln(mu0) / denominator); the official code divides by N - 1, the paper by N."""
    return math.exp(start_scales * math.log(start_ema) / denominator)


def halving(step: int, start_scales: int, stage: int) -> int:
    """Steps of the student of progressive distillation, halved every `stage` training steps.

    The last two stages, of 2 steps and 1, take twice as long, as in openai/consistency_models.
    """
    scales = start_scales >> min(step // stage, 64)
    if scales > 2:
        return scales
    before = stage * (math.log2(start_scales) - 1)
    return 2 if step < before + 2 * stage else 1
