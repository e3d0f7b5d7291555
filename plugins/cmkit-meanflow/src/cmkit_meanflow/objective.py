"""Mean flows (Geng, Deng, Bai, Kolter, He: Mean Flows for One-step Generative Modeling, 2025)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

import cmkit
from cmkit import Objective, Phase

if TYPE_CHECKING:
    from torch import Tensor

    from cmkit import Cond, Models, Rng


class MeanFlow(Objective):
    """The network learns average velocities u from one noise level to a lower one, by what a
    derivative along the path says of them; no teacher, no target network.

    The path is x_t = (1 - t) x0 + t z, which is x / (1 + sigma) of x = x0 + sigma z at
    t = sigma / (1 + sigma). The denoiser for `cond.sigma_to` = s is where the average velocity down
    to r = s / (1 + s) would arrive if it went on to 0: x0_hat = x_t - t u, so
    u = (x - (1 + sigma) x0_hat) / sigma. At s = sigma that is a diffusion model, at s = sigma_min a
    consistency model, and x_r = x_t - (t - r) u is x_s = (s / sigma) x + (1 - s / sigma) x0_hat.

    Needs denoiser.precond = "edm", and sampler `meanflow`, which fills in sigma_to. The derivative
    is taken through ln(sigma) / 4, which backbone `adm` multiplies by its `time_scale` before it
    takes sinusoids: choose a small one, such as 4.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"identity", "continuous", "sigma_to"})

    p_mean: float = Field(-0.4, ge=-20, le=20)
    """Mean of ln(sigma), which is the logit of t."""
    p_std: float = Field(1.0, gt=0, le=20)
    """Standard deviation of ln(sigma)."""
    equal: float = Field(0.75, ge=0, le=1)
    """Share of the images with r = t, where the loss is that of flow matching."""
    power: float = Field(1.0, ge=0, le=10)
    """p of the weight 1 / (|error|^2 + c)^p; 0 = the squared error itself."""
    c: float = Field(1e-3, gt=0, le=1e6)
    """c of that weight, beside the squared norm of the whole image."""
    derivative: Literal["forward", "difference"] = "forward"
    """The Jacobian-vector product: forward-mode differentiation, or central differences for a
    backbone that lacks it."""

    def phase(self, step: int, total: int) -> Phase:
        return Phase(step)

    def loss(self, models: Models, x0: Tensor, cond: Cond, phase: Phase, rng: Rng) -> Tensor:
        """|u - sg(v - (t - r) du/dt)|^2 / sg(|.|^2 + c)^p, (B,), with v = z - x0.

        t and r are the larger and the smaller of two draws (algorithm 1 and appendix A).
        """
        import torch

        from cmkit.functional import lognormal_sigma, per_image
        from cmkit_meanflow import velocity

        noise = models.online.noise
        two = lognormal_sigma(x0.repeat(2, 1, 1, 1), self.p_mean, self.p_std, rng).view(2, -1)
        low, sigma = two.clamp(noise.sigma_min, noise.sigma_max).sort(0).values
        sigma_to = torch.where(rng.uniform(len(x0)) < self.equal, sigma, low)
        z = rng.normal_like(x0)
        x = x0 + per_image(sigma, x0) * z
        with torch.no_grad():
            target = velocity.target(
                models.online, x, sigma, sigma_to, z, cond, self.derivative, rng
            )
        with cmkit.shared_dropout(rng):
            u = velocity.average(models.online, x, sigma, sigma_to, cond)
        squared = (u - target).square().flatten(1).sum(1)
        return squared / (squared.detach() + self.c) ** self.power
