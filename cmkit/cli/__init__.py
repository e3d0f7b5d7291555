"""The command line: parse, call, print. Imports torch only inside the commands that compute."""

import os
import sys
from importlib.util import find_spec

from cmkit.stop import end_at_once


def main() -> None:
    """Carry out the command line; a signal while it is still being imported is one line too."""
    for number in range(3):  # else a closed stdin, stdout or stderr is the next file's number
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    end_at_once()
    sys.stdout = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115
    if not (find_spec("fcntl") and find_spec("resource")):
        print(
            "error: cmkit needs Linux or macOS, whose file locks it holds a run with; on Windows"
            " use WSL",
            file=sys.stderr,
        )
        sys.exit(5)
    from cmkit.cli.entry import main as carry_out

    carry_out()
