"""Trackers are told the events of a run, and cannot break or stop it."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future
from typing import Any

from cmkit.errors import CmkitError, PluginError
from cmkit.kinds import Listener, RunInfo
from cmkit.plan.networks import naming_table
from cmkit.recipe import Recipe
from cmkit.runs.events import Event, Note, RunFinished, Step
from cmkit.runs.folder import RunFolder

PATIENCE = 20.0
"""Seconds that a run waits for a tracker that was told an event, before it goes on without; it
waits three times as long for one that ends."""
PATIENCE_AT_START = 300.0
"""Seconds for one that begins, which may build a database first."""


class Told:
    """A tracker's listener in a thread of its own, so that one that hangs can be left. Its methods
    return the error that came, a TimeoutError without an answer."""

    def __init__(self, name: str):
        self.name = name
        self.listener: Listener  # once it has begun
        self._calls: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None]
        self._calls = queue.SimpleQueue()
        threading.Thread(target=self._serve, name=f"tracker {name}", daemon=True).start()

    def begin(self, start: Callable[[], Listener]) -> BaseException | None:
        """Make the listener."""

        def begun() -> None:
            self.listener = start()

        return self._call(begun, PATIENCE_AT_START)

    def on(self, event: Event) -> BaseException | None:
        """Tell an event."""
        return self._call(lambda: self.listener.on(event), PATIENCE)

    def close(self) -> BaseException | None:
        """End the listener, and the thread."""
        error = self._call(lambda: self.listener.close(), 3 * PATIENCE)
        self.leave()
        return error

    def leave(self) -> None:
        """Let the thread end."""
        self._calls.put(None)

    def _call(self, call: Callable[[], Any], patience: float) -> BaseException | None:
        answer: Future[Any] = Future()
        self._calls.put((call, answer))
        try:
            return answer.exception(patience)
        except TimeoutError:
            return TimeoutError(f"no answer within {patience:g} s")

    def _serve(self) -> None:
        while asked := self._calls.get():
            call, answer = asked
            try:
                answer.set_result(call())
            except BaseException as error:  # a library may even call sys.exit
                answer.set_exception(error)


def telling(
    events: Generator[Event, None, None], recipe: Recipe, folder: RunFolder
) -> Iterator[Event]:
    """The events of a run, RunFinished the last of them, each once every tracker was told it.

    A tracker that cannot start stops the run, before it has begun: the recipe asked for it. One
    that fails later is left with a note, since hours of training are worth more than its curve.
    """
    told: list[Told] = []
    with contextlib.closing(events):
        try:
            for index in range(len(recipe.tracker)):
                told.append(_started(recipe, index, folder))
            for event in events:
                silent = isinstance(event, Step) and not event.log
                for one in () if silent else tuple(told):
                    if error := one.on(event):
                        told.remove(one)
                        one.leave()
                        yield _left(one, error)
                if isinstance(event, RunFinished):
                    yield from _ended(told)
                yield event
        except BaseException as error:
            notes = [*_ended(told)]
            if isinstance(error, Exception):  # a generator that is closed yields no more
                yield from notes
            raise


def _started(recipe: Recipe, index: int, folder: RunFolder) -> Told:
    """The tracker at `index` of the recipe, begun; PluginError where it cannot be."""
    uses = [table["use"] for table in recipe.resolved["tracker"]]
    use = uses[index]
    name = f"{use}-{index}" if use in uses[:index] else use
    own = {table: said for table, said in recipe.resolved.items() if table != "tracker"}
    info = RunInfo(folder.path.name, own, folder.of_tracker(name))
    told = Told(use)
    if error := told.begin(lambda: recipe.tracker[index].start(info)):
        told.leave()
        with naming_table(recipe, "tracker", index):
            if isinstance(error, CmkitError):
                raise error
            said = f"tracker {use} cannot be started: {' '.join(f'{error}'.split())}"
            raise PluginError(f"{said}; mend it, or drop its [[tracker]] table") from error
    return told


def _ended(told: list[Told]) -> Iterator[Note]:
    """End what is told, with a note of each that fails."""
    while told:
        one = told.pop(0)
        if error := one.close():
            yield _left(one, error)


def _left(told: Told, error: BaseException) -> Note:
    what = " ".join(f"{type(error).__name__}: {error}".split())
    return Note(f"tracker {told.name}: {what}; the run goes on without it")
