"""The IDX format of MNIST: two zero bytes, a type, the number of axes, their sizes, the bytes."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np

from cmkit import DataError

UINT8 = 0x08
MAX_BYTES = 2**30


def read_idx(file: Path, axes: int) -> np.ndarray:
    """The uint8 array, with `axes` axes, of an IDX file, gzipped iff it is named .gz.

    Raises DataError for any byte too few, too many or wrong. Never holds more than the header
    announces, and never more than 1 GiB, whatever the file expands to.
    """
    try:
        with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as stream:
            return _read(cast(BinaryIO, stream), file, axes)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{file}: cannot be read ({error}); fetch it again") from error


def _read(stream: BinaryIO, file: Path, axes: int) -> np.ndarray:
    header = stream.read(4 + 4 * axes)
    magic = bytes([0, 0, UINT8, axes])
    if header[:4] != magic:
        raise DataError(
            f"{file}: starts with {header[:4].hex() or 'nothing'}, not with {magic.hex()}; not an"
            f" IDX file of {axes}-dimensional bytes: fetch it again"
        )
    if len(header) < 4 + 4 * axes:
        raise DataError(f"{file}: truncated inside its header; fetch it again")
    shape = tuple(int(n) for n in np.frombuffer(header, ">u4", offset=4))
    size = math.prod(shape)
    if not 0 < size <= MAX_BYTES:
        raise DataError(f"{file}: its header announces {shape}, {size} bytes; fetch it again")
    body = stream.read(size + 1)
    if len(body) != size:
        fault = "trailing bytes" if len(body) > size else f"truncated to {len(body)}"
        raise DataError(f"{file}: its header announces {size} bytes, but {fault}; fetch it again")
    return np.frombuffer(body, np.uint8).reshape(shape).copy()
