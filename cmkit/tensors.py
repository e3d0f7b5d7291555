"""Safetensors files, and loading tensors into a network. Nothing here unpickles."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from cmkit.errors import CheckpointError, NonFiniteError
from cmkit.files import reading, replace_file, require_regular, require_space

_PICKLES = {".bin", ".ckpt", ".joblib", ".pickle", ".pkl", ".pt", ".pth"}
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def save_weights(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Replace the safetensors file `path`, whole or not at all; errors as of `save_checkpoint`."""
    header, ordered, size = file_plan(path.name, tensors)
    require_space(path.parent, size)
    replace_file(path, serialized(header, ordered), size)


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
        raise CheckpointError(
            f"{source}: {len(wrong)} tensors do not fit: {first};"
            " choose the backbone and preset that these weights were made with"
        )
    for key, tensor in tensors.items():
        _require_finite(f"{source}: {key}", tensor, own[key].dtype)
    with torch.no_grad():
        for key, tensor in tensors.items():
            own[key].copy_(tensor)


FilePlan = tuple[bytes, list[Tensor], int]
"""Header of a safetensors file, its tensors in order, and the size of the whole."""


def file_plan(name: str, group: Mapping[str, Tensor]) -> FilePlan:
    """Layout of `<name>.safetensors`: widest types first, which keeps every tensor aligned."""
    ordered = sorted(group, key=lambda key: (-group[key].element_size(), key))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for key in ordered:
        tensor = group[key]
        if tensor.dtype not in _DTYPES or tensor.layout is not torch.strided:
            raise CheckpointError(
                f"{name}: {key} is {tensor.dtype}, {tensor.layout}, which cannot be saved;"
                f" convert it to one of {', '.join(_DTYPES.values())}"
            )
        _require_finite(f"{name}: {key}", tensor, tensor.dtype)
        start, end = end, end + tensor.nbytes
        header[key] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    prefix = len(text).to_bytes(8, "little") + text
    return prefix, [group[key] for key in ordered], len(prefix) + end


def serialized(header: bytes, group: list[Tensor]) -> Iterator[Any]:
    """Bytes of a safetensors file; one tensor at a time is brought to the CPU and made dense."""
    yield header
    for tensor in group:
        yield tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def same_shapes(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> bool:
    """Whether `load_weights` would take `tensors` for a network with the state dict `own`."""
    return tensors.keys() == own.keys() and all(_agree(own[k], tensors[k]) for k in own)


def _agree(own: Tensor | None, other: Tensor | None) -> bool:
    if own is None or other is None or own.shape != other.shape:
        return False
    if own.is_floating_point() and other.is_floating_point():
        return other.dtype in _DTYPES
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
    with reading(path):
        require_regular(path)
        with path.open("rb") as file:
            head = file.read(9)
        size = path.stat().st_size
        length = int.from_bytes(head[:8], "little")
        if len(head) == 9 and head[8:] == b"{" and length <= size - 8:
            return load_file(path)
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
    with reading(path):
        require_regular(path)
        with path.open("rb") as file:
            head = file.read(9)
    if len(head) == 9 and head[8:] == b"{":
        return False
    return head[:2] == b"PK" or head[:1] == b"\x80" or path.suffix.lower() in _PICKLES
