"""The entry point of the command line."""

from __future__ import annotations

import os
import sys

import typer

from cmkit.cli.commands import app
from cmkit.cli.errors import fail, resource_error, say, unexpected
from cmkit.errors import CmkitError


def main() -> None:
    """Run the command line; each error is one line on stderr, and an exit code."""
    try:
        code = app(standalone_mode=False) or 0
    except CmkitError as error:
        code = fail(error, error.exit_code)
    except KeyboardInterrupt:
        code = say("interrupted; nothing was being written", 130)
    except BrokenPipeError:
        # Python writes what is left in stdout as it ends, and would fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except (MemoryError, OSError, RuntimeError) as error:
        code = resource_error(error)
    except typer.Exit as exit_:
        code = exit_.exit_code
    except Exception as error:
        code = unexpected(error)
    sys.exit(code)
