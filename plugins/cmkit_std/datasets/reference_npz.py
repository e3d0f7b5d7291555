"""Published reference statistics: `.npz` files of guided-diffusion (ADM) and of EDM."""

from __future__ import annotations

import hashlib
import lzma
import math
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset

from cmkit import DataError, Reference

MAX_BYTES = 2**34
MAX_RATIO = 100
ASYMMETRY = 1e-6
PAIRS = (("mu", "sigma"), ("mu_s", "sigma_s"))
"""Mean and covariance of the pooled features, and of ADM's spatial ones."""
_DAMAGE = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, ValueError, RuntimeError)


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

    `mu` (d,) and `sigma` (d, d) must be there; `mu_s` and `sigma_s`, of the spatial features, and
    `arr_0` (N, H, W, channels) uint8 may. DataError for a file that is missing, no npz, too large,
    or that holds something else.
    """
    shapes: dict[str, tuple[tuple[int, ...], np.dtype]] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                _refuse_bomb(path, member)
                with archive.open(member) as stream:
                    shapes[member.filename.removesuffix(".npy")] = _header(stream, member)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}; name a reference .npz") from error
    except _DAMAGE as error:
        raise DataError(f"{path}: not a whole .npz file ({error}); download it again") from error
    for mu, sigma in PAIRS:
        if mu == "mu" or mu in shapes or sigma in shapes:
            _refuse_odd_pair(path, shapes, mu, sigma)
    images = shapes.get("arr_0")
    if images and (len(images[0]) != 4 or images[0][3] != channels or images[1] != np.uint8):
        raise DataError(
            f"{path}: arr_0 is {images[1]} {images[0]}, not uint8 (N, H, W, {channels}); name the"
            " reference of this data set"
        )
    return {name: shape for name, (shape, _) in shapes.items()}


def read(path: Path, channels: int) -> Reference:
    """Statistics and images of the file; its SHA-256 is the fingerprint."""
    shapes, found = check(path, channels), statistics(path, channels)
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    count = shapes["arr_0"][0] if "arr_0" in shapes else 0
    return Reference(ReferenceImages(path, count), digest, found)


def statistics(path: Path, channels: int) -> dict[str, np.ndarray]:
    """Means and covariances of the file, float64; DataError, besides those of `check`, for NaN,
    infinity, and a matrix that is no covariance."""
    shapes = check(path, channels)
    names = [name for pair in PAIRS for name in pair if name in shapes]
    found = {name: _array(path, name).astype(np.float64) for name in names}
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


def _refuse_odd_pair(
    path: Path, shapes: Mapping[str, tuple[tuple[int, ...], np.dtype]], mu: str, sigma: str
) -> None:
    (size, kind), (square, other) = (shapes.get(name, ((), np.dtype("V"))) for name in (mu, sigma))
    if len(size) != 1 or size[0] < 1 or square != size * 2 or {kind.kind, other.kind} != {"f"}:
        raise DataError(
            f"{path}: holds {', '.join(sorted(shapes)) or 'nothing'}, not {mu} (d,) and {sigma}"
            " (d, d) of floats; name a reference file of guided-diffusion or EDM"
        )


def _refuse_bomb(path: Path, member: zipfile.ZipInfo) -> None:
    ratio = member.file_size / max(member.compress_size, 1)
    if member.file_size > MAX_BYTES or (member.file_size > 2**20 and ratio > MAX_RATIO):
        raise DataError(
            f"{path}: {member.filename} would take {member.file_size} bytes from"
            f" {member.compress_size}; that is no reference file"
        )


def _header(stream: IO[bytes], member: zipfile.ZipInfo) -> tuple[tuple[int, ...], np.dtype]:
    version = np.lib.format.read_magic(stream)
    read_header = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }.get(version)
    if read_header is None:
        raise ValueError(f"npy version {version}")
    shape, _, dtype = read_header(stream)
    claimed, held = math.prod(shape) * dtype.itemsize, member.file_size - stream.tell()
    if claimed != held and not dtype.hasobject:
        raise ValueError(f"{member.filename} claims {claimed} bytes and holds {held}")
    return shape, dtype


def _array(path: Path, name: str) -> np.ndarray:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return arrays[name]
    except (OSError, *_DAMAGE) as error:
        raise DataError(f"{path}: {name} is damaged ({error}); download it again") from error
