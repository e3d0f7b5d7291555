"""Consistency trajectory models (Kim, Lai, Liao, Murata, Takida, Uesaka, He, Mitsufuji, Ermon:
Consistency Trajectory Models: Learning Probability Flow ODE Trajectory of Diffusion, 2023,
algorithm 1), as sony/ctm trains them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

import cmkit
from cmkit import Companion, DataSpec, Phase, RecipeError
from cmkit.files import cached_sha256
from cmkit_std.objectives.comparison import Comparison
from cmkit_std.objectives.weightings import Weighting, weighting

if TYPE_CHECKING:
    from torch import Tensor, nn

    from cmkit import Cond, Models, Noise, Rng


Decay = Annotated[float, Field(ge=0, lt=1)]
RANDOM = "random"


@dataclass(frozen=True)
class Jumps:
    """Noisy images x (B, C, H, W) at grid points t, and the points s that they jump to, at most
    u = t - gap, where the teacher's solver goes; t, s (B,) int64."""

    sigmas: Tensor
    x: Tensor
    t: Tensor
    s: Tensor
    gap: int


class CTM(Comparison):
    """Consistency trajectory training: a jump from sigma_t to sigma_s meets the jump to sigma_s
    from where the teacher's ODE solver arrives on the way; beside it, denoising score matching and,
    with `gan_weight`, a discriminator of the jumps' images.

    The two are compared as images, after a jump of the EMA to sigma_min. The gap that the solver
    crosses has a random number of grid steps. Defaults are those of the official runs on
    ImageNet-64; the CIFAR-10 ones have num_sigmas = 18. Their students start from the teacher
    (denoiser.init = "teacher"), with denoiser.precond = "edm". Sampler `gamma` samples them.

    Where the published code takes the gradients of the adaptive weight at a layer of its own
    networks, here it is the last weight of any. Its discriminator looks through two published
    networks, whose weights are to be on this disk; it knows no labels.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"target", "teacher", "diffusion", "sigma_to"})

    num_sigmas: int = Field(40, ge=2, le=10**6)
    """N, points of the grid."""
    max_gap: int | None = Field(None, ge=1, le=10**6)
    """H, most grid steps of the gap, which has h steps with a probability in proportion to h;
    absent = N - 1."""
    target_ema: float = Field(0.999, ge=0, lt=1)
    """The target's decay."""
    solver: Literal["heun", "euler"] = "heun"
    """How the teacher makes each grid step of the gap: two evaluations, or one."""
    weighting: Weighting = "uniform"
    """Weight of the distance by sigma_t."""
    gap_power: float = Field(0.0, ge=0, le=10)
    """Exponent of a further weight 1 / (1 - sigma_s / sigma_t)."""
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

    gan_weight: float = Field(0.0, ge=0, le=1e6)
    """Weight of the adversarial term; 0 = without, 1 = as published."""
    gan_start: int = Field(0, ge=0, le=10**9)
    """First step with a discriminator; before it training is as without."""
    gan_period: int = Field(2, ge=2, le=1000)
    """Of so many steps the first teaches the denoiser, the others the discriminator."""
    gan_lr: float = Field(2e-3, gt=0, le=10)
    """The discriminator's learning rate."""
    gan_betas: tuple[Decay, Decay] = (0.5, 0.9)
    """Its decays of averages in the optimizer."""
    gan_features: tuple[str, ...] = Field(
        ("deit_base_distilled_patch16_224", "tf_efficientnet_lite0"), min_length=1
    )
    """The frozen networks of timm through which it looks."""
    gan_weights: dict[str, str] | str | None = None
    """Their .safetensors files by name, or a folder of NAME.safetensors, or "random" to try the
    rest without them; absent = the user's cache."""
    gan_augment: Literal["apart", "together", "off"] = "apart"
    """Whether real images and jumps are augmented by draws of their own, by the same, or not."""

    @model_validator(mode="after")
    def _gap_fits_the_grid(self) -> CTM:
        if self.max_gap is not None and self.max_gap >= self.num_sigmas:
            raise ValueError(
                f"max_gap {self.max_gap} must be below num_sigmas {self.num_sigmas}, the points of"
                " the grid"
            )
        return self

    def check(self, data: DataSpec) -> None:
        super().check(data)
        if self.gan_weight and data.channels not in (1, 3):
            raise RecipeError(
                f"gan_weight: the discriminator takes images of 1 or 3 channels, not of"
                f" {data.channels}; set gan_weight = 0"
            )

    def smallest(self, data: DataSpec) -> Mapping[str, Any]:
        """A short grid, and a discriminator from the second step on that looks through a small
        network of random weights."""
        short = min(self.num_sigmas, 5)
        found = {**super().smallest(data), "num_sigmas": short}
        found["max_gap"] = self.max_gap and min(self.max_gap, short - 1)
        if self.gan_weight:
            found |= {"gan_start": min(self.gan_start, 1), "gan_period": 2}
            found |= {"gan_features": ["test_vit"], "gan_weights": RANDOM}
        return found

    def identity(self) -> dict[str, Any]:
        """The SHA-256 of the weights of LPIPS and of the discriminator's features, if they are
        used; raises as `check`."""
        found = super().identity()
        if self.gan_weight:
            from cmkit_std.timm_network import weights_of

            for name in self.gan_features:
                file = weights_of(name, self.gan_weights, "gan_features", "gan_weights")
                found[name] = cached_sha256(file) if file else RANDOM
        return found

    def check_batch(self, size: int) -> None:
        if self.gan_weight and size < 2:
            raise RecipeError(
                f"gan_weight: the discriminator's batch normalisation needs 2 images at a time, not"
                f" {size}; raise train.batch or lower train.accumulate"
            )

    def companions(self, data: DataSpec) -> Mapping[str, Companion]:
        """The discriminator, if there is an adversarial term."""
        if not self.gan_weight:
            return {}
        from cmkit_std.objectives.projected_gan import Discriminator

        network = Discriminator(self.gan_features, self.gan_weights)
        return {"discriminator": Companion(network, self.gan_lr, self.gan_betas)}

    def phase(self, step: int, total: int) -> Phase:
        """N and mu are fixed; steps that teach the discriminator move no average."""
        return Phase(
            step, self.num_sigmas, self.target_ema, update=not self.teaches_discriminator(step)
        )

    def teaches_discriminator(self, step: int) -> bool:
        """Whether `step` is the discriminator's; the denoiser then stays as it is."""
        return self.has_gan(step) and (step - self.gan_start) % self.gan_period > 0

    def has_gan(self, step: int) -> bool:
        """Whether the adversarial term is there at `step`."""
        return bool(self.gan_weight) and step >= self.gan_start

    def loss(self, models: Models, x0: Tensor, cond: Cond, phase: Phase, rng: Rng) -> Tensor:
        """d(G_target(G(x, t, s), s, 0), G_target(sg G(x_u, u, s), s, 0)) + lambda DSM
        + lambda' GAN, (B,), where x = x0 + t z, x_u is the teacher's solution at u and
        0 <= s <= u < t stand for points of the grid. The gradient passes through the frozen
        G_target. Steps that teach the discriminator have its loss alone."""
        jumps = self.jumps(models.online.noise, x0, phase, rng)
        if self.teaches_discriminator(phase.step):
            return models.total(discriminator=self.judging(models, jumps, x0, cond, rng))
        estimate = self.estimate(models, jumps, cond, rng)
        terms = {"consistency": self.consistency(models, jumps, estimate, cond, rng)}
        has_gan = self.has_gan(phase.step)
        if has_gan or (self.dsm_weight and self.dsm_adaptive):
            last = last_weight(models.online.network)
            pull = gradient_norm(terms["consistency"].mean(), last)
        if self.dsm_weight:
            matching = self.score_matching(models, x0, cond, rng)
            if self.dsm_adaptive:
                matching = gradient_ratio(pull, matching.mean(), last) * matching
            terms["denoising"] = self.dsm_weight * matching
        if has_gan:
            fooling = self.fooling(models, estimate, rng)
            share = gradient_ratio(pull, fooling.mean(), last).clamp(0.01, 10)
            terms["adversarial"] = self.gan_weight * share * fooling
        return models.total(**terms)

    def jumps(self, noise: Noise, x0: Tensor, phase: Phase, rng: Rng) -> Jumps:
        """Random start and end points of jumps, and the noisy x0 at the start."""
        from cmkit.functional import per_image

        sigmas = noise.sigmas(phase.num_sigmas, x0.device, x0.dtype)
        # One number for the batch: the solver makes as many steps for every image.
        gap = 1 + int(rng.host.choice(self.gap_weights(phase.num_sigmas), 1))
        u = rng.integers(phase.num_sigmas - gap, len(x0))
        s = (rng.uniform(len(x0)).double() * (u + 1)).long()
        t = u + gap
        x = x0 + per_image(sigmas[t], x0) * rng.normal_like(x0)
        return Jumps(sigmas, x, t, s, gap)

    def estimate(self, models: Models, jumps: Jumps, cond: Cond, rng: Rng) -> Tensor:
        """The image at sigma_min of the jump from t to s, (B, C, H, W)."""
        from cmkit_std.trajectory import jump

        sigmas = jumps.sigmas
        with cmkit.shared_dropout(rng):
            inner = jump(models.online, jumps.x, sigmas[jumps.t], sigmas[jumps.s], cond)
            low = sigmas[:1].expand(len(inner))
            return jump(models.target, inner, sigmas[jumps.s], low, cond)

    def consistency(
        self, models: Models, jumps: Jumps, estimate: Tensor, cond: Cond, rng: Rng
    ) -> Tensor:
        """The distance of `estimate` to the image of the jump from u to s, weighted, (B,)."""
        import torch

        solve = getattr(cmkit.functional, self.solver)
        sigmas, t = jumps.sigmas, jumps.t
        with torch.no_grad():
            x_u = jumps.x
            for k in range(jumps.gap):
                x_u = solve(models.teacher, x_u, sigmas[t - k], sigmas[t - k - 1], cond)
            target = self.estimate(models, replace(jumps, x=x_u, t=t - jumps.gap), cond, rng)
        weight = self.weight(sigmas[t], sigmas[jumps.s], models.online.sigma_data)
        return self.apart(estimate, target) * weight

    def fooling(self, models: Models, estimate: Tensor, rng: Rng) -> Tensor:
        """The hinge loss of `estimate`, which the discriminator shall take for data, (B,)."""
        from cmkit_std.objectives import projected_gan

        critic = models.companions["discriminator"]
        with critic.still():
            return projected_gan.fooling(critic(estimate, self.views(estimate, rng)))

    def judging(self, models: Models, jumps: Jumps, x0: Tensor, cond: Cond, rng: Rng) -> Tensor:
        """The discriminator's hinge loss of data x0 and of jumps that begin there, (B,)."""
        import torch

        from cmkit_std.objectives import projected_gan

        critic = models.companions["discriminator"]
        with torch.no_grad():
            fake = self.estimate(models, jumps, cond, rng)
        views = self.views(fake, rng)
        judged = critic(fake, views)
        views = self.views(x0, rng) if self.gan_augment == "apart" else views
        return projected_gan.judging(critic(x0, views), judged)

    def views(self, x: Tensor, rng: Rng) -> list[Callable[[Tensor], Tensor]]:
        """How each feature network's images like x are augmented."""
        from cmkit_std.objectives.diffaugment import draw

        if self.gan_augment == "off":
            return [lambda x: x] * len(self.gan_features)
        return [draw(x, rng) for _ in self.gan_features]

    def score_matching(self, models: Models, x0: Tensor, cond: Cond, rng: Rng) -> Tensor:
        """w(sigma) mean (D(x0 + sigma z, sigma) - x0)^2, (B,), with D(x, sigma) = g(x, sigma,
        sigma)."""
        from cmkit.functional import l2, per_image
        from cmkit_std.trajectory import denoised

        sigma = self.noise_levels(models.online.noise, x0, rng)
        x = x0 + per_image(sigma, x0) * rng.normal_like(x0)
        with cmkit.shared_dropout(rng):
            x0_hat = denoised(models.online, x, sigma, cond)
        return weighting(self.dsm_weighting, sigma, models.online.sigma_data) * l2(x0_hat, x0)

    def noise_levels(self, noise: Noise, x0: Tensor, rng: Rng) -> Tensor:
        """Noise levels of score matching, (B,): lognormal for the first half of the images x0,
        uniform over the upper part of the Karras grid for the other."""
        import torch

        from cmkit.functional import lognormal_sigma

        half = len(x0) // 2
        lognormal = lognormal_sigma(x0[:half], self.p_mean, self.p_std, rng)
        place = self.grid_share * rng.uniform(len(x0) - half).to(x0.dtype)
        return torch.cat([lognormal, noise.sigma_at(1 - place)])

    def gap_weights(self, num_sigmas: int) -> Tensor:
        """Unnormalised probabilities of gaps of 1 .. H grid steps, (H,)."""
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


def gradient_norm(loss: Tensor, weight: Tensor) -> Tensor:
    """|grad loss| at `weight`, () and without gradient."""
    import torch

    (gradient,) = torch.autograd.grad(loss, weight, retain_graph=True)
    return gradient.norm().detach()


def gradient_ratio(pull: Tensor, other: Tensor, weight: Tensor) -> Tensor:
    """pull / (|grad other| + 1e-4) at `weight`, at most 1e4, () and without gradient."""
    return (pull / (gradient_norm(other, weight) + 1e-4)).clamp(max=1e4)
