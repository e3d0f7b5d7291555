"""The folder of a run: every file in it is named, written and read here.

Imports no torch: reports and comparisons read a folder without it.
"""

from __future__ import annotations

import contextlib
import json
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cmkit import files
from cmkit.errors import CheckpointError, DataError, ResourceError
from cmkit.values import DataSpec

if TYPE_CHECKING:
    from torch import Tensor

SCHEMA = 1
"""Of report.json."""


class RunFolder:
    """The folder `path` of a run; it need not be there yet."""

    def __init__(self, path: Path):
        self.path = path
        self.recipe = path / "recipe.toml"
        """The resolved recipe, which makes a folder that of a run."""
        self.weights = path / "model.safetensors"
        """What training left: the first of its averages."""
        self.checkpoints = path / "checkpoints"
        self.samples = path / "samples"
        self.page = path / "report.html"
        self.debug_log = path / "debug.log"
        self._report = path if path.suffix == ".json" else path / "report.json"
        self._status = path / "status.json"
        self._log = path / "log.jsonl"
        self._search = path / "search"
        self._unfinished = self._search / "unfinished.safetensors"

    @classmethod
    def of_weights(cls, weights: str) -> RunFolder:
        """The folder that the key `weights` of a recipe names: a run, or a run's weights."""
        path = Path(weights.removeprefix("path:"))
        return cls(path.parent if path.name == "model.safetensors" else path)

    def newest_weights(self) -> Path:
        """The weights, or the checkpoints where training goes on; the folder itself where it is
        no run's."""
        return next((p for p in (self.weights, self.checkpoints) if p.exists()), self.path)

    def held(self) -> AbstractContextManager[None]:
        """`files.lock` of the folder, which is made where it is not there."""
        return files.lock(self.path)

    def keep_recipe(self, text: str) -> None:
        """Write recipe.toml, once; CheckpointError where another recipe stands there."""
        if not self.recipe.exists():
            files.atomic_write(self.recipe, text)
            return
        try:
            same = tomllib.loads(self.recipe.read_text("utf-8")) == tomllib.loads(text)
        except ValueError:
            same = False
        if not same:
            raise CheckpointError(
                f"{self.recipe}: is not the recipe that this folder is named after; restore it, or"
                " run with another --out"
            )

    def keep(
        self, name: Literal["environment", "status", "search", "report"], content: Mapping[str, Any]
    ) -> None:
        """Write `name`.json: what decides the bits of this start, the results of the finished
        stages, those of the search, or the report."""
        text = json.dumps(content, indent=1, allow_nan=False) + "\n"
        files.atomic_write(self.path / f"{name}.json", text)

    def status(self) -> dict[str, Any]:
        """The results of the finished stages, by stage."""
        try:
            return dict(json.loads(self._status.read_text("utf-8")))
        except FileNotFoundError:
            return {}
        except ValueError as error:
            raise CheckpointError(
                f"{self._status}: damaged ({error}); delete it to redo the stages"
            ) from error

    def winner(self) -> dict[str, Any]:
        """The rescaler's values that the search found best; none before it is finished."""
        found = self.status().get("search")
        return {axis: found["best"][axis] for axis in found["axes"]} if found else {}

    def report(self) -> dict[str, Any]:
        """report.json; CheckpointError where it is missing or not one that cmkit wrote."""
        path = self._report
        try:
            report = json.loads(path.read_text("utf-8"))
        except OSError as error:
            raise CheckpointError(
                f"{path}: {error.strerror}; give the folder of a finished run, such as"
                " runs/NAME-HASH: `cmkit run` writes it when every stage is done"
            ) from error
        except ValueError as error:
            raise CheckpointError(f"{path}: damaged ({error}); run the recipe again") from error
        schema = report.get("schema") if isinstance(report, dict) else None
        if schema != SCHEMA:
            raise CheckpointError(
                f"{path}: schema {schema!r}, but this cmkit reads {SCHEMA}; run the recipe again"
            )
        return dict(report)

    @contextlib.contextmanager
    def reading_report(self) -> Iterator[dict[str, Any]]:
        """`report()`; inside, an odd field of it becomes a CheckpointError, and an OSError of the
        folder's files a ResourceError."""
        report, path = self.report(), self._report
        try:
            yield report
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise CheckpointError(
                f"{path}: not a report that cmkit wrote ({type(error).__name__}: {error}); run the"
                " recipe again"
            ) from error
        except OSError as error:
            raise ResourceError(
                f"{error.filename or path}: cannot be read: {error.strerror}; mend it, then run"
                " again"
            ) from error

    def data(self) -> DataSpec | None:
        """Shape of the data, by the report of a finished run; None without one."""
        try:
            return DataSpec(**self.report()["data"])
        except (CheckpointError, KeyError, TypeError):
            return None  # it is of an earlier version, or yet to be written

    def log(self) -> list[dict[str, Any]]:
        """The records of the training log, without torn lines."""
        return files.read_jsonl(self._log)

    def append_log(self, record: Mapping[str, Any], durable: bool = False) -> None:
        """Add a record to the training log; `durable` before a checkpoint is saved."""
        files.append_jsonl(self._log, record, durable)

    def rewind_log(self, step: int) -> None:
        """Drop what the training log holds of steps behind `step`."""
        files.truncate_jsonl(self._log, lambda record: record["step"] <= step)

    def scores(self, name: str) -> list[dict[str, Any]]:
        """The records "cells", "rerank" or "confirm" of a search; a torn last line is removed."""
        self._search.mkdir(exist_ok=True)
        path = self._search / f"{name}.jsonl"
        files.truncate_jsonl(path, lambda record: True)
        return files.read_jsonl(path)

    def append_score(self, name: str, record: Mapping[str, Any]) -> None:
        """Add one record to those of `scores`."""
        files.append_jsonl(self._search / f"{name}.jsonl", record)

    def keep_unfinished(self, tensors: Mapping[str, Tensor], about: Mapping[str, str]) -> None:
        """Write what there is of cells that are being drawn, for `unfinished`."""
        from safetensors.torch import save

        files.atomic_write(self._unfinished, save(dict(tensors), dict(about)))

    def unfinished(self) -> tuple[dict[str, Tensor], dict[str, str]] | None:
        """What `keep_unfinished` wrote; None where nothing can be read, as it only saves time."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self._unfinished, "pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
        except (FileNotFoundError, SafetensorError):
            return None

    def drop_unfinished(self) -> None:
        """Remove what `keep_unfinished` wrote."""
        self._unfinished.unlink(missing_ok=True)

    def sample_files(self) -> list[Path]:
        """Arrays of samples, in order; a file is named after its first image."""
        return sorted(self.samples.glob(f"{'[0-9]' * 7}.npz"))

    def keep_samples(self, first: int, npz: bytes) -> None:
        """Write the samples from image `first` on."""
        self.samples.mkdir(exist_ok=True)
        files.atomic_write(self.samples / f"{first:07d}.npz", npz)

    def keep_picture(self, name: str, png: bytes) -> str:
        """Write the picture `name`.png; its name for `picture`."""
        files.atomic_write(self.path / f"{name}.png", png)
        return f"{name}.png"

    def picture(self, name: str) -> Path:
        """A picture that the report names; DataError where that is outside the folder."""
        path = (self.path / name).resolve()
        if Path(name).is_absolute() or not path.is_relative_to(self.path.resolve()):
            raise DataError(
                f"{self._report}: picture {name!r} is outside the run's folder;"
                " correct it, or run the recipe again"
            )
        return path

    def keep_page(self, html: str) -> None:
        """Write report.html."""
        files.atomic_write(self.page, html)


def make_out(path: Path) -> None:
    """Make the folder `path` that --out names, or one in it; ResourceError where it cannot be."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ResourceError(
            f"{path}: cannot be made: {error.strerror}; name another place with --out"
        ) from error
