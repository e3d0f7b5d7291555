"""The folder of a run: every file in it is named, written and read here.

Imports no torch: reports and comparisons read a folder without it.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import json
import re
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cmkit import files, hub
from cmkit.errors import CheckpointError, DataError, ResourceError
from cmkit.runs.places import chosen, named, roots, runs_below
from cmkit.values import DataSpec

if TYPE_CHECKING:
    from torch import Tensor

SCHEMA = 2
"""Of report.json, with its own digest; a report of schema 1 has none."""
STAGE_FILES = {
    "cache": (),
    "train": ("model.safetensors", "log.jsonl", "shown.jsonl", "shown/*.png"),
    "search": ("search/*.jsonl", "search/*.png", "search.json", "rescaling.json"),
    "sample": ("samples/*.npz", "samples.jsonl", "samples_*.png"),
    "metric": (),
}
"""What a finished stage leaves, for its digests; another stage has a folder of its name."""


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
        self._inputs = path / "inputs.json"
        self._starts = path / "starts.jsonl"
        self._log = path / "log.jsonl"
        self._search = path / "search"
        self._unfinished = self._search / "unfinished.safetensors"
        self._drawn = path / "samples.jsonl"
        self._shown = path / "shown.jsonl"
        self._measured = path / "measured.jsonl"

    @classmethod
    def of_weights(cls, weights: str) -> RunFolder:
        """The folder that the key `weights` of a recipe names: a run, or a run's weights."""
        path = cls.at(chosen(weights)[0]).path
        return cls(path.parent if path.name == "model.safetensors" else path)

    @classmethod
    def at(cls, place: str) -> RunFolder:
        """The folder that a user names: a path, "run:NAME-KEY", or "hub:OWNER/NAME"."""
        if place.startswith("hub:"):
            return cls(hub.run_folder(place))
        if place.startswith("run:"):
            return cls(named(place[4:]))
        return cls(Path(place.removeprefix("path:")).expanduser())

    def siblings(self) -> list[RunFolder]:
        """The other runs beside this one and in the folders where runs are found, newest first."""
        own, found = self.path.resolve(), runs_below((self.path.parent, *roots()))
        return [RunFolder(path) for path in found if path.resolve() != own]

    def checkpoint(self, step: int | Literal["best"]) -> Path:
        """The checkpoint of a step, or the folder of the best by score; it need not be there."""
        return self.checkpoints / (step if step == "best" else f"step-{step:08d}")

    def steps(self) -> list[int]:
        """The steps of the checkpoints, rising, intact or not."""
        names = (path.name for path in self.checkpoints.glob("step-*"))
        return sorted(int(name[5:]) for name in names if re.fullmatch(r"step-\d{8,18}", name))

    def with_checkpoints(self) -> RunFolder:
        """The run itself, or where it has no checkpoints the one that its training is that of."""
        key = self.inputs().get("keys", {}).get("train")
        for other in self.siblings() if key and not self.steps() else ():
            with contextlib.suppress(CheckpointError):
                if other.steps() and other.inputs().get("keys", {}).get("train") == key:
                    return other
        return self

    def newest_weights(self) -> Path:
        """The weights, or the checkpoints where training goes on; the folder itself where it is
        no run's."""
        return next((p for p in (self.weights, self.checkpoints) if p.exists()), self.path)

    def held(self) -> AbstractContextManager[int]:
        """`files.lock` of the folder, which is made where it is not there."""
        return files.lock(self.path)

    def holder(self) -> str:
        """Who holds the folder, such as "pid 1 on host since ..", or "" where nobody does."""
        with contextlib.suppress(OSError), (self.path / ".lock").open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return file.read(4096).strip() or "another process"
        return ""

    def keep_recipe(self, text: str) -> None:
        """Write recipe.toml, unless it stands there: see `check_recipe`."""
        if self.recipe.exists():
            self.check_recipe()
        else:
            files.atomic_write(self.recipe, text)

    @functools.cached_property
    def smoke(self) -> bool:
        """Whether its recipe says that pictures and numbers mean nothing."""
        with contextlib.suppress(CheckpointError, ValueError):
            return bool(tomllib.loads(files.read_bytes(self.recipe).decode()).get("smoke"))
        return False

    def check_recipe(self) -> None:
        """CheckpointError where recipe.toml is not the one that the run was begun with."""
        digest = self.inputs().get("recipe")
        same = digest == files.sha256_of(self.recipe)
        if digest is None:  # begun by an earlier cmkit
            with contextlib.suppress(ValueError):
                same = bool(tomllib.loads(files.read_bytes(self.recipe).decode()))
        if not same:
            raise CheckpointError(
                f"{self.recipe}: is not the recipe that this folder is named after; restore it, or"
                " run with another --out"
            )

    def inputs(self) -> dict[str, Any]:
        """What the run was begun with: "inputs" by table, "keys" by stage, digest of the "recipe",
        and "home", the working folder, from which relative paths count; empty for a folder of an
        earlier cmkit. CheckpointError where it is damaged."""
        try:
            return files.unsealed(self._inputs) if self._inputs.exists() else {}
        except CheckpointError as error:
            raise CheckpointError(
                f"{error}; restore it from a copy, or run with another --out"
            ) from error

    def keep_inputs(self, inputs: Mapping[str, Any], keys: Mapping[str, str]) -> None:
        """Write `inputs()`."""
        recipe, home = files.sha256_of(self.recipe), str(Path.cwd())
        content = {"inputs": inputs, "keys": keys, "recipe": recipe, "home": home}
        files.atomic_write(self._inputs, files.sealed(content))

    def migrate(self) -> None:
        """Give the records of a run that an earlier cmkit began their digests, as they stand."""
        for path in (self._log, *self._search.glob("*.jsonl")):
            if records := files.read_jsonl(path):
                lines = (files.jsonl_line(record, path) for record in records)
                files.atomic_write(path, b"".join(lines))
        if self._status.exists():
            status = self.status()
            self.keep_status({k: {**v, "files": self.digests(k)} for k, v in status.items()})

    @property
    def begun(self) -> bool:
        """Whether anything of the run's work may be here."""
        files = (self._inputs, self._log, self._status, self._search, self.samples)
        return any(path.exists() for path in (*files, self.checkpoints))

    @property
    def earlier(self) -> bool:
        """Whether an earlier cmkit, which kept no inputs and no starts, wrote all that is here."""
        return not (self._inputs.exists() or self._starts.exists())

    @property
    def checked(self) -> bool:
        """Whether every line of a log has its CRC, as an earlier cmkit's have not."""
        return self._inputs.exists()

    def starts(self) -> list[dict[str, Any]]:
        """The environments of the starts of this run, in order."""
        return files.read_jsonl(self._starts, checked=True)

    def append_start(self, environment: Mapping[str, Any]) -> None:
        """Add the environment of one start."""
        files.append_jsonl(self._starts, environment, durable=True)

    def status(self) -> dict[str, dict[str, Any]]:
        """The finished stages: of each its "result", "key" and digests of its "files"; the result
        alone, where an earlier cmkit finished it. CheckpointError where it is damaged."""
        if not self._status.exists():
            return {}
        try:
            status = files.read_json(self._status)
            if "stages" in status or self.checked:
                status = files.unsealed(self._status)["stages"]
            else:
                status = {name: {"result": result} for name, result in status.items()}
            if not all(isinstance(stage["result"], dict) for stage in status.values()):
                raise ValueError("not what cmkit wrote")
        except (CheckpointError, ValueError, TypeError, KeyError, AttributeError) as error:
            reason = str(error).removeprefix(f"{self._status}: ").partition(";")[0]
            raise CheckpointError(
                f"{self._status}: {reason}; delete it to redo the stages"
            ) from error
        return status

    def keep_status(self, status: Mapping[str, Mapping[str, Any]]) -> None:
        """Write `status()`."""
        files.atomic_write(self._status, files.sealed({"stages": status}))

    def keep_search(self, result: Mapping[str, Any], policy: str) -> None:
        """Write search.json, for other programs, and the text `policy` of rescaling.json."""
        files.atomic_write(self.path / "rescaling.json", policy)
        files.atomic_write(self.path / "search.json", json.dumps(result, indent=1) + "\n")

    def digests(self, stage: str) -> dict[str, str]:
        """SHA-256 of each file of a stage, by its path in the folder."""
        globs = STAGE_FILES.get(stage, (f"{stage}/*",))
        paths = (path for glob in globs for path in sorted(self.path.glob(glob)))
        return {str(path.relative_to(self.path)): files.sha256_of(path) for path in paths}

    def damage(self, stage: str, finished: Mapping[str, Any]) -> dict[str, str]:
        """What is wrong with the files of a `finished` stage: "missing" or "damaged", by file."""
        found = {}
        for name, digest in finished.get("files", {}).items():
            path = self.path / name
            if not path.exists():
                found[name] = "missing"
            elif files.sha256_of(path) != digest:
                found[name] = "damaged"
        return found

    def winner(self) -> dict[str, Any]:
        """The rescaler's values that the search found best; none before it is finished."""
        found = self.status().get("search", {}).get("result")
        return {axis: found["best"][axis] for axis in found["axes"]} if found else {}

    @property
    def reported(self) -> bool:
        """Whether report.json is there."""
        return self._report.exists()

    @property
    def finished(self) -> bool:
        """Whether the run has its report; without status.json its stages are to be done again."""
        return self.reported and self._status.exists()

    def report(self) -> dict[str, Any]:
        """report.json; CheckpointError where it is missing or not one that cmkit wrote."""
        path = self._report
        if not path.exists():
            raise CheckpointError(
                f"{path}: no such file; give the folder of a finished run, such as"
                " runs/NAME-KEY: `cmkit run` writes it when every stage is done"
            )
        try:
            report = files.read_json(path)
            schema = report.get("schema")
            if schema == SCHEMA:
                report = files.unsealed(path)
            elif schema != 1 or "sha256" in report or self.checked:
                raise CheckpointError(f"schema {schema!r}, but this cmkit reads {SCHEMA} and 1")
        except CheckpointError as error:
            reason = str(error).removeprefix(f"{path}: ").partition(";")[0]
            raise CheckpointError(
                f"{path}: {reason}; delete it and run the recipe again"
            ) from error
        return report

    def keep_report(self, report: Mapping[str, Any]) -> None:
        """Write report.json."""
        files.atomic_write(self._report, files.sealed(report))

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
            data: dict[str, Any] = self.report()["data"]
            lists = {key: tuple(v) for key, v in data.items() if isinstance(v, list)}
            return DataSpec(**{**data, **lists})
        except (CheckpointError, KeyError, TypeError, AttributeError):
            return None  # it is of an earlier version, or yet to be written

    def log(self) -> list[dict[str, Any]]:
        """The records of the training log, without damaged lines."""
        records = files.read_jsonl(self._log, self.checked)
        return [record for record in records if isinstance(record.get("step"), int)]

    def append_log(self, record: Mapping[str, Any], durable: bool = False) -> None:
        """Add a record to the training log; `durable` before a checkpoint is saved."""
        files.append_jsonl(self._log, record, durable)

    def rewind_log(self, step: int) -> None:
        """Drop what the training log holds of steps behind `step`."""

        def kept(record: Mapping[str, Any]) -> bool:
            return isinstance(record.get("step"), int) and record["step"] <= step

        files.truncate_jsonl(self._log, kept, self.checked)

    def scores(self, name: str) -> tuple[dict[int, dict[str, Any]], int]:
        """The records "cells", "rerank" or "confirm" of a search, by their index, and how many
        lines were damaged, which are removed."""
        files.make_folder(self._search)
        path = self._search / f"{name}.jsonl"
        lost = files.damaged_lines(path, self.checked)
        files.truncate_jsonl(path, lambda record: "index" in record, self.checked)
        return {r["index"]: r for r in files.read_jsonl(path, self.checked)}, lost

    def append_score(self, name: str, record: Mapping[str, Any]) -> None:
        """Add one record to those of `scores`."""
        files.append_jsonl(self._search / f"{name}.jsonl", record)

    def keep_unfinished(self, tensors: Mapping[str, Tensor], about: Mapping[str, str]) -> None:
        """Write what there is of cells that are being drawn, for `unfinished`."""
        from safetensors.torch import save

        from cmkit.tensors import digest

        seal = digest(tensors, about)
        files.atomic_write(self._unfinished, save(dict(tensors), {**about, "sha256": seal}))

    def unfinished(self) -> tuple[dict[str, Tensor], dict[str, str]] | None:
        """What `keep_unfinished` wrote; None where nothing intact is there: it only saves time."""
        from cmkit.tensors import digest, read_with_metadata

        if not self._unfinished.exists():
            return None
        try:
            tensors, about = read_with_metadata(self._unfinished)
        except CheckpointError:
            return None
        return (tensors, about) if about.pop("sha256", None) == digest(tensors, about) else None

    def drop_unfinished(self) -> None:
        """Remove what `keep_unfinished` wrote."""
        self._unfinished.unlink(missing_ok=True)

    def sample_files(self) -> list[Path]:
        """Arrays of samples, in order; a file is named after its first image."""
        return sorted(self.samples.glob(f"{'[0-9]' * 7}.npz"))

    def intact_samples(self) -> tuple[int, list[str]]:
        """How many samples, from the first on, are kept in intact files; and the names of damaged
        ones. They, and what lies behind a gap, are removed, to be drawn again."""
        kept, bad = 0, []
        drawn = {r["file"]: r for r in files.read_jsonl(self._drawn, checked=True)}
        for path in self.sample_files():
            said = drawn.get(path.name, {})
            if kept == int(path.stem) and said.get("sha256") == files.sha256_of(path):
                kept += said["images"]
                continue
            if kept == int(path.stem):
                bad.append(path.name)
            path.unlink()
        return kept, bad

    def keep_samples(self, first: int, images: int, npz: bytes) -> None:
        """Write the samples from image `first` on."""
        files.make_folder(self.samples)
        path = self.samples / f"{first:07d}.npz"
        files.atomic_write(path, npz)
        record = {"file": path.name, "images": images, "sha256": files.sha256_of(path)}
        files.append_jsonl(self._drawn, record)

    def shown(self, about: str) -> dict[int, str]:
        """The names, for `picture`, of the intact pictures of a training that were drawn as the
        digest `about` says, by step."""
        found = {}
        for record in files.read_jsonl(self._shown, checked=True):
            path = self.path / record["picture"]
            same = record["about"] == about and path.exists()
            if same and files.sha256_of(path) == record["sha256"]:
                found[record["step"]] = record["picture"]
        return found

    def keep_shown(self, step: int, about: str, png: bytes) -> str:
        """Write the picture of a step of the training for `shown`; its name there."""
        files.make_folder(self.path / "shown")
        name = self.keep_picture(f"shown/step-{step:08d}", png)
        digest = files.sha256_of(self.path / name)
        record = {"step": step, "picture": name, "about": about, "sha256": digest}
        files.append_jsonl(self._shown, record)
        return name

    def of_tracker(self, name: str) -> Path:
        """The folder of a tracker, made where it is not there."""
        path = self.path / "trackers" / name.replace(":", "-")
        files.make_folder(path)
        return path

    def keep_picture(self, name: str, png: bytes) -> str:
        """Write the picture `name`.png, that of a smoke run stamped; its name for `picture`."""
        if self.smoke:
            from cmkit.pictures import stamped

            png = stamped(png)
        files.atomic_write(self.path / f"{name}.png", png)
        return f"{name}.png"

    def measured(self) -> list[dict[str, Any]]:
        """What `cmkit measure` found, in order."""
        return files.read_jsonl(self._measured, checked=True)

    def append_measured(self, record: Mapping[str, Any]) -> None:
        """Add one record to those of `measured`."""
        files.append_jsonl(self._measured, record, durable=True)

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
