"""Published reference statistics: `.npz` files of guided-diffusion (ADM) and of EDM."""

from __future__ import annotations

import hashlib
import zipfile
import zlib
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset

from cmkit import DataError, Reference

MAX_BYTES = 2**34
MAX_RATIO = 100


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
    shapes: dict[str, tuple[tuple[int, ...], np.dtype]] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                _refuse_bomb(path, member)
                with archive.open(member) as stream:
                    shapes[member.filename.removesuffix(".npy")] = _header(stream)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}; name a reference .npz") from error
    except (zipfile.BadZipFile, ValueError, EOFError, NotImplementedError) as error:
        raise DataError(f"{path}: not a whole .npz file ({error}); download it again") from error
    mu, sigma = shapes.get("mu"), shapes.get("sigma")
    if mu is None or sigma is None or len(mu[0]) != 1 or sigma[0] != (mu[0][0],) * 2:
        raise DataError(
            f"{path}: holds {', '.join(sorted(shapes)) or 'nothing'}, not mu (d,) and sigma (d, d);"
            " name a reference file of guided-diffusion or EDM"
        )
    images = shapes.get("arr_0")
    if images and (len(images[0]) != 4 or images[0][3] != channels or images[1] != np.uint8):
        raise DataError(
            f"{path}: arr_0 is {images[1]} {images[0]}, not uint8 (N, H, W, {channels}); name the"
            " reference of this data set"
        )
    return {name: shape for name, (shape, _) in shapes.items()}


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


def _refuse_bomb(path: Path, member: zipfile.ZipInfo) -> None:
    ratio = member.file_size / max(member.compress_size, 1)
    if member.file_size > MAX_BYTES or (member.file_size > 2**20 and ratio > MAX_RATIO):
        raise DataError(
            f"{path}: {member.filename} would take {member.file_size} bytes from"
            f" {member.compress_size}; that is no reference file"
        )


def _header(stream: IO[bytes]) -> tuple[tuple[int, ...], np.dtype]:
    version = np.lib.format.read_magic(stream)
    read_header = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }.get(version)
    if read_header is None:
        raise ValueError(f"npy version {version}")
    shape, _, dtype = read_header(stream)
    return shape, dtype


def _array(path: Path, name: str) -> np.ndarray:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return arrays[name]
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path}: {name} is damaged ({error}); download it again") from error
