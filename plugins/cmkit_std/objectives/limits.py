"""Limits of the discrete consistency losses as the number of noise levels goes to infinity (Song,
Dhariwal, Chen, Sutskever: Consistency Models, 2023, appendix B)."""

from __future__ import annotations

import torch
from torch import Tensor

from cmkit import Noise
from cmkit_std.objectives import distances


def levels(noise: Noise, u: Tensor) -> tuple[Tensor, Tensor]:
    """(sigma, dsigma / du), (B,) each, of the Karras grid at fractions u (B,) in [0, 1].

    A grid of N points has gaps of dsigma / du / (N - 1).
    """
    low, high = noise.sigma_min ** (1 / noise.rho), noise.sigma_max ** (1 / noise.rho)
    sigma = noise.sigma_at(u)
    return sigma, noise.rho * (high - low) * sigma ** (1 - 1 / noise.rho)


def limit(name: str, f: Tensor, v: Tensor, net: str = "vgg", weights: str | None = None) -> Tensor:
    """v H v / 2, (B,), with gradient H v in f (B, C, H, W) (theorems 5 and 6).

    H is the Hessian of the distance `name` at f; v (B, C, H, W), without gradient, is the change of
    f over a gap. For "l2" the value is the distance of f and f - v; "l1" has no Hessian, its value
    is that distance too (theorem 4).
    """
    moved = f - f.detach()  # zero, with the gradient of f
    if name == "l1":
        return (moved + v).abs().flatten(1).mean(1)
    return ((moved + v / 2) * _hessian_times(name, f.detach(), v, net, weights)).flatten(1).sum(1)


def _hessian_times(name: str, f: Tensor, v: Tensor, net: str, weights: str | None) -> Tensor:
    if name == "l2":
        return 2 * v / f[0].numel()
    with torch.enable_grad(), torch.autocast(f.device.type, enabled=False):
        a = f.clone().requires_grad_()
        d = distances.distance(name, a, f, lpips_net=net, lpips_weights=weights)
        (gradient,) = torch.autograd.grad(d.sum(), a, create_graph=True)
        (product,) = torch.autograd.grad((gradient * v).sum(), a)
    return product
