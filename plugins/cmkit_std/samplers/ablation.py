"""The samplers of EDM's ablation (Karras, Aittala, Aila, Laine: Elucidating the Design Space of
Diffusion-Based Generative Models, 2022, algorithms 1 and 2, table 1)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

from pydantic import Field, model_validator

from cmkit import DataSpec, Sampler
from cmkit.errors import RecipeError
from cmkit_std.samplers.steps import DIFFUSION, Draws

if TYPE_CHECKING:
    from torch import Tensor

    from cmkit import Cond, Denoiser, Noise
    from cmkit_std.preconds.vp import Betas

EPSILON = 1e-3
"""The time at which a walk along VP's schedule reaches sigma_min; it starts at 1."""


class Ablation(Sampler):
    """Steps of first or second order down any of table 1's noise levels, along any of its
    schedules, maybe with churn. For diffusion models, such as of denoiser.precond = "edm".

    The defaults are EDM's own sampler. The state is kept in float64, as in the official code.
    """

    needs: ClassVar[frozenset[str]] = DIFFUSION

    steps: int = Field(18, ge=2, le=10_000)
    """Noise levels; the last step goes from the lowest to 0."""
    solver: Literal["euler", "heun"] = "heun"
    """Order of a step: 1, or 2 by a second evaluation, which the last step goes without."""
    alpha: float = Field(1.0, gt=0, le=1)
    """Where in the step the second evaluation is: 1 is Heun's method, 0.5 the midpoint method."""
    discretization: Literal["edm", "vp", "ve", "iddpm"] = "edm"
    """Which noise levels between sigma_max and sigma_min."""
    schedule: Literal["linear", "vp", "ve"] = "linear"
    """sigma(t), along which a step is straight: t itself, that of VP, or sqrt(t)."""
    scaling: Literal["none", "vp"] = "none"
    """s(t) of the state s(t) x: 1, or 1 / sqrt(1 + sigma^2), which preserves the variance."""
    s_churn: float = Field(0.0, ge=0, le=1e6)
    """Noise to add over the whole walk: gamma = min(s_churn / steps, sqrt(2) - 1); 0 = none."""
    s_min: float = Field(0.0, ge=0, le=1e6)
    """Lowest sigma at which noise is added."""
    s_max: float | None = Field(None, ge=0, le=1e6)
    """Highest sigma at which noise is added; absent = no bound."""
    s_noise: float = Field(1.0, ge=0, le=100)
    """Standard deviation of the added noise, over what sigma asks for."""

    @model_validator(mode="after")
    def _bounds_are_in_order(self) -> Ablation:
        if self.s_max is not None and self.s_min > self.s_max:
            raise ValueError(f"s_min {self.s_min} must not be above s_max {self.s_max}")
        return self

    @property
    def nfe(self) -> int:
        return 2 * self.steps - 1 if self.solver == "heun" else self.steps

    def smallest(self, data: DataSpec) -> Mapping[str, Any]:
        return {"steps": min(self.steps, 2)}

    def sample(self, denoiser: Denoiser, x: Tensor, cond: Cond, noise: Draws) -> Tensor:
        """Images after steps along dx/dt = (sigma'/sigma + s'/s) x - (sigma' s / sigma) D(x/s)."""
        import torch

        from cmkit_std.trajectory import denoised

        dtype = x.dtype
        sigmas = self.sigmas(denoiser.noise)
        curve = self._curve(denoiser.noise)

        def slope(x: Tensor, t: Tensor) -> Tensor:
            sigma, dsigma, s, ds = curve.at(t)
            level = sigma.to(x.device, dtype).expand(len(x))
            x0 = denoised(denoiser, (x / s).to(dtype), level, cond)
            return (dsigma / sigma + ds / s) * x - dsigma * s / sigma * x0

        times = [*curve.time(sigmas), torch.zeros((), dtype=torch.float64)]
        _, _, s, _ = curve.at(times[0])
        x = x.double() / denoiser.noise.start * sigmas[0] * s
        for k, t_next in enumerate(times[1:], 1):
            x, t = self._churned(x, times[k - 1], curve, k, noise)
            step = t_next - t
            d = slope(x, t)
            if self.solver == "heun" and k < self.steps:
                a = self.alpha
                d_inner = slope(x + a * step * d, t + a * step)
                d = (1 - 1 / (2 * a)) * d + 1 / (2 * a) * d_inner
            x = x + step * d
        return x.to(dtype)

    def sigmas(self, noise: Noise) -> Tensor:
        """The noise levels, falling from about sigma_max to about sigma_min, (steps,) float64."""
        import torch

        u = torch.linspace(0, 1, self.steps, dtype=torch.float64)
        low, high = noise.sigma_min, noise.sigma_max
        match self.discretization:
            case "edm":
                return noise.sigmas(self.steps, dtype=torch.float64).flip(0)
            case "vp":
                return _vp(noise).sigma(1 + u * (EPSILON - 1))
            case "ve":
                return high * (low / high) ** u
            case "iddpm":
                from cmkit_std.preconds.schedule import Cosine

                levels = torch.tensor(Cosine().sigmas(), dtype=torch.float64).flip(0)
                levels = levels[(levels >= low) & (levels <= high)]
                if len(levels) < self.steps:
                    raise RecipeError(
                        f"sampler.steps = {self.steps}: iddpm has {len(levels)} noise levels from"
                        f" {low} to {high}; give at most as many steps"
                    )
                return levels[((len(levels) - 1) * u).round().long()]

    def _churned(
        self, x: Tensor, t: Tensor, curve: Curve, k: int, noise: Draws
    ) -> tuple[Tensor, Tensor]:
        """(x, t) after the k-th draw of noise (algorithm 2, lines 4 to 6)."""
        sigma, _, s, _ = curve.at(t)
        top = math.inf if self.s_max is None else self.s_max
        if self.s_churn == 0 or not self.s_min <= sigma <= top:
            return x, t
        higher = sigma * (1 + min(self.s_churn / self.steps, math.sqrt(2) - 1))
        t_higher = curve.time(higher)
        _, _, s_higher, _ = curve.at(t_higher)
        added = (higher**2 - sigma**2).sqrt() * self.s_noise * noise(k).double()
        return s_higher / s * x + s_higher * added, t_higher

    def _curve(self, noise: Noise) -> Curve:
        import torch

        match self.schedule:
            case "linear":
                time, sigma, slope = lambda sigma: sigma, lambda t: t, torch.ones_like
            case "vp":
                vp = _vp(noise)
                time, sigma, slope = vp.time, vp.sigma, vp.slope
            case "ve":
                time, sigma, slope = torch.square, torch.sqrt, lambda t: 0.5 / t.sqrt()
        return Curve(time, sigma, slope, self.scaling == "vp")


class Curve(NamedTuple):
    """The noise level and the scale of the state as functions of time."""

    time: Callable[[Tensor], Tensor]
    sigma: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]
    preserving: bool

    def at(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """sigma(t), its derivative, s(t) and its derivative."""
        sigma, dsigma = self.sigma(t), self.slope(t)
        if not self.preserving:
            return sigma, dsigma, t.new_ones(()), t.new_zeros(())
        s = (1 + sigma**2).rsqrt()
        return sigma, dsigma, s, -sigma * dsigma * s**3


def _vp(noise: Noise) -> Betas:
    """VP's schedule that is at sigma_min at time EPSILON and at sigma_max at time 1."""
    from cmkit_std.preconds.vp import Betas

    low, high = math.log1p(noise.sigma_min**2), math.log1p(noise.sigma_max**2)
    beta_d = 2 * (low / EPSILON - high) / (EPSILON - 1)
    return Betas(beta_d, high - 0.5 * beta_d)
