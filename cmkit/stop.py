"""SIGINT, SIGTERM and SIGHUP: before a run begins they end the command, then they are a flag that
stages check between two units of work."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

from cmkit.errors import Interrupted

NAMES = ("SIGINT", "SIGTERM", "SIGHUP")
NOTHING = "nothing was being written"


class StopSignal:
    """A flag that the first of the signals sets; the second ends the process at once.

    With the flag set, a run saves at the next step, cell or batch and ends with Interrupted.
    """

    def __init__(self) -> None:
        self.signum = 0
        self.listening = False
        """Whether a run looks at the flag; it has something to save."""

    def listen(self) -> None:
        """Handle the signals; call it in the main thread."""
        self.listening = True
        _handle(self._received)

    @property
    def ended(self) -> bool:
        """Whether a signal came before a run listened: nothing was being written."""
        return bool(self.signum) and not self.listening

    def _received(self, signum: int, frame: FrameType | None) -> None:
        if self.signum:
            _end(signum, "ended without a save; run the same command again to go on")
        self.signum = signum

    def interrupt(self) -> None:
        """Make the first signal a KeyboardInterrupt, and the second the end; as `listen`."""

        def received(signum: int, frame: FrameType | None) -> None:
            self._received(signum, frame)
            raise KeyboardInterrupt

        _handle(received)

    @contextlib.contextmanager
    def within(self) -> Iterator[None]:
        """Inside, the first SIGINT sets the flag, and the second is a KeyboardInterrupt; outside,
        and in another thread than the main one, it means what it meant before."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def received(signum: int, frame: FrameType | None) -> None:
            if self.signum:
                raise KeyboardInterrupt
            self.signum = signum

        before = signal.signal(signal.SIGINT, received)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def check(self, saved: str) -> None:
        """Raise Interrupted if the flag is set; `saved` says what is kept."""
        if self.signum:
            name = signal.Signals(self.signum).name
            raise Interrupted(f"{name}: {saved}; run the same command again to go on", self.signum)


def end_at_once() -> None:
    """Let the signals end the process with one line: nothing is being written yet."""
    _handle(lambda signum, frame: _end(signum, NOTHING))


def _end(signum: int, said: str) -> None:
    with contextlib.suppress(OSError):
        os.write(2, f"{signal.Signals(signum).name}: {said}\n".encode())
    os._exit(128 + signum)


def _handle(received: Callable[[int, FrameType | None], None]) -> None:
    for name in NAMES:
        signum = getattr(signal, name, None)  # Windows knows no SIGHUP
        # nohup ignores SIGHUP for the programs that it starts
        if signum and not (name == "SIGHUP" and signal.getsignal(signum) == signal.SIG_IGN):
            signal.signal(signum, received)
