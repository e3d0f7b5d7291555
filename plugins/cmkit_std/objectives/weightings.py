"""Weights of a loss by noise level, as openai/consistency_models and sony/ctm name them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

Weighting = Literal["uniform", "snr", "snr+1", "karras", "truncated-snr", "sq-t-inverse"]


def weighting(name: Weighting, sigma: Tensor, sigma_data: float) -> Tensor:
    """lambda(sigma), (B,), of noise levels sigma (B,), with snr = 1 / sigma^2.

    "karras" is EDM's weight, (sigma^2 + sigma_data^2) / (sigma sigma_data)^2 (EDM, table 1);
    "sq-t-inverse" is sqrt(sigma), whatever its name.
    """
    snr = sigma**-2
    match name:
        case "snr":
            return snr
        case "snr+1":
            return snr + 1
        case "karras":
            return snr + 1 / sigma_data**2
        case "truncated-snr":
            return snr.clamp(min=1)
        case "sq-t-inverse":
            return sigma.sqrt()
        case "uniform":
            return sigma.new_ones(sigma.shape)
