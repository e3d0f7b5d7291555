"""Consistency trajectory models (Kim, Lai, Liao, Murata, Takida, Uesaka, He, Mitsufuji, Ermon:
Consistency Trajectory Models: Learning Probability Flow ODE Trajectory of Diffusion, 2023,
algorithm 1), as sony/ctm trains them, without the adversarial term."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, model_validator

import cmkit
from cmkit.kinds import DataSpec, Objective, Phase
from cmkit_std.objectives.weightings import Weighting, weighting

if TYPE_CHECKING:
    from torch import Tensor, nn

    from cmkit import Cond, Models, Noise, Rng


class CTM(Objective):
    """Consistency trajectory training: a jump from sigma_t to sigma_s meets the jump to sigma_s
    from where the teacher's ODE solver arrives on the way; beside it, denoising score matching.

    The two are compared as images, after a jump of the EMA to sigma_min. The gap that the solver
    crosses has a random number of grid steps. Defaults are those of the official runs on
    ImageNet-64; the CIFAR-10 ones have num_sigmas = 18. Their students start from the teacher
    (denoiser.init = "teacher"), with denoiser.precond = "edm". Sampler `gamma` samples them.

    Where the published code takes the gradients of the adaptive weight at a layer of its own
    networks, here it is the last weight of any.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"target", "teacher", "edm", "sigma_to"})

    num_sigmas: int = Field(40, ge=2, le=10**6)
    """N, points of the grid."""
    max_gap: int | None = Field(None, ge=1, le=10**6)
    """H, most grid steps of the gap, which has h steps with a probability in proportion to h;
    absent = N - 1."""
    target_ema: float = Field(0.999, ge=0, lt=1)
    """The target's decay."""
    solver: Literal["heun", "euler"] = "heun"
    """How the teacher makes each grid step of the gap: two evaluations, or one."""
    distance: Literal["l1", "l2", "l2-32", "lpips", "pseudo_huber"] = "lpips"
    """How the two images are compared; "l2-32" is l2 at 32 pixels."""
    weighting: Weighting = "uniform"
    """Weight of the distance by sigma_t."""
    gap_power: float = Field(0.0, ge=0, le=10)
    """Exponent of a further weight 1 / (1 - sigma_s / sigma_t)."""
    huber_c: float | None = Field(None, ge=0, le=1e6)
    """c of the pseudo-Huber distance; absent = 0.00054 sqrt(d)."""
    lpips_net: Literal["vgg", "alex", "squeeze"] = "vgg"
    """Backbone of LPIPS."""
    lpips_weights: str | None = None
    """A .safetensors file of that backbone's weights; absent = torch.hub's folder."""
    dsm_weight: float = Field(1.0, ge=0, le=1e6)
    """Weight of denoising score matching; 0 = without."""
    dsm_adaptive: bool = True
    """Multiply that weight by the ratio of the two terms' gradients at the last layer."""
    dsm_weighting: Weighting = "karras"
    """Weight of the squared error of score matching by noise level."""
    p_mean: float = Field(-1.2, ge=-20, le=20)
    """Mean of ln(sigma) for one half of the images of score matching."""
    p_std: float = Field(1.2, gt=0, le=20)
    """Standard deviation of ln(sigma) for that half."""
    grid_share: float = Field(0.7, gt=0, le=1)
    """The other half has levels evenly from this share of the Karras grid, from sigma_max down."""

    @model_validator(mode="after")
    def _gap_fits_the_grid(self) -> CTM:
        if self.max_gap is not None and self.max_gap >= self.num_sigmas:
            raise ValueError(
                f"max_gap {self.max_gap} must be below num_sigmas {self.num_sigmas}, the points of"
                " the grid"
            )
        return self

    def check(self, data: DataSpec) -> None:
        if self.distance == "lpips":
            from cmkit_std.objectives.distances import check_lpips

            check_lpips(self.lpips_net, self.lpips_weights)

    def phase(self, step: int, total: int) -> Phase:
        """N and mu are fixed."""
        return Phase(step, self.num_sigmas, self.target_ema)

    def loss(self, models: Models, x0: Tensor, cond: Cond, phase: Phase, rng: Rng) -> Tensor:
        """d(G_target(G(x, t, s), s, 0), G_target(sg G(x_u, u, s), s, 0)) + lambda DSM, (B,), where
        x = x0 + t z, x_u is the teacher's solution at u and 0 <= s <= u < t stand for points of
        the grid. The gradient passes through the frozen G_target."""
        consistency = self.consistency(models, x0, cond, phase, rng)
        if not self.dsm_weight:
            return models.total(consistency=consistency)
        matching = self.score_matching(models, x0, cond, rng)
        if self.dsm_adaptive:
            last = last_weight(models.online.network)
            matching = gradient_ratio(consistency.mean(), matching.mean(), last) * matching
        return models.total(consistency=consistency, denoising=self.dsm_weight * matching)

    def consistency(self, models: Models, x0: Tensor, cond: Cond, phase: Phase, rng: Rng) -> Tensor:
        """The distance of the two images, weighted, (B,)."""
        import torch

        from cmkit_std.objectives.distances import distance
        from cmkit_std.objectives.solvers import SOLVERS
        from cmkit_std.trajectory import jump

        assert models.teacher is not None
        assert phase.num_sigmas is not None
        sigmas = models.online.noise.sigmas(phase.num_sigmas, x0.device, x0.dtype)
        # One number for the batch: the solver makes as many steps for every image.
        gap = 1 + int(rng.choice(self.gap_weights(phase.num_sigmas).to(x0.device), 1))
        u = rng.integers(phase.num_sigmas - gap, len(x0))
        i = (rng.uniform(len(x0)).double() * (u + 1)).long()
        t = u + gap
        low = sigmas[:1].expand(len(x0))
        x = x0 + sigmas[t].view(-1, 1, 1, 1) * rng.normal_like(x0)
        with cmkit.shared_dropout(rng):
            inner = jump(models.online, x, sigmas[t], sigmas[i], cond)
            estimate = jump(models.target, inner, sigmas[i], low, cond)
        with torch.no_grad():
            x_u = x
            for k in range(gap):
                x_u = SOLVERS[self.solver](
                    models.teacher, x_u, sigmas[t - k], sigmas[t - k - 1], cond
                )
            with cmkit.shared_dropout(rng):
                inner = jump(models.online, x_u, sigmas[u], sigmas[i], cond)
                target = jump(models.target, inner, sigmas[i], low, cond)
        d = distance(
            self.distance, estimate, target, self.huber_c, self.lpips_net, self.lpips_weights
        )
        return d * self.weight(sigmas[t], sigmas[i], models.online.sigma_data)

    def score_matching(self, models: Models, x0: Tensor, cond: Cond, rng: Rng) -> Tensor:
        """w(sigma) mean (D(x0 + sigma z, sigma) - x0)^2, (B,), with D(x, sigma) = g(x, sigma,
        sigma)."""
        from cmkit_std.objectives.distances import l2
        from cmkit_std.trajectory import denoised

        sigma = self.noise_levels(models.online.noise, x0, rng)
        x = x0 + sigma.view(-1, 1, 1, 1) * rng.normal_like(x0)
        with cmkit.shared_dropout(rng):
            x0_hat = denoised(models.online, x, sigma, cond)
        return weighting(self.dsm_weighting, sigma, models.online.sigma_data) * l2(x0_hat, x0)

    def noise_levels(self, noise: Noise, x0: Tensor, rng: Rng) -> Tensor:
        """Noise levels of score matching for images x0, (B,): the first half lognormal, the others
        by a uniform place on the upper part of the Karras grid."""
        import torch

        half = len(x0) // 2
        z = rng.normal_like(x0.new_empty(half))
        place = self.grid_share * rng.uniform(len(x0) - half).to(x0.dtype)
        return torch.cat([(self.p_mean + self.p_std * z).exp(), noise.sigma_at(1 - place)])

    def gap_weights(self, num_sigmas: int) -> Tensor:
        """What the probabilities of gaps of 1 .. H steps are in proportion to, (H,)."""
        import torch

        most = self.max_gap or num_sigmas - 1
        return torch.arange(1, most + 1, dtype=torch.float64)

    def weight(self, sigma: Tensor, sigma_to: Tensor, sigma_data: float) -> Tensor:
        """Weight of the distance for a jump from sigma (B,) to sigma_to (B,), (B,)."""
        by_gap = (1 - sigma_to / sigma) ** -self.gap_power
        return weighting(self.weighting, sigma, sigma_data) * by_gap


def last_weight(network: nn.Module) -> nn.Parameter:
    """The trained weight of two axes or more that was registered last."""
    return [p for p in network.parameters() if p.ndim >= 2 and p.requires_grad][-1]


def gradient_ratio(loss: Tensor, other: Tensor, weight: Tensor) -> Tensor:
    """|grad loss| / (|grad other| + 1e-4) at `weight`, at most 1e4, () and without gradient."""
    import torch

    (first,) = torch.autograd.grad(loss, weight, retain_graph=True)
    (second,) = torch.autograd.grad(other, weight, retain_graph=True)
    return (first.norm() / (second.norm() + 1e-4)).clamp(max=1e4).detach()
