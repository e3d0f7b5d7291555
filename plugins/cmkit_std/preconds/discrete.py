"""Discrete variance-preserving models (Ho, Jain, Abbeel: Denoising Diffusion Probabilistic Models,
2020), such as those of latent diffusion, of DiT and of guided-diffusion; and latent consistency
models (Luo, Tan, Huang, Li, Zhao, 2023)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from cmkit import Precond
from cmkit.errors import RecipeError
from cmkit_std.preconds.schedule import Schedule, Spacing

if TYPE_CHECKING:
    from torch import Tensor

    from cmkit import Noise, Scalings


class Discrete(Precond):
    """Networks that know whole steps t of x_vp = alpha_t x0 + sqrt(1 - alpha_t^2) z. The defaults
    are those of latent diffusion; DiT and guided-diffusion have spacing = "linear",
    beta_start = 1e-4, beta_end = 0.02, and guided-diffusion at 64 pixels "cosine".

    On our axis sigma_t = sqrt(1 / alpha_t^2 - 1), x = x_vp / alpha_t, and a DDIM step is an Euler
    step. The steps are the noise axis, so that sigma_min, sigma_max and rho of a recipe have
    nothing to say. The backbone is told t as it is: give it time_scale = 1.
    """

    read_by = {"unit_start": ("search", "sample")}

    beta_start: float = Field(0.00085, gt=0, lt=1)
    """Variance of the noise that the first step adds."""
    beta_end: float = Field(0.012, gt=0, lt=1)
    """Variance of the noise that the last step adds."""
    steps: int = Field(1000, ge=2, le=100_000)
    """Steps of the schedule."""
    spacing: Spacing = "scaled_linear"
    """What rises evenly: the square root of beta, or beta; or the cosine schedule, whose betas are
    its own."""
    prediction: Literal["epsilon", "v_prediction", "sample"] = "epsilon"
    """What the network estimates: the noise z, v = alpha z - sqrt(1 - alpha^2) x0, or x0."""
    timestep_scaling: float | None = Field(None, gt=0, le=1e6)
    """For a consistency model, 10 in latent ones: with s = timestep_scaling t, x_vp and the
    estimate count 0.25 / (s^2 + 0.25) and s / sqrt(s^2 + 0.25), so that it returns x_vp at t = 0.
    Absent = a diffusion model."""
    unit_start: bool = False
    """Start sampling from x_vp = z, as diffusers does, instead of x = sigma_max z: with the same
    noise its pictures then come out."""

    @model_validator(mode="after")
    def _betas_rise(self) -> Discrete:
        if self.beta_start > self.beta_end:
            raise ValueError(
                f"beta_start {self.beta_start} must not be above beta_end {self.beta_end}"
            )
        if self.schedule.alphas_cumprod()[-1] < 1e-12:
            raise ValueError(f"{self.steps} such steps leave nothing of an image; take fewer")
        return self

    @property
    def schedule(self) -> Schedule:
        """Its steps, in plain numbers."""
        return Schedule(self.beta_start, self.beta_end, self.steps, self.spacing)

    @property
    def levels(self) -> tuple[float, float]:
        sigmas = self.schedule.sigmas()
        return sigmas[0], sigmas[-1]

    known = levels

    def noise(self, sigma_min: float, sigma_max: float, rho: float) -> Noise:
        """The steps as noise levels; RecipeError for other ends than theirs."""
        from cmkit_std.discrete import DiscreteNoise

        low, high = self.levels
        if (sigma_min, sigma_max) != (low, high):
            raise RecipeError(
                f"sigma_min {sigma_min:g}, sigma_max {sigma_max:g}: the steps of precond discrete"
                f" have noise levels {low:g} to {high:g}; drop both keys"
            )
        return DiscreteNoise.of(self.schedule, self.unit_start)

    def scalings(self, sigma: Tensor, sigma_data: float, sigma_min: float) -> Scalings:
        """Of the nearest step t, alpha = 1 / sqrt(1 + sigma^2): c_in = alpha, c_noise = t, and
        (c_skip, c_out) = (1, -sigma), (alpha^2, -alpha sigma) or (0, 1) by the prediction."""
        from cmkit import Scalings
        from cmkit_std.discrete import lcm_boundary, nearest

        t = nearest(self.schedule, sigma).to(sigma.dtype)
        alpha = (1 + sigma**2).rsqrt()
        match self.prediction:
            case "epsilon":
                c_skip, c_out = sigma.new_ones(sigma.shape), -sigma
            case "v_prediction":
                c_skip, c_out = alpha**2, -alpha * sigma
            case "sample":
                c_skip, c_out = sigma.new_zeros(sigma.shape), sigma.new_ones(sigma.shape)
        if self.timestep_scaling is not None:
            near, far = lcm_boundary(t, self.timestep_scaling)
            c_skip, c_out = near * alpha + far * c_skip, far * c_out
        return Scalings(c_skip, c_out, alpha, t)
