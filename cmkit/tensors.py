"""Safetensors files, and loading tensors into a network. Nothing here unpickles."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cmkit import files
from cmkit.errors import CheckpointError, NonFiniteError

_PICKLES = {".bin", ".ckpt", ".joblib", ".pickle", ".pkl", ".pt", ".pth"}
_TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Types of weights, by their name in a safetensors file."""


def save_weights(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, str] = {}) -> str:
    """SHA-256 of the safetensors file `path`, which is replaced, whole or not at all; `about` are
    texts beside the tensors.

    NonFiniteError names a tensor with NaN or infinity; ResourceError when the disk refuses.
    """
    size = require_savable(path.name, tensors)
    files.require_space(path.parent, size)
    with files.writing(path, size):
        with tempfile.TemporaryDirectory(prefix=files.TEMPORARY, dir=path.parent) as folder:
            whole = Path(folder) / path.name
            sha256 = write_tensors(whole, tensors, about)
            os.replace(whole, path)
        files.sync_folder(path.parent)
    return sha256


def load_weights(network: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Copy `tensors`, which come from `source`, into `network`: all of them, or none at all.

    Every key and shape must agree; floating types are converted to the network's own, other types
    must be the same. CheckpointError names the first three differences, NonFiniteError a tensor
    with NaN, infinity, or values too large for the network's type.
    """
    own = network.state_dict()
    wrong = [
        f"{key} is {_signature(tensors.get(key))}, the network wants {_signature(own.get(key))}"
        for key in [*own, *(key for key in tensors if key not in own)]
        if not _agree(own.get(key), tensors.get(key))
    ]
    if wrong:
        first = "; ".join([*wrong[:3], "..."] if len(wrong) > 3 else wrong)
        if tensors and not own.keys() & tensors.keys():
            first += f"; its own names begin {next(iter(tensors))}"
        raise CheckpointError(
            f"{source}: {len(wrong)} tensors do not fit: {first};"
            " choose the backbone and preset that these weights were made with"
        )
    for key, tensor in tensors.items():
        _require_finite(f"{source}: {key}", tensor, own[key].dtype)
    with torch.no_grad():
        for key, tensor in tensors.items():
            own[key].copy_(tensor)


def require_savable(name: str, group: Mapping[str, Tensor]) -> int:
    """About how many bytes the safetensors file `name` of a group of tensors will have.

    NonFiniteError names a tensor with NaN or infinity, CheckpointError one of another kind.
    """
    for key, tensor in group.items():
        if tensor.dtype not in _TYPES.values() or tensor.layout is not torch.strided:
            raise CheckpointError(
                f"{name}: {key} is {tensor.dtype}, {tensor.layout}, which cannot be saved;"
                f" convert it to one of {', '.join(_TYPES)}"
            )
        _require_finite(f"{name}: {key}", tensor, tensor.dtype)
    return sum(tensor.nbytes + len(key) + 100 for key, tensor in group.items())


def write_tensors(path: Path, group: Mapping[str, Tensor], about: Mapping[str, str] = {}) -> str:
    """SHA-256 of the new safetensors file `path`, which is fsynced; OSError where it cannot be."""
    dense: dict[str, Tensor] = {}
    storages = set()
    for name, tensor in group.items():
        own = tensor.detach().cpu().contiguous()
        at = own.untyped_storage().data_ptr()
        dense[name] = own.clone() if at in storages else own  # a file cannot share memory
        storages.add(at)
    path.touch(exist_ok=False)
    mode = path.stat().st_mode
    try:
        save_file(dense, path, {"format": "pt", **about})
    except SafetensorError as error:
        raise files.as_os_error(error) from error
    path.chmod(mode)  # safetensors makes its files readable for this user alone
    if about:
        _sort_metadata(path)
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sort_metadata(path: Path) -> None:
    """Sort the texts in a safetensors file's header, which its writer orders by chance."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False)
        file.seek(8)
        file.write(text.encode().ljust(size))


def same_shapes(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> bool:
    """Whether `load_weights` would take `tensors` for a network with the state dict `own`."""
    return tensors.keys() == own.keys() and all(_agree(own[k], tensors[k]) for k in own)


def _agree(own: Tensor | None, other: Tensor | None) -> bool:
    if own is None or other is None or own.shape != other.shape:
        return False
    if own.is_floating_point() and other.is_floating_point():
        return other.dtype in _TYPES.values()
    return own.dtype == other.dtype


def _signature(tensor: Tensor | None) -> str:
    if tensor is None:
        return "absent"
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def _require_finite(place: str, tensor: Tensor, dtype: torch.dtype) -> None:
    """Raise NonFiniteError unless every value of `tensor` is finite as `dtype`; copies nothing."""
    if not tensor.is_floating_point() or tensor.numel() == 0 or tensor.is_meta:
        return
    low, high = (bound.item() for bound in torch.aminmax(tensor.detach()))
    limit = torch.finfo(dtype).max
    if not (-limit <= low and high <= limit):  # NaN fails both
        raise NonFiniteError(
            f"{place} holds values from {low:g} to {high:g}, not finite as {dtype};"
            " go back to the last good checkpoint, lower the learning rate, or use float32"
        )


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU; CheckpointError for anything else."""
    _require_safetensors(path)
    with files.reading(path):
        return load_file(path)


def read_with_metadata(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file, and the texts beside them."""
    tensors = read_safetensors(path)
    with files.reading(path), safe_open(path, "pt") as file:
        return tensors, dict(file.metadata() or {})


def digest(tensors: Mapping[str, Tensor], about: Mapping[str, str] = {}) -> str:
    """SHA-256 of names, types, shapes and bytes of tensors on the CPU, and of texts beside them."""
    found = hashlib.sha256(json.dumps(dict(about), sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def safetensors_shapes(path: Path) -> dict[str, Tensor]:
    """What `read_safetensors` gives, on the meta device: only the file's head is read."""
    _require_safetensors(path)
    with files.reading(path), safe_open(path, "pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        return {
            name: torch.empty(one.get_shape(), dtype=_TYPES[one.get_dtype()], device="meta")
            for name, one in slices.items()
        }


def _require_safetensors(path: Path) -> None:
    """CheckpointError unless the file begins as safetensors do and holds its whole header."""
    with files.reading(path):
        files.require_regular(path)
        with path.open("rb") as file:
            head = file.read(9)
        size = path.stat().st_size
    length = int.from_bytes(head[:8], "little")
    if len(head) == 9 and head[8:] == b"{" and length <= size - 8:
        return
    if is_pickle(path):
        raise CheckpointError(
            f"{path}: a pickle, which can run code, and is not read without conversion;"
            " turn it into .safetensors with `cmkit convert`"
        )
    raise CheckpointError(
        f"{path}: not a whole safetensors file ({size} bytes, its header claims {length});"
        " fetch or save it again"
    )


def is_pickle(path: Path) -> bool:
    """Whether a file would have to be unpickled: by its first bytes, or else by its name."""
    with files.reading(path):
        files.require_regular(path)
        with path.open("rb") as file:
            head = file.read(9)
    if len(head) == 9 and head[8:] == b"{":
        return False
    return head[:2] == b"PK" or head[:1] == b"\x80" or path.suffix.lower() in _PICKLES
