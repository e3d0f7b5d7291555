"""Ancestral sampling with Euler steps, of openai/consistency_models and k-diffusion."""

from __future__ import annotations

import math

from cmkit_std.samplers.steps import Walk


class Ancestral(Walk):
    """Each Euler step goes below the next noise level, and fresh noise leads back up to it.
    For diffusion models, such as of denoiser.precond = "edm"."""

    def split(self, sigma: float, sigma_next: float) -> tuple[float, float]:
        return ancestral_step(sigma, sigma_next)


def ancestral_step(sigma: float, sigma_next: float) -> tuple[float, float]:
    """(sigma_down, sigma_up): sigma_down^2 + sigma_up^2 = sigma_next^2, and sigma_up is the
    posterior deviation of x at sigma_next given x0 and x at sigma (DDPM, eq. 7)."""
    ratio = sigma_next / sigma
    return sigma_next * ratio, sigma_next * math.sqrt(1 - ratio**2)
