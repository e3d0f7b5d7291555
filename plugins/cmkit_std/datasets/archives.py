"""Pictures in a zip or a tar, read by index: nothing is unpacked, so that no name can leave it."""

from __future__ import annotations

import functools
import io
import os
import stat
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple

from cmkit import DataError
from cmkit_std.datasets.folders import LOOSE, File, Folder, numbered, printable
from cmkit_std.datasets.on_disk import File as Packed

LARGEST = 2**28
"""Bytes of the largest picture, unpacked."""
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"(\xb5": "zstd"}
"""How compressed files begin."""
REGULAR = "no regular file; remove it"
LEAVES = "its name leaves the archive; rename it"


class Member(NamedTuple):
    """A file of an archive: its name there and its size, where a tar has it (None in a zip), and
    what is wrong with it."""

    name: str
    size: int
    offset: int | None
    fault: str


@dataclass(frozen=True, kw_only=True)
class Archive(Folder):
    """The pictures of a zip or a tar, equal to the folder that it was made of in names, order and
    fingerprint."""

    packed: Packed
    above: str
    """What precedes the names of all members: that of a folder that holds everything, or ""."""

    def name(self, index: int) -> str:
        """The archive and the member."""
        return f"{self.root}: member {self.above + self.files[index].name!r}"

    def open_picture(self, index: int) -> BinaryIO:
        """The encoded picture `index`, in memory; DataError where it cannot be read."""
        file = self.files[index]
        if file.fault:
            raise DataError(f"{self.name(index)}: {file.fault}")
        try:
            content = _read(self.packed, _members(self.packed)[self.above + file.name])
        except Exception as error:  # zipfile raises almost anything
            reason = getattr(error, "strerror", None) or error
            raise DataError(
                f"{self.name(index)}: cannot be read ({reason}); pack it again"
            ) from error
        if len(content) != file.size:
            raise DataError(f"{self.name(index)}: cut short since it was listed; run again")
        return io.BytesIO(content)


def find(path: Path, labels: bool) -> Archive:
    """The pictures of the archive `path`, in the order of their names, with classes if `labels`;
    DataError for one that is none, is damaged or compressed as a whole, or has none."""
    packed = Packed.at(path)
    members = {name: member for name, member in _members(packed).items() if _visible(name)}
    above = _above([name for name, m in members.items() if m.fault != LEAVES], labels)
    names: dict[str, list[str]] = {}
    for name in sorted(members):
        first, inner, _ = name.removeprefix(above).partition("/")
        in_class = labels and inner and members[name].fault != LEAVES
        names.setdefault(first if in_class else "", []).append(name)
    loose = names.pop("", []) if labels else []
    if not names:
        raise DataError(f"{path}: no {'folder of a class' if labels else 'pictures'} in it")
    classes = numbered(names) if labels else [""]

    def file(name: str, label: int, fault: str = "") -> File:
        own, known = members[name], name.removeprefix(above)
        return File(known, label, own.size, packed.mtime_ns, own.fault or fault)

    files = [file(name, label) for label, key in enumerate(classes) for name in names[key]]
    files += [file(name, 0, LOOSE) for name in loose]
    shown = printable(classes) if labels else ()
    return Archive(path, tuple(files), shown, packed=packed, above=above)


def _visible(name: str) -> bool:
    parts = name.split("/")
    return parts[0] != "__MACOSX" and not any(p.startswith(".") and p != ".." for p in parts)


def _above(names: list[str], labels: bool) -> str:
    """The folder that holds everything, with its slash, if any: with `labels` one that holds
    folders alone, so that it is no class."""
    first = {name.partition("/")[0] for name in names}
    if len(first) != 1:
        return ""
    above = f"{first.pop()}/"
    inner = [name.removeprefix(above) for name in names if name.startswith(above)]
    return above if inner and (not labels or all("/" in name for name in inner)) else ""


@functools.lru_cache(maxsize=4)
def _members(packed: Packed) -> dict[str, Member]:
    """The files of an archive by name; those whose names leave it, that are there twice, too large
    or no regular files have a fault."""
    path, found = packed.path, dict[str, Member]()
    try:
        with path.open("rb") as stream:
            begins = stream.read(2)
            if begins == b"PK":
                listed = list(_zipped(_opened(packed, os.getpid())))
            elif begins in COMPRESSED or tarfile.is_tarfile(path):
                listed = [_tarred(info) for info in entries(path, stream)]
            else:
                raise DataError(f"{path}: no folder, no zip and no tar; name one of pictures")
    except (OSError, zipfile.BadZipFile, NotImplementedError, ValueError) as error:
        raise DataError(f"{path}: not a whole archive ({error}); pack it again") from error
    for member in listed:
        inner = PurePosixPath(member.name)
        fault = member.fault
        if inner.is_absolute() or ".." in inner.parts:
            fault = LEAVES
        elif str(inner) in found:
            fault = "is in it twice; keep one"
        elif not fault and member.size > LARGEST:
            fault = f"{member.size} bytes, more than {LARGEST}; shrink it"
        found[str(inner)] = member._replace(fault=fault)
    return found


def _zipped(archive: zipfile.ZipFile) -> Iterator[Member]:
    """The files of a zip."""
    for info in archive.infolist():
        kind, fault = stat.S_IFMT(info.external_attr >> 16), ""
        if info.flag_bits & 1:
            fault = "encrypted; pack it without a password"
        elif kind not in (0, stat.S_IFREG):
            fault = REGULAR
        if not info.is_dir():
            yield Member(info.filename, info.file_size, None, fault)


def _tarred(info: tarfile.TarInfo) -> Member:
    fault = "" if info.isreg() and not info.issparse() else REGULAR
    return Member(info.name, info.size, info.offset_data, fault)


def entries(path: Path, stream: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """The members of a tar that are no folders, in its order; DataError where it is none, is
    compressed, or not whole.

    tarfile takes a damaged header for the end, where an empty block must be.
    """
    stream.seek(0)
    begins = stream.read(2)
    stream.seek(0)
    if begins in COMPRESSED:
        raise DataError(f"{path}: compressed, so that no member can be read alone; decompress it")
    damaged = f"{path}: not a whole tar ({{}}); fetch or write it again"
    try:
        with tarfile.open(fileobj=stream, mode="r:") as archive:
            while (info := archive.next()) is not None:
                archive.members.clear()  # tarfile would keep them all
                if not info.isdir():
                    yield info
            end = archive.offset
    except (tarfile.TarError, ValueError, OverflowError, EOFError) as error:
        raise DataError(damaged.format(error)) from error
    stream.seek(end)
    if (left := stream.read(tarfile.BLOCKSIZE)).strip(b"\0") or len(left) < tarfile.BLOCKSIZE:
        what = "cut short" if len(left) < tarfile.BLOCKSIZE else "damaged"
        raise DataError(damaged.format(f"{what} at byte {end}"))


@functools.lru_cache(maxsize=4)
def _opened(packed: Packed, process: int) -> zipfile.ZipFile:
    """The open zip, whose threads may read at once, and whose forks open their own."""
    return zipfile.ZipFile(packed.path)


def _read(packed: Packed, member: Member) -> bytes:
    """The bytes of a member, of a zip no more than it announces."""
    if member.offset is None:
        with _opened(packed, os.getpid()).open(member.name) as stream:
            return stream.read(member.size)
    with packed.path.open("rb") as whole:
        whole.seek(member.offset)
        return whole.read(member.size)
