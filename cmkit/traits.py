"""Properties of a precond's scalings, found by evaluating them."""

from __future__ import annotations

import torch
from torch import Tensor

from cmkit.denoiser import Scaling, edm_scalings
from cmkit.noise import Noise

TRAITS = {
    "boundary": "D(x, sigma_min) follows from x alone: a consistency model",
    "diffusion": "D(x, sigma_min) does not: a diffusion model",
    "identity": "D(x, 0) is x",
    "continuous": "c_noise follows every change of sigma",
    "edm": "the scalings are EDM's",
}
"""Properties of scalings that an objective may need."""


def traits(scaling: Scaling, noise: Noise, sigma_data: float) -> frozenset[str]:
    """Which of `TRAITS` hold on a noise axis, found by evaluating the scalings."""
    low, high = noise.sigma_min, noise.sigma_max
    ends = torch.tensor([0.0, low], dtype=torch.float64, device="cpu")
    zero, first = zip(*(c.tolist() for c in scaling(ends, sigma_data, low)[:2]), strict=True)
    sigma = _spread(max(low, 1e-3 * high), high)
    here, above = (scaling(s, sigma_data, low) for s in (sigma, sigma * (1 + 1e-6)))
    known = edm_scalings(sigma, sigma_data, low)
    held = {
        "boundary": first[1] == 0,
        "diffusion": first[1] != 0,
        "identity": zero == (1, 0),
        "continuous": bool((here.c_noise != above.c_noise).all()),
        "edm": all(torch.allclose(a, b, rtol=1e-6) for a, b in zip(here, known, strict=True)),
    }
    return frozenset(name for name, holds in held.items() if holds)


def interchangeable(a: Scaling, b: Scaling) -> bool:
    """Whether a network trained under `a` can be used under `b`: c_in, c_noise and c_out agree, but
    for the boundary condition near sigma_min."""
    sigma = _spread(0.1, 10.0)
    pairs = zip(*(scaling(sigma, 0.5, 1e-9)[1:] for scaling in (a, b)), strict=True)
    return all(torch.allclose(one, other, rtol=0.005) for one, other in pairs)


def uses_sigma_data(scaling: Scaling) -> bool:
    """Whether the standard deviation of the data changes the scalings."""
    sigma = _spread(0.1, 10.0)
    pairs = zip(*(scaling(sigma, deviation, 1e-9) for deviation in (0.5, 0.6)), strict=True)
    return not all(torch.equal(one, other) for one, other in pairs)


def _spread(low: float, high: float) -> Tensor:
    """Noise levels between two, evenly in their logarithm."""
    u = torch.linspace(0, 1, 50, dtype=torch.float64, device="cpu")
    return low * (high / low) ** u
