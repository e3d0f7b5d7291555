"""Precision and recall of samples against real images (Kynkaanniemi et al., 2019)."""

from __future__ import annotations

import torch
from torch import Tensor

from cmkit_std.metrics.streams import widened

BLOCK = 4096
ROUNDING = 1e-12
"""Relative error of a float64 squared distance by the scalar product, with room to spare."""


def precision_recall(
    samples: Tensor, real: Tensor, neighbours: int, device: torch.device
) -> tuple[float, float]:
    """(share of samples in the manifold of `real`, share of `real` in that of the samples).

    A set's manifold is the union of the closed balls around its features (N, d), each through its
    `neighbours`-th nearest neighbour, itself not counted. guided-diffusion (which computes in
    float16 where it can) and torch-fidelity follow this definition; the balls here are exact to
    float64 rounding, so that copies are at distance 0. No more than BLOCK^2 distances are held.
    """
    ball_real, ball_samples = (_radii(x, neighbours, device) for x in (real, samples))
    sample_in = torch.zeros(len(samples), dtype=torch.bool, device=ball_real.device)
    real_in = torch.zeros(len(real), dtype=torch.bool, device=ball_real.device)
    for i in range(0, len(samples), BLOCK):
        for j in range(0, len(real), BLOCK):
            rows, columns = slice(i, i + BLOCK), slice(j, j + BLOCK)
            found = _distances(samples[rows], real[columns], device)
            sample_in[rows] |= (found <= ball_real[columns]).any(1)
            real_in[columns] |= (found <= ball_samples[rows, None]).any(0)
    return sample_in.double().mean().item(), real_in.double().mean().item()


def _radii(x: Tensor, neighbours: int, device: torch.device) -> Tensor:
    """Squared distance of each feature to its `neighbours`-th other one, (N,)."""
    found = []
    for rows in x.split(BLOCK):
        near = None
        for columns in x.split(BLOCK):
            both = _distances(rows, columns, device)
            both = both if near is None else torch.cat([near, both], 1)
            near = both.topk(min(neighbours + 1, both.shape[1]), largest=False).values
        assert near is not None
        found.append(near[:, neighbours])  # the nearest is the feature itself, at 0
    return torch.cat(found)


def _distances(a: Tensor, b: Tensor, device: torch.device) -> Tensor:
    """Squared distances (A, B), float64; those that rounding cannot tell from 0 are 0."""
    a, b = widened(a.to(device)), widened(b.to(device))
    norms = a.square().sum(1)[:, None] + b.square().sum(1)
    found = norms - 2 * a @ b.T
    return found.where(found > ROUNDING * norms, 0.0)
