"""Where the numbers of a run go."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cmkit import Listener, RunInfo, Tracker

if TYPE_CHECKING:
    from cmkit import Event


class Mine(Tracker):
    """Writes a line of text for every line of the training's log."""

    digits: int = 4
    """Digits of the loss."""

    def start(self, run: RunInfo) -> Listener:
        """A file in the run's folder, added to at every start."""
        return Lines(run, self.digits)


class Lines:
    """The file of one start."""

    def __init__(self, run: RunInfo, digits: int):
        self.file = (run.folder / "losses.txt").open("a", encoding="utf-8")
        self.digits = digits
        self.file.write(f"{run.name}\n")

    def on(self, event: Event) -> None:
        """Write a step that has numbers."""
        from cmkit import Step  # here, since it brings torch along

        if isinstance(event, Step) and event.log:
            self.file.write(f"{event.step} {event.log['loss']:.{self.digits}g}\n")
            self.file.flush()

    def close(self) -> None:
        """Close the file."""
        self.file.close()
