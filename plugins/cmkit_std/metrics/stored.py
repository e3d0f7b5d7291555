"""Features of references on disk: `$XDG_CACHE_HOME/cmkit/features/<hash>.safetensors`.

A file's name is the hash of all that decides its content: the reference's fingerprint, the
extractor and its weights, the kind of device, the layer, and the stream. The files take at most
MAX_BYTES; the least recently used are removed first. The folder only saves time and may be deleted
at any time: a damaged file is made again, and one that cannot be written is skipped.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from cmkit import CheckpointError, ResourceError
from cmkit.checkpoint import read_weights
from cmkit.files import cache_folder, fresh_cache
from cmkit.tensors import save_weights

FORMAT = 1
MAX_BYTES = 4 * 2**30
DIGEST = "sha256"


def _file(name: str) -> Path:
    return cache_folder("features") / f"{name}.safetensors"


def name(
    fingerprint: str, extractor: str, sha256: str | None, device: torch.device, *want: str
) -> str:
    """The name of the file that holds `want` (layer, stream) of a reference."""
    network = [extractor, sha256, version("torch-fidelity"), device.type]
    text = json.dumps([FORMAT, fingerprint, *network, *want])
    return hashlib.sha256(text.encode()).hexdigest()


def load(name: str) -> dict[str, Tensor] | None:
    """The tensors that `save` stored, or None when they are missing or damaged."""
    try:
        tensors = read_weights(_file(name))
    except (CheckpointError, ResourceError):
        return None
    digest = tensors.pop(DIGEST, None)
    if digest is None or digest.tolist() != list(_digest(name, tensors)):
        return None
    with contextlib.suppress(OSError):  # another's folder: its files stay as old as they are
        os.utime(_file(name))
    return tensors


def save(name: str, tensors: Mapping[str, Tensor]) -> None:
    """Store `tensors`, whole or not at all, and remove the least recently used files."""
    digest = torch.tensor(list(_digest(name, tensors)), dtype=torch.uint8)
    # a full or read-only disk costs the next process time, not this one its numbers
    with contextlib.suppress(OSError, ResourceError):
        fresh_cache(_file(name).parent)
        save_weights(_file(name), {**tensors, DIGEST: digest})
        _prune(_file(name).parent)


def _digest(name: str, tensors: Mapping[str, Tensor]) -> bytes:
    sha = hashlib.sha256(name.encode())
    for key, tensor in sorted(tensors.items()):
        sha.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
        sha.update(tensor.contiguous().numpy().data)
    return sha.digest()


def _prune(folder: Path) -> None:
    files = sorted(folder.iterdir(), key=lambda file: file.stat().st_mtime_ns, reverse=True)
    total = 0
    for index, file in enumerate(files):
        total += file.stat().st_size
        if index and total > MAX_BYTES:
            file.unlink(missing_ok=True)
