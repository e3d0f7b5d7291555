"""Measuring what a finished run draws once more: beside other pictures, or with other metrics."""

from __future__ import annotations

import datetime
import functools
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Subset

from cmkit.errors import CheckpointError, DataError, RecipeError, inline, nearest
from cmkit.files import atomic_write
from cmkit.kinds import Dataset, Metric
from cmkit.measure import measure
from cmkit.plan import check_fit, coding_of, naming_table, prompts_of
from cmkit.plugins import Registry
from cmkit.recipe import Recipe, load
from cmkit.recipe.toml import key_path
from cmkit.runs.drawing import model_of
from cmkit.runs.events import Event, Sampled, StageFinished, StageStarted
from cmkit.runs.finished import drawn_from
from cmkit.runs.folder import RunFolder
from cmkit.runs.places import chosen
from cmkit.sample import Batch, Draws, SavedImages, npz, sample
from cmkit.values import DataSpec, Reference

FILE_IMAGES = 1000
"""Images in a file, of those that are drawn for this alone."""
READ = ("dataset", "metric")
"""Tables of which --set changes no image."""
FOLDER = "image_folder"
"""The data set that a mere folder means."""


@dataclass(frozen=True)
class Measurement:
    """What is to be measured, all of it checked."""

    folder: RunFolder
    recipe: Recipe
    """With the data set and the metrics of this measurement."""
    metrics: tuple[Metric, ...]
    spec: DataSpec
    images: int
    prompts: Sequence[str]
    """What the images are drawn from; none without a prompt encoder."""
    drawn: Recipe | None
    """What draws the images; None where the run's samples are measured."""


def to_measure(
    source: str, data: str | None, overrides: Sequence[str], registry: Registry, images: int | None
) -> Measurement:
    """What `measure_run` is to do with the run `source`, "RUN@STEP:AVERAGE".

    `data` names pictures as `data_table` has it; None means those of the recipe. The run's samples
    are measured where there are so many `images`, and neither other weights nor `overrides` of what
    draws are asked for; else images are drawn, by the noise that samples are drawn by.
    RecipeError, CheckpointError or DataError for what cannot be.
    """
    place, step, average = chosen(source)
    folder = RunFolder.at(place)
    if not folder.recipe.is_file():
        raise CheckpointError(f"{source}: no run folder, it has no recipe.toml")
    begun = load(folder.recipe, [], registry)
    shape = folder.data() or begun.dataset.spec()
    own = [item for item in overrides if (key_path(item.partition("=")[0]) or ("",))[0] in READ]
    others = [item for item in overrides if item not in own]
    said = [f"dataset={data_table(data, shape, registry)}"] if data else []
    recipe = load(folder.recipe, [*said, *own], registry)
    metrics = recipe.metric
    if data:  # no training saw these pictures
        metrics = tuple(metric.model_copy(update={"heldout": False}) for metric in metrics)
        metrics = tuple(m for k, m in enumerate(metrics) if m not in metrics[:k])
    if not metrics:
        raise RecipeError(
            f"{source}: its recipe has no metric; say one, such as"
            " --set 'metric=[{use=\"fidelity\", kid=true}]'"
        )
    spec = recipe.dataset.spec()
    sizes = [(one.channels, one.resolution) for one in (shape, spec)]
    if sizes[0] != sizes[1]:
        (channels, side), (other, their_side) = sizes
        raise DataError(
            f"dataset: {other}x{their_side}x{their_side}, and the run draws"
            f" {channels}x{side}x{side}; choose pictures of that shape, by the keys channels and"
            " resolution where the data set has them"
        )
    kept = 0 if others or step is not None or average else _kept(folder, images)
    wanted = images or kept or (recipe.sample.images if recipe.sample else 0)
    if not wanted:
        raise RecipeError(f"{source}: its recipe draws no samples; say how many, such as -n 10000")
    for index, metric in enumerate(metrics):
        with naming_table(recipe, "metric", index):
            metric.check(spec, wanted)
    drawn = None
    if wanted > kept:
        drawn = drawn_from(source, others, registry, wanted)
        if drawn.sampler is None:
            raise RecipeError(
                f'{source}: say how to draw, such as --set sampler={{use="multistep"}}'
            )
    return Measurement(folder, recipe, metrics, spec, wanted, prompts_of(drawn or begun), drawn)


def data_table(text: str, shape: DataSpec, registry: Registry) -> str:
    """The table [dataset] that --data means, on one line, for pictures of a shape: a table, the
    name of a data set, NAME:PATH, or the path of a folder of pictures. RecipeError for what is none
    of these."""
    if text.lstrip().startswith("{"):
        return text
    names = registry.names("dataset")
    use, colon, path = text.partition(":")
    if use not in names:
        use, colon, path = FOLDER, ":", text
        if not Path(path).expanduser().exists():
            raise RecipeError(
                f"--data {text}: no such folder, and no data set that is installed"
                f"{nearest(text.partition(':')[0], names)}; say a folder of pictures, NAME:PATH, or"
                ' a table such as {use="digits"}'
            )
    fields = registry.load("dataset", use).model_fields
    said: dict[str, Any] = {"use": use, **({"path": path} if colon else {})}
    own = {"channels": shape.channels, "resolution": shape.resolution}
    return inline(said | {key: value for key, value in own.items() if key in fields})


def _kept(folder: RunFolder, wanted: int | None) -> int:
    """How many samples a finished stage left intact; CheckpointError where one is damaged, unless
    it was said how many are wanted."""
    finished = folder.status().get("sample")
    if not finished:
        return 0
    count = int(finished["result"]["images"])
    for name, fault in folder.damage("sample", finished).items():
        if wanted is None:
            raise CheckpointError(
                f"{folder.path / name}: {fault}; restore it, or draw images anew: -n {count}"
            )
        return 0
    return count


def measure_run(found: Measurement, device: torch.device) -> Iterator[Event]:
    """Events of measuring; the last is StageFinished, whose result is kept in the run's folder."""
    began = time.perf_counter()
    references = _references(found)
    for index, metric in enumerate(found.metrics):
        with naming_table(found.recipe, "metric", index):
            metric.check_reference(found.spec, references(metric), device)
    with tempfile.TemporaryDirectory() as place:
        if found.drawn:
            files, rule = yield from _drawn(found.drawn, found.images, Path(place), device)
        else:
            sampled = found.folder.status()["sample"]["result"]
            files, rule = found.folder.sample_files(), sampled.get("label_rule")
        images: Any = SavedImages(files)
        if len(images) > found.images:
            images = Subset(images, range(found.images))
        yield StageStarted("metric", 0, len(found.metrics))
        values, provenance = measure(found.metrics, images, references, device)
    if rule:
        provenance = [{**record, "labels": rule} for record in provenance]
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    result: dict[str, Any] = {
        "values": values,
        "provenance": provenance,
        "data": dict(found.recipe.resolved["dataset"]),
        "images": found.images,
        "of": f"{found.images:,} {'images drawn anew' if found.drawn else 'samples'}",
        "weights": found.drawn.denoiser.weights if found.drawn else None,
        "time": now,
        "seconds": time.perf_counter() - began,
    }
    found.folder.append_measured(result)
    yield StageFinished("measure", result)


def _references(found: Measurement) -> Callable[[Metric], Reference]:
    """The real images that a metric compares with, each set read once, with what the run draws from
    as captions."""

    @functools.cache
    def of(dataset: Dataset) -> Reference:
        return replace(dataset.reference(), captions=found.prompts or None)

    return lambda metric: of(found.recipe.compared_with(metric))


def _drawn(
    recipe: Recipe, count: int, place: Path, device: torch.device
) -> Generator[Event, None, tuple[list[Path], str | None]]:
    """The files of images that are drawn into the folder `place`, those that a run would draw, and
    the rule of their labels."""
    assert recipe.sampler is not None
    assert recipe.sample is not None
    plan, table = check_fit(recipe), recipe.sample
    prompts, coding = prompts_of(recipe), coding_of(plan, device)
    model = yield from model_of(plan, table, device, coding)
    draws = Draws(plan.space, recipe.seed, "sample", (), plan.label_rule, prompts, coding)
    yield StageStarted("sample", 0, count)
    indices, precision = range(count), table.precision
    batches = sample(model, recipe.sampler, draws, indices, table.batch, device, precision)
    held, files = list[Batch](), list[Path]()
    for batch in batches:
        held.append(batch)
        done = batch.first + len(batch.images)
        yield Sampled(done, count)
        if done - held[0].first >= FILE_IMAGES or done == count:
            files.append(place / f"{held[0].first:07d}.npz")
            atomic_write(files[-1], npz(held))
            held.clear()
    return files, plan.label_rule
