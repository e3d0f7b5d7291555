"""Loss weights as functions of the noise level, by the names of openai/consistency_models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

Weighting = Literal["uniform", "snr", "snr+1", "karras", "truncated-snr"]


def snr(sigma: Tensor) -> Tensor:
    """Signal-to-noise ratio 1 / sigma^2, (B,)."""
    return sigma**-2


def weights(name: Weighting, sigma: Tensor, sigma_data: float) -> Tensor:
    """Weight of a squared error of x0_hat at each noise level, (B,).

    "karras" is 1 / c_out^2 of EDM, table 1; "snr+1" and "truncated-snr" are of progressive
    distillation (Salimans, Ho, 2022, section 4).
    """
    match name:
        case "uniform":
            return sigma.new_ones(sigma.shape)
        case "snr":
            return snr(sigma)
        case "snr+1":
            return snr(sigma) + 1
        case "karras":
            return snr(sigma) + sigma_data**-2
        case "truncated-snr":
            return snr(sigma).clamp(min=1)
