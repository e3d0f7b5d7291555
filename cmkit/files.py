"""Files written whole or not at all and read with care, locks, logs of JSON lines, digests, and the
cure for each errno."""

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
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError

from cmkit.errors import (
    BusyError,
    CheckpointError,
    CmkitError,
    NonFiniteError,
    ResourceError,
)

TEMPORARY = ".tmp-cmkit-"
"""How names of unfinished files begin; `sweep` removes them."""
ABANDONED = 86_400.0
"""Seconds after which a temporary in the user's cache is that of a killed process."""
MAX_TEXT = 256 * 2**20
"""Bytes of the largest text of a run that is read."""
OFFLINE: ContextVar[bool] = ContextVar("OFFLINE", default=False)
"""Whether no part may ask the network, as while --smoke shrinks a recipe."""


def atomic_write(path: Path, data: bytes | str) -> None:
    """Replace the file `path` by `data`, whole or not at all; ResourceError when it cannot."""
    data = data.encode() if isinstance(data, str) else data
    temporary = path.with_name(TEMPORARY + secrets.token_hex(8))
    with writing(path, len(data)):
        try:
            write_file(temporary, data)
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
        sync_folder(path.parent)


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[IO[bytes]]:
    """A file to fill, which becomes `path` when the block ends without an error."""
    temporary = path.with_name(TEMPORARY + secrets.token_hex(8))
    with writing(path):
        try:
            with temporary.open("xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A hidden folder to fill, which becomes `path` when the block ends without an error."""
    stage = path.with_name(f"{TEMPORARY}{path.name}")
    shutil.rmtree(stage, ignore_errors=True)  # of an attempt that was killed
    with writing(path):
        stage.mkdir(parents=True)
        try:
            yield stage
            os.replace(stage, path)
        except BaseException:
            shutil.rmtree(stage, ignore_errors=True)
            raise


_held: dict[int, tuple[Path, int]] = {}
"""The folders that this process locks, and their inodes, by the handles of their locks."""


def _release_inherited() -> None:
    """Close a fork's copies of the locks, so that they end with the process that took them."""
    while _held:
        os.close(_held.popitem()[0])


os.register_at_fork(after_in_child=_release_inherited)


INHERITED = "CMKIT_LOCK"
"""Variable of the environment: the handle of a lock that a process took for the one it began."""


def _inherited(path: Path) -> int | None:
    """The handle of the lock `path` that this process was begun with, if any."""
    said = os.environ.get(INHERITED, "")
    if not said.isdecimal():
        return None
    try:
        same = os.path.samestat(os.fstat(int(said)), path.stat())
    except OSError:
        return None
    if not same:
        return None
    del os.environ[INHERITED]
    os.set_inheritable(int(said), False)
    return int(said)


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[int]:
    """Hold `folder` against other processes; the lock ends with this process.

    Inside, the handle of the lock, which a process that inherits it by `INHERITED` holds on.
    BusyError at once, naming the holder, when it is held. Temporaries of killed runs are removed.
    """
    path = folder / ".lock"
    with writing(folder):
        make_folder(folder)
    with writing(path):
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        handle = _inherited(path) or os.open(path, flags, 0o666)
    held = _held[handle] = (folder.absolute(), folder.stat().st_ino)
    try:
        with writing(path):
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
            for place in (folder, *filter(_is_folder, folder.iterdir())):
                sweep(place)
        yield handle
    except (OSError, CmkitError) as error:
        if _is_gone(*held):
            raise ResourceError(
                f"{folder}: is gone, it was renamed or removed while it was written to; put it"
                " back, and run the same command again"
            ) from error
        raise
    finally:
        if _held.pop(handle, None):
            os.close(handle)


def _is_gone(folder: Path, inode: int) -> bool:
    """Whether a folder that had `inode` is no longer under its name."""
    try:
        return folder.stat().st_ino != inode
    except OSError:
        return True


def jsonl_line(record: Mapping[str, Any], path: Path) -> bytes:
    """One line of the log `path`, with its CRC-32."""
    body = to_json(record, path)
    return body[:-1] + b', "crc": "%08x"}\n' % zlib.crc32(body)


def append_jsonl(path: Path, record: Mapping[str, Any], durable: bool = False) -> None:
    """Add one line with its CRC-32 to the log `path` in a single write.

    `durable` fsyncs the whole log: do so with the last record before a save.
    """
    line = jsonl_line(record, path)
    with writing(path, len(line)):
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
            sync_folder(path.parent)


def read_jsonl(path: Path, checked: bool = False) -> list[dict[str, Any]]:
    """The records of the log `path`, without damaged lines; none when there is no such file.

    A line without a CRC is one of an earlier cmkit, which is damage where all are `checked`.
    """
    return [record for _, record in _lines(path, checked)]


def truncate_jsonl(
    path: Path, keep: Callable[[dict[str, Any]], bool], checked: bool = False
) -> None:
    """Drop damaged lines of the log `path`, and records that do not satisfy `keep`."""
    kept = b"".join(line + b"\n" for line, record in _lines(path, checked) if keep(record))
    if path.exists() and read_bytes(path) != kept:
        atomic_write(path, kept)


def damaged_lines(path: Path, checked: bool = False) -> int:
    """How many lines of the log `path` are damaged; none when there is no such file."""
    every = read_bytes(path).splitlines() if path.exists() else []
    return len(every) - len(list(_lines(path, checked)))


def _lines(path: Path, checked: bool) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """(line, record) of each whole line of the log `path`."""
    lines = read_bytes(path).split(b"\n")[:-1] if path.exists() else []
    for line in lines:
        with contextlib.suppress(ValueError, RecursionError):
            record = json.loads(line)
            if isinstance(record, dict) and _agrees(line, record.pop("crc", None), checked):
                yield line, record


def _agrees(line: bytes, crc: object, checked: bool) -> bool:
    body, mark, _ = line.rpartition(b', "crc": ')
    if not mark:
        return crc is None and not checked
    return crc == f"{zlib.crc32(body + b'}'):08x}"


def read_bytes(path: Path, limit: int = MAX_TEXT) -> bytes:
    """The regular file `path` of at most `limit` bytes; CheckpointError where it is none."""
    with reading(path):
        require_regular(path)
        if (size := path.stat().st_size) > limit:
            raise CheckpointError(f"{path}: {size} bytes, of which {limit} are read; not cmkit's")
        return path.read_bytes()


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in the file `path`; CheckpointError where there is none."""
    with reading(path):
        found = json.loads(read_bytes(path))
        if not isinstance(found, dict):
            raise ValueError("not a JSON object")
    return found


def sealed(content: Mapping[str, Any]) -> str:
    """A JSON text of `content` with its own digest, for `unsealed`."""
    body = json.dumps(content, indent=1, allow_nan=False)
    return json.dumps({**content, "sha256": _digest(json.loads(body))}, indent=1) + "\n"


def unsealed(path: Path) -> dict[str, Any]:
    """The content of a file that `sealed` wrote; CheckpointError where it was changed since."""
    content = read_json(path)
    if content.pop("sha256", None) != _digest(content):
        raise CheckpointError(f"{path}: damaged, its digest is not that of its content")
    return content


def _digest(content: Mapping[str, Any]) -> str:
    return digest_of(json.dumps(content, sort_keys=True))


def digest_of(text: str) -> str:
    """SHA-256 of a text, in hexadecimal digits."""
    return hashlib.sha256(text.encode()).hexdigest()


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def sweep(folder: Path, seconds: float = 0) -> None:
    """Remove temporaries of killed processes from `folder`, those at least so old; only the holder
    of `lock` may without an age."""
    before = time.time() - seconds
    with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            if not entry.name.startswith(TEMPORARY):
                continue
            if not seconds or entry.stat(follow_symlinks=False).st_mtime < before:
                if entry.is_dir(follow_symlinks=False):
                    shutil.rmtree(entry.path)
                else:
                    Path(entry.path).unlink(missing_ok=True)


def write_file(path: Path, data: bytes) -> str:
    """SHA-256 of the new file `path` with `data`, which is fsynced."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
    with os.fdopen(os.open(path, flags, 0o666), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return hashlib.sha256(data).hexdigest()


def sha256_of(path: Path) -> str:
    with reading(path):
        require_regular(path)
        with path.open("rb", buffering=0) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


def cached_sha256(path: Path, known: str | None = None) -> str:
    """The file's SHA-256, kept by its path, inode, size and time, so that it is computed once, or
    not where it is `known`."""
    with reading(path):
        at = path.stat()
    identity = f"{path.resolve()} {at.st_ino} {at.st_size} {at.st_mtime_ns}"
    return cached_digest(identity, lambda: known or sha256_of(path))


def cached_digest(identity: str, compute: Callable[[], str]) -> str:
    """What `compute` returned when it was first asked for `identity`, kept in the user's cache."""
    record = cache_folder("digests") / digest_of(identity)
    if record.is_file() and len(known := read_bytes(record, 64).decode("ascii", "replace")) == 64:
        return known
    digest = compute()
    fresh_cache(record.parent)
    atomic_write(record, digest)
    return digest


def fresh_cache(folder: Path) -> None:
    """Make a folder of the user's cache, and sweep it: many processes write to it, none for
    long."""
    folder.mkdir(parents=True, exist_ok=True)
    sweep(folder, ABANDONED)


def sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems cannot
            raise
    finally:
        os.close(handle)


def make_folder(folder: Path) -> None:
    """Make `folder` and its parents, each durable in its own parent."""
    if folder.is_dir():
        return
    for held, inode in _held.values():
        if folder.absolute().is_relative_to(held) and _is_gone(held, inode):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(held))
    make_folder(folder.absolute().parent)
    folder.mkdir(exist_ok=True)
    sync_folder(folder.absolute().parent)


def to_json(record: Mapping[str, Any], path: Path) -> bytes:
    try:
        return json.dumps(record, allow_nan=False).encode()
    except ValueError as error:
        raise NonFiniteError(f"{path}: {error}; a number is NaN or infinite") from error


def cache_folder(name: str) -> Path:
    """The folder `name` of what the user's cache keeps of cmkit; it need not be there."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "cmkit" / name


def require_regular(path: Path, kind: type[CmkitError] = CheckpointError) -> None:
    """An error of `kind` unless `path` is a regular file: a device or FIFO is read for ever."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise kind(f"{path}: not a regular file; name one that is")


def require_space(folder: Path, needed: int) -> None:
    with writing(folder, needed):
        if shutil.disk_usage(folder).free < needed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


CURES = {
    errno.ENOSPC: "free some space or choose another folder",
    errno.EDQUOT: "free some of your quota or choose another folder",
    errno.EFBIG: "raise the limit on file sizes (ulimit -f)",
    errno.EIO: "the disk or its connection fails: see dmesg, and choose another folder",
    errno.EROFS: "mount it read-write or choose another folder",
    errno.EACCES: "give this user permission or choose another folder",
    errno.EPERM: "give this user permission or choose another folder",
}
"""What to do about an errno."""


def _resource_error(error: OSError, path: Path, needed: int) -> ResourceError:
    room = ""
    if needed and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        with contextlib.suppress(OSError):
            free = shutil.disk_usage(path.absolute().parent).free
            room = f" ({needed} bytes needed, {free} free)"
    cure = CURES.get(error.errno or 0, "check the path, or choose another folder")
    return ResourceError(f"{path}: {error.strerror or error}{room}; {cure}")


@contextlib.contextmanager
def writing(path: Path, needed: int = 0) -> Iterator[None]:
    """Inside, an OSError becomes a ResourceError."""
    try:
        yield
    except OSError as error:
        raise _resource_error(error, path, needed) from error


def as_os_error(error: SafetensorError) -> OSError | SafetensorError:
    """The OSError that safetensors reports as text, with its errno; another error is itself."""
    number = re.search(r"\(os error (\d+)\)", str(error))
    return OSError(int(number[1]), os.strerror(int(number[1]))) if number else error


_DAMAGE = {errno.EIO, errno.EISDIR, errno.ELOOP, errno.ENODEV, errno.ENOENT, errno.ENOTDIR}


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Inside, faults of a file become CheckpointError, and those of the machine ResourceError."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        fault = error if isinstance(error, OSError) else as_os_error(error)
        if isinstance(fault, OSError) and fault.errno not in _DAMAGE:
            raise _resource_error(fault, path, 0) from error
        reason = fault.strerror if isinstance(fault, OSError) else str(fault)
        raise CheckpointError(f"{path}: {reason}; fetch or save it again") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path}: damaged ({error}); fetch or save it again") from error
