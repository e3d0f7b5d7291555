"""How the command line ends: one line on stderr for every error, and its exit code."""

from __future__ import annotations

import contextlib
import errno
import sys
import tempfile
import traceback
from pathlib import Path

from cmkit.errors import ResourceError

DISK = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EACCES}


class debug_log:  # noqa: N801 - a variable of the module, which `run` sets once it knows its folder
    path: Path | None = None


def fail(error: BaseException, code: int) -> int:
    if debug_log.path and debug_log.path.parent.is_dir():
        _write_debug_log(debug_log.path)
    return say(f"error: {error}", code)


def resource_error(error: BaseException) -> int:
    """The exit code of an error that libraries raise: 5 for memory and disk, else a bug."""
    text = str(error)
    if isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text:
        first = text.partition("\n")[0]
        hint = "lower train.batch, search.batch or sample.batch, or raise train.accumulate"
        return fail(ResourceError(f"out of memory: {first}; {hint}"), ResourceError.exit_code)
    if isinstance(error, OSError) and error.errno in DISK:
        where = f"{error.filename or 'disk'}: {error.strerror}"
        return fail(ResourceError(f"{where}; choose another --out"), ResourceError.exit_code)
    return unexpected(error)


def unexpected(error: BaseException) -> int:
    if hasattr(error, "format_message"):  # a usage error of the parser that typer brings
        return say(f"error: {error.format_message()}; see --help", 2)
    logs = [Path(tempfile.gettempdir()) / "cmkit-debug.log"]
    if debug_log.path:
        logs.insert(0, debug_log.path)
    where = next((log for log in logs if _write_debug_log(log)), "the command")
    return say(
        f"error: a bug in cmkit: {type(error).__name__}: {' '.join(str(error).split())[:300]};"
        f" please report it with {where}",
        70,
    )


def _write_debug_log(path: Path) -> bool:
    """Append the traceback of the current error; False where the file cannot be written."""
    try:
        with path.open("a", encoding="utf-8") as file:
            traceback.print_exc(file=file)
    except OSError:
        return False
    return True


def say(text: str, code: int) -> int:
    with contextlib.suppress(OSError, ValueError):
        line = text.encode(sys.stderr.encoding or "ascii", "backslashreplace")
        print(line.decode(sys.stderr.encoding or "ascii"), file=sys.stderr, flush=True)
    return code
