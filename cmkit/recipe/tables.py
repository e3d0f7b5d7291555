"""The tables of a recipe that belong to no part: their keys, bounds and defaults."""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib import import_module
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from cmkit.kinds import CLASSES, Part
from cmkit.values import DataSpec

Precision = Literal["auto", "fp32", "bf16"]
Decay = Annotated[float, Field(gt=0, lt=1)]
Count = Annotated[int, Field(ge=1, le=10**9)]
Batch = Annotated[int, Field(ge=1, le=2**20)]
Prompt = Annotated[str, Field(max_length=10_000)]
SHOWN = 16
"""Most pictures that are drawn at a step of the training."""
Shown = Annotated[tuple[Prompt, ...], Field(max_length=SHOWN)]


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
    """What it embeds; absent = what the data and the prompts have."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Type of its weights in memory: "bf16" takes half of it, rounds them, and computes under
    autocast to bf16."""
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


class CacheTable(StageTable):
    """The keys of [cache]; `cache = false` encodes at every step of the training."""

    read_by = {"batch": ()}

    latents: bool = True
    """Keep the latents of all pictures, and of their mirror images where the data set has them:
    mean and standard deviation, so that they are still drawn anew at every step."""
    text: bool = True
    """Keep the features of all captions. They may take more room than the latents: with many
    captions, false encodes them at every step."""
    dtype: Literal["fp16", "bf16", "fp32"] = "fp16"
    """Type of the numbers that are kept."""
    batch: Batch = 8
    """Pictures encoded at a time."""


class TrainTable(StageTable):
    """The keys of [train]."""

    read_by = dict.fromkeys(
        (
            *("log_every", "save_every", "save_minutes", "keep", "show", "show_every"),
            *("score_every", "score", "score_images"),
        ),
        (),
    )

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
    save_minutes: float | None = Field(None, gt=0, le=10**6)
    """Minutes after which a checkpoint is due as well, since the one before it."""
    keep: int = Field(2, ge=1, le=1000)
    """Checkpoints kept."""
    start: str | None = None
    """A run to go on from, as RUN, RUN@STEP or RUN@best: its weights, averages, optimizer and step,
    under this recipe's numbers. `cmkit run RECIPE --from RUN` says it."""
    log_every: Count = 50
    """Steps between log lines."""
    show: Annotated[int, Field(ge=0, le=SHOWN)] | Shown = 0
    """Pictures drawn during training from the first average, always of the same noise: their
    number, or with a [text] table their prompts. They change no bit of the training."""
    show_every: Count | None = None
    """Steps between such pictures, the last step aside; absent = `save_every`."""

    score_every: Count | None = None
    """Steps between quick scores of the first average, the last step aside: a metric of few images,
    always of the same noise and labels, compared with the validation split where the data set has
    one. The checkpoint of the best is kept as RUN@best. They change no bit of the training."""
    score: str | None = None
    """The number of a [[metric]] that is the score; absent = what the first metric has for few
    images: of `fidelity` the kernel distance, "kid_mean"."""
    score_images: int = Field(500, ge=2, le=10**6)
    """Images of a quick score."""

    @field_validator("show", mode="before")
    @classmethod
    def _a_number_or_prompts(cls, show: Any) -> Any:
        prompts = isinstance(show, list | tuple) and all(isinstance(each, str) for each in show)
        if not prompts and (isinstance(show, bool) or not isinstance(show, int)):
            raise ValueError('say a number of pictures, or prompts such as ["a red apple"]')
        if len(show) > SHOWN if prompts else not 0 <= show <= SHOWN:
            raise ValueError(f"say at most {SHOWN} pictures or prompts")
        return tuple(show) if prompts else show

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
        if self.score_every:
            few |= {"score_every": 2, "score_images": 16}
        return {**sizes, **few, "save_every": 2, "log_every": 1, "compile": False, "start": None}


class SampleTable(StageTable):
    """The keys of [sample]."""

    read_by = {"show_steps": ()}

    images: Count
    """Images."""
    batch: Batch = 64
    """Images at a time; the images do not depend on it."""
    precision: Precision = "auto"
    """Autocast while sampling."""
    labels: Literal["data", "uniform"] = "data"
    """Classes of the images, those of a search as well: in the proportions of the data, where
    these are known, or each as often as any other."""
    prompts: tuple[Prompt, ...] = ()
    """What images are drawn from, those of a search as well, in turns; absent = the captions of the
    pictures that metrics compare with, image k from that of picture k."""
    show_steps: Annotated[tuple[Count, ...], Field(max_length=8)] = ()
    """Other numbers of steps in which the first images are drawn too, for the page, such as
    [1, 2, 4, 8], with a sampler that has the key `steps`. They change no bit of the images."""

    def smallest(self, data: DataSpec) -> Mapping[str, Any]:
        return {"images": min(self.images, 16), "batch": 16}


class ExpectedTable(Part):
    """Scores that others published for this setting, which `cmkit compare` prints beside ours."""

    source: str = Field(min_length=1, max_length=300)
    """Where the scores were published."""
    scores: dict[str, float] = Field(min_length=1, max_length=100)
    """Published values by the metric's name: fid, precision, ..."""


PART_TABLES = (
    "dataset",
    "codec",
    "text",
    "backbone",
    "adapter",
    "objective",
    "rescaler",
    "sampler",
)
STAGES = {
    "cache": "cmkit.runs.stages.cache:Cache",
    "train": "cmkit.runs.stages.train:Train",
    "search": "cmkit.runs.stages.search:Search",
    "sample": "cmkit.runs.stages.sample:Sample",
    "metric": "cmkit.runs.stages.metric:Measure",
}
"""What a run does, in order: each stage is the class of its table, named as plugins name parts."""
KEYS = (
    "name",
    "seed",
    "smoke",
    *PART_TABLES,
    "denoiser",
    "teacher",
    *STAGES,
    "tracker",
    "expected",
)
REQUIRED = ("name", "dataset", "backbone")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


def kinds_inside(fields: Mapping[str, Any]) -> list[str]:
    """Those keys of a table, or fields of its class, that hold a part: they are named after its
    kind, and are no switch."""
    switches = [key for key, field in fields.items() if getattr(field, "annotation", None) is bool]
    return [key for key in fields if key in CLASSES and key not in switches]


def stage_class(name: str) -> type[StageTable]:
    """The class of the table [name], which carries the stage out."""
    module, _, attribute = STAGES[name].partition(":")
    return getattr(import_module(module), attribute)  # type: ignore[no-any-return]


def core_tables() -> dict[str, type[Part]]:
    """The tables that belong to no part, by key, in the order of the documentation."""
    stages = {name: stage_class(name) for name in STAGES if name != "metric"}
    return dict(denoiser=DenoiserTable, teacher=TeacherTable, **stages, expected=ExpectedTable)
