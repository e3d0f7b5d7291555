"""Pictures and captions in tars, read by index: as img2dataset and webdataset write them."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import os
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import numpy as np
from cmkit_std.datasets.archives import LARGEST, LEAVES, REGULAR, entries
from cmkit_std.datasets.folders import LISTED, File

from cmkit import CheckpointError, DataError
from cmkit.files import (
    atomic_write,
    cache_folder,
    cached_digest,
    digest_of,
    fresh_cache,
    read_bytes,
)
from cmkit_latent.captioned import LONGEST, PICTURES, SKIP, Captioned, cleaned, contents

INDEX_BYTES = 2**33
INDEX = "index of a tar 1"
"""Changes with what is kept of a tar."""


@dataclass(frozen=True, eq=False)
class Tars:
    """The pictures of tars by number, as `cmkit_std.datasets.pictures` takes them; none is
    unpacked."""

    root: Path
    files: tuple[File, ...]
    tar: np.ndarray
    """Which of `files` holds picture i, (N,)."""
    offset: np.ndarray
    """Where in it, (N,) int64."""
    size: np.ndarray
    names: list[str]
    """Names of the members."""

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of the tars' names, sizes and times, and of which pictures these are."""
        listing = "".join(f"{f.name}\0{f.size}\0{f.mtime_ns}\n" for f in self.files)
        digest = hashlib.sha256(os.fsencode(f"{self.place}\n{listing}"))
        digest.update(self.tar.tobytes() + self.offset.tobytes())
        return digest.hexdigest()

    @property
    def place(self) -> str:
        """The folder, links resolved."""
        return str(self.root.resolve())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tars) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        """The tar and the member."""
        return f"{self.root / self.files[self.tar[index]].name}: member {self.names[index]!r}"

    def key(self, index: int) -> str:
        """Name, size and time of the tar, and where in it the picture is."""
        file = self.files[self.tar[index]]
        return f"{file.name}\0{file.size}\0{file.mtime_ns}\0{self.offset[index]}"

    def open_picture(self, index: int) -> io.BytesIO:
        """The encoded picture `index`; DataError where the tar has become shorter."""
        path = self.root / self.files[self.tar[index]].name
        size = int(self.size[index])
        try:
            with path.open("rb") as stream:
                stream.seek(int(self.offset[index]))
                content = stream.read(size)
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror}); put it back") from error
        if len(content) < size:
            raise DataError(f"{self.name(index)}: cut short since it was listed; run again")
        return io.BytesIO(content)

    def fingerprint(self) -> str:
        """SHA-256 of the pictures, computed anew when a tar's name, size or time changes; of tars
        of more than LISTED bytes that of names, sizes and times."""
        if sum(file.size for file in self.files) > LISTED:
            return self.digest
        return cached_digest(f"pictures {self.digest}", lambda: contents(self))

    def only(self, indices: Iterable[int]) -> Tars:
        """Those of `indices`."""
        chosen = list(indices)
        return replace(
            self,
            tar=self.tar[chosen],
            offset=self.offset[chosen],
            size=self.size[chosen],
            names=[self.names[index] for index in chosen],
        )


@dataclass
class Members:
    """Pictures of one tar with captions, and what is wrong with others."""

    names: list[str] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


@functools.lru_cache(maxsize=2)
def indexed(root: Path, files: tuple[File, ...]) -> Captioned:
    """The captioned pictures of tars, whose indices are kept in the user's cache; DataError for a
    tar that is damaged, cut short or compressed, or without captions."""
    every = [_members(root / file.name, file) for file in files]
    faults = [
        f"{root / file.name}: {fault}"
        for file, members in zip(files, every, strict=True)
        for fault in members.faults
    ]
    source = Tars(
        root,
        files,
        np.repeat(np.arange(len(files)), [len(members.names) for members in every]),
        np.array([offset for members in every for offset in members.offsets], np.int64),
        np.array([size for members in every for size in members.sizes], np.int64),
        [name for members in every for name in members.names],
    )
    if not len(source) and not faults:
        raise DataError(f"{root}: no pictures in its tars; name the folder of others")
    return Captioned(source, [text for members in every for text in members.texts], faults)


def _members(path: Path, file: File) -> Members:
    """What `scan` finds in a tar, or found while its size and time were the same."""
    if file.fault:
        raise DataError(f"{path}: {file.fault}")
    record = cache_folder("tars") / (
        digest_of(f"{INDEX} {str(path.resolve())!a} {file.size} {file.mtime_ns}") + ".json"
    )
    if record.is_file():
        with contextlib.suppress(CheckpointError, ValueError, TypeError):  # damaged: scanned again
            return Members(**json.loads(read_bytes(record, INDEX_BYTES)))
    members = scan(path)
    fresh_cache(record.parent)
    atomic_write(record, json.dumps(vars(members)))
    return members


def scan(path: Path) -> Members:
    """The pictures of a tar that have captions: members KEY.jpg (or another ending) and KEY.txt,
    where KEY ends at the first dot of the file's name; others are not looked at."""
    pictures: dict[str, tarfile.TarInfo] = {}
    texts: dict[str, tuple[str, str]] = {}
    found = Members()
    try:
        with path.open("rb") as stream:
            for info in _regular(path, stream, found.faults):
                key, ending = _split(info.name)
                if ending in PICTURES and key in pictures:
                    found.faults.append(
                        f"{info.name!r} and {pictures[key].name!r} have one key; rename one"
                    )
                elif ending == "txt" and key in texts:
                    found.faults.append(f"{info.name!r} is in it twice; keep one")
                elif ending in PICTURES:
                    pictures[key] = info
                elif ending == "txt":
                    texts[key] = _text(stream, info)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); replace it") from error
    if pictures and not texts:
        raise DataError(
            f"{path}: pictures without captions (KEY.txt); img2dataset writes them where it is told"
            " the column by --caption_col"
        )
    for key, info in pictures.items():
        text, fault = texts.get(key, ("", f"no {key}.txt for it; write its caption, {SKIP}"))
        if info.size > LARGEST:
            fault = f"{info.size} bytes, more than {LARGEST}; shrink it"
        if fault:
            found.faults.append(f"member {info.name!r}: {fault}")
            continue
        found.names.append(info.name)
        found.offsets.append(info.offset_data)
        found.sizes.append(info.size)
        found.texts.append(text)
    found.faults += (
        f"{key}.txt: no picture of that key in it; add it, or remove the text"
        for key in texts.keys() - pictures
    )
    return found


def _regular(path: Path, stream: BinaryIO, faults: list[str]) -> Iterator[tarfile.TarInfo]:
    """The members of a tar that are pictures and texts; errors as of `entries`."""
    for info in entries(path, stream):
        if _split(info.name)[1] not in {*PICTURES, "txt"}:
            continue
        name = PurePosixPath(info.name)
        if not info.isreg() or info.issparse():
            faults.append(f"member {info.name!r}: {REGULAR}")
        elif name.is_absolute() or ".." in name.parts:
            faults.append(f"member {info.name!r}: {LEAVES}")
        else:
            yield info


def _text(stream: BinaryIO, info: tarfile.TarInfo) -> tuple[str, str]:
    """The caption in a member and "", or "" and what is wrong; the place in the stream is kept."""
    if info.size > LONGEST:
        return "", f"its caption has {info.size} bytes, more than {LONGEST}; shorten it"
    place = stream.tell()
    stream.seek(info.offset_data)
    content = stream.read(info.size)
    stream.seek(place)
    try:
        return cleaned(content), ""
    except ValueError as error:
        return "", str(error)


def _split(name: str) -> tuple[str, str]:
    """(key, ending): the name up to the first dot of the file's name, and what is after it."""
    folder, _, file = name.rpartition("/")
    key, _, ending = file.partition(".")
    return f"{folder}/{key}" if folder else key, ending.lower()
