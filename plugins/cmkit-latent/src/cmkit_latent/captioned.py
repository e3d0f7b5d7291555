"""Pictures with a text each: in folders, and in what else `collect` finds."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Protocol, Self

import numpy as np
from cmkit_std.datasets.folders import File, Folder, below
from cmkit_std.datasets.pictures import READ_AHEAD, Lasting
from cmkit_std.datasets.pixels import pool

from cmkit import DataError

PICTURES = frozenset(("png", "jpg", "jpeg", "webp", "bmp", "tif", "tiff", "gif", "ppm", "pgm"))
"""Endings of what is a picture where there are other files."""
LONGEST = 2**16
"""Bytes of the longest caption."""
METADATA = "metadata.jsonl"
SKIP = 'or leave it out by dataset.on_bad = "skip"'


class Source(Lasting, Protocol):
    """Encoded pictures, of which some can be chosen."""

    def only(self, indices: Iterable[int]) -> Self:
        """Those of `indices`."""


@dataclass(frozen=True)
class Captioned:
    """Pictures, what is said of each, and what is wrong with those that have no caption, and with
    captions that have no picture."""

    source: Source
    texts: Sequence[str]
    faults: Sequence[str] = ()

    @functools.cached_property
    def captions(self) -> list[str]:
        """The texts, each once."""
        return list(dict.fromkeys(self.texts))

    @functools.cached_property
    def numbers(self) -> np.ndarray:
        """The number of each picture's text in `captions`, (N,) int64."""
        number = {text: k for k, text in enumerate(self.captions)}
        return np.fromiter((number[text] for text in self.texts), np.int64, len(self.texts))

    def only(self, indices: Sequence[int]) -> Captioned:
        """Those of `indices`."""
        return Captioned(self.source.only(indices), [self.texts[index] for index in indices])

    def digest(self) -> str:
        """SHA-256 of the texts, picture by picture."""
        digest = hashlib.sha256()
        for text in self.texts:
            digest.update(f"{text}\n".encode())
        return digest.hexdigest()


def collect(path: str, key: str) -> Captioned:
    """The captioned pictures of `dataset.path`, in the order of their names; DataError where it is
    of none of the forms that are read."""
    root = Path(path).expanduser()
    if root.is_file():
        root, files = root.parent, _single(root)
    elif root.is_dir():
        files = below(root, root, 0)
    else:
        raise DataError(f"dataset.path = {path!r}: no such folder or file; name that of the data")
    names = {file.name for file in files}
    if {"state.json", "dataset_dict.json"} & names:
        from cmkit_latent.rows import saved

        return saved(root, files, key)
    kinds = {_ending(file.name) for file in files}
    if "tar" in kinds:
        if kinds & PICTURES:
            raise DataError(f"{root}: tars and pictures in one folder; name a folder of one kind")
        from cmkit_latent.tars import indexed

        return indexed(root, tuple(file for file in files if _ending(file.name) == "tar"))
    if "parquet" in kinds and not kinds & PICTURES:
        from cmkit_latent.rows import parquet

        return parquet(root, tuple(f for f in files if _ending(f.name) == "parquet"), key)
    return in_folder(root, files, key)


def _single(path: Path) -> tuple[File, ...]:
    if _ending(path.name) not in ("tar", "parquet"):
        raise DataError(f"{path}: no .tar and no .parquet file; name one, or a folder")
    info = path.stat()
    return (File(path.name, 0, info.st_size, info.st_mtime_ns),)


@functools.lru_cache(maxsize=2)
def in_folder(root: Path, files: tuple[File, ...], key: str) -> Captioned:
    """Pictures with a .txt each, or with a metadata.jsonl, among the `files` below `root`."""
    pictures = {file.name: file for file in files if _ending(file.name) in PICTURES}
    beside = {file.name: file for file in files if _ending(file.name) == "txt"}
    if not pictures:
        known = ", ".join(sorted(PICTURES))
        raise DataError(f"{root}: no pictures in it; put some there ({known}), tars or parquets")
    if any(file.name == METADATA for file in files):
        stems = {name.rpartition(".")[0] for name in pictures}
        if both := sorted(name for name in beside if name.rpartition(".")[0] in stems):
            raise DataError(
                f"{root}: captions in {METADATA} and in {len(both)} .txt ({both[0]}, ..); keep one"
                " kind there"
            )
        said, faults = _metadata(root, pictures, key)
    elif beside:
        said, faults = _beside(root, pictures, beside)
    else:
        inner = [file.name for file in files if PurePosixPath(file.name).name == METADATA]
        if inner:
            raise DataError(
                f"{root}: {METADATA} is in a folder below; name {str((root / inner[0]).parent)!r}"
            )
        raise DataError(
            f"{root}: pictures without captions; put a .txt beside each, or a {METADATA} in it"
        )
    chosen = sorted(said)
    return Captioned(
        Folder(root, tuple(pictures[name] for name in chosen)),
        [said[name] for name in chosen],
        faults,
    )


def _beside(
    root: Path, pictures: Mapping[str, File], texts: Mapping[str, File]
) -> tuple[dict[str, str], list[str]]:
    """What the .txt of each picture says, and what is wrong."""
    said: dict[str, str] = {}
    faults: list[str] = []
    of: dict[str, str] = {}
    for name in sorted(pictures):
        stem = name.rpartition(".")[0]
        if stem in of:
            faults.append(
                f"{root / name}: has the name of {of[stem]}, and one .txt serves one picture;"
                f" rename it, {SKIP}"
            )
        else:
            of[stem] = name
    captions = {name.rpartition(".")[0]: file for name, file in texts.items()}
    for stem, file in captions.items():
        if stem not in of:
            faults.append(
                f"{root / file.name}: no picture of that name; add it, or remove the file"
            )
    stems = list(of)

    def read(stem: str) -> tuple[str, str]:
        """(text, "") or ("", what is wrong)."""
        if stem not in captions:
            return "", f"{root / of[stem]}: no {stem}.txt beside it; write its caption, {SKIP}"
        path = root / captions[stem].name
        try:
            return cleaned(_content(path, captions[stem])), ""
        except ValueError as error:
            return "", f"{path}: {error}"
        except OSError as error:
            return "", f"{path}: {error.strerror}; give this user permission to read it"

    with pool() as threads:
        for first in range(0, len(stems), READ_AHEAD):
            part = stems[first : first + READ_AHEAD]
            for stem, (text, fault) in zip(part, threads.map(read, part), strict=True):
                if fault:
                    faults.append(fault)
                else:
                    said[of[stem]] = text
    return said, faults


def _content(path: Path, file: File) -> bytes:
    """The bytes of a small file; ValueError for another."""
    if file.fault:
        raise ValueError(file.fault)
    if file.size > LONGEST:
        raise ValueError(f"{file.size} bytes, more than the {LONGEST} of a caption; shorten it")
    return path.read_bytes()


def _metadata(
    root: Path, pictures: Mapping[str, File], key: str
) -> tuple[dict[str, str], list[str]]:
    """What each line of metadata.jsonl says of its picture, and what is wrong."""
    said: dict[str, str] = {}
    faults: list[str] = []
    named: dict[str, int] = {}
    file = root / METADATA
    for number, line in _lines(file):
        place = f"{file} line {number}"
        try:
            row = _row(line)
            name = str(PurePosixPath(row["file_name"]))
            if name not in pictures:
                raise ValueError(f"file_name {name!r}: no such picture in {root}; add it")
            if name in named:
                raise ValueError(f"file_name {name!r} is in line {named[name]} too; keep one")
            named[name] = number
            if key not in row:
                others = ", ".join(sorted(row.keys() - {"file_name"})) or "none"
                raise ValueError(f"no {key!r}; dataset.caption_key may be one of: {others}")
            said[name] = cleaned(row[key])
        except ValueError as error:
            faults.append(f"{place}: {error}")
    faults += (
        f"{root / name}: not in {METADATA}; add its caption, {SKIP}"
        for name in sorted(pictures.keys() - named.keys())
    )
    return said, faults


def _lines(file: Path) -> Iterator[tuple[int, bytes]]:
    """Number and content of each line that is not blank."""
    try:
        with file.open("rb") as stream:
            for number, line in enumerate(stream, 1):
                if line.strip():
                    yield number, line
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror}); replace it") from error


def _row(line: bytes) -> dict[str, Any]:
    """What a line of metadata.jsonl says of a file in its folder; ValueError else."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"{twice!r} is said twice")
        return dict(pairs)

    try:
        row = json.loads(line.decode("utf-8-sig"), object_pairs_hook=once)
    except UnicodeDecodeError as error:
        raise ValueError("not UTF-8; save the file as UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"no JSON ({error}); mend or remove the line") from error
    if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
        raise ValueError('no object with a "file_name"; mend or remove the line')
    name = PurePosixPath(row["file_name"])
    if name.is_absolute() or ".." in name.parts:
        raise ValueError(f"file_name {row['file_name']!r} leaves the folder; name a file in it")
    return row


def contents(source: Source) -> str:
    """SHA-256 of the encoded pictures of a source that holds them in memory."""
    digest = hashlib.sha256()

    def sha256(index: int) -> bytes:
        with source.open_picture(index) as stream:
            return hashlib.sha256(stream.read()).digest()

    with pool() as threads:
        for first in range(0, len(source), READ_AHEAD):
            for own in threads.map(sha256, range(first, min(first + READ_AHEAD, len(source)))):
                digest.update(own)
    return digest.hexdigest()


def cleaned(text: object) -> str:
    """A caption with each run of white space as one blank; ValueError, which says why, for what is
    no text, is not UTF-8, or is empty."""
    if isinstance(text, bytes):
        try:
            text = text.decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"not UTF-8 (byte {error.start}); save it as UTF-8") from error
    if not isinstance(text, str):
        raise ValueError(f"the caption is {type(text).__name__}, not a text; give one text")
    if not (text := " ".join(text.removeprefix("\ufeff").split())):
        raise ValueError(f"the caption is empty; write one, {SKIP}")
    if len(text) > LONGEST:
        raise ValueError(f"a caption of {len(text)} characters; at most {LONGEST}: shorten it")
    if any("\ud800" <= c <= "\udfff" for c in text):
        raise ValueError("the caption holds half a character (a lone surrogate); write it anew")
    return text


def _ending(name: str) -> str:
    return name.rpartition(".")[2].lower() if "." in name else ""
