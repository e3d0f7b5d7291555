"""The entry point: one line on stderr for every error, and its exit code."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
import tempfile
import traceback
from pathlib import Path

import typer

from cmkit.cli import commands
from cmkit.errors import CmkitError, PluginError, RecipeError, ResourceError, printable
from cmkit.files import CURES
from cmkit.plugins import blame, discover
from cmkit.stop import NOTHING, StopSignal


def main() -> None:
    """Run the command line; each error is one line on stderr, and an exit code."""
    stop = commands.stop = StopSignal()
    stop.interrupt()
    try:
        code = commands.app(standalone_mode=False) or 0
        sys.stdout.flush()
    except BaseException as error:  # what a signal breaks off may raise almost anything
        code = 0 if stop.ended else _code_of(error)
    if stop.ended:
        code = _say(f"{signal.Signals(stop.signum).name}: {NOTHING}", 128 + stop.signum)
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        # Python writes what is left in stdout as it ends, and would fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)


def _code_of(error: BaseException) -> int:
    """The exit code of an error, whose line is printed."""
    match error:
        case CmkitError():
            return _fail(error)
        case BrokenPipeError():
            return 0
        case typer.Exit():
            return int(error.exit_code)
        case SystemExit() if "_CMKIT_COMPLETE" in os.environ:  # how typer ends completion
            return int(error.code or 0)
        case SystemExit(__context__=OSError(errno=errno.EPIPE)):  # and where nobody reads stdout
            return 0
    return _resource_error(error)


def _fail(error: CmkitError) -> int:
    if isinstance(error, PluginError) and error.__cause__:
        return _say(f"error: {error}; traceback: {_logged()}", error.exit_code)
    log = commands.debug_log
    if log and log.parent.is_dir():
        _write_debug_log(log)
    return _say(f"error: {error}", error.exit_code)


def _resource_error(error: BaseException) -> int:
    """The exit code of an error that is not ours: 5 for memory and disk."""
    text = str(error)
    if isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text:
        first = text.partition("\n")[0]
        hint = "lower train.batch, search.batch or sample.batch, or raise train.accumulate"
        return _fail(ResourceError(f"out of memory: {first}; {hint}"))
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        return _fail(RecipeError(f"{str(error.filename)[:200]}..: {error.strerror}; shorten it"))
    if isinstance(error, ValueError) and "embedded null" in text:
        return _fail(RecipeError(f"a path with a null character ({text}); no file has one"))
    if isinstance(error, OSError) and error.errno in CURES:
        where = f"{error.filename or 'disk'}: {error.strerror}"
        return _fail(ResourceError(f"{where}; {CURES[error.errno]}"))
    return _unexpected(error)


def _unexpected(error: BaseException) -> int:
    if hasattr(error, "format_message"):  # a usage error of the parser that typer brings
        return _say(f"error: {error.format_message()}; see --help", 2)
    log = _logged()
    said = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    if place := blame(error, discover().rows):
        return _say(f"error: {place}: {said}; mend it, or report it to its authors with {log}", 9)
    return _say(f"error: a bug in cmkit: {said}; please report it with {log}", 70)


def _logged() -> Path | str:
    """The debug log with the traceback of the current error."""
    logs = [commands.debug_log, Path(tempfile.gettempdir()) / "cmkit-debug.log"]
    return next((log for log in logs if log and _write_debug_log(log)), "the command")


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
        print(printable(text, sys.stderr.encoding), file=sys.stderr, flush=True)
    return code
