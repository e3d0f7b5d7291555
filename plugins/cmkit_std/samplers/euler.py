"""Euler's method on the probability-flow ODE (Karras et al.: Elucidating the Design Space of
Diffusion-Based Generative Models, 2022, equation 1 with s = 1)."""

from __future__ import annotations

from cmkit_std.samplers.steps import Walk


class Euler(Walk):
    """Steps of first order down the sigma grid; deterministic. In this parametrization it is DDIM.
    For diffusion models, such as of denoiser.precond = "edm"."""
