"""The record that a recipe file becomes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from cmkit.recipe.tables import (
    PART_TABLES,
    DenoiserTable,
    ExpectedTable,
    SampleTable,
    SearchTable,
    TeacherTable,
    TrainTable,
)
from cmkit.recipe.toml import Source

if TYPE_CHECKING:
    from cmkit.kinds import Backbone, Dataset, Metric, Objective, Precond, Rescaler, Sampler
    from cmkit.values import DataSpec


@dataclass(frozen=True)
class Recipe:
    """A recipe whose every value is known; parts are instances of their plugins' classes."""

    name: str
    seed: int
    dataset: Dataset
    backbone: Backbone
    denoiser: DenoiserTable
    precond: Precond
    teacher: TeacherTable | None
    teacher_precond: Precond | None
    teacher_backbone: Backbone | None
    """None = the student's."""
    objective: Objective | None
    rescaler: Rescaler | None
    sampler: Sampler | None
    stages: Mapping[str, Any]
    """What a run shall do, in order: each stage's table, which carries itself out, by its name."""
    expected: ExpectedTable | None
    metric: tuple[Metric, ...]
    resolved: Mapping[str, Any]
    source: Source
    data: DataSpec | None = None
    """What is known of the data where they need not be asked, as of a finished run."""

    @property
    def train(self) -> TrainTable | None:
        return cast("TrainTable | None", self.stages.get("train"))

    @property
    def search(self) -> SearchTable | None:
        return cast("SearchTable | None", self.stages.get("search"))

    @property
    def sample(self) -> SampleTable | None:
        return cast("SampleTable | None", self.stages.get("sample"))

    @property
    def hash(self) -> str:
        """First 8 hexadecimal digits of the SHA-256 of the resolved recipe."""
        canonical = json.dumps(self.resolved, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()[:8]

    def used(self) -> Iterator[tuple[str, str]]:
        """(kind, name) of each part."""
        for kind in PART_TABLES:
            if kind in self.resolved:
                yield kind, self.resolved[kind]["use"]
        yield "precond", _used(self.denoiser.precond)
        if self.teacher:
            yield "precond", _used(self.teacher.precond)
        if self.teacher_backbone:
            yield "backbone", self.resolved["teacher"]["backbone"]["use"]
        for table in self.resolved.get("metric", ()):
            yield "metric", table["use"]

    def toml(self) -> str:
        """The resolved recipe, every default written out."""
        import tomlkit

        return tomlkit.dumps(self.resolved)


def _used(precond: str | Mapping[str, Any]) -> str:
    return precond if isinstance(precond, str) else precond["use"]
