"""LSUN (Yu, Seff, Zhang, Song, Funkhouser, Xiao, 2015), from files on this disk."""

from __future__ import annotations

import contextlib
import hashlib
import io
import threading
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from cmkit import DataError, DataSpec, PluginError
from cmkit_std.datasets import image_folder
from cmkit_std.datasets.folders import Folder
from cmkit_std.datasets.on_disk import File, Published

if TYPE_CHECKING:
    from cmkit_std.datasets.pictures import Decoder

CHANNELS = 3
CHECKED = 1024
SAMPLED = 1024


class LSUN(Published):
    """Bedrooms, cats, churches and the like, without labels, as LSUN is published.

    `path` is the folder of an unzipped LMDB, such as `bedroom_train_lmdb` with its `data.mdb`, or
    a folder of the pictures that were unpacked from it, which is read as `image_folder` reads it.
    Both are resized and cropped as `image_folder` does with orientation = "stored". Pictures come
    in the order of the LMDB's keys, or of the names of files. An LMDB needs the package `lmdb`
    (`pip install 'cmkit[lsun]'`), which trusts what it reads: a truncated file is refused, but
    damage inside one can end the process. It is only read, and takes 48 bytes of memory a
    picture. Metrics that read three million bedrooms take hours: see `reference_npz`. Nothing is
    downloaded.
    """

    resolution: int = Field(256, ge=4, le=4096)
    """Height and width after resizing and cropping."""

    def spec(self) -> DataSpec:
        """Shape; DataError when there are no pictures, or when one that was opened is none.

        Of an LMDB all keys are read, but only 1,024 pictures are opened, spread evenly. A damaged
        one among the others stops training when its turn comes.
        """
        self._check_published()
        if self.path is not None:
            from cmkit_std.datasets.pictures import check

            source = self._source()
            most = CHECKED if isinstance(source, Records) else len(source)
            check(source, spread(len(source), most))
        return self.declared()

    def declared(self) -> DataSpec:
        """The same, without the files."""
        return DataSpec(CHANNELS, self.resolution)

    def faults(self) -> Iterator[str]:
        """What is wrong with each picture that cannot be decoded; reads them all."""
        from cmkit_std.datasets.pictures import undecodable

        shape = (CHANNELS, self.resolution)
        return undecodable(self._source(), shape) if self.path is not None else iter(())

    def _images(self) -> Decoder:
        from cmkit_std.datasets.pictures import Decoder

        return Decoder(self._source(), (CHANNELS, self.resolution), flip=self.flip)

    def _source(self) -> Records | Folder:
        """The LMDB in `path`, or the folder of pictures."""
        root = self._root
        if (root / "data.mdb").exists():
            return Records.open(root)
        below = sorted(root.glob("*/data.mdb"))
        if below:
            raise DataError(
                f"dataset.path = {self.path!r}: the LMDB is in a folder below; name"
                f" {str(below[0].parent)!r}"
            )
        return image_folder.find(str(self.path), labels=False)


@dataclass(frozen=True)
class Records:
    """The pictures of an LMDB in the order of their keys, as `pictures` takes them; equal while
    the file is the same."""

    file: File

    @classmethod
    def open(cls, folder: Path) -> Records:
        """The records of `folder`; DataError when its file cannot be looked at."""
        return cls(File.at(folder / "data.mdb", "name the folder of an LMDB"))

    def __len__(self) -> int:
        """Number of pictures; errors as of `_open`."""
        return len(_opened(self).ends)

    def name(self, index: int) -> str:
        """How errors call picture `index`: its file and its key."""
        key = _opened(self).key(index)
        text = key.decode("ascii", "replace")
        shown = text if text.isprintable() and text.isascii() else key.hex()
        return f"{self.file.path}: record {shown!r}"

    def open_picture(self, index: int) -> io.BytesIO:
        """The encoded picture `index`, as a file in memory."""
        return io.BytesIO(self.read(index))

    def read(self, index: int) -> bytes:
        """The encoded picture `index`; DataError when lmdb finds the file damaged."""
        import lmdb

        opened = _opened(self)
        try:
            with opened.environment.begin() as transaction:
                return transaction.get(opened.key(index), b"")
        except lmdb.Error as error:
            raise _damaged(self.file.path, error) from error

    def fingerprint(self) -> str:
        """SHA-256 of the keys, the last transaction, the size and time of the file, and 1,024
        pictures, spread evenly."""
        file = self.file
        digest = hashlib.sha256(f"{_opened(self).digest} {file.size} {file.mtime_ns}".encode())
        for index in spread(len(self), SAMPLED):
            digest.update(self.read(index))
        return digest.hexdigest()


def spread(count: int, most: int) -> range:
    """At most `most` of 0 .. count - 1, evenly, the first among them."""
    return range(0, count, max(1, -(-count // most)))


@dataclass(frozen=True)
class _Opened:
    """An open LMDB and its keys, one after another; `ends` says where each ends."""

    environment: Any
    keys: bytearray
    ends: array[int]
    digest: str

    def key(self, index: int) -> bytes:
        start = self.ends[index - 1] if index else 0
        return bytes(self.keys[start : self.ends[index]])


_held: dict[Records, _Opened] = {}
_holding = threading.Lock()


def _opened(records: Records) -> _Opened:
    """The LMDB, opened by the first call in this process and kept; errors as of `_open`."""
    with _holding:
        if records not in _held:
            _held.clear()  # closes the file as it was: lmdb opens a file once a process
            _held[records] = _open(records)
        return _held[records]


def _open(records: Records) -> _Opened:
    """Opens the LMDB and reads its keys.

    PluginError without the package lmdb; DataError for a file that is no LMDB, truncated, or
    empty. What is wrong inside a page is lmdb's to find, and it may abort the process over it.
    """
    file = records.file.path
    try:
        import lmdb
    except ImportError as error:  # the data may be fine, so this is no DataError
        raise PluginError(
            f"dataset lsun: {file} needs the package lmdb; pip install 'cmkit[lsun]'"
        ) from error
    keys, ends = bytearray(), array("Q")
    try:
        with contextlib.ExitStack() as faulty:
            environment = faulty.enter_context(
                lmdb.open(str(file.parent), readonly=True, lock=False, readahead=False)
            )
            needed = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
            if records.file.size < needed:  # reading a page that is missing would be a SIGBUS
                raise DataError(
                    f"{file}: truncated to {records.file.size} of {needed} bytes; download it again"
                )
            with environment.begin() as transaction:
                for key in transaction.cursor().iternext(values=False):
                    keys += key
                    ends.append(len(keys))
            if not ends:
                raise DataError(f"{file}: no records in it; download it again")
            faulty.pop_all()
    except lmdb.Error as error:
        raise _damaged(file, error) from error
    digest = hashlib.sha256(f"{environment.info()['last_txnid']} ".encode())
    digest.update(ends)
    digest.update(keys)
    return _Opened(environment, keys, ends, digest.hexdigest())


def _damaged(file: Path, error: Exception) -> DataError:
    return DataError(f"{file}: not a whole LMDB ({error}); download or unpack it again")
