"""Easy consistency tuning (Geng, Pokle, Luo, Lin, Kolter: Consistency Models Made Easy, 2024)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

import cmkit
from cmkit import Objective, Phase

if TYPE_CHECKING:
    from torch import Tensor

    from cmkit import Cond, Models, Rng


class ECT(Objective):
    """Easy consistency tuning: pairs of noise levels sigma > r that close up stage by stage, from
    r = 0, which is diffusion training, towards r = sigma, which is consistency training.

    It starts from a diffusion model: name its weights in denoiser.weights. The scalings are the
    identity at noise level 0, such as those of denoiser.precond = "edm".
    """

    needs: ClassVar[frozenset[str]] = frozenset({"identity"})

    q: float = Field(2.0, gt=1, le=1e6)
    """r falls short of sigma by the part q^-(stage + 1), times n(sigma)."""
    k: float = Field(8.0, ge=0, le=1e6)
    """n(sigma) = 1 + k sigmoid(-b sigma): how much wider the gap is at low noise; 0 = no wider."""
    b: float = Field(1.0, ge=0, le=1e6)
    """Steepness of n(sigma)."""
    stage_steps: int | None = Field(None, ge=1, le=10**9)
    """Steps a stage; absent = an eighth of the training, as in the paper's longest runs."""
    p_mean: float = Field(-1.1, ge=-20, le=20)
    """Mean of ln(sigma)."""
    p_std: float = Field(2.0, gt=0, le=10)
    """Standard deviation of ln(sigma)."""
    c: float = Field(0.0, ge=0, le=1e6)
    """c of the distance sqrt(||a - b||^2 + c^2) - c; 0 = the norm itself."""
    weighting: Literal["gap", "snr"] = "gap"
    """Weight of a pair: 1 / (sigma - r), or SNR + k, 1 / sigma^2 + 1 / sigma_data^2, which is that
    of EDM's diffusion training; on ImageNet-64 ECT takes the latter."""

    def phase(self, step: int, total: int) -> Phase:
        """The stage, and the part 1 - r / sigma of the gap at high noise."""
        stage = step // (self.stage_steps or max(total // 8, 1))
        return Phase(step, log={"stage": stage, "gap": self.q ** -(stage + 1)})

    def loss(self, models: Models, x0: Tensor, cond: Cond, phase: Phase, rng: Rng) -> Tensor:
        """w d(f(x0 + sigma z, sigma), sg f(x0 + r z, r)), (B,), with f(x0, 0) = x0.

        ln(sigma) ~ N(p_mean, p_std^2); both passes share z and the masks of dropout.
        """
        import torch

        from cmkit.functional import lognormal_sigma, per_image, pseudo_huber

        sigma = lognormal_sigma(x0, self.p_mean, self.p_std, rng)
        r = self.lower(sigma, phase)
        z = rng.normal_like(x0)
        with cmkit.shared_dropout(rng):
            online = models.online(x0 + per_image(sigma, x0) * z, sigma, cond)
        with torch.no_grad(), cmkit.shared_dropout(rng):
            target = models.online(x0 + per_image(r, x0) * z, r, cond)
        target = torch.where(per_image(r, x0) > 0, target, x0)
        d = pseudo_huber(online, target, self.c)
        return self.weight(sigma, r, models.online.sigma_data) * d

    def lower(self, sigma: Tensor, phase: Phase) -> Tensor:
        """r = max(0, sigma (1 - q^-(stage + 1) n(sigma))), (B,), below sigma (section 3.2)."""
        import torch

        n = 1 + self.k * torch.sigmoid(-self.b * sigma)
        r = (sigma * (1 - phase.log["gap"] * n)).clamp(min=0)
        # A late stage leaves a gap that the type of sigma cannot hold: then its smallest one.
        return torch.minimum(r, torch.nextafter(sigma, torch.zeros_like(sigma)))

    def weight(self, sigma: Tensor, r: Tensor, sigma_data: float) -> Tensor:
        """w, (B,), of the pairs (sigma, r)."""
        if self.weighting == "snr":
            return sigma**-2 + sigma_data**-2
        return 1 / (sigma - r)
