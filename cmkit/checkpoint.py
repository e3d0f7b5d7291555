"""Checkpoints: the only module that reads or writes weights and run files.

A checkpoint is a folder of safetensors and JSON. Order of a save, each step for its crash:
stage in a hidden folder, fsync every file, manifest last, fsync the folder, rename, fsync the
parent, and only then prune. Nothing here unpickles, and no name found in a file is ever imported.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from cmkit.errors import BusyError, CheckpointError, NonFiniteError, ResourceError

MANIFEST = "SHA256SUMS"
STATE = "state.json"
TEMPORARY = ".tmp-cmkit-"

_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"
_MANIFEST = re.compile(rf"(?:[0-9a-f]{{64}}  {_NAME}\n)+")
_STEP = re.compile(r"step-(\d{8,})")
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
_BLOCK = 1 << 22


def atomic_write(path: Path, data: bytes | str) -> None:
    """Replace the file `path` by `data`, whole or not at all; ResourceError when it cannot."""
    data = data.encode() if isinstance(data, str) else data
    _replace(path, [data], len(data))


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A hidden folder to fill, which becomes `path` when the block ends well; errors as of
    `atomic_write`."""
    stage = path.with_name(f"{TEMPORARY}{path.name}")
    shutil.rmtree(stage, ignore_errors=True)  # of an attempt that was killed
    with _writing(path):
        stage.mkdir(parents=True)
        try:
            yield stage
            os.replace(stage, path)
        except BaseException:
            shutil.rmtree(stage, ignore_errors=True)
            raise


def save_weights(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Replace the safetensors file `path`, whole or not at all; errors as of `save_checkpoint`."""
    header, ordered, size = _plan(path.name, tensors)
    _require_space(path.parent, size)
    _replace(path, _serialized(header, ordered), size)


def _replace(path: Path, chunks: Iterable[Any], size: int) -> None:
    temporary = path.with_name(TEMPORARY + secrets.token_hex(8))
    with _writing(path, size):
        try:
            _write(temporary, chunks)
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
        _sync_folder(path.parent)


def save_checkpoint(
    root: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    keep: int = 2,
) -> Path:
    """The folder `root/step-<step>`, durable once this returns; only then are older ones pruned.

    Each entry of `tensors` becomes `<name>.safetensors`, and `state` goes to `state.json`. A step
    that is already there intact is not written again. Call it while holding `lock`.

    NonFiniteError names a tensor with NaN or infinity; ResourceError when the disk will not do.
    """
    if step < 0 or keep < 1:
        raise ValueError(f"step {step} must be at least 0, and keep {keep} at least 1")
    for name in tensors:
        if not re.fullmatch(_NAME, name):
            raise ValueError(f"{name!r} is no file name; use letters, digits, '.', '_' and '-'")
    final = root / f"step-{step:08d}"
    files = {f"{name}.safetensors": _plan(name, group) for name, group in tensors.items()}
    text = _json({"step": step, "state": dict(state)}, final / STATE)
    with _writing(root):
        _make_folder(root)
        sweep(root)
    if final.is_symlink() or not _intact(final):
        needed = len(text) + sum(size for _, _, size in files.values()) + 4096 * (len(files) + 3)
        _require_space(root, needed)
        with _writing(final, needed):
            _stage_and_publish(final, files, text)
    with _writing(root):
        _sync_folder(root)
        _prune(root, final, keep)
    return final


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose every byte agreed with its manifest when it was opened."""

    path: Path
    step: int
    state: Mapping[str, Any]

    @property
    def names(self) -> tuple[str, ...]:
        """What `tensors` can be asked for."""
        return tuple(sorted(file.stem for file in self.path.glob("[!.]*.safetensors")))

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors saved as `name`, on the CPU."""
        if name not in self.names:
            raise CheckpointError(f"{self.path}: holds no '{name}', only {', '.join(self.names)}")
        return _read_safetensors(self.path / f"{name}.safetensors")


def latest_checkpoint(root: Path, warn: Callable[[str], None]) -> Checkpoint | None:
    """The newest intact checkpoint below `root`, None when there is none at all.

    Damaged ones are skipped and told to `warn`; CheckpointError when all are damaged. Call it
    while holding `lock`, for it removes what dead attempts to save have left.
    """
    with contextlib.suppress(OSError):
        sweep(root)
    return _newest(root, warn)


def verify(folder: Path) -> None:
    """Raise CheckpointError, naming the file, unless every byte agrees with SHA256SUMS."""
    manifest = folder / MANIFEST
    with _reading(manifest):
        _require_regular(manifest)
        text = manifest.read_bytes().decode(errors="replace")
    if not _MANIFEST.fullmatch(text):
        raise CheckpointError(f"{manifest}: damaged; delete {folder} or restore it from a copy")
    digests = {line[66:]: line[:64] for line in text.splitlines()}
    with _reading(folder):
        present = {name for name in os.listdir(folder) if not name.startswith(".")} - {MANIFEST}
    for name in sorted(present ^ digests.keys()):
        what = "not listed in" if name in present else "missing, but listed in"
        raise CheckpointError(f"{folder / name}: {what} {MANIFEST}; delete {folder}")
    for name, digest in digests.items():
        if _digest(folder / name) != digest:
            raise CheckpointError(
                f"{folder / name}: damaged, its SHA-256 is not that of {MANIFEST};"
                f" delete {folder} or restore it from a copy"
            )
    with _reading(folder):
        _remember(folder)


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


def read_weights(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file, or of a checkpoint folder: its slowest EMA, else "online".

    A run folder stands for its `model.safetensors`, or else for its newest checkpoint. Unlike
    `latest_checkpoint` this only reads, so a run may go on meanwhile. CheckpointError for what is
    damaged, and for any pickle.
    """
    path = path / "model.safetensors" if (path / "model.safetensors").exists() else path
    if not path.is_dir():
        return _read_safetensors(path)
    root = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    with _reading(path):
        steps = [] if (path / MANIFEST).exists() else _steps(root)
    checkpoint = _open(steps[0][1] if steps else path)
    emas = [name for name in checkpoint.names if re.fullmatch(r"ema-[\d.]+", name)]
    return checkpoint.tensors(max(emas, key=lambda name: float(name[4:]), default="online"))


_held: set[int] = set()


def _release_inherited() -> None:
    """A forked child must not keep its dead parent's lock alive; close() leaves the parent's."""
    while _held:
        os.close(_held.pop())


os.register_at_fork(after_in_child=_release_inherited)


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Hold `folder` against other processes; the system lets go of it when this one dies.

    BusyError at once, naming the holder, when it is held. Temporaries of the dead are removed.
    """
    path = folder / ".lock"
    with _writing(path):
        _make_folder(folder)
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    _held.add(handle)
    try:
        with _writing(path):
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = os.pread(handle, 4096, 0).decode(errors="replace").strip()
                raise BusyError(
                    f"{folder}: in use by {holder or 'another process'};"
                    " wait for it, stop it, or choose another folder"
                ) from None
            start = time.strftime("%Y-%m-%d %H:%M:%S%z")
            os.ftruncate(handle, 0)
            holder = f"pid {os.getpid()} on {socket.gethostname()} since {start}"
            os.pwrite(handle, holder.encode(), 0)
            sweep(folder)
        yield
    finally:
        if handle in _held:
            _held.remove(handle)
            os.close(handle)


def append_jsonl(path: Path, record: Mapping[str, Any], durable: bool = False) -> None:
    """Add one line to the log `path` in a single write.

    `durable` fsyncs the whole log: do so with the last record before a save.
    """
    line = _json(record, path) + b"\n"
    with _writing(path, len(line)):
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        handle = os.open(path, flags, 0o666)
        try:
            size = os.fstat(handle).st_size
            if os.write(handle, line) < len(line):
                os.ftruncate(handle, size)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if durable:
                os.fsync(handle)
        finally:
            os.close(handle)
        if durable:
            _sync_folder(path.parent)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The records of the log `path`, without torn lines; none when there is no such file."""
    return [record for _, record in _lines(path)]


def truncate_jsonl(path: Path, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Drop torn lines of the log `path`, and records that do not satisfy `keep`."""
    kept = b"".join(line + b"\n" for line, record in _lines(path) if keep(record))
    if path.exists() and path.read_bytes() != kept:
        atomic_write(path, kept)


def _lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """(line, record) of each whole line of the log `path`."""
    with _writing(path):
        lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    for line in lines:
        with contextlib.suppress(ValueError, RecursionError):
            record = json.loads(line)
            if isinstance(record, dict):
                yield line, record


def sweep(folder: Path) -> None:
    """Remove what dead attempts to write have left in `folder`; only the holder of `lock` may."""
    with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith(TEMPORARY):
                _remove(Path(entry.path))


def _stage_and_publish(final: Path, files: Mapping[str, _Plan], text: bytes) -> None:
    stage = final.with_name(TEMPORARY + final.name)
    try:
        stage.mkdir()
        _stage(stage, files, text)
        if os.path.lexists(final):
            os.rename(final, final.with_name(f"{TEMPORARY}damaged-{final.name}"))
        os.rename(stage, final)
    except BaseException:
        shutil.rmtree(stage, ignore_errors=True)
        raise
    _remember(final)


def _stage(stage: Path, files: Mapping[str, _Plan], text: bytes) -> None:
    """Write a whole checkpoint to `stage`, manifest last, every byte of it fsynced."""
    digests = {}
    for name, (header, group, _) in files.items():
        digests[name] = _write(stage / name, _serialized(header, group))
    digests[STATE] = _write(stage / STATE, [text])
    lines = (f"{digest}  {name}\n" for name, digest in sorted(digests.items()))
    _write(stage / MANIFEST, ["".join(lines).encode()])
    _sync_folder(stage)


def _prune(root: Path, newest: Path, keep: int) -> None:
    """Delete what is older than the `keep` newest intact checkpoints, of which `newest` is one.

    A folder loses its name before its first file, so that a half-deleted one never looks valid.
    """
    kept = 0
    for _, folder in _steps(root):
        if kept >= keep and folder != newest:
            os.rename(folder, folder.with_name(f"{TEMPORARY}pruned-{folder.name}"))
        elif folder == newest or _intact(folder):
            kept += 1
    sweep(root)


_verified: dict[Path, tuple[Any, ...]] = {}


def _fingerprint(folder: Path) -> tuple[Any, ...]:
    entries = sorted(
        (entry.name, entry.stat(follow_symlinks=False)) for entry in os.scandir(folder)
    )
    return tuple((name, at.st_ino, at.st_size, at.st_mtime_ns) for name, at in entries)


def _remember(folder: Path) -> None:
    """Note that `folder` is intact, so that pruning need not hash it until a file changes."""
    _verified[folder.absolute()] = _fingerprint(folder)


def _intact(folder: Path) -> bool:
    with contextlib.suppress(OSError, CheckpointError, ResourceError):
        if _verified.get(folder.absolute()) != _fingerprint(folder):
            verify(folder)
        return True
    return False


def _newest(root: Path, warn: Callable[[str], None]) -> Checkpoint | None:
    damage: list[CheckpointError] = []
    with _reading(root):
        steps = _steps(root)
    for _, folder in steps:
        try:
            found = _open(folder)
        except CheckpointError as error:
            damage.append(error)
            continue
        for fault in damage:
            warn(f"{fault}; going on from step {found.step}")
        return found
    if damage:
        raise CheckpointError(f"{damage[0]} (no intact checkpoint in {root})") from damage[0]
    return None


def _open(folder: Path) -> Checkpoint:
    verify(folder)
    with _reading(folder / STATE):
        record = json.loads((folder / STATE).read_bytes())
        step, state, name = record["step"], dict(record["state"]), f"step-{record['step']:08d}"
    if _STEP.fullmatch(folder.name) and folder.name != name:
        raise CheckpointError(f"{folder}: holds step {step}; rename it to {name}")
    return Checkpoint(folder, step, state)


def _steps(root: Path) -> list[tuple[int, Path]]:
    """(step, folder) of each checkpoint below `root`, newest first; links are not followed."""
    found = []
    with contextlib.suppress(FileNotFoundError), os.scandir(root) as entries:
        for entry in entries:
            match = _STEP.fullmatch(entry.name)
            if match and entry.is_dir(follow_symlinks=False):
                found.append((int(match[1]), root / entry.name))
    return sorted(found, reverse=True)


_Plan = tuple[bytes, list[Tensor], int]
"""Header of a safetensors file, its tensors in order, and the size of the whole."""


def _plan(name: str, group: Mapping[str, Tensor]) -> _Plan:
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


def _serialized(header: bytes, group: list[Tensor]) -> Iterator[Any]:
    """Bytes of a safetensors file; one tensor at a time is brought to the CPU and made dense."""
    yield header
    for tensor in group:
        yield tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def _write(path: Path, chunks: Iterable[Any]) -> str:
    """SHA-256 of the new file `path`, hashed while it is written; the file is fsynced."""
    sha = hashlib.sha256()
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
    with os.fdopen(os.open(path, flags, 0o666), "wb") as file:
        for chunk in chunks:
            sha.update(chunk)
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
    return sha.hexdigest()


def _digest(path: Path) -> str:
    with _reading(path):
        _require_regular(path)
        with path.open("rb", buffering=0) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems cannot
            raise
    finally:
        os.close(handle)


def _make_folder(folder: Path) -> None:
    """Make `folder` and its parents, each durable in its own parent."""
    if folder.is_dir():
        return
    _make_folder(folder.absolute().parent)
    folder.mkdir(exist_ok=True)
    _sync_folder(folder.absolute().parent)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _json(record: Mapping[str, Any], path: Path) -> bytes:
    try:
        return json.dumps(record, allow_nan=False).encode()
    except ValueError as error:
        raise NonFiniteError(f"{path}: {error}; a number is NaN or infinite") from error


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


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    with _reading(path):
        _require_regular(path)
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
    with _reading(path):
        _require_regular(path)
        with path.open("rb") as file:
            head = file.read(9)
    if len(head) == 9 and head[8:] == b"{":
        return False
    return head[:2] == b"PK" or head[:1] == b"\x80" or path.suffix.lower() in _PICKLES


def cache_folder(name: str) -> Path:
    """The folder `name` of what the user's cache keeps of cmkit; it need not be there."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "cmkit" / name


def _require_regular(path: Path) -> None:
    """A device or a FIFO would be read for ever."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise CheckpointError(f"{path}: not a regular file")


def _require_space(folder: Path, needed: int) -> None:
    with _writing(folder, needed):
        if shutil.disk_usage(folder).free < needed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


_CURES = {
    errno.ENOSPC: "free some space or choose another folder",
    errno.EDQUOT: "free some of your quota or choose another folder",
    errno.EFBIG: "raise the limit on file sizes (ulimit -f)",
    errno.EIO: "the disk or its connection fails: see dmesg, and choose another folder",
    errno.EROFS: "mount it read-write or choose another folder",
    errno.EACCES: "give this user permission or choose another folder",
    errno.EPERM: "give this user permission or choose another folder",
}


def _resource_error(error: OSError, path: Path, needed: int) -> ResourceError:
    room = ""
    if needed and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        with contextlib.suppress(OSError):
            free = shutil.disk_usage(path.absolute().parent).free
            room = f" ({needed} bytes needed, {free} free)"
    cure = _CURES.get(error.errno or 0, "check the path, or choose another folder")
    return ResourceError(f"{path}: {error.strerror or error}{room}; {cure}")


@contextlib.contextmanager
def _writing(path: Path, needed: int = 0) -> Iterator[None]:
    """Inside, an OSError becomes a ResourceError."""
    try:
        yield
    except OSError as error:
        raise _resource_error(error, path, needed) from error


_DAMAGE = {errno.EIO, errno.EISDIR, errno.ELOOP, errno.ENODEV, errno.ENOENT, errno.ENOTDIR}


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Inside, faults of a file become CheckpointError, and those of the machine ResourceError.

    safetensors reports an errno as text.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        fault = error
        if number and not getattr(error, "errno", None):
            fault = OSError(int(number[1]), os.strerror(int(number[1])))
        if isinstance(fault, OSError) and fault.errno not in _DAMAGE:
            raise _resource_error(fault, path, 0) from error
        reason = fault.strerror if isinstance(fault, OSError) else str(fault)
        raise CheckpointError(f"{path}: {reason}; fetch or save it again") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path}: damaged ({error}); fetch or save it again") from error
