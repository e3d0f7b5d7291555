"""SIGINT and SIGTERM as a flag, which stages check between two units of work."""

from __future__ import annotations

import os
import signal
from types import FrameType

from cmkit.errors import Interrupted


class StopSignal:
    """A flag that the first SIGINT or SIGTERM sets; the second ends the process at once.

    With the flag set, a run saves at the next step, cell or batch and ends with Interrupted.
    """

    def __init__(self) -> None:
        self.signum = 0

    def listen(self) -> None:
        """Handle the signals; call it in the main thread."""
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, self._received)

    def _received(self, signum: int, frame: FrameType | None) -> None:
        if self.signum:
            os._exit(128 + signum)
        self.signum = signum

    def check(self, saved: str) -> None:
        """Raise Interrupted if the flag is set; `saved` says what is kept."""
        if self.signum:
            name = signal.Signals(self.signum).name
            raise Interrupted(f"{name}: {saved}; run the same command again to go on", self.signum)
