"""The record that a recipe file becomes."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from cmkit.recipe.search_table import SearchTable
from cmkit.recipe.tables import (
    PART_TABLES,
    CacheTable,
    DenoiserTable,
    ExpectedTable,
    SampleTable,
    TeacherTable,
    TrainTable,
    kinds_inside,
)
from cmkit.recipe.toml import Source

if TYPE_CHECKING:
    from cmkit.kinds import (
        Adapter,
        Backbone,
        Codec,
        Dataset,
        Metric,
        Objective,
        Precond,
        Rescaler,
        Sampler,
        TextEncoder,
        Tracker,
    )
    from cmkit.values import DataSpec


@dataclass(frozen=True)
class Teacher:
    """The table [teacher] with its parts; the backbone is the student's where it names none."""

    table: TeacherTable
    precond: Precond
    backbone: Backbone


@dataclass(frozen=True)
class Recipe:
    """A recipe whose every value is known; parts are instances of their plugins' classes."""

    name: str
    seed: int
    dataset: Dataset
    codec: Codec | None
    text: TextEncoder | None
    backbone: Backbone
    denoiser: DenoiserTable
    precond: Precond
    teacher: Teacher | None
    objective: Objective | None
    rescaler: Rescaler | None
    sampler: Sampler | None
    stages: Mapping[str, Any]
    """The stages of a run in order, by name; each is its table and carries itself out."""
    expected: ExpectedTable | None
    metric: tuple[Metric, ...]
    resolved: Mapping[str, Any]
    source: Source
    data: DataSpec | None = None
    """Shape of the data where it is known without reading them: of a finished run."""
    adapter: Adapter | None = None
    tracker: tuple[Tracker, ...] = ()
    """What is told the events of a run; they are no part of its key."""
    smoke: bool = False
    """Whether its numbers mean nothing: see `cmkit.smoke`."""

    @property
    def cache(self) -> CacheTable | None:
        return self.stages.get("cache")

    @property
    def train(self) -> TrainTable | None:
        return self.stages.get("train")

    @property
    def search(self) -> SearchTable | None:
        return self.stages.get("search")

    @property
    def sample(self) -> SampleTable | None:
        return self.stages.get("sample")

    @property
    def needs(self) -> frozenset[str]:
        """What the objective needs; nothing where there is none."""
        return self.objective.needed() if self.objective else frozenset()

    def compared_with(self, metric: Metric) -> Dataset:
        """The data set with whose images a metric compares; RecipeError where these are to be held
        out and none are."""
        found = self.dataset.heldout() if metric.heldout else self.dataset
        if found is None:
            use = self.resolved["dataset"]["use"]
            index = [m.heldout for m in self.metric].index(True)
            raise self.source.error(
                ("metric", index, "heldout"),
                f"dataset {use} has no images beside those of its batches; choose its training"
                " split if it has one, or drop the key",
                " = true",
            )
        return found

    def sampler_in(self, steps: int) -> Sampler:
        """The sampler with another number of steps; RecipeError where it cannot take that."""
        assert self.sampler is not None
        use, where = self.resolved["sampler"]["use"], ("sample", "show_steps")
        if "steps" not in type(self.sampler).model_fields:
            raise self.source.error(
                where, f"sampler {use} has no key `steps`; drop show_steps, or choose another"
            )
        try:
            return type(self.sampler).model_validate({**self.sampler.model_dump(), "steps": steps})
        except ValidationError as error:
            reason = error.errors()[0]["msg"].removeprefix("Value error, ")
            raise self.source.error(
                where, f"sampler {use} cannot take steps = {steps}: {reason}"
            ) from error

    def used(self) -> Iterator[tuple[str, str]]:
        """(kind, name) of each part."""
        said = [(kind, self.resolved[kind]) for kind in PART_TABLES if kind in self.resolved]
        for key in ("denoiser", "teacher"):
            table = self.resolved.get(key, {})
            said += [(kind, table[kind]) for kind in kinds_inside(table)]
        for kind in ("metric", "tracker"):
            said += [(kind, table) for table in self.resolved.get(kind, ())]
        for kind, part in said:
            yield kind, part if isinstance(part, str) else part["use"]

    def said(self, *but: str) -> str:
        """The options --set that were given, without those of the keys `but`."""
        given = self.source.overrides.items()
        words = (shlex.quote(item) for path, item in given if ".".join(path) not in but)
        return "".join(f" --set {word}" for word in words)

    def toml(self) -> str:
        """The resolved recipe, every default written out."""
        import tomlkit

        return tomlkit.dumps(self.resolved)
