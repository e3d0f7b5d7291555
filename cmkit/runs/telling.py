"""Trackers are told the events of a run, and cannot break or stop it."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from cmkit.errors import CmkitError, PluginError
from cmkit.kinds import Listener, Tracker
from cmkit.kinds.tracker import RunInfo
from cmkit.plan.networks import naming_table
from cmkit.recipe import Recipe
from cmkit.runs.events import Event, Note, Step
from cmkit.runs.folder import RunFolder

PATIENCE = 20.0
"""Seconds that a run waits for a tracker that was told something, before it goes on without."""


class Told:
    """A tracker's listener in a thread of its own, so that one that hangs can be left."""

    def __init__(self, name: str, begin: Callable[[], Listener]):
        self.name = name
        self.calls: queue.SimpleQueue[Callable[[], Any] | None] = queue.SimpleQueue()
        self.answers: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
        self.listener: Listener | None = None
        threading.Thread(target=self._serve, name=f"tracker {name}", daemon=True).start()
        if error := self.call(lambda: setattr(self, "listener", begin()), 3 * PATIENCE):
            raise error

    def _serve(self) -> None:
        while (call := self.calls.get()) is not None:
            try:
                call()
            except BaseException as error:  # a library may even call sys.exit
                self.answers.put(error)
            else:
                self.answers.put(None)

    def call(self, call: Callable[[], Any], patience: float) -> BaseException | None:
        """Call it in the thread; the error that came, a TimeoutError without an answer."""
        self.calls.put(call)
        try:
            return self.answers.get(timeout=patience)
        except queue.Empty:
            return TimeoutError(f"no answer within {patience:g} s")

    def on(self, event: Event) -> BaseException | None:
        """Tell an event; the error that came."""
        assert self.listener is not None
        return self.call(lambda: self.listener and self.listener.on(event), PATIENCE)

    def close(self) -> BaseException | None:
        """End it; the error that came."""
        assert self.listener is not None
        error = self.call(self.listener.close, 3 * PATIENCE)
        self.calls.put(None)
        return error


def telling(events: Iterable[Event], recipe: Recipe, folder: RunFolder) -> Iterator[Event]:
    """The events of a run, each once every tracker of the recipe was told it.

    A tracker that cannot start stops the run, before it has begun: the recipe asked for it. One
    that fails later is left with a note, since hours of training are worth more than its curve.
    """
    told = dict[int, Told]()
    try:
        for index, tracker in enumerate(recipe.tracker):
            told[index] = _started(tracker, index, recipe, folder)
        for event in events:
            silent = isinstance(event, Step) and not event.log
            for index, one in () if silent else list(told.items()):
                if error := one.on(event):
                    del told[index]
                    yield Note(_left(one, error))
                    one.calls.put(None)
            yield event
    except BaseException:
        for one in told.values():
            one.close()
        raise
    for one in told.values():
        if error := one.close():
            yield Note(_left(one, error))


def _started(tracker: Tracker, index: int, recipe: Recipe, folder: RunFolder) -> Told:
    use = recipe.resolved["tracker"][index]["use"]
    own: Mapping[str, Any] = {k: v for k, v in recipe.resolved.items() if k != "tracker"}
    name = f"{use}-{index}" if _uses(recipe)[:index].count(use) else use
    info = RunInfo(folder.path.name, own, folder.of_tracker(name))
    try:
        with naming_table(recipe, "tracker", index):
            return Told(use, lambda: tracker.start(info))
    except CmkitError:
        raise
    except Exception as error:
        said = f"tracker {use} cannot be started: {' '.join(f'{error}'.split())}"
        raise PluginError(f"{said}; mend it, or drop its [[tracker]] table") from error


def _uses(recipe: Recipe) -> list[str]:
    return [table["use"] for table in recipe.resolved["tracker"]]


def _left(told: Told, error: BaseException) -> str:
    what = " ".join(f"{type(error).__name__}: {error}".split())
    return f"tracker {told.name}: {what}; the run goes on without it"
