"""SIGINT and SIGTERM as a flag that stages look at between two units of work."""

from __future__ import annotations

import os
import signal
from types import FrameType

from cmkit.errors import Interrupted


class StopSignal:
    """SIGINT and SIGTERM, once, as a flag; the second time they act at once.

    The run saves at the next step, cell or batch and ends with Interrupted.
    """

    def __init__(self) -> None:
        self.signum = 0

    def listen(self) -> None:
        """Take the signals over; only the main thread may."""
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, self._received)

    def _received(self, signum: int, frame: FrameType | None) -> None:
        if self.signum:
            os._exit(128 + signum)
        self.signum = signum

    def check(self, saved: str) -> None:
        """Raise Interrupted if a signal has come; `saved` says what is safe."""
        if self.signum:
            name = signal.Signals(self.signum).name
            raise Interrupted(f"{name}: {saved}; run the same command again to go on", self.signum)
