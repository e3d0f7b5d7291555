"""What a run does, one file a stage; `cmkit.recipe.tables.STAGES` lists them.

A stage is a table of a recipe that can be carried out. Its module imports torch inside functions,
since recipes are read without it.
"""

from __future__ import annotations

import contextlib
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from cmkit.recipe import StageTable

if TYPE_CHECKING:
    from cmkit.runs.events import Event
    from cmkit.runs.job import Job


class Stage(StageTable):
    """A table with its work, and what the page says of it; `needs` names tables beside it."""

    @abstractmethod
    def run(self, job: Job, result: dict[str, Any]) -> Iterator[Event]:
        """The work as events, from where an earlier start stopped; fills `result`, the stage's
        entry in report.json. What is on the disk is consistent at every event."""

    def lost(self, job: Job) -> str:
        """What is wrong with what the finished stage left outside the run's folder, so that it is
        done again; "" where nothing is."""
        return ""

    @abstractmethod
    def line(self, result: Mapping[str, Any]) -> str:
        """What was done, in a few words for the page."""


@contextlib.contextmanager
def saving_first(save: Callable[[], object]) -> Iterator[None]:
    """Inside, an error such as a bad picture or full memory is raised once `save` has kept what is
    done so far."""
    try:
        yield
    except Exception as error:
        try:
            save()
        except Exception as second:  # the first is the one to mend
            error.add_note(f"what was done before could not be kept: {second}")
        raise
