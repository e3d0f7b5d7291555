"""Pictures and captions in Hugging Face data sets on this disk: saved folders and parquet files."""

from __future__ import annotations

import functools
import hashlib
import io
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from cmkit_std.datasets.folders import LISTED, File

from cmkit import DataError, PluginError
from cmkit.files import cache_folder, cached_digest
from cmkit_latent.captioned import Captioned, cleaned, contents

SPLITS = ("train", "test", "validation", "valid", "val", "dev")


@dataclass(frozen=True, eq=False)
class Rows:
    """The pictures of a table by number, as `cmkit_std.datasets.pictures` takes them."""

    root: Path
    files: tuple[File, ...]
    table: Any
    """The column of pictures, not decoded: a `datasets.Dataset`."""
    column: str
    rows: np.ndarray
    """The row of picture i, (N,) int64."""

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of the files' names, sizes and times, and of which rows these are."""
        listing = "".join(f"{f.name}\0{f.size}\0{f.mtime_ns}\n" for f in self.files)
        digest = hashlib.sha256(os.fsencode(f"{self.place}\n{self.column}\n{listing}"))
        digest.update(self.rows.tobytes())
        return digest.hexdigest()

    @property
    def place(self) -> str:
        """The folder, links resolved."""
        return str(self.root.resolve())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Rows) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, index: int) -> str:
        """The folder and the row."""
        return f"{self.root}: row {self.rows[index]}"

    def key(self, index: int) -> str:
        """The row, and the files' digest."""
        return f"{self.rows[index]}\0{self._listed}"

    @functools.cached_property
    def _listed(self) -> str:
        return replace(self, rows=self.rows[:0]).digest

    def open_picture(self, index: int) -> io.BytesIO:
        """The encoded picture `index`; DataError where the table does not hold it."""
        found = self.table[int(self.rows[index])][self.column]
        content = found["bytes"] if isinstance(found, dict) else found
        if not isinstance(content, bytes):
            raise DataError(
                f"{self.name(index)}: no picture in column {self.column!r}; save the data set with"
                " its pictures inside (save_to_disk does)"
            )
        return io.BytesIO(content)

    def fingerprint(self) -> str:
        """SHA-256 of the pictures, computed anew when a file's name, size or time changes; of more
        than LISTED bytes that of names, sizes and times."""
        if sum(file.size for file in self.files) > LISTED:
            return self.digest
        return cached_digest(f"pictures {self.digest}", lambda: contents(self))

    def only(self, indices: Iterable[int]) -> Rows:
        """Those of `indices`."""
        return replace(self, rows=self.rows[list(indices)])


@functools.lru_cache(maxsize=2)
def saved(root: Path, files: tuple[File, ...], key: str) -> Captioned:
    """The captioned pictures of a folder that `save_to_disk` wrote."""
    datasets = _package(root)
    if (root / "dataset_dict.json").is_file():
        names = sorted({f.name.partition("/")[0] for f in files if f.name.endswith("/state.json")})
        raise DataError(
            f"{root}: has splits {', '.join(names)}; name the folder of one, such as"
            f" {str(root / (names or ['train'])[0])!r}"
        )
    data = tuple(file for file in files if not file.name.startswith("cache-"))
    with _reading(root):
        return _captioned(root, data, datasets.load_from_disk(str(root)), key, datasets)


@functools.lru_cache(maxsize=2)
def parquet(root: Path, files: tuple[File, ...], key: str) -> Captioned:
    """The captioned pictures of parquet files, which the package copies once, so that rows can be
    read alone, into the user's cache."""
    datasets = _package(root)
    names = {file.name.rpartition("/")[2].partition("-")[0] for file in files} & {*SPLITS}
    if len(names) > 1:
        raise DataError(
            f"{root}: has splits {', '.join(sorted(names))}; move the files of each into a folder"
        )
    paths = [str(root / file.name) for file in files]
    with _reading(root):
        table = datasets.Dataset.from_parquet(paths, cache_dir=str(cache_folder("parquet")))
        return _captioned(root, files, table, key, datasets)


def _captioned(
    root: Path, files: tuple[File, ...], table: Any, key: str, datasets: Any
) -> Captioned:
    """The pictures and captions of a `datasets.Dataset`."""
    pictures = [name for name, kind in table.features.items() if isinstance(kind, datasets.Image)]
    known = ", ".join(table.column_names)
    if len(pictures) != 1:
        raise DataError(
            f"{root}: {len(pictures)} columns of pictures, where one is wanted; it has {known}"
        )
    if key not in table.column_names:
        raise DataError(f"{root}: no column {key!r}; dataset.caption_key may be one of: {known}")
    texts, kept, faults = [], [], []
    for row, text in enumerate(table.select_columns([key])[key]):
        try:
            texts.append(cleaned(text))
            kept.append(row)
        except ValueError as error:
            faults.append(f"{root}: row {row}: {error}")
    column = pictures[0]
    bare = table.select_columns(pictures).cast_column(column, datasets.Image(decode=False))
    if not kept and not faults:
        raise DataError(f"{root}: no rows in it; name the folder of another data set")
    return Captioned(Rows(root, files, bare, column, np.array(kept, np.int64)), texts, faults)


def _package(root: Path) -> Any:
    """The package `datasets`, quiet; PluginError without it."""
    try:
        import datasets
    except ImportError as error:  # the data may be fine, so this is no DataError
        raise PluginError(
            f"dataset captions: {root} needs the package datasets; pip install"
            " 'cmkit-latent[datasets]'"
        ) from error
    datasets.disable_progress_bars()
    return datasets


@contextmanager
def _reading(root: Path) -> Iterator[None]:
    """Inside, what the package raises of damaged files becomes DataError."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # it raises almost anything
        raise DataError(
            f"{root}: not a whole Hugging Face data set ({str(error) or type(error).__name__});"
            " save or fetch it again"
        ) from error
