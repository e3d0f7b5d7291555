"""What the codecs compute, in a module of its own because it imports torch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class AutoencoderCoder:
    """diffusers' autoencoder `vae`, `batch` images at once."""

    def __init__(self, vae: Any, batch: int):
        self.vae, self.batch = vae, batch
        config = vae.config
        self.scale: float | Tensor = float(config.scaling_factor)
        self.shift: float | Tensor = float(getattr(config, "shift_factor", None) or 0.0)
        mean, std = (getattr(config, f"latents_{name}", None) for name in ("mean", "std"))
        if mean is not None and std is not None:  # of each channel, as pipelines of SDXL take them
            self.shift = _wide(torch.tensor(mean, device=vae.device))
            self.scale = self.scale / _wide(torch.tensor(std, device=vae.device))

    @torch.no_grad()
    def encode(self, x0: Tensor) -> tuple[Tensor, Tensor | None]:
        """Mean and standard deviation of the posterior of AutoencoderKL, whose log variance is
        clamped to [-30, 20] by diffusers; AutoencoderTiny's latents are not drawn."""
        found = [self.vae.encode(part) for part in x0.to(self.vae.dtype).split(self.batch)]
        if hasattr(found[0], "latents"):
            return (_joined([one.latents for one in found]) - self.shift) * self.scale, None
        mean = _joined([one.latent_dist.mean for one in found])
        # What diffusers clamps is the log variance, in the network's type.
        std = _joined([(0.5 * one.latent_dist.logvar.float()).exp() for one in found])
        return (mean - self.shift) * self.scale, std * self.scale

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Images of latents / scaling_factor + the mean, as the pipelines of diffusers decode."""
        z = (latents / self.scale + self.shift).to(self.vae.dtype)
        return _joined([self.vae.decode(part).sample for part in z.split(self.batch)])


def _joined(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts).float()


class PatchCoder:
    """Coordinates of patches in an orthonormal basis (k, C, p, p), less `mean` (C, p, p), each
    divided by its `std` (k,)."""

    def __init__(self, mean: Tensor, components: Tensor, std: Tensor):
        self.patch = components.shape[-1]
        self.mean, self.basis, self.std = mean.reshape(-1), components.flatten(1), std

    @torch.no_grad()
    def encode(self, x0: Tensor) -> tuple[Tensor, Tensor | None]:
        patches = nn.functional.pixel_unshuffle(x0.float(), self.patch) - _wide(self.mean)
        return torch.einsum("kd,bdhw->bkhw", self.basis, patches) / _wide(self.std), None

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        patches = torch.einsum("kd,bkhw->bdhw", self.basis, latents.float() * _wide(self.std))
        return nn.functional.pixel_shuffle(patches + _wide(self.mean), self.patch)


def _wide(vector: Tensor) -> Tensor:
    return vector.view(1, -1, 1, 1)


def cosines(channels: int, patch: int, count: int) -> dict[str, Tensor]:
    """Mean, components and std of the first `count` cosines of patches (C, p, p), by the variance
    that they have where neighbouring pixels correlate by 0.95, colours by 0.9, and pixels in
    [-1, 1] have the standard deviation 0.5."""
    colour, space = _cosine_basis(channels), _cosine_basis(patch)
    steps = torch.arange(patch, dtype=torch.float64)
    of_space = _variances(space, 0.95 ** (steps[:, None] - steps).abs())
    of_colour = _variances(colour, 0.9 + 0.1 * torch.eye(channels, dtype=torch.float64))
    variances = 0.25 * torch.einsum("c,i,j->cij", of_colour, of_space, of_space).flatten()
    basis = torch.einsum("cC,iI,jJ->cijCIJ", colour, space, space).flatten(0, 2)
    # Equal variances, as of a pattern and its transpose, must not be ordered by rounding.
    order = variances.log().mul(1e6).round().argsort(descending=True, stable=True)[:count]
    return {
        "mean": torch.zeros(channels, patch, patch),
        "components": basis[order].float(),
        "std": variances[order].sqrt().float(),
    }


def _cosine_basis(n: int) -> Tensor:
    """The orthonormal cosines (DCT-II) of n points, (n, n) float64, low frequencies first."""
    k = torch.arange(n, dtype=torch.float64)
    basis = torch.cos(torch.pi / n * (k + 0.5) * k[:, None]) * (2 / n) ** 0.5
    basis[0] /= 2**0.5
    return basis


def _variances(basis: Tensor, covariance: Tensor) -> Tensor:
    return (basis @ covariance * basis).sum(1)


def principal(images: Tensor, patch: int, count: int) -> dict[str, Tensor]:
    """Mean, components and std of the first `count` principal components of the patches of images
    (N, C, H, W) in [-1, 1]."""
    channels = images.shape[1]
    rows = nn.functional.pixel_unshuffle(images.double(), patch).movedim(1, -1).flatten(0, -2)
    mean = rows.mean(0)
    rows = rows - mean
    values, vectors = torch.linalg.eigh(rows.T @ rows / len(rows))
    values, basis = values.flip(0)[:count].clamp(min=1e-8), vectors.T.flip(0)[:count]
    # An eigenvector's sign is arbitrary: its largest entry is made positive.
    basis = basis * basis.gather(1, basis.abs().argmax(1, keepdim=True)).sign()
    basis, mean = (value.reshape(-1, channels, patch, patch) for value in (basis, mean))
    found = {"mean": mean[0], "components": basis, "std": values.sqrt()}
    return {name: value.float().contiguous() for name, value in found.items()}
