"""Pickles of other projects become safetensors, in a child process that cannot hurt this one.

Of a pickle only plain containers, numbers and dense tensors are taken. Whatever else it names
becomes an inert record: nothing is imported, called or built because a file says so. The child
has limits on memory and time, because hostile bytes can crash or exhaust any reader.
"""

from __future__ import annotations

import collections
import io
import os
import pickle
import resource
import subprocess
import sys
import types
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cmkit.errors import CheckpointError, CmkitError, ResourceError
from cmkit.tensors import save_weights

MAX_BYTES = 64 << 30
ENTRIES = ("ema", "model_ema", "state_dict", "model", "net")
"""Which part of a training checkpoint is the weights to sample from, the best first."""
_LEGACY = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)
"""How torch.save began its files before they were zip archives."""
_MARGIN = 768 << 20
_BYTES_PER_SECOND = 20 << 20


def pickle_to_safetensors(source: Path, target: Path) -> str:
    """Write the tensors of the pickle `source` (.pt, .pth, .pkl) to the safetensors file `target`;
    a note of what was passed over, "" where nothing was.

    Names are those of the state dict, or of the modules where whole modules were pickled; of a
    training checkpoint the first of `ENTRIES` that has names is taken. CheckpointError for anything
    but a pickle of dense tensors, ResourceError when disk or memory do not suffice.
    """
    size = source.stat().st_size
    if size > MAX_BYTES:
        raise CheckpointError(f"{source}: {size} bytes are more than {MAX_BYTES}; is it weights?")
    seconds = 60 + size // _BYTES_PER_SECOND
    reader = [sys.executable, "-P", "-m", "cmkit.weights.pickles"]
    command = [*reader, str(source), str(target), str(seconds)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    try:
        child = subprocess.run(command, capture_output=True, env=environment, timeout=2 * seconds)
    except subprocess.TimeoutExpired as error:
        raise CheckpointError(
            f"{source}: not read within {2 * seconds} s; damaged or hostile, fetch it again"
        ) from error
    told = child.stdout.decode(errors="replace").strip().splitlines()
    if child.returncode == 0:
        return told[-1] if told else ""
    for kind in (CheckpointError, ResourceError):
        if told and child.returncode == kind.exit_code:
            raise kind(told[-1])
    raise CheckpointError(
        f"{source}: its reader ended with code {child.returncode} (memory, time or a crash);"
        " damaged or hostile, fetch it again from its author"
    )


def main(source: str, target: str, seconds: str) -> int:
    """The child: exit code 0, or that of the error whose line it prints."""
    path = Path(source)
    try:
        _limit(path.stat().st_size, int(seconds))
        tensors, note = _weights(_load(path), path)
        save_weights(Path(target), dict(_checked(tensors, path)))
        print(note)
    except CmkitError as error:
        print(error)
        return error.exit_code
    except MemoryError:
        print(f"{path}: asks for far more memory than its size; damaged or hostile")
        return CheckpointError.exit_code
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        print(f"{path}: no readable pickle ({type(error).__name__}: {reason}); fetch it again")
        return CheckpointError.exit_code
    return 0


def _limit(size: int, seconds: int) -> None:
    """Bound what this process may still allocate (on Linux: others know no such limit), and how
    long it may compute."""
    status = Path("/proc/self/status")
    for line in status.read_text().splitlines() if status.exists() else ():
        if line.startswith("VmData:"):
            most = (int(line.split()[1]) << 10) + 3 * size + _MARGIN
            resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _load(path: Path) -> Any:
    """The unpickled content, with inert records for whatever is no container or tensor."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
        if any(member.compress_type != zipfile.ZIP_STORED for member in members):
            raise CheckpointError(f"{path}: its members are compressed, torch.save's are not")
        if sum(member.file_size for member in members) > path.stat().st_size:
            raise CheckpointError(f"{path}: its members overlap; damaged or hostile")
        return torch.load(path, "cpu", _INERT, weights_only=False, mmap=True)
    with path.open("rb") as file:
        legacy = file.read(len(_LEGACY)) == _LEGACY
        file.seek(0)
        if legacy:
            return torch.load(file, "cpu", _INERT, weights_only=False)
        return _Unpickler(file).load()


class _Record:
    """What stands for an object of a class that is not imported: its arguments and its state."""

    def __init__(self, *args: Any, **_: Any):
        self.args, self.state = args, None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, *_: Any) -> None:
        """Items of a dict's or list's subclass are not weights."""

    append = extend = __setitem__

    def __call__(self, *args: Any, **_: Any) -> _Record:
        return _Record(*args)

    def __hash__(self) -> int:
        return id(self)


def _storage(data: bytes) -> Any:
    """torch.storage._load_from_bytes, without its pickle: a storage within a plain pickle."""
    return torch.load(io.BytesIO(data), "cpu", _INERT, weights_only=False)


_ALLOWED = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
    ("torch.storage", "_load_from_bytes"): _storage,
    ("torch.storage", "UntypedStorage"): torch.UntypedStorage,
    ("torch", "Size"): torch.Size,
    ("dnnlib.util", "EasyDict"): dict,  # what NVIDIA's projects keep a checkpoint in
    ("torch", "device"): torch.device,
}
_TYPES = (
    "Float", "Double", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool",
)  # fmt: skip
_ALLOWED |= {("torch", f"{name}Storage"): getattr(torch, f"{name}Storage") for name in _TYPES}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        return _ALLOWED.get((module, name), _Record)


_INERT: Any = types.ModuleType("inert")
"""What torch.load takes for the pickle module."""
_INERT.Unpickler = _Unpickler
_INERT.UnpicklingError = pickle.UnpicklingError
_INERT.load = lambda file, **options: _Unpickler(file, **options).load()


def _weights(content: Any, path: Path) -> tuple[dict[str, Tensor], str]:
    """The state dict within what was unpickled, and a note of entries without one."""
    if isinstance(content, Mapping):
        passed: list[str] = []
        for entry in ENTRIES:
            if not isinstance(content.get(entry), Mapping | _Record | list | tuple):
                continue
            try:
                tensors, note = _weights(content[entry], path)
            except CheckpointError:
                passed.append(repr(entry))
                continue
            if passed:
                note = f"{', '.join(passed)} in it has no names of tensors; {entry!r} is taken"
            return tensors, note
        found = {key: value for key, value in content.items() if isinstance(value, Tensor)}
        if found and all(isinstance(key, str) for key in found):
            return found, ""
    elif found := dict(_of_module(content, "")):
        return found, ""
    raise CheckpointError(f"{path}: holds no state dict (a mapping of names to tensors)")


def _of_module(record: Any, prefix: str) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers of a pickled module, which is known by what nn.Module pickles."""
    if not isinstance(record, _Record):
        return
    state = record.state
    if state is None and record.args and isinstance(record.args[0], Mapping):
        state = record.args[0].get("state")
    if not isinstance(state, Mapping):
        return
    for kind in ("_parameters", "_buffers"):
        for name, value in (state.get(kind) or {}).items():
            if isinstance(value, Tensor):
                yield f"{prefix}{name}", value
    for name, module in (state.get("_modules") or {}).items():
        yield from _of_module(module, f"{prefix}{name}.")


def _checked(tensors: Mapping[str, Tensor], path: Path) -> Iterator[tuple[str, Tensor]]:
    """The tensors, if they are dense and no larger than what their file can hold."""
    total, size = 0, path.stat().st_size
    for name, tensor in tensors.items():
        dense = tensor.layout is torch.strided and not tensor.is_quantized
        if not dense or tensor.is_complex():
            raise CheckpointError(f"{path}: {name} is {tensor.dtype}, {tensor.layout}; not weights")
        end = tensor.storage_offset() + sum(
            (n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True)
        )
        held = tensor.untyped_storage().nbytes()
        if tensor.numel() and not 0 <= end * tensor.element_size() < held:
            raise CheckpointError(f"{path}: {name} reaches beyond its storage; damaged or hostile")
        total += tensor.nbytes
        if total > 2 * size:
            raise CheckpointError(
                f"{path}: {name} and those before it are larger than the file; damaged or hostile"
            )
        yield name, tensor


if __name__ == "__main__":
    code = main(*sys.argv[1:])
    sys.stdout.flush()
    os._exit(code)  # damaged tensors are not even destroyed
