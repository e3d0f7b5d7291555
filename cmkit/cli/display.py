"""The events of a run on stderr: a live display on a terminal, plain lines in a pipe."""

from __future__ import annotations

import contextlib
import statistics
import sys
import time
from collections.abc import Iterable
from typing import Any

from rich import progress
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from cmkit.errors import printable
from cmkit.runs import events
from cmkit.runs.environment import peak_memory_mib

PLAIN_SECONDS = 5.0
"""Between two plain lines of a stage."""


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Leave it to `Display.say`: rich would end the run, and close stdout."""
        raise BrokenPipeError


class Display:
    """A context in which `show` takes every event, in order."""

    def __init__(self, device: Any, quiet: bool = False):
        self.console = _Console(stderr=True, highlight=False, soft_wrap=True)
        self.device = device
        self.quiet = quiet
        self.progress = progress.Progress(
            progress.SpinnerColumn(),
            progress.TextColumn("[bold]{task.description:<8}"),
            progress.BarColumn(bar_width=None),
            progress.MofNCompleteColumn(),
            progress.TimeElapsedColumn(),
            progress.TextColumn("eta"),
            progress.TimeRemainingColumn(),
            console=self.console,
            expand=True,
        )
        self.numbers: dict[str, str] = {}
        self.losses: list[float] = []
        self.task: Any = None
        self.stage = ""
        self.first = self.done = self.total = 0
        self.began = self.printed = 0.0
        self.live: Live | None = None
        # The console would take FORCE_COLOR for a terminal, and fill log files with cursor moves.
        if sys.stderr.isatty() and not quiet and not self.console.is_dumb_terminal:
            self.live = Live(
                get_renderable=self._render,
                console=self.console,
                refresh_per_second=8,
                transient=True,
            )

    def __enter__(self) -> Display:
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop()

    def _stop(self) -> None:
        """End the live display, if any."""
        live, self.live = self.live, None
        if live:
            with contextlib.suppress(OSError, ValueError):
                live.stop()

    def show(self, event: events.Event) -> None:
        """Draw one event."""
        match event:
            case events.StageStarted(stage, done, total):
                self._begin(stage, done, total)
            case events.Downloaded(name, done, total):
                mib = total >> 20
                if self.stage != name:
                    self._begin(name, done >> 20, mib)
                self.numbers = {"MiB": f"{done >> 20:,} of {mib:,}" if total else f"{done >> 20:,}"}
                self.advance(done >> 20)
            case events.Step(step, _, log):
                if log:
                    self._remember(log)
                self.advance(step)
            case events.Cell(_, _, values, score):
                moved = {k: v for k, v in values.items() if v != 1} if len(values) > 3 else values
                shown = " ".join(f"{name} {value:g}" for name, value in moved.items())
                self.numbers = {"cell": shown or "all 1", "score": _number(score)}
                # Cells that share an encoding come together; interpolated ones may be drawn later.
                self.advance(min(self.done + 1, self.total))
            case events.Comparison(index, _, plain, rescaled):
                self.numbers = {"unscaled": _number(plain), "rescaled": _number(rescaled)}
                self.advance(index + 1)
            case events.CellsDrawn(done, total):
                self.numbers["images"] = f"{done:,} of {total:,}"
                self.advance(self.done)
            case events.Sampled(done, _) | events.Encoded(done, _):
                self.advance(done)
            case events.Saved(step):
                self.say(f"saved step {step}")
            case events.Scored(step, name, score, best):
                self.say(
                    f"step {step}: {name} {_number(score)}{', the best so far' if best else ''}"
                )
            case events.Note(text):
                self.say(text)
            case events.StageFinished(stage, result):
                self.say(f"{stage} done in {result['seconds']:.1f} s")

    def _begin(self, stage: str, done: int, total: int) -> None:
        self.stage, self.first, self.done, self.total = stage, done, done, total
        self.began, self.printed = time.monotonic(), 0.0
        self.numbers, self.losses = {}, []
        if self.live:
            for task in self.progress.tasks:
                self.progress.update(task.id, visible=False)
            self.task = self.progress.add_task(stage, total=total, completed=done)

    def _remember(self, log: dict[str, float]) -> None:
        self.losses.append(log["loss"])
        self.numbers = {
            "loss": f"{log['loss']:.4g}",
            "steps/s": f"{log['rate']:.2f}",
            "images/s": f"{log['images_per_second']:.0f}",
            "lr": f"{log['lr']:.2e}",
            **({"N": f"{log['num_sigmas']:.0f}"} if "num_sigmas" in log else {}),
            "memory": f"{peak_memory_mib(self.device):,.0f} MiB",
        }

    def advance(self, done: int) -> None:
        """Show that `done` units of the stage are done."""
        self.done = done
        if self.live:
            self.progress.update(self.task, completed=done)
            return
        now = time.monotonic()
        if now - self.printed < PLAIN_SECONDS and done != self.total:
            return
        self.printed = now
        speed = (done - self.first) / max(now - self.began, 1e-9)
        eta = f"  eta {(self.total - done) / speed:.0f} s" if speed > 0 else ""
        numbers = "".join(f"  {name} {value}" for name, value in self.numbers.items())
        self.say(f"{self.stage} {done}/{self.total}{numbers}{eta}")

    def say(self, text: str) -> None:
        """Print one line; nothing more once stderr is gone, such as with its terminal."""
        if self.quiet:
            return
        try:
            self.console.print(Text(printable(text, self.console.encoding)))
        except (OSError, ValueError):
            self.quiet = True
            self._stop()

    def _render(self) -> RenderableType:
        table = Table.grid(padding=(0, 2))
        for name, value in self.numbers.items():
            table.add_row(Text(name, "dim"), Text(value, "bold"))
        if len(self.losses) > 1:
            table.add_row(Text("loss curve", "dim"), Text(sparkline(self.losses, 40), "cyan"))
        return Group(self.progress, table)


def sparkline(values: Iterable[float], width: int) -> str:
    """A curve of at most `width` block characters, each the mean of a stretch of `values`."""
    values = list(values)
    stretch = max(1, -(-len(values) // width))
    means = [statistics.fmean(values[i : i + stretch]) for i in range(0, len(values), stretch)]
    low, high = min(means), max(means)
    marks = "▁▂▃▄▅▆▇█"
    return "".join(marks[round((v - low) / ((high - low) or 1) * (len(marks) - 1))] for v in means)


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4g}"
