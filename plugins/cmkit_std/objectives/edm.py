"""Denoising score matching (Karras, Aittala, Aila, Laine: Elucidating the Design Space of
Diffusion-Based Generative Models, 2022, equations 2 and 8)."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

import cmkit
from cmkit import Objective, Phase, RecipeError
from cmkit_std.objectives.weightings import Weighting, weighting

if TYPE_CHECKING:
    from torch import Tensor

    from cmkit import Cond, Models, Network, Rng


class EDM(Objective):
    """Diffusion training: the network denoises at noise levels drawn from a lognormal law. It makes
    teachers; denoiser.precond = "edm" belongs to it, and any other of a diffusion model."""

    needs: ClassVar[frozenset[str]] = frozenset()

    p_mean: float = Field(-1.2, ge=-20, le=20)
    """Mean of ln(sigma)."""
    p_std: float = Field(1.2, gt=0, le=20)
    """Standard deviation of ln(sigma)."""
    weighting: Weighting = "karras"
    """Weight of the squared error at each noise level; "karras" makes the effective weight 1."""
    noise_levels: Literal["grid"] | None = None
    """Where noise levels come from: "grid" = evenly from the noise axis, with precond discrete from
    all steps alike, as DDPM trains with weighting = "snr"; absent = that lognormal law."""
    label_dropout: float = Field(0.0, ge=0, lt=1)
    """Probability with which a label gives way to the null class of the backbone (null_class =
    true), so that samples and students can be guided; 0.1 is usual."""

    def check_networks(self, online: Network, teacher: Network | None) -> None:
        if self.label_dropout and online.null_label is None:
            raise RecipeError(
                f"label_dropout = {self.label_dropout}: the backbone embeds no null class; set its"
                " null_class = true, on data with classes"
            )

    def phase(self, step: int, total: int) -> Phase:
        return Phase(step)

    def loss(self, models: Models, x0: Tensor, cond: Cond, phase: Phase, rng: Rng) -> Tensor:
        """w(sigma) mean (D(x0 + sigma z, sigma) - x0)^2, (B,), with levels of the grid or
        ln(sigma) ~ N(p_mean, p_std^2)."""
        from cmkit.functional import l2, lognormal_sigma, per_image

        if self.label_dropout:
            cond = dropped(cond, self.label_dropout, models.online.network.null_label, rng)
        if self.noise_levels == "grid":
            sigma = models.online.noise.sigma_at(rng.uniform(len(x0)).to(x0.dtype))
        else:
            sigma = lognormal_sigma(x0, self.p_mean, self.p_std, rng)
        z = rng.normal_like(x0)
        with cmkit.shared_dropout(rng):
            x0_hat = models.online(x0 + per_image(sigma, x0) * z, sigma, cond)
        return weighting(self.weighting, sigma, models.online.sigma_data) * l2(x0_hat, x0)


def dropped(cond: Cond, probability: float, null_label: int | None, rng: Rng) -> Cond:
    """`cond` with the label of each image replaced by the null label with this probability."""
    import torch

    assert cond.label is not None
    drop = rng.uniform(len(cond.label)) < probability
    return replace(cond, label=torch.where(drop, null_label, cond.label))
