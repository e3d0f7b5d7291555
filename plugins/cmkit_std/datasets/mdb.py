"""The file format of LMDB 0.9 (data version 1), in which LSUN is published: reading only.

The library behind the package `lmdb` trusts its file: a zeroed page aborts the process, a wrong
page number or a file that shrinks is a SIGBUS. Here every number is checked against the file
before it is followed, nothing is mapped and no file stays open, so that threads and forked
processes may read at will.
"""

from __future__ import annotations

import functools
import hashlib
import io
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from cmkit import DataError

MAGIC = 0xBEEFC0DE
VERSION = 1
BRANCH, LEAF = 1, 2
INLINE, OVERFLOW = 0, 1
PAGE = struct.Struct("<QHHHH")
"""Page number, padding, flags, end of the node pointers, start of the nodes."""
META = struct.Struct("<IIQQ 48x IHHQQQQQ QQ")
"""Magic, version, address, map size, the list of free pages, the database (padding, flags, depth,
branch, leaf and overflow pages, entries, root), last page, transaction."""
PAGE_SIZE = struct.Struct("<24x I")
"""Inside META: kept in the padding of the list of free pages."""
NODE_BYTES = 8
MAX_BYTES = 2**26
SAMPLED = 1024


@dataclass(frozen=True)
class Mdb:
    """The records of a `data.mdb` in the order of their keys; equal while the file is the same."""

    file: Path
    size: int
    mtime_ns: int

    @classmethod
    def open(cls, folder: Path) -> Mdb:
        """The records of `folder`; DataError when its file cannot be looked at."""
        file = folder / "data.mdb"
        try:
            info = file.stat()
        except OSError as error:
            raise DataError(f"{file}: cannot be read ({error.strerror})") from error
        if not file.is_file():
            raise DataError(f"{file}: no regular file; name the folder of an LMDB")
        return cls(file, info.st_size, info.st_mtime_ns)

    def __len__(self) -> int:
        """Number of records; the first call reads all pages that hold keys, or raises DataError."""
        return len(_index(self).values)

    def name(self, index: int) -> str:
        """How errors call record `index`: its file and its key."""
        return f"{self.file}: record {_key(self.file, int(_index(self).nodes[index]))}"

    def open_picture(self, index: int) -> io.BytesIO:
        """Value `index`; DataError when the file shrank."""
        return io.BytesIO(self.read(index))

    def read(self, index: int) -> bytes:
        """Value `index`; DataError when the file shrank."""
        found = _index(self)
        value = _read(self.file, int(found.values[index]), int(found.sizes[index]))
        if len(value) < found.sizes[index]:
            raise _corrupt(self.file, "it shrank while it was read")
        return value

    def fingerprint(self) -> str:
        """SHA-256 that changes with any key, with any transaction, and with the file's time.

        Of the values themselves 1,024 are read, spread evenly.
        """
        digest = hashlib.sha256(f"{_index(self).digest} {self.size} {self.mtime_ns}".encode())
        for index in spread(len(self), SAMPLED):
            digest.update(self.read(index))
        return digest.hexdigest()


def spread(count: int, most: int) -> range:
    """At most `most` of 0 .. count - 1, evenly, the first among them."""
    return range(0, count, max(1, -(-count // most)))


@dataclass(frozen=True)
class Index:
    """Where the records are: three arrays (N,) of file offsets and bytes, in the order of keys."""

    nodes: np.ndarray
    values: np.ndarray
    sizes: np.ndarray
    digest: str
    """SHA-256 of the meta page and of all pages that hold keys."""


@functools.lru_cache(maxsize=2)
def _index(records: Mdb) -> Index:
    file = records.file
    try:
        with file.open("rb") as stream:
            return _walk(file, stream, records.size)
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror or error})") from error


def _walk(file: Path, stream: BinaryIO, size: int) -> Index:
    """The index, from the meta page down to every leaf, left to right."""
    page_size, entries, root, last = _meta(file, stream, size)
    stream.seek(0)
    digest = hashlib.sha256(stream.read(2 * page_size))
    parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    pending, seen = [root], 0
    while pending:
        number = pending.pop()
        seen += 1
        if number > last or seen + len(pending) > last:
            raise _corrupt(file, f"page {number} is one too many")
        stream.seek(number * page_size)
        page = stream.read(page_size)
        flags, nodes, fields = _nodes(file, number, page)
        if flags == BRANCH:
            children = fields[:, 0] | fields[:, 1] << 16 | fields[:, 2] << 32
            pending.extend(children[::-1].tolist())
        else:
            digest.update(page)
            parts.append(_leaf(file, number, page, nodes, fields, last))
    columns = [np.concatenate(column) for column in zip(*parts, strict=True)]
    if len(columns[0]) != entries:
        raise _corrupt(file, f"{len(columns[0])} records, not the {entries} that it announces")
    return Index(*columns, digest.hexdigest())


def _meta(file: Path, stream: BinaryIO, size: int) -> tuple[int, int, int, int]:
    """Page size, entries, root page and last page, of the later of the two meta pages."""
    head = stream.read(PAGE.size + META.size)
    if len(head) < PAGE.size + META.size:
        raise DataError(f"{file}: {len(head)} bytes, no LMDB; download it again")
    magic, version = META.unpack_from(head, PAGE.size)[:2]
    if magic != MAGIC or version != VERSION:
        fault = f"LMDB data version {version}" if magic == MAGIC else f"begins with {magic:08x}"
        raise DataError(
            f"{file}: {fault}, not a little-endian LMDB of data version 1; give a folder of"
            " pictures instead"
        )
    (page_size,) = PAGE_SIZE.unpack_from(head, PAGE.size)
    if page_size not in {2**power for power in range(8, 17)}:
        raise _corrupt(file, f"pages of {page_size} bytes")
    stream.seek(page_size)
    twin = stream.read(PAGE.size + META.size).ljust(len(head), b"\0")
    metas = [META.unpack_from(meta, PAGE.size) for meta in (head, twin)]
    valid = [meta for meta in metas if meta[:2] == (MAGIC, VERSION)]
    entries, root, last, _ = max(valid, key=lambda meta: meta[-1])[-4:]
    if size < (last + 1) * page_size:
        raise DataError(
            f"{file}: truncated to {size} of {(last + 1) * page_size} bytes; download it again"
        )
    if not entries:
        raise DataError(f"{file}: no records in it; download it again")
    return page_size, entries, root, last


def _nodes(file: Path, number: int, page: bytes) -> tuple[int, np.ndarray, np.ndarray]:
    """BRANCH or LEAF, where the nodes begin (n,), and the four numbers at each (n, 4)."""
    itself, _, flags, lower, _ = PAGE.unpack_from(page)
    if itself != number or flags not in (BRANCH, LEAF):
        raise _corrupt(file, f"page {number} says {itself}, type {flags}")
    if not PAGE.size < lower <= len(page) or lower % 2:
        raise _corrupt(file, f"page {number} has no nodes")
    nodes = np.frombuffer(page, "<u2", (lower - PAGE.size) // 2, PAGE.size).astype(np.int64)
    if nodes.min() < lower or nodes.max() > len(page) - NODE_BYTES:
        raise _corrupt(file, f"a node of page {number} lies outside")
    fields = _gather(page, nodes, NODE_BYTES).view("<u2").astype(np.int64)
    return flags, nodes, fields


def _leaf(
    file: Path, number: int, page: bytes, nodes: np.ndarray, fields: np.ndarray, last: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """File offsets of nodes, file offsets of values, and sizes of values, each (n,)."""
    low, high, kinds, key_sizes = fields.T
    sizes, inside = low | high << 16, nodes + NODE_BYTES + key_sizes
    far = kinds == OVERFLOW
    if not (far | (kinds == INLINE)).all():
        raise DataError(f"{file}: holds databases in a database, which LSUN does not")
    if (inside + np.where(far, 8, sizes)).max() > len(page):
        raise _corrupt(file, f"a node of page {number} is longer than its page")
    offsets = number * len(page) + nodes
    if sizes.max() > MAX_BYTES:
        worst = int(sizes.argmax())
        raise DataError(
            f"{file}: record {_key(file, int(offsets[worst]))} takes {sizes[worst]} bytes, more"
            f" than {MAX_BYTES}; no picture of LSUN does"
        )
    values = number * len(page) + inside
    if far.any():
        pages = _gather(page, inside[far], 8).view("<u8")[:, 0]
        end = pages.clip(max=last + 1).astype(np.int64) * len(page) + PAGE.size
        if pages.min() < 2 or (end + sizes[far]).max() > (last + 1) * len(page):
            raise _corrupt(file, f"a value of page {number} lies outside")
        values[far] = end
    return offsets, values, sizes


def _gather(page: bytes, starts: np.ndarray, count: int) -> np.ndarray:
    """`count` bytes at each of `starts` (n,), (n, count) uint8."""
    return np.frombuffer(page, np.uint8)[starts[:, None] + np.arange(count)]


def _key(file: Path, node: int) -> str:
    """The key of the node at this file offset, for a person: text, or hexadecimal."""
    key_size = int.from_bytes(_read(file, node + 6, 2), "little")
    key = _read(file, node + NODE_BYTES, key_size)
    text = key.decode("ascii", "replace")
    return repr(text if text.isprintable() and text.isascii() else key.hex())


def _read(file: Path, start: int, count: int) -> bytes:
    try:
        with file.open("rb", buffering=0) as stream:
            return os.pread(stream.fileno(), count, start)
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror or error})") from error


def _corrupt(file: Path, reason: str) -> DataError:
    return DataError(f"{file}: corrupt LMDB ({reason}); download or unpack it again")
