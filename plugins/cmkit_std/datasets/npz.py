"""What an `.npz` file announces, read without its arrays: a zip of `.npy` members."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from cmkit import DataError

MAX_BYTES = 2**34
MAX_RATIO = 100
READ_BYTES = 2**22
METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)


@dataclass(frozen=True)
class Header:
    """One array of the file, in C order; `start` is where its bytes begin in the member."""

    member: zipfile.ZipInfo
    shape: tuple[int, ...]
    dtype: np.dtype
    start: int


def headers(path: Path) -> dict[str, Header]:
    """The headers of all arrays, by name.

    DataError for a file that is missing, no npz, damaged or encrypted, that would swell, or whose
    arrays are not of the size that they announce: what is pickled never is.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return {
                member.filename.removesuffix(".npy"): _header(path, archive, member)
                for member in archive.infolist()
            }
    except DataError:
        raise
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}; name an .npz file") from error
    except Exception as error:  # zipfile and numpy raise almost anything
        raise DataError(f"{path}: not a whole .npz file ({error}); download it again") from error


def content(path: Path, header: Header) -> Iterator[bytes]:
    """The bytes of an array, a few MiB at a time; DataError when they are damaged."""
    try:
        with zipfile.ZipFile(path) as archive, archive.open(header.member) as stream:
            missing = header.member.file_size - len(stream.read(header.start))
            while chunk := stream.read(READ_BYTES):
                missing -= len(chunk)
                yield chunk
            if missing:
                raise EOFError(f"{missing} bytes are missing")
    except Exception as error:  # zipfile raises almost anything
        name = header.member.filename
        raise DataError(f"{path}: {name} is damaged ({error}); download it again") from error


def _header(path: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> Header:
    ratio = member.file_size / max(member.compress_size, 1)
    if member.file_size > MAX_BYTES or (member.file_size > 2**20 and ratio > MAX_RATIO):
        raise DataError(
            f"{path}: {member.filename} would take {member.file_size} bytes from"
            f" {member.compress_size}; download it again"
        )
    if member.compress_type not in METHODS:
        raise ValueError(f"{member.filename} is compressed by method {member.compress_type}")
    with archive.open(member) as stream:
        shape, fortran, dtype = _npy(stream)
        start = stream.tell()
    size = math.prod(shape) * dtype.itemsize
    if min(shape, default=0) < 0 or member.file_size != start + size:
        raise ValueError(
            f"{member.filename} announces {dtype} {shape}, but holds {member.file_size - start}"
            " bytes"
        )
    if fortran and len(shape) > 1:
        raise ValueError(f"{member.filename} is in Fortran order")
    return Header(member, shape, dtype, start)


def _npy(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(stream)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(stream)
    if version == (2, 0):
        return np.lib.format.read_array_header_2_0(stream)
    raise ValueError(f"npy version {version}")
