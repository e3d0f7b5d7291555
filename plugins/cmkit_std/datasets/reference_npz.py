"""Published reference statistics: `.npz` files of guided-diffusion (ADM) and of EDM."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset

from cmkit import DataError, Reference
from cmkit.files import cached_sha256
from cmkit_std.datasets.npz import Header, array, headers

ASYMMETRY = 1e-6
PAIRS = (("mu", "sigma"), ("mu_s", "sigma_s"))
"""Mean and covariance of the pooled features, and of ADM's spatial ones."""


class ReferenceImages(TorchDataset[Tensor]):
    """`arr_0` of the file, uint8 (N, H, W, C), read when the first image is asked for."""

    def __init__(self, path: Path, count: int):
        self.path, self.count = path, count
        self._held: np.ndarray | None = None

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Tensor:
        if self._held is None:
            self._held = array(self.path, "arr_0")
        return torch.from_numpy(self._held[index]).permute(2, 0, 1)


def check(path: Path, channels: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the file's arrays, from their headers alone.

    `mu` (d,) and `sigma` (d, d) must be there; `mu_s` and `sigma_s`, of the spatial features, and
    `arr_0` (N, H, W, channels) uint8 may. DataError for a file that is missing, no npz, or that
    holds something else.
    """
    arrays = headers(path)
    for mu, sigma in PAIRS:
        if mu == "mu" or mu in arrays or sigma in arrays:
            _refuse_odd_pair(path, arrays, mu, sigma)
    images = arrays.get("arr_0")
    if images and (images.shape[3:] != (channels,) or images.dtype != np.uint8):
        raise DataError(
            f"{path}: arr_0 is {images.dtype} {images.shape}, not uint8 (N, H, W, {channels}); name"
            " the reference of this data set"
        )
    return {name: header.shape for name, header in arrays.items()}


def read(path: Path, channels: int) -> Reference:
    """Statistics and images of the file; its SHA-256 is the fingerprint."""
    shapes, found = check(path, channels), statistics(path, channels)
    count = shapes["arr_0"][0] if "arr_0" in shapes else 0
    return Reference(ReferenceImages(path, count), cached_sha256(path), found)


def statistics(path: Path, channels: int) -> dict[str, np.ndarray]:
    """Means and covariances of the file, float64; DataError, besides those of `check`, for NaN,
    infinity, and a matrix that is no covariance."""
    shapes = check(path, channels)
    names = [name for pair in PAIRS for name in pair if name in shapes]
    found = {name: array(path, name).astype(np.float64) for name in names}
    for name, values in found.items():
        if not np.isfinite(values).all():
            raise DataError(f"{path}: {name} holds NaN or infinity; download it again")
        if values.ndim == 2 and not _is_covariance(values):
            raise DataError(
                f"{path}: {name} is not symmetric with a diagonal of variances; download it again"
            )
    return found


def _is_covariance(matrix: np.ndarray) -> bool:
    variances = matrix.diagonal()
    slack = ASYMMETRY * np.abs(variances).max(initial=0)
    return bool(variances.min(initial=0) >= 0 and np.abs(matrix - matrix.T).max() <= slack)


def _refuse_odd_pair(path: Path, arrays: Mapping[str, Header], mu: str, sigma: str) -> None:
    pair = [arrays[name] for name in (mu, sigma) if name in arrays]
    shapes, kinds = [array.shape for array in pair], {array.dtype.kind for array in pair}
    size = shapes[0] if shapes else ()
    if len(size) != 1 or size[0] < 1 or shapes != [size, size * 2] or kinds != {"f"}:
        raise DataError(
            f"{path}: holds {', '.join(sorted(arrays)) or 'nothing'}, not {mu} (d,) and {sigma}"
            " (d, d) of floats; name a reference file of guided-diffusion or EDM"
        )
