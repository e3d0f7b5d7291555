"""Classifier-free guidance (Ho, Salimans: Classifier-Free Diffusion Guidance, 2022)."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from cmkit import Cond, Rng


def guided(with_label: Tensor, without: Tensor, w: Tensor, channels: int | None = None) -> Tensor:
    """with_label + w (with_label - without), (B, C, H, W), for weights w, () or (B,) (eq. 6).

    Linear, and so the same for noise as for denoised images. `channels` guides only the first so
    many and leaves the others as they are with the label; facebookresearch/DiT guides 3 of 4, and
    its scale is 1 + w.
    """
    import torch

    channels = with_label.shape[1] if channels is None else channels
    near, far = with_label[:, :channels], without[:, :channels]
    guided = near + w.to(near.dtype).view(-1, 1, 1, 1) * (near - far)
    return torch.cat([guided, with_label[:, channels:]], dim=1)


def dropped(cond: Cond, probability: float, null_label: int | None, rng: Rng) -> Cond:
    """`cond` with the label of each image replaced by the null label with this probability."""
    import torch

    assert cond.label is not None
    assert null_label is not None
    drop = rng.uniform(len(cond.label)) < probability
    return replace(cond, label=torch.where(drop, null_label, cond.label))
