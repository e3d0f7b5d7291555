"""A table of losses and scores that any program reads."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from cmkit import Listener, PluginError, RunInfo, Tracker

if TYPE_CHECKING:
    from cmkit import Event

COLUMNS = ("run", "step", "name", "value")


class CSV(Tracker):
    """Losses, learning rates, terms and scores of a training in one file of comma-separated values:
    a line for each number, with the columns run, step, name and value.

    Lines are whole at any kill. A run that goes on from a checkpoint drops its lines of later steps
    first, and writes them again. Several runs may share a file, one after the other.
    """

    path: str | None = Field(None, min_length=1)
    """The file; absent = `trackers/csv/log.csv` in the run's folder."""

    def start(self, run: RunInfo) -> Listener:
        """The file, which is made with its head where it is not there; PluginError for a file that
        is another table's."""
        path = Path(self.path).expanduser() if self.path else run.folder / "log.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        return Rows(path, run.name)


class Rows:
    """The file as one start of a run fills it."""

    def __init__(self, path: Path, run: str):
        self.path, self.run = path, run
        if not path.exists() or not path.stat().st_size:
            self._add([COLUMNS])
        with path.open(encoding="utf-8", errors="replace", newline="") as file:
            if file.readline() != f"{','.join(COLUMNS)}\n":
                raise PluginError(
                    f"tracker csv: {path} is no table of {', '.join(COLUMNS)}; name another file"
                )

    def on(self, event: Event) -> None:
        """Write the numbers of a step or of a score; drop steps that come again."""
        from cmkit import Scored, StageStarted, Step

        match event:
            case StageStarted("train", done, _):
                self._drop(done)
            case Step(step, _, log) if log:
                self._add([(self.run, step, name, value) for name, value in log.items()])
            case Scored(step, name, score, _):
                self._add([(self.run, step, name, score)])

    def close(self) -> None:
        """Nothing is open between two events."""

    def _add(self, rows: Sequence[tuple[object, ...]]) -> None:
        """Append rows in one write, so that a kill leaves none of them by half."""
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(rows)
        with self.path.open("ab") as file:
            file.write(text.getvalue().encode())

    def _drop(self, step: int) -> None:
        """Remove this run's rows of steps behind `step`, and a line that a full disk cut short."""
        lines = self.path.read_text("utf-8").splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n") and not self._behind(line, step)]
        if kept != lines:
            other = self.path.with_name(f".{self.path.name}.new")
            other.write_text("".join(kept), "utf-8")
            other.replace(self.path)

    def _behind(self, line: str, step: int) -> bool:
        row = next(csv.reader([line]))
        return len(row) != len(COLUMNS) or (
            row[0] == self.run and row[1].isdecimal() and int(row[1]) > step
        )
