"""Published reference statistics: `.npz` files of guided-diffusion (ADM) and of EDM."""

from __future__ import annotations

import hashlib
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset

from cmkit import DataError, Reference
from cmkit_std.datasets.npz import headers


class ReferenceImages(TorchDataset[Tensor]):
    """`arr_0` of the file, uint8 (N, H, W, C), read when the first image is asked for."""

    def __init__(self, path: Path, count: int):
        self.path, self.count = path, count
        self._held: np.ndarray | None = None

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Tensor:
        if self._held is None:
            self._held = _array(self.path, "arr_0")
        return torch.from_numpy(self._held[index]).permute(2, 0, 1)


def check(path: Path, channels: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the file's arrays, from their headers alone.

    `mu` (d,) and `sigma` (d, d) must be there, `arr_0` (N, H, W, channels) uint8 may. DataError
    for a file that is missing, no npz, too large, or that holds something else.
    """
    arrays = headers(path)
    mu, sigma = arrays.get("mu"), arrays.get("sigma")
    if mu is None or sigma is None or len(mu.shape) != 1 or sigma.shape != mu.shape * 2:
        raise DataError(
            f"{path}: holds {', '.join(sorted(arrays)) or 'nothing'}, not mu (d,) and sigma (d, d);"
            " name a reference file of guided-diffusion or EDM"
        )
    images = arrays.get("arr_0")
    if images and (images.shape[3:] != (channels,) or images.dtype != np.uint8):
        raise DataError(
            f"{path}: arr_0 is {images.dtype} {images.shape}, not uint8 (N, H, W, {channels}); name"
            " the reference of this data set"
        )
    return {name: header.shape for name, header in arrays.items()}


def read(path: Path, channels: int) -> Reference:
    """Statistics and images of the file; its SHA-256 is the fingerprint."""
    shapes = check(path, channels)
    statistics = {name: _array(path, name).astype(np.float64) for name in ("mu", "sigma")}
    for name, values in statistics.items():
        if not np.isfinite(values).all():
            raise DataError(f"{path}: {name} holds NaN or infinity; download it again")
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    count = shapes["arr_0"][0] if "arr_0" in shapes else 0
    return Reference(ReferenceImages(path, count), digest, statistics)


def _array(path: Path, name: str) -> np.ndarray:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return arrays[name]
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path}: {name} is damaged ({error}); download it again") from error
