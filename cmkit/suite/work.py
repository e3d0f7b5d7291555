"""Carry the cells of a suite out: any number of processes may do so in one folder at once."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cmkit import files
from cmkit.errors import BusyError, CheckpointError, Interrupted, ResourceError
from cmkit.runs.folder import RunFolder
from cmkit.runs.places import make_out
from cmkit.stop import StopSignal
from cmkit.suite.cells import Cell

COMMAND = (sys.executable, "-m", "cmkit")
POLL = 0.2
"""Seconds between two looks at the processes of a worker."""
LOOK = 2.0
"""Seconds between two looks at what other workers have finished."""
BUSY = BusyError.exit_code
TRIES = 2
"""How often a cell is begun that a signal ends."""


@dataclass(frozen=True)
class CellEnded:
    """A cell is finished or has failed, `done` of `total` are; `text` says it in one line."""

    cell: Cell
    done: int
    total: int
    text: str
    failed: bool = False


class SuiteFolder:
    """The folder of a suite: its runs, and beside them what belongs to no single run."""

    def __init__(self, path: Path):
        self.path = path
        self.page = path / "suite.html"
        self.results = path / "results.json"
        self.seconds = path / "seconds.json"

    def run(self, cell: Cell) -> RunFolder:
        """The run of a cell."""
        return RunFolder(self.path / cell.name)

    def finished(self, cell: Cell) -> bool:
        """Whether the cell's run has its report."""
        return self.run(cell).finished

    def trained(self, name: str) -> bool:
        """Whether the training of the run `name` is finished."""
        with contextlib.suppress(CheckpointError):
            return "train" in RunFolder(self.path / name).status()
        return False

    def recipe(self, cell: Cell) -> Path:
        """The recipe of a cell, as `cmkit run` takes it; written where it is not there yet."""
        path, text = self.path / "recipes" / f"{cell.name}.toml", cell.recipe.toml()
        files.make_folder(path.parent)
        if not path.exists() or path.read_text("utf-8") != text:
            files.atomic_write(path, text)
        return path

    def log(self, cell: Cell) -> Path:
        """What the process of a cell has said."""
        return self.path / "logs" / f"{cell.name}.log"

    def failure(self, cell: Cell) -> dict[str, Any] | None:
        """Why the cell failed when it was begun last: "code", "reason", "log", "time"."""
        path = self._failure(cell)
        with contextlib.suppress(CheckpointError):
            return files.unsealed(path) if path.exists() else None
        return None  # damaged: the cell is tried again

    def keep_failure(self, cell: Cell, code: int, reason: str) -> None:
        """Write `failure`."""
        files.make_folder(self._failure(cell).parent)
        record = {"code": code, "reason": reason, "log": str(self.log(cell)), "time": time.time()}
        files.atomic_write(self._failure(cell), files.sealed(record))

    def forget_failure(self, cell: Cell) -> None:
        """Remove what `keep_failure` wrote."""
        self._failure(cell).unlink(missing_ok=True)

    def _failure(self, cell: Cell) -> Path:
        return self.path / "failed" / f"{cell.name}.json"


@dataclass
class _Running:
    """A process that carries a cell out."""

    cell: Cell
    process: subprocess.Popen[bytes]
    slot: int
    began: float = field(default_factory=time.monotonic)


class Worker:
    """Begins `cmkit run` for one cell after another, `jobs` at a time, each in a process of its own
    that holds the lock of its run folder."""

    def __init__(
        self,
        cells: Sequence[Cell],
        folder: SuiteFolder,
        device: str,
        stop: StopSignal,
        jobs: int = 1,
    ):
        self.cells = {cell.name: cell for cell in cells}
        self.folder = folder
        self.device = device
        self.stop = stop
        self.jobs = jobs
        self.began = time.time()
        self.running: list[_Running] = []
        self.tries: dict[str, int] = {}
        self.ended: dict[str, str] = {}
        """Cells that are finished ("") or have failed (the reason)."""
        self.looked = 0.0
        self.later: dict[str, float] = {}
        """When to look again at a cell that another process has, or whose needs are not met."""
        self.trained: set[str] = set()

    def work(self) -> Iterator[CellEnded]:
        """Carry all cells out, or see other workers do so; Interrupted after a stop signal, when
        the cells that were running have saved what they have.

        A cell that fails is kept as such, and the rest goes on; a worker that is begun later tries
        it again.
        """
        make_out(self.folder.path)
        check_locks(self.folder.path)
        try:
            while len(self.ended) < len(self.cells):
                yield from self._look()
                while len(self.running) < self.jobs and (cell := next(self._ready(), None)):
                    self._begin(cell)
                yield from self._reap()
                if self.stop.signum:
                    yield from self._end()
                time.sleep(POLL)
        finally:
            for running in self.running:
                running.process.terminate()  # it saves what it has
            for running in self.running:
                running.process.wait()

    def _look(self) -> Iterator[CellEnded]:
        """What is finished on the disk, or has failed since this worker was begun."""
        if self.looked and time.monotonic() - self.looked < LOOK:
            return
        self.looked = time.monotonic()
        own = {running.cell.name for running in self.running}
        for name, cell in self.cells.items():
            if name in self.ended or name in own:
                continue
            if self.folder.finished(cell):
                try:
                    yield self._finished(cell, "is finished")
                except CheckpointError as error:  # a damaged report
                    self.folder.keep_failure(cell, error.exit_code, str(error))
                    yield self._failed(cell, str(error))
            elif (failure := self.folder.failure(cell)) and failure["time"] >= self.began:
                yield self._failed(cell, str(failure["reason"]))

    def _ready(self) -> Iterator[Cell]:
        """Cells that could be begun now, in order."""
        own, now = {running.cell.name for running in self.running}, time.monotonic()
        for name, cell in self.cells.items():
            if name in self.ended or name in own or self.later.get(name, 0.0) > now:
                continue
            if all(self._trained(need) for need in cell.needs):
                yield cell
            else:
                self.later[name] = now + LOOK

    def _trained(self, name: str) -> bool:
        if name not in self.trained and self.folder.trained(name):
            self.trained.add(name)
        return name in self.trained

    def _begin(self, cell: Cell) -> None:
        """Begin a cell, unless another process has it."""
        run, log = self.folder.run(cell), self.folder.log(cell)
        files.make_folder(log.parent)
        recipe = self.folder.recipe(cell)
        command = [*COMMAND, "run", str(recipe)]
        command += ["--out", str(self.folder.path), "--device", self.device]
        slot = min(set(range(self.jobs)) - {running.slot for running in self.running})
        self.later[cell.name] = time.monotonic() + LOOK
        with contextlib.suppress(BusyError), run.held() as handle, log.open("ab") as out:
            if run.finished:  # by another worker, since the last look
                return
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                env={**os.environ, **self._environment(slot), files.INHERITED: str(handle)},
                pass_fds=[handle],
                start_new_session=True,  # the terminal's ^C is this worker's, which tells it
            )
            self.running.append(_Running(cell, process, slot))

    def _environment(self, slot: int) -> dict[str, str]:
        """Of one of `jobs` processes: its share of the cores, or its GPU."""
        if self.jobs == 1:
            return {}
        found = {}
        if "OMP_NUM_THREADS" not in os.environ:
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
            found["OMP_NUM_THREADS"] = str(max(1, cores // self.jobs))
        if self.device in ("auto", "cuda") and (gpus := visible_gpus()):
            found["CUDA_VISIBLE_DEVICES"] = gpus[slot % len(gpus)]
        return found

    def _reap(self) -> Iterator[CellEnded]:
        """What became of the cells whose processes have ended."""
        for running in [r for r in self.running if r.process.poll() is not None]:
            self.running.remove(running)
            cell, code = running.cell, running.process.returncode
            if code == 0 and self.folder.finished(cell):
                self.folder.forget_failure(cell)
                yield self._finished(cell, f"in {time.monotonic() - running.began:.0f} s")
            elif code != BUSY and not self.stop.signum:
                yield from self._lost(cell, code)

    def _lost(self, cell: Cell, code: int) -> Iterator[CellEnded]:
        """A process that has not done its cell: begun once more where a signal ended it."""
        tries = self.tries[cell.name] = self.tries.get(cell.name, 0) + 1
        by_signal = code < 0 or code - 128 in signal.valid_signals()
        if by_signal and tries < TRIES:
            return
        reason = _last_words(self.folder.log(cell), code)
        self.folder.keep_failure(cell, code, reason)
        yield self._failed(cell, reason)

    def _finished(self, cell: Cell, how: str) -> CellEnded:
        self.ended[cell.name] = ""
        values = self.folder.run(cell).report()["stages"].get("metric", {}).get("values", {})
        shown = ", ".join(f"{name} = {value:.4g}" for name, value in [*values.items()][:4])
        text = f"{cell.recipe.name}: {how}{f': {shown}' if shown else ''}"
        return CellEnded(cell, len(self.ended), len(self.cells), text)

    def _failed(self, cell: Cell, reason: str) -> CellEnded:
        """The failure of a cell, and with it of those that need its training."""
        self.ended[cell.name] = reason
        lost = [cell.recipe.name]
        grown = True
        while grown and not self._trained(cell.name):
            grown = False
            for other in self.cells.values():
                need = next((n for n in other.needs if self.ended.get(n)), None)
                if other.name not in self.ended and need and not self._trained(need):
                    self.ended[other.name] = f"needs the training of {need}"
                    lost.append(other.recipe.name)
                    grown = True
        with_it = f"; with it {', '.join(lost[1:])}" if len(lost) > 1 else ""
        text = f"{lost[0]}: failed: {reason}; see {self.folder.log(cell)}{with_it}"
        return CellEnded(cell, len(self.ended), len(self.cells), text, failed=True)

    def _end(self) -> Iterator[CellEnded]:
        """Let the running cells save what they have, then Interrupted."""
        for running in self.running:
            running.process.send_signal(signal.SIGTERM)
        for running in self.running:
            running.process.wait()
        yield from self._reap()
        name = signal.Signals(self.stop.signum).name
        raise Interrupted(
            f"{name}: {sum(not why for why in self.ended.values())} of {len(self.cells)} cells are"
            " finished, the others saved; run the same command again to go on",
            self.stop.signum,
        )


def _last_words(log: Path, code: int) -> str:
    """The last error of a log in one line, or how its process ended."""
    with contextlib.suppress(OSError):
        lines = log.read_text("utf-8", errors="replace").splitlines()
        said = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
        if said and code > 0:
            return said[-1]
    if code < 0:
        return f"killed by {signal.Signals(-code).name}, {TRIES} times"
    return f"ended with exit code {code}"


def visible_gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES may name here; none where there is no GPU."""
    if said := os.environ.get("CUDA_VISIBLE_DEVICES"):
        return said.split(",")
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]


TRY = "import fcntl, sys; fcntl.flock(open(sys.argv[1]), fcntl.LOCK_EX | fcntl.LOCK_NB)"


def check_locks(folder: Path) -> None:
    """ResourceError where another process can take a lock that this one holds: on such a file
    system two workers would do a cell twice."""
    place = folder / ".locks"
    try:
        with files.lock(place):
            done = subprocess.run(
                [sys.executable, "-c", TRY, place / ".lock"], capture_output=True, check=False
            )
    except BusyError:  # another worker is at it, and its lock holds
        return
    if b"BlockingIOError" not in done.stderr:
        raise ResourceError(
            f"{folder}: locks do not hold on this file system, workers would do cells twice; mount"
            " it with locks (NFS 4, or Lustre with -o flock), or name another place with --out"
        )
