"""The entry point: one line on stderr for every error, and its exit code."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import tempfile
import traceback
from pathlib import Path

import typer

from cmkit.cli import commands
from cmkit.errors import CmkitError, ResourceError

DISK = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EACCES}


def main() -> None:
    """Run the command line; each error is one line on stderr, and an exit code."""
    try:
        code = commands.app(standalone_mode=False) or 0
    except CmkitError as error:
        code = _fail(error)
    except KeyboardInterrupt:
        code = _say("interrupted; nothing was being written", 130)
    except BrokenPipeError:
        # Python writes what is left in stdout as it ends, and would fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except (MemoryError, OSError, RuntimeError) as error:
        code = _resource_error(error)
    except typer.Exit as exit_:
        code = exit_.exit_code
    except Exception as error:
        code = _unexpected(error)
    sys.exit(code)


def _fail(error: CmkitError) -> int:
    log = commands.debug_log
    if log and log.parent.is_dir():
        _write_debug_log(log)
    return _say(f"error: {error}", error.exit_code)


def _resource_error(error: BaseException) -> int:
    """The exit code of an error that libraries raise: 5 for memory and disk, else a bug."""
    text = str(error)
    if isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text:
        first = text.partition("\n")[0]
        hint = "lower train.batch, search.batch or sample.batch, or raise train.accumulate"
        return _fail(ResourceError(f"out of memory: {first}; {hint}"))
    if isinstance(error, OSError) and error.errno in DISK:
        where = f"{error.filename or 'disk'}: {error.strerror}"
        return _fail(ResourceError(f"{where}; choose another --out"))
    return _unexpected(error)


def _unexpected(error: BaseException) -> int:
    if hasattr(error, "format_message"):  # a usage error of the parser that typer brings
        return _say(f"error: {error.format_message()}; see --help", 2)
    logs = [commands.debug_log, Path(tempfile.gettempdir()) / "cmkit-debug.log"]
    where = next((log for log in logs if log and _write_debug_log(log)), "the command")
    return _say(
        f"error: a bug in cmkit: {type(error).__name__}: {' '.join(str(error).split())[:300]};"
        f" please report it with {where}",
        70,
    )


def _write_debug_log(path: Path) -> bool:
    """Append the traceback of the current error; False where the file cannot be written."""
    if path.exists() and not path.is_file():  # a FIFO would wait for its reader
        return False
    try:
        with path.open("a", encoding="utf-8") as file:
            traceback.print_exc(file=file)
    except OSError:
        return False
    return True


def _say(text: str, code: int) -> int:
    with contextlib.suppress(OSError, ValueError):
        line = text.encode(sys.stderr.encoding or "ascii", "backslashreplace")
        print(line.decode(sys.stderr.encoding or "ascii"), file=sys.stderr, flush=True)
    return code
