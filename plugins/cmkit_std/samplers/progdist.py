"""Sampling of progressively distilled models (Salimans, Ho: Progressive Distillation for Fast
Sampling of Diffusion Models, 2022), as openai/consistency_models does it."""

from __future__ import annotations

from pydantic import Field

import cmkit
from cmkit_std.samplers.steps import Walk, falling


class ProgDist(Walk):
    """DDIM steps over the intervals of a sigma grid of steps + 1 points, ending at sigma_min: the
    very steps that each stage of progressive distillation halves."""

    steps: int = Field(1, ge=1, le=10_000)
    """Intervals of the sigma grid, each one evaluation."""

    def levels(self, noise: cmkit.Noise) -> list[float]:
        """The points of the grid; no step to 0 follows."""
        return falling(noise, self.steps + 1)
