"""[cache]: latents and features of prompts, encoded once and kept for every run on these data."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from cmkit.recipe.tables import CacheTable
from cmkit.runs.stages import Stage

if TYPE_CHECKING:
    from cmkit.latents import Store
    from cmkit.runs.events import Event
    from cmkit.runs.job import Job

WAITED = 0.5
"""Seconds between two looks at what another process encodes."""


class Cache(CacheTable, Stage):
    """Encoding of the pictures and prompts of training, in the user's cache."""

    title: ClassVar[str] = "encoding"
    needs: ClassVar[tuple[str, ...]] = ("train",)
    reads: ClassVar[tuple[str, ...]] = ("dataset", "codec", "text")

    def run(self, job: Job, result: dict[str, Any]) -> Iterator[Event]:
        """Encode what is missing; where another process does so, wait, and go on after it."""
        from cmkit import latents
        from cmkit.files import make_folder
        from cmkit.plan import kept, sigma_data_note
        from cmkit.runs.events import Encoded, Note, StageStarted

        recipe = job.plan.recipe
        stores = kept(job.plan)
        missing = {store: store.missing() for store in stores.stores}
        total = sum(store.rows for store in missing)
        done = total - sum(_rows(store, faults) for store, faults in missing.items())
        yield StageStarted("cache", done, total)
        for store in filter(missing.get, missing):
            with contextlib.ExitStack() as held:
                make_folder(store.path)
                yield from self._held(job, store, held)
                faults = store.missing()
                done += _rows(store, missing[store]) - _rows(store, faults)
                for shard, fault in faults.items():
                    if fault != "missing":
                        yield Note(f"{store.path}: file {shard} is {fault}; it is made again")
                part = recipe.codec if store is stores.latents else recipe.text
                assert part is not None
                steps = latents.work(
                    recipe.dataset, part, store, list(faults), self.batch, job.device
                )
                shards = iter(faults)
                for rows, tensors in steps:
                    if tensors is None:
                        done += rows
                        yield Encoded(done, total)
                    else:
                        store.keep(next(shards), tensors)
                    job.stop.check(f"what is encoded is kept in {store.path}")
        if any(missing.values()) and stores.latents and (said := sigma_data_note(job.plan)):
            yield Note(said)
        result |= {
            "pictures": stores.latents.rows if stores.latents else 0,
            "prompts": stores.text.rows if stores.text else 0,
            "bytes": sum(store.bytes for store in stores.stores),
            "folders": [store.path.name for store in stores.stores],
        }

    def _held(self, job: Job, store: Store, held: contextlib.ExitStack) -> Iterator[Event]:
        """Enter the lock of a store, once another process is done with it."""
        from cmkit.errors import BusyError
        from cmkit.files import lock
        from cmkit.runs.events import Note

        said = False
        while True:
            try:
                held.enter_context(lock(store.path))
                return
            except BusyError as error:
                if not said:
                    said = True
                    yield Note(f"waiting: {str(error).partition(';')[0]}")
            job.stop.check("nothing was being written")
            time.sleep(WAITED)

    def lost(self, job: Job) -> str:
        """What training would miss of the cache."""
        from cmkit.plan import kept

        if "train" in job.status:
            return ""
        for store in kept(job.plan).stores:
            for shard, fault in store.missing().items():
                return f"{store.path}: file {shard} is {fault}"
        return ""

    def line(self, result: Mapping[str, Any]) -> str:
        from cmkit.report.figures import number

        counts = [f"{number(result[k])} {k}" for k in ("pictures", "prompts") if result[k]]
        return ", ".join([*counts, f"{number(result['bytes'] / 2**20)} MiB"])


def _rows(store: Store, shards: Mapping[int, str]) -> int:
    return sum(len(store.shards[shard]) for shard in shards)
