"""One TOML file becomes one validated, fully resolved recipe."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, Field, ValidationError, model_validator

from cmkit.errors import CmkitError, PluginError, RecipeError
from cmkit.kinds import Part
from cmkit.plugins import Registry
from cmkit.source import Source, meant, read

if TYPE_CHECKING:
    from cmkit.kinds import Backbone, Dataset, Metric, Objective, Precond, Rescaler, Sampler
    from cmkit.values import DataSpec

Precision = Literal["auto", "fp32", "bf16"]
Decay = Annotated[float, Field(gt=0, lt=1)]
Count = Annotated[int, Field(ge=1, le=10**9)]
Batch = Annotated[int, Field(ge=1, le=2**20)]
MAX_CELLS = 10_000
"""Of a search; the paper's have 121."""


class DenoiserTable(Part):
    """How a network becomes a denoiser, and where its weights come from."""

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
    """A frozen model to distil. A table `backbone` in it names a network unlike the student's."""

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


class TrainTable(Part):
    """Training. A step takes `batch` images, drawn as `accumulate` equal parts."""

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
    log_every: Count = 50
    """Steps between log lines."""

    @model_validator(mode="after")
    def _parts_are_equal(self) -> TrainTable:
        if self.batch % self.accumulate:
            raise ValueError(f"batch {self.batch} is not divisible by accumulate {self.accumulate}")
        return self

    @model_validator(mode="after")
    def _rate_falls_one_way(self) -> TrainTable:
        if self.decay and self.sqrt_decay:
            raise ValueError(f"decay = true and sqrt_decay = {self.sqrt_decay}: choose one of them")
        return self


class SearchTable(Part):
    """The search of the rescaler's numbers, on the same noise and labels in every cell."""

    images: int = Field(ge=2, le=10**7)
    """Images a cell."""
    grid: dict[str, Annotated[tuple[float, ...], Field(min_length=1, max_length=1000)]] = Field(
        min_length=1, max_length=256
    )
    """Values of each of the rescaler's numbers: of a field such as skip, or, in
    quotation marks, of a part of it such as "skip.3", where the rescaler has parts."""
    method: Literal["grid", "coordinate"] | None = None
    """Which cells are tried: "grid", the default, every combination; "coordinate" one number after
    the other, the others at their best so far and at first the rescaler's own."""
    rounds: int | None = Field(None, ge=1, le=100)
    """How often "coordinate" goes through the numbers; absent = once."""
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
        values = sum(map(len, self.grid.values()))
        if self.method == "coordinate":
            count, cure = float(values * (self.rounds or 1)), "name fewer values"
        else:
            count = math.prod(map(len, self.grid.values()), start=1.0)
            cure = f'name fewer values, or set method = "coordinate", which tries {values:,}'
            if self.rounds:
                raise ValueError(f'rounds = {self.rounds} is of method = "coordinate"; add it')
        if count > MAX_CELLS:
            raise ValueError(f"{count:.3g} cells, of which {MAX_CELLS:,} are the most: {cure}")
        return self


class SampleTable(Part):
    """Sampling from the trained, rescaled model."""

    images: Count
    """Images."""
    batch: Batch = 64
    """Images at a time; the images do not depend on it."""
    precision: Precision = "auto"
    """Autocast while sampling."""


class ExpectedTable(Part):
    """Scores that others published for this setting, which `cmkit compare` prints beside ours."""

    source: str = Field(min_length=1, max_length=300)
    """Where the scores were published."""
    scores: dict[str, float] = Field(min_length=1, max_length=100)
    """Published values by the metric's name: fid, precision, ..."""


PART_TABLES = ("dataset", "backbone", "objective", "rescaler", "sampler")
CORE_TABLES: dict[str, type[Part]] = {
    "denoiser": DenoiserTable,
    "teacher": TeacherTable,
    "train": TrainTable,
    "search": SearchTable,
    "sample": SampleTable,
    "expected": ExpectedTable,
}
KEYS = ("name", "seed", *PART_TABLES, *CORE_TABLES, "metric")
REQUIRED = ("name", "dataset", "backbone")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


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
    train: TrainTable | None
    search: SearchTable | None
    sample: SampleTable | None
    expected: ExpectedTable | None
    metric: tuple[Metric, ...]
    resolved: Mapping[str, Any]
    source: Source
    data: DataSpec | None = None
    """What is known of the data where they need not be asked, as of a finished run."""

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


def load(path: str | Path, overrides: Sequence[str], registry: Registry) -> Recipe:
    """The recipe in the file `path` with `key=value` overrides applied.

    Raises RecipeError for whatever is wrong with the text, PluginError for a part that is missing
    or broken. Imports the parts that it names and nothing else.
    """
    tables, source = read(path, overrides)
    return _resolve(tables, source, registry)


def _resolve(tables: dict[str, Any], source: Source, registry: Registry) -> Recipe:
    for key in tables:
        if key not in KEYS:
            raise source.error((key,), f"unknown key{meant(key, KEYS)}")
    for key in REQUIRED:
        if key not in tables:
            raise source.error((), f"the key {key!r} is missing")
    name, seed = _name(tables["name"], source), _seed(tables.get("seed", 0), source)
    resolved: dict[str, Any] = {"name": name, "seed": seed}
    parts: dict[str, Any] = {}
    for kind in PART_TABLES:
        parts[kind] = None
        if kind in tables:
            parts[kind], resolved[kind] = _part(kind, tables[kind], (kind,), source, registry)
    tables, inner = _without_backbone(tables)
    parts["teacher_backbone"] = parts["teacher_precond"] = None
    for key, model in CORE_TABLES.items():
        table = tables.get(key, {} if key == "denoiser" else None)
        parts[key] = None
        if table is not None and "precond" in model.model_fields:
            precond, table = _preconditioned(key, model, table, source, registry)
            parts["precond" if key == "denoiser" else "teacher_precond"] = precond
        if table is not None:
            parts[key] = _validate(model, table, (key,), source)
            resolved[key] = _plain(parts[key])
    if inner is not None:
        path = ("teacher", "backbone")
        parts["teacher_backbone"], plain = _part("backbone", inner, path, source, registry)
        resolved["teacher"]["backbone"] = plain
    metrics = tables.get("metric", [])
    if not isinstance(metrics, list):
        raise source.error(("metric",), 'expected a list of tables: [[metric]] use = "fidelity"')
    pairs = [
        _part("metric", table, ("metric", index), source, registry)
        for index, table in enumerate(metrics)
    ]
    if pairs:
        resolved["metric"] = [table for _, table in pairs]
    parts["metric"] = tuple(part for part, _ in pairs)
    return Recipe(name=name, seed=seed, resolved=resolved, source=source, **parts)


def _without_backbone(tables: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    """The tables without the part inside [teacher], and that part's own table, if any."""
    teacher = tables.get("teacher")
    if not isinstance(teacher, dict) or "backbone" not in teacher:
        return tables, None
    rest = {key: value for key, value in teacher.items() if key != "backbone"}
    return {**tables, "teacher": rest}, teacher["backbone"]


def _preconditioned(
    key: str, model: type[Part], table: Any, source: Source, registry: Registry
) -> tuple[Precond, dict[str, Any]]:
    """The precond of a [denoiser] or [teacher], and the table with all that follows from it.

    A precond without options is written as its name.
    """
    if not isinstance(table, dict):
        raise source.error((key,), "expected a table")
    said, path = table.get("precond", model.model_fields["precond"].default), (key, "precond")
    by_name = isinstance(said, str)
    precond, plain = _part(
        "precond", {"use": said} if by_name else said, path, source, registry, by_name
    )
    ends = dict(zip(("sigma_min", "sigma_max"), precond.levels, strict=True))
    full = {**table, "precond": plain if len(plain) > 1 else plain["use"]}
    return precond, ({**ends, **full} if key == "denoiser" else full)


def _used(precond: str | Mapping[str, Any]) -> str:
    return precond if isinstance(precond, str) else precond["use"]


def _name(name: object, source: Source) -> str:
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise source.error(
            ("name",), "use 1 to 64 letters, digits, '.', '_' or '-'", f" = {_shown(name)}"
        )
    return name


def _seed(seed: object, source: Source) -> int:
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**63:
        raise source.error(("seed",), "expected a whole number from 0", f" = {_shown(seed)}")
    return seed


def _part(
    kind: str,
    table: Any,
    path: tuple[str | int, ...],
    source: Source,
    registry: Registry,
    by_name: bool = False,
) -> tuple[Any, dict[str, Any]]:
    """The part that a table says, or its name there `by_name`; and the table in full."""
    if not isinstance(table, dict):
        raise source.error(path, f'expected a table such as {{ use = "{kind}-name" }}')
    use, where = table.get("use"), path if by_name else (*path, "use")
    if not isinstance(use, str):
        known = ", ".join(registry.names(kind))
        raise source.error(where, f"name the {kind} to use: {known}")
    try:
        model = registry.load(kind, use)
    except PluginError as error:
        raise PluginError(str(source.error(where, str(error)))) from error
    part = _validate(model, {k: v for k, v in table.items() if k != "use"}, path, source)
    return part, {"use": use, **_plain(part)}


def _validate(model: type[Part], table: Any, path: tuple[str | int, ...], source: Source) -> Part:
    if not isinstance(table, dict):
        raise source.error(path, "expected a table")
    try:
        return model.model_validate_json(json.dumps(table, default=str))
    except ValidationError as error:
        raise _first_error(error, model, table, path, source) from error
    except CmkitError as error:
        raise type(error)(str(source.error(path, str(error)))) from error
    except ValueError as error:  # a number of thousands of digits
        raise source.error(path, str(error)) from error


def _first_error(
    error: ValidationError,
    model: type[BaseModel],
    table: Mapping[str, Any],
    path: tuple[str | int, ...],
    source: Source,
) -> RecipeError:
    faults = error.errors(include_url=False)
    fault = min(faults, key=lambda f: f["type"] != "extra_forbidden")
    where = (*path, *_real(fault["loc"], table))
    more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
    if fault["type"] == "extra_forbidden":
        return source.error(where, f"unknown key{meant(str(where[-1]), model.model_fields)}{more}")
    if fault["type"] == "missing":
        return source.error(where, f"missing key{more}")
    message = fault["msg"].removeprefix("Value error, ").replace("Input should", "should")
    shown = f" = {_shown(fault['input'])}" if fault["loc"] else ""
    if isinstance(fault["input"], dict) and fault["input"] and "array" in message:
        name = f"{where[-1]}.{next(iter(fault['input']))}"
        message += f'; a name with a dot belongs in quotation marks: "{name}"'
    return source.error(where, f"{message}{more}", shown)


def _real(loc: tuple[str | int, ...], table: Any) -> Iterator[str | int]:
    """The parts of a pydantic location that exist in the table (it adds names of types)."""
    for n, part in enumerate(loc):
        if isinstance(table, dict) and (part in table or n == 0):
            yield part
            table = table.get(part)
        elif isinstance(table, list) and isinstance(part, int):
            yield part
            table = table[part] if part < len(table) else None


def _shown(value: object) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def _plain(part: Part) -> dict[str, Any]:
    return part.model_dump(mode="json", exclude_none=True)


def schema(registry: Registry) -> dict[str, Any]:
    """JSON Schema of recipes, built from every part that can be imported."""
    definitions: dict[str, Any] = {}

    def refer(model: type[Part], use: str | None = None, name: str = "") -> dict[str, Any]:
        body = model.model_json_schema(ref_template=f"#/$defs/{name}.{{model}}")
        for key, inner in body.pop("$defs", {}).items():
            definitions[f"{name}.{key}"] = inner
        if use is not None:
            body["properties"] = {"use": {"const": use}, **body.get("properties", {})}
            body["required"] = ["use", *body.get("required", [])]
        definitions[name] = body
        return {"$ref": f"#/$defs/{name}"}

    def choice(kind: str) -> dict[str, Any]:
        options = []
        for name in registry.names(kind):
            try:
                options.append(refer(registry.load(kind, name), name, f"{kind}.{name}"))
            except Exception:  # noqa: S112 - a stranger's class may raise anything
                continue  # `cmkit plugins` shows it as broken; an editor cannot complete it
        return {"oneOf": options} if options else {"type": "object"}

    properties: dict[str, Any] = {
        "name": {"type": "string", "pattern": f"^{NAME.pattern}$"},
        "seed": {"type": "integer", "minimum": 0, "default": 0},
    }
    properties |= {kind: choice(kind) for kind in PART_TABLES}
    properties |= {key: refer(model, name=key) for key, model in CORE_TABLES.items()}
    definitions["teacher"]["properties"]["backbone"] = choice("backbone")
    tables, names = choice("precond"), {"enum": registry.names("precond")}
    for key in ("denoiser", "teacher"):
        entry = definitions[key]["properties"]["precond"]
        entry["anyOf"] = [names, tables]
    properties["metric"] = {"type": "array", "items": choice("metric")}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "cmkit recipe",
        "type": "object",
        "additionalProperties": False,
        "required": list(REQUIRED),
        "properties": properties,
        "$defs": definitions,
    }


def fields(model: type[Part]) -> Iterator[dict[str, str]]:
    """Key, type with bounds, default and meaning of each field of a part, as text."""
    body = model.model_json_schema()
    for key, entry in body.get("properties", {}).items():
        default = json.dumps(entry.get("default"))
        yield {
            "key": key,
            "type": _type(entry),
            "default": "required"
            if key in body.get("required", ())
            else ("absent" if default == "null" else default),
            "meaning": entry.get("description", ""),
        }


def _type(entry: Mapping[str, Any]) -> str:
    """A JSON Schema type in words: `integer, 1 to 64`, `list of number, above 0`."""
    if "anyOf" in entry:
        return " or ".join(_type(e) for e in entry["anyOf"] if e.get("type") != "null")
    if "enum" in entry or "const" in entry:
        return " or ".join(json.dumps(value) for value in entry.get("enum", [entry.get("const")]))
    kind = entry.get("type", "any")
    if kind == "array":
        inner = entry.get("items") or (entry.get("prefixItems") or [{}])[0]
        return f"list of {_type(inner)}"
    if kind == "object":
        inner = entry.get("additionalProperties")
        return f"table of {_type(inner)}" if isinstance(inner, dict) else "table"
    low = entry.get("minimum", entry.get("exclusiveMinimum"))
    high = entry.get("maximum", entry.get("exclusiveMaximum"))
    bounds = []
    if low is not None:
        bounds.append(f"{'above' if 'exclusiveMinimum' in entry else 'from'} {_plain_number(low)}")
    if high is not None:
        bounds.append(f"{'below' if 'exclusiveMaximum' in entry else 'to'} {_plain_number(high)}")
    return f"{kind}, {' '.join(bounds)}" if bounds else str(kind)


def _plain_number(value: float) -> str:
    return f"{int(value):,}" if value == int(value) else f"{value:g}"
