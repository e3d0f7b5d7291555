"""What discrete consistency losses become as the grid of noise levels grows without end (Song,
Dhariwal, Chen, Sutskever: Consistency Models, 2023, appendix B)."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

import cmkit
from cmkit import Cond, Denoiser, Noise, Rng
from cmkit_std.objectives import distances


def levels(noise: Noise, u: Tensor) -> tuple[Tensor, Tensor]:
    """(sigma, dsigma / du), (B,) each, of the Karras grid at fractions u (B,) of its way.

    A grid of N points has gaps of dsigma / du / (N - 1).
    """
    low, high = noise.sigma_min ** (1 / noise.rho), noise.sigma_max ** (1 / noise.rho)
    sigma = noise.sigma_at(u)
    return sigma, noise.rho * (high - low) * sigma ** (1 - 1 / noise.rho)


def tangent(
    denoiser: Denoiser, x: Tensor, sigma: Tensor, dx: Tensor, cond: Cond, rng: Rng
) -> Tensor:
    """df / dsigma along a path of slope dx = dx / dsigma, like x (B, C, H, W), by forward mode.

    In the type of x also under autocast: it is a small difference of large numbers. Attention is
    the plain formula, because fused kernels have no forward mode. Without gradient, dropout masks
    are those of every pass that shares them.
    """

    def f(x: Tensor, sigma: Tensor) -> Tensor:
        return denoiser(x, sigma, cond)

    point, direction = (x, sigma), (dx, torch.ones_like(sigma))
    exact = torch.autocast(x.device.type, enabled=False)
    with exact, sdpa_kernel(SDPBackend.MATH), cmkit.shared_dropout(rng), warnings.catch_warnings():
        # The first use compiles torch's own formulas with torch.jit, which torch deprecates.
        warnings.simplefilter("ignore", FutureWarning)
        if torch.is_grad_enabled():  # backward through dual tensors' softmax is torch's bug
            along: Tensor = torch.func.jvp(f, point, direction)[1]
            return along
        with forward_ad.dual_level():  # torch.func would draw other masks in channels_last memory
            duals = map(forward_ad.make_dual, point, direction)
            tangent = forward_ad.unpack_dual(f(*duals)).tangent
            assert tangent is not None
            return tangent


def limit(name: str, f: Tensor, v: Tensor, net: str = "vgg", weights: str | None = None) -> Tensor:
    """v H v / 2, (B,), where the gradient into f (B, C, H, W) is H v (theorems 5 and 6).

    H is the Hessian of the distance `name` at f, and v (B, C, H, W), without gradient, by how much
    f changes over a gap: for "l2" the value is that of the distance of f and f - v. "l1" has no
    Hessian, and is that distance itself (theorem 4).
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
