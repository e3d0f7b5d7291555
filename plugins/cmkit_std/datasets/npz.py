"""Arrays of an `.npz` file, a zip of `.npy` members: their headers alone, or one array whole."""

from __future__ import annotations

import math
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cmkit import DataError
from cmkit.files import require_regular

READERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


@dataclass(frozen=True)
class Header:
    """Shape and type that the file gives for an array, and the CRC-32 of its member."""

    shape: tuple[int, ...]
    dtype: np.dtype
    crc: int


def headers(path: Path) -> dict[str, Header]:
    """The headers of all arrays, by name.

    DataError for a file that is missing, no npz, damaged or encrypted, or whose arrays are not of
    the size that they announce, pickled ones among them.
    """
    try:
        require_regular(path, DataError)
        with zipfile.ZipFile(path) as archive:
            return {
                member.filename.removesuffix(".npy"): _header(archive, member)
                for member in archive.infolist()
            }
    except DataError:
        raise
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}; name an .npz file") from error
    except Exception as error:  # zipfile and numpy raise almost anything
        raise DataError(f"{path}: not a whole .npz file ({error}); download it again") from error


def array(path: Path, name: str) -> np.ndarray:
    """An array of the file, of those in `headers`; DataError when it is damaged."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return arrays[name]  # zipfile compares the CRC-32 once the last byte is read
    except Exception as error:  # zipfile and numpy raise almost anything
        raise DataError(f"{path}: {name}.npy is damaged ({error}); download it again") from error


def _header(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> Header:
    with archive.open(member) as stream:
        version = np.lib.format.read_magic(stream)
        if version not in READERS:
            raise ValueError(f"npy version {version}")
        shape, _, dtype = READERS[version](stream)
        held = member.file_size - stream.tell()
    if min(shape, default=0) < 0 or held != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{member.filename} announces {dtype} {shape}, but holds {held} bytes")
    return Header(shape, dtype, member.CRC)
