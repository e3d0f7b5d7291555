"""Numbered rows of tensors in the user's cache, made once and shared by runs.

A store is a folder of safetensors files, of SHARD rows each, and `manifest.json`, which names the
finished ones with their sizes and digests and is written anew, whole or not at all, after each.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from cmkit import files
from cmkit.errors import CheckpointError
from cmkit.tensors import save_weights

T = TypeVar("T")
SHARD = 1000
"""Rows of a file: what a killed process loses."""


@dataclass(frozen=True, eq=False)
class Store:
    """`rows` rows of what `kind` says, under the key of `about`: all that decides them, as JSON."""

    kind: str
    about: Mapping[str, Any]
    rows: int
    row_bytes: int
    """Of one row, at most."""

    @cached_property
    def path(self) -> Path:
        """The folder, which need not be there yet."""
        key = files.digest_of(json.dumps(self.about, sort_keys=True))
        return files.cache_folder("latents") / f"{self.kind}-{key[:32]}"

    @property
    def shards(self) -> list[range]:
        """The rows of each file."""
        firsts = range(0, self.rows, SHARD)
        return [range(first, min(first + SHARD, self.rows)) for first in firsts]

    def missing(self) -> dict[int, str]:
        """What is wrong with each file, by its number: "missing", "cut short" or "damaged".

        A digest is computed when a file's size or time is new, and kept.
        """
        listed, found = self._listed(), {}
        for shard in range(len(self.shards)):
            path, known = self._file(shard), listed.get(str(shard))
            if known is None or not path.is_file():
                found[shard] = "missing"
            elif path.stat().st_size != known["bytes"]:
                found[shard] = "cut short"
            elif files.cached_sha256(path) != known["sha256"]:
                found[shard] = "damaged"
        return found

    @property
    def bytes(self) -> int:
        """Bytes of the files."""
        return sum(known["bytes"] for known in self._listed().values())

    def keep(self, shard: int, tensors: Mapping[str, Tensor]) -> None:
        """Write a file, then the manifest; only the holder of `files.lock` may."""
        path = self._file(shard)
        sha256 = files.cached_sha256(path, save_weights(path, tensors))
        listed = {**self._listed(), str(shard): {"bytes": path.stat().st_size, "sha256": sha256}}
        content = {"about": dict(self.about), "rows": self.rows, "shards": listed}
        files.atomic_write(self._manifest, files.sealed(content))

    def read(self) -> Rows:
        """The rows, mapped from the disk; CheckpointError where they are not all there."""
        listed = self._listed()
        for shard in range(len(self.shards)):
            path, known = self._file(shard), listed.get(str(shard))
            size = path.stat().st_size if path.is_file() else None
            if known is None or size != known["bytes"]:
                raise CheckpointError(
                    f"{path}: missing or cut short; run the recipe again, its stage [cache] makes"
                    " it, or say cache = false"
                )
        return Rows([_mapped(self._file(shard)) for shard in range(len(self.shards))])

    @property
    def _manifest(self) -> Path:
        return self.path / "manifest.json"

    def _file(self, shard: int) -> Path:
        return self.path / f"{shard:06d}.safetensors"

    def _listed(self) -> dict[str, dict[str, Any]]:
        """The finished files by number; none where the manifest is damaged: all are made again."""
        if not self._manifest.exists():
            return {}
        try:
            content = files.unsealed(self._manifest)
        except CheckpointError:
            return {}
        if content["about"] != json.loads(json.dumps(self.about)) or content["rows"] != self.rows:
            raise CheckpointError(
                f"{self._manifest}: is of other data, codec or text encoder; remove {self.path}, it"
                " is made again"
            )
        shards: dict[str, dict[str, Any]] = content["shards"]
        return shards


class Rows:
    """Rows of files of SHARD rows, by their numbers."""

    def __init__(self, shards: list[dict[str, Tensor]]):
        self.shards = shards

    def __call__(self, index: np.ndarray, crop: np.ndarray | None = None) -> dict[str, Tensor]:
        """Rows `index` (B,) of each tensor, on the CPU, in the order of `index`; of tensors
        (N, crops, ..) those of `crop` (B,)."""
        out = {
            name: first.new_empty(len(index), *first.shape[1 if crop is None else 2 :])
            for name, first in self.shards[0].items()
        }
        shard, row = np.divmod(index, SHARD)
        for number in np.unique(shard):
            here = torch.from_numpy(np.flatnonzero(shard == number))
            at: tuple[Tensor, ...] = (torch.from_numpy(row)[here],)
            if crop is not None:
                at = (*at, torch.from_numpy(crop)[here])
            for name, tensor in self.shards[number].items():
                out[name][here] = tensor[at]
        return out


def _mapped(path: Path) -> dict[str, Tensor]:
    with files.reading(path), safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def ahead(items: Iterator[T], count: int) -> Iterator[T]:
    """The same items, of which a thread makes the next `count`."""
    end: Any = object()
    with ThreadPoolExecutor(1, thread_name_prefix="ahead") as thread:
        waiting: deque[Future[T]] = deque(thread.submit(next, items, end) for _ in range(count))
        try:
            while (item := waiting.popleft().result()) is not end:
                waiting.append(thread.submit(next, items, end))
                yield item
        finally:
            thread.shutdown(cancel_futures=True)
