"""The tables of a recipe that belong to no part: their keys, bounds and defaults."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from importlib import import_module
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from cmkit.kinds import CLASSES, Part
from cmkit.values import DataSpec

Precision = Literal["auto", "fp32", "bf16"]
Decay = Annotated[float, Field(gt=0, lt=1)]
Count = Annotated[int, Field(ge=1, le=10**9)]
Batch = Annotated[int, Field(ge=1, le=2**20)]
MAX_CELLS = 10_000
"""Of a search; the paper's have 121."""
MAX_NODES = 1024
"""Of a search by interpolation."""
DRAWN_CELLS = 5
"""Cells beside the nodes that such a search draws to see how good it is: (1, 1), three by lot, and
the winner."""


class DenoiserTable(Part):
    """How a network becomes a denoiser, and where its weights come from."""

    read_by = {"guidance": ("search", "sample")}

    precond: str | dict[str, Any] = "consistency"
    """What its inputs and output mean: "consistency" for a consistency model, "edm" for a diffusion
    teacher, or a table with `use` and the options of another precond."""
    sigma_data: float = Field(0.5, gt=0, le=100)
    """Standard deviation of the data."""
    sigma_min: float = Field(0.002, gt=0, le=1)
    """Noise level at which a consistency model is the identity; other preconds have defaults of
    their own."""
    sigma_max: float = Field(80.0, gt=0, le=1e6)
    """Noise level that sampling starts from; other preconds have defaults of their own."""
    rho: float = Field(7.0, ge=1, le=100)
    """Curvature of the Karras grid."""
    weights: str | None = None
    """Weights to start from: a .safetensors file, a checkpoint folder, or a run folder."""
    init: Literal["teacher", "random"] | None = None
    """What training starts from without `weights`: beside a [teacher] it must be said."""
    guidance: float | None = Field(None, ge=-1, le=1000)
    """Classifier-free guidance while sampling: w of x0_hat + w (x0_hat - x0_hat without label), the
    usual scale less 1. It doubles the evaluations unless the network embeds w."""
    embeds_guidance: bool = False
    """Whether the network of `weights` embeds w; known where the recipe has its objective."""

    @model_validator(mode="after")
    def _levels_rise(self) -> DenoiserTable:
        if self.sigma_min >= self.sigma_max:
            raise ValueError(f"sigma_min {self.sigma_min} must be below sigma_max {self.sigma_max}")
        if self.init and self.weights:
            raise ValueError(f"init {self.init!r} and weights exclude each other; drop one")
        return self


class TeacherTable(Part):
    """A frozen model to distil."""

    weights: str
    """Weights of the teacher: a .safetensors file, a checkpoint folder, or a run folder."""
    precond: str | dict[str, Any] = "edm"
    """What its inputs and output mean: "edm" for a diffusion model, "consistency" for a consistency
    model, or a table with `use` and the options of another precond."""
    sigma_data: float | None = Field(None, gt=0, le=100)
    """Standard deviation of the data that it was trained with; absent = the student's."""
    sigma_min: float | None = Field(None, ge=0, le=1)
    """Lowest noise level that it was trained on; absent = what its precond knows, or the
    student's."""
    sigma_max: float | None = Field(None, gt=0, le=1e6)
    """Highest noise level that it was trained on; absent = what its precond knows, or the
    student's."""
    conditions: tuple[Literal["label", "text"], ...] | None = Field(None, max_length=2)
    """What it embeds; absent = what the data have."""
    backbone: str | dict[str, Any] | None = None
    """Its network, a table with `use` and options; absent = the student's."""


class StageTable(Part):
    """A table that makes something happen: a stage of a run (see `STAGES`)."""

    needs: ClassVar[tuple[str, ...]] = ()
    """Tables that must stand beside it."""
    title: ClassVar[str] = ""
    """What a person calls it."""
    reads: ClassVar[tuple[str, ...]] = ()
    """Tables that decide its result, beside its own and the stages before it."""


class TrainTable(StageTable):
    """The keys of [train]."""

    read_by = {"log_every": (), "save_every": (), "keep": ()}

    steps: Count
    """Optimizer steps."""
    batch: Batch
    """Images a step."""
    lr: float = Field(1e-4, gt=0, le=10)
    """Learning rate."""
    optimizer: Literal["radam", "adamw"] = "radam"
    """RAdam is what the papers use."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (
        0.9,
        0.999,
    )
    """Momentum decays of the optimizer."""
    weight_decay: float = Field(0.0, ge=0, le=1)
    """Weight decay, decoupled."""
    warmup: int = Field(0, ge=0, le=10**9)
    """Steps over which the learning rate rises linearly from 0."""
    decay: bool = False
    """Let the learning rate fall to 0 along a half cosine after the warm-up."""
    sqrt_decay: Count | None = None
    """Steps after which the learning rate falls as 1 / sqrt(step), instead of `decay`."""
    clip_norm: float | None = Field(None, gt=0, le=1e9)
    """Largest norm of the whole gradient of a network."""
    accumulate: int = Field(1, ge=1, le=2**20)
    """Backward passes a step; divides `batch`."""
    ema: tuple[Decay, ...] = Field((0.999,), min_length=1)
    """Decays of the averaged copies; samples come from the first."""
    ema_warmup: bool = True
    """Cap a decay by (1 + step) / (10 + step), so that early weights are forgotten."""
    precision: Precision = "auto"
    """Autocast: bf16 where the device gains by it, unless told."""
    compile: bool = False
    """Compile the network with torch.compile."""
    save_every: Count = 1000
    """Steps between checkpoints."""
    keep: int = Field(2, ge=1, le=1000)
    """Checkpoints kept."""
    start: str | None = None
    """A run to go on from, as RUN or RUN@STEP: its weights, averages, optimizer and step, under
    this recipe's numbers. `cmkit run RECIPE --from RUN` says it."""
    log_every: Count = 50
    """Steps between log lines."""

    @model_validator(mode="after")
    def _keys_agree(self) -> TrainTable:
        if self.batch % self.accumulate:
            raise ValueError(f"batch {self.batch} is not divisible by accumulate {self.accumulate}")
        if self.decay and self.sqrt_decay:
            raise ValueError(f"decay = true and sqrt_decay = {self.sqrt_decay}: choose one of them")
        return self

    def smallest(self, data: DataSpec) -> Mapping[str, Any]:
        few = {key: getattr(self, key) and 2 for key in ("warmup", "sqrt_decay")}
        sizes = {"steps": min(self.steps, 3), "batch": 4, "accumulate": min(self.accumulate, 2)}
        return {**sizes, **few, "save_every": 2, "log_every": 1, "compile": False, "start": None}


def _fitted(axes: int, degree: int) -> int:
    """Nodes that fit a polynomial of a total degree: half as many again as it has terms."""
    return math.ceil(1.5 * math.comb(axes + degree, degree))


OF_METHOD = {"rounds": "coordinate", "tolerance": "surrogate", "candidates": "surrogate"}
"""Keys of [search] that only one method reads."""


class SearchTable(StageTable):
    """The keys of [search]."""

    PRODUCT: ClassVar[int] = 3
    """Up to so many numbers, "surrogate" interpolates on a grid of nodes."""

    images: int = Field(ge=2, le=10**7)
    """Images a cell."""
    grid: dict[str, Annotated[tuple[float, ...], Field(min_length=1, max_length=1000)]] = Field(
        min_length=1, max_length=256
    )
    """Values of each of the rescaler's numbers: of a field such as skip, or, in
    quotation marks, of a part of it such as "skip.3", where the rescaler has parts."""
    method: Literal["grid", "coordinate", "surrogate"] | None = None
    """Which cells are tried: "grid", the default, every combination; "coordinate" one number after
    the other, the others at their best so far and at first the rescaler's own; "surrogate" every
    combination as well, most of them with images that are interpolated from those of few."""
    rounds: int | None = Field(None, ge=1, le=100)
    """How often "coordinate" goes through the numbers; absent = once."""
    tolerance: float | None = Field(None, gt=0)
    """How far an interpolated score of "surrogate" may be from the exact one, in cells that are
    drawn to see it; absent = the standard error of the winner's own score."""
    candidates: int | None = Field(None, ge=2, le=MAX_CELLS)
    """Most cells that "surrogate" scores, absent = 1000. Of a grid with more it takes half as many
    by lot, and goes on from the best of them one number after the other."""
    minimize: str = "fid"
    """The metric's number that decides."""
    batch: Batch = 64
    """Images at a time."""
    precision: Precision = "auto"
    """Autocast while sampling."""
    rerank: int = Field(5, ge=0, le=1000)
    """Best cells that are scored again on more images, before the winner is chosen; 0 = none."""
    rerank_images: int = Field(0, ge=0, le=10**7)
    """Images a cell then; 0 = four times `images`."""
    confirm_images: int = Field(0, ge=0, le=10**7)
    """Images a seed when the winner meets the unscaled model on fresh noise; 0 = as `images`."""
    confirm_seeds: int = Field(5, ge=2, le=1000)
    """Noise seeds of that comparison."""
    thumbnails: int = Field(25, ge=1, le=400)
    """Pictures kept of every cell."""

    @model_validator(mode="after")
    def _cells_can_be_counted(self) -> SearchTable:
        for key, method in OF_METHOD.items():
            if getattr(self, key) is not None and self.method != method:
                raise ValueError(
                    f'{key} = {getattr(self, key):g} is of method = "{method}"; add it, or drop'
                    f" {key}"
                )
        values = sum(map(len, self.grid.values()))
        if self.method == "surrogate":
            self._nodes_can_be_drawn()
            return self
        if self.method == "coordinate":
            count, cure = float(values * (self.rounds or 1)), "name fewer values"
        else:
            count = math.prod(map(len, self.grid.values()), start=1.0)
            cure = f'name fewer values, or set method = "coordinate", which tries {values:,}'
        if count > MAX_CELLS:
            raise ValueError(f"{count:.3g} cells, of which {MAX_CELLS:,} are the most: {cure}")
        return self

    def _nodes_can_be_drawn(self) -> None:
        axes = self._moving()
        if axes > self.PRODUCT and (nodes := _fitted(axes, 2)) > MAX_NODES:
            most = max(n for n in range(axes) if _fitted(n, 2) <= MAX_NODES)
            raise ValueError(
                f"{axes} numbers take {nodes:,} nodes to interpolate, of which {MAX_NODES:,} are"
                f' the most: name at most {most} of them, or set method = "coordinate"'
            )

    def _moving(self) -> int:
        return sum(len(set(values)) > 1 for values in self.grid.values())

    def node_sizes(self) -> tuple[int, ...]:
        """What "surrogate" interpolates with, coarse to fine: up to so many nodes an axis, or of
        more than `PRODUCT` axes the total degree."""
        axes, sizes = self._moving(), (3, 5, 9)
        if axes > self.PRODUCT:
            return tuple(d for d in range(2, 9) if _fitted(axes, d) <= MAX_NODES)
        longest = max(len(set(values)) for values in self.grid.values())
        return tuple(n for k, n in enumerate(sizes) if k == 0 or sizes[k - 1] < longest)

    def node_counts(self) -> tuple[int, ...]:
        """Nodes that each of `node_sizes` has."""
        axes = self._moving()
        if axes > self.PRODUCT:
            return tuple(_fitted(axes, degree) for degree in self.node_sizes())
        lengths = [len(set(values)) for values in self.grid.values()]
        return tuple(math.prod(min(n, length) for length in lengths) for n in self.node_sizes())

    def passes(self) -> tuple[int, ...]:
        """How often "surrogate" draws an image with each of `node_sizes`, at most: in the nodes, in
        (1, 1), three cells by lot and the winner. First images, of which a few are drawn once
        more, are left out."""
        return tuple(count + DRAWN_CELLS for count in self.node_counts())

    def smallest(self, data: DataSpec) -> Mapping[str, Any]:
        """The ends of every axis, of parts such as "skip.3" the first, on a dozen images."""
        images = min(self.images, 12)
        firsts = {re.sub(r"\.\d+$", ".0", key): values for key, values in self.grid.items()}
        return {
            **dict.fromkeys(("images", "batch", "rerank_images", "confirm_images"), images),
            "grid": {key: sorted({values[0], values[-1]}) for key, values in firsts.items()},
            "rounds": self.rounds and 1,
            "rerank": min(self.rerank, 1),
            "confirm_seeds": 2,
            "thumbnails": 4,
        }


class SampleTable(StageTable):
    """The keys of [sample]."""

    images: Count
    """Images."""
    batch: Batch = 64
    """Images at a time; the images do not depend on it."""
    precision: Precision = "auto"
    """Autocast while sampling."""
    labels: Literal["data", "uniform"] = "data"
    """Classes of the images, those of a search as well: in the proportions of the data, where
    these are known, or each as often as any other."""

    def smallest(self, data: DataSpec) -> Mapping[str, Any]:
        return {"images": min(self.images, 16), "batch": 16}


class ExpectedTable(Part):
    """Scores that others published for this setting, which `cmkit compare` prints beside ours."""

    source: str = Field(min_length=1, max_length=300)
    """Where the scores were published."""
    scores: dict[str, float] = Field(min_length=1, max_length=100)
    """Published values by the metric's name: fid, precision, ..."""


PART_TABLES = ("dataset", "backbone", "objective", "rescaler", "sampler")
STAGES = {
    "train": "cmkit.run.stages.train:Train",
    "search": "cmkit.run.stages.search:Search",
    "sample": "cmkit.run.stages.sample:Sample",
    "metric": "cmkit.run.stages.metric:Measure",
}
"""What a run does, in order: each stage is the class of its table, named as plugins name parts."""
KEYS = ("name", "seed", "smoke", *PART_TABLES, "denoiser", "teacher", *STAGES, "expected")
REQUIRED = ("name", "dataset", "backbone")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


def kinds_inside(keys: Iterable[str]) -> list[str]:
    """Those keys of a table that hold a part: they are named after its kind."""
    return [key for key in keys if key in CLASSES]


def stage_class(name: str) -> type[StageTable]:
    """The class of the table [name], which carries the stage out."""
    module, _, attribute = STAGES[name].partition(":")
    return getattr(import_module(module), attribute)  # type: ignore[no-any-return]


def core_tables() -> dict[str, type[Part]]:
    """The tables that belong to no part, by key, in the order of the documentation."""
    stages = {name: stage_class(name) for name in STAGES if name != "metric"}
    return dict(denoiser=DenoiserTable, teacher=TeacherTable, **stages, expected=ExpectedTable)
