"""The commands."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from itertools import chain, groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer

from cmkit.cli import printing
from cmkit.cli.bench import bench
from cmkit.cli.compare import compare
from cmkit.cli.parts import DeviceOption, JsonOption, new, plugins_app
from cmkit.errors import CheckpointError, DataError, inline
from cmkit.stop import StopSignal

if TYPE_CHECKING:
    import torch

    from cmkit.kinds import Adapter, Dataset
    from cmkit.plan import Plan
    from cmkit.plugins import Registry
    from cmkit.recipe import Recipe
    from cmkit.run import Event

debug_log: Path | None = None
"""Where the traceback of an error goes, once `run` knows its folder."""
stop = StopSignal()
"""The signals that this process received."""

app = typer.Typer(
    help="Train, rescale, sample and compare consistency models from swappable parts.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
RecipeArgument = Annotated[
    str, typer.Argument(help="A recipe file, or the bare name of a recipe that comes with cmkit.")
]
SourceArgument = Annotated[
    str, typer.Argument(help="Folder of a finished run, or a recipe with denoiser.weights.")
]
SeedOption = Annotated[
    int | None, typer.Option(min=0, help="Seed of the noise; absent = the recipe's.")
]
SetOption = Annotated[
    list[str],
    typer.Option("--set", metavar="TABLE.KEY=VALUE", help="Change a value, written as in TOML."),
]
LabelOption = Annotated[
    list[str],
    typer.Option(
        metavar="NAME|NUMBER",
        help="Class of every image, by name or number, of which a class's name goes first; several"
        " are taken in turns.",
    ),
]
RescalerOption = Annotated[
    str | None,
    typer.Option(
        metavar="PATH|off",
        help="Scales of a rescaling.json, or of the run with it, instead of the source's own;"
        " off = none.",
    ),
]
OutOption = Annotated[Path, typer.Option(help="Parent of the run folder.")]
SmokeOption = Annotated[
    bool,
    typer.Option(
        "--smoke",
        help="Try the recipe within a minute: shrunk, on invented data and weights, which are"
        " written below --out. Its numbers mean nothing.",
    ),
]

app.add_typer(plugins_app, name="plugins")


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        import cmkit

        printing.line(cmkit.__version__)
        raise typer.Exit


@app.command()
def run(
    recipe: RecipeArgument,
    set: SetOption = [],  # noqa: B006 - the option is called --set
    from_: Annotated[
        str | None,
        typer.Option("--from", metavar="RUN[@STEP]", help="Go on from the training of a run."),
    ] = None,
    smoke: SmokeOption = False,
    out: OutOption = Path("runs"),
    device: DeviceOption = "auto",
    json: JsonOption = False,
) -> None:
    """Carry a recipe out, or go on where it stopped: train, search, sample, measure, report."""
    begun = [f"train.start={inline(from_)}"] if from_ else []
    loaded, registry, said = _loaded(recipe, [*set, *begun], out if smoke else None)
    from cmkit.device import pick_device
    from cmkit.run import Note, run, run_folder, shown

    chosen, folder = pick_device(device), run_folder(loaded, out, registry)
    global debug_log
    debug_log = folder.debug_log
    with _runs_below(out):
        if folder.finished:
            events = shown(loaded, folder, chosen)
        else:
            events = run(_plan(loaded), registry, out, chosen, stop)
        start = Note(f"run folder: {folder.path} on {chosen}")
        stop.listen()
        report = _shown(chain(map(Note, said), [start], events), chosen, json).report
    if json:
        printing.document({**report, "folder": str(folder.path)})
    else:
        printing.results(folder, report)


@app.command()
def check(
    recipe: RecipeArgument,
    set: SetOption = [],  # noqa: B006
    smoke: SmokeOption = False,
    out: OutOption = Path("runs"),
    device: DeviceOption = "auto",
    data: Annotated[
        bool, typer.Option("--data", help="Read every image as well, and list the bad ones.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Check all that `run` would check, and say what it would cost, without running."""
    loaded, registry, said = _loaded(recipe, set, out if smoke else None)
    from cmkit.device import pick_device
    from cmkit.plan import cache_bytes, check_disk, sigma_data_note
    from cmkit.recipe import stage_keys
    from cmkit.run import as_begun, changes, inputs_of, outlook, run_folder
    from cmkit.run.inputs import chosen_precision
    from cmkit.run.policies import check_training
    from cmkit.search import all_images, most_cells

    if data:
        _check_images(loaded.dataset, json)
    chosen, folder = pick_device(device), run_folder(loaded, out, registry)
    with _runs_below(out):
        plan = as_begun(_plan(loaded), folder)
        inputs = inputs_of(plan.recipe, plan.data, chosen)
        keys = stage_keys(loaded, inputs)
        check_training(loaded, keys)
        stages = list(outlook(loaded, folder, keys, inputs, registry))
    check_disk(plan, out)
    bad = loaded.dataset.left_out()
    facts = {
        "recipe": plan.recipe.name,
        "folder": str(folder.path),
        "device": str(chosen),
        "parameters": plan.parameters,
        "gflop_per_image": plan.flops / 1e9,
        "weights_memory_mib": plan.memory / 2**20,
        "disk_mib": plan.disk / 2**20,
        "images": [plan.data.channels, plan.data.resolution, plan.data.resolution],
        "latents": [plan.space.channels, *[plan.space.resolution] * 2] if loaded.codec else None,
        "text": [plan.space.text.length, plan.space.text.width] if plan.space.text else None,
        "classes": plan.data.num_classes,
        "labels": plan.label_rule,
        "nfe": plan.nfe,
        "sites": len(plan.sites),
        "weights": plan.recipe.denoiser.weights,
        "to_download": [weights.url for weights in plan.downloads],
    }
    if plan.recipe.cache:
        facts["cache_mib"], facts["cache_to_write_mib"] = (n / 2**20 for n in cache_bytes(plan))
    if search := plan.recipe.search:
        facts["search_cells"], facts["search_images"] = most_cells(loaded), all_images(loaded)
        if search.method == "surrogate":
            facts["search_passes"] = [draws * (plan.nfe or 1) for draws in search.passes()]
    if precision := chosen_precision(plan.recipe, chosen):
        facts["precision"] = precision
    notes = [*said, *plan.notes, *filter(None, [sigma_data_note(plan)])]
    if folder.checked:
        changed = changes(folder.inputs()["inputs"], inputs)
        notes += [f"since the run was begun: {said}" for _, _, said in changed]
    if json:
        known = {"class_names": list(plan.data.classes), "class_counts": list(plan.data.counts)}
        told = {"site_names": list(plan.sites), "notes": notes, "left_out": list(bad)}
        printing.document({**facts, **known, **told, "stages": [stage.facts() for stage in stages]})
        return
    facts |= {"left_out": len(bad)} if bad else {}
    families = [list(own) for _, own in groupby(plan.sites, lambda site: site.split(".")[0])]
    facts["sites"] = ", ".join(f"{own[0]} to {own[-1]}" for own in families) or "none"
    facts |= dict(str(stage).split(": ", 1) for stage in stages)
    for name, value in facts.items():
        printing.line(f"{name.replace('_', ' '):<20} {printing.human(value)}")
    printing.classes(plan.data)
    printing.first("left out: ", bad)
    for note in notes:
        printing.line(f"note: {note}")


@app.command()
def sample(
    source: SourceArgument,
    count: Annotated[
        int | None,
        typer.Option(
            "--count", "-n", min=1, help="Images to draw; absent = one a prompt, or 16 without any."
        ),
    ] = None,
    seed: SeedOption = None,
    label: LabelOption = [],  # noqa: B006
    prompt: Annotated[
        list[str], typer.Option(metavar="TEXT", help="What to draw; several are taken in turns.")
    ] = [],  # noqa: B006
    negative: Annotated[
        str | None, typer.Option(metavar="TEXT", help="What guidance leads away from.")
    ] = None,
    guidance: Annotated[
        float | None,
        typer.Option(metavar="W", help="denoiser.guidance, the usual guidance scale less 1."),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="sampler.steps, of samplers that have it.")
    ] = None,
    out: Annotated[
        Path, typer.Option(help="A grid FILE.png, arrays FILE.npz, or a FOLDER of PNG files.")
    ] = Path("samples.png"),
    rescaler: RescalerOption = None,
    set: SetOption = [],  # noqa: B006
    device: DeviceOption = "auto",
    json: JsonOption = False,
) -> None:
    """Draw images from a finished run, with the scales that its search found, or from a recipe
    with weights. An image depends on the seed and its number alone."""
    from cmkit.device import pick_device
    from cmkit.run import draw

    said = {"denoiser.guidance": guidance, "sampler.steps": steps}
    flags = [f"{key}={value}" for key, value in said.items() if value is not None]
    count = count or len(prompt) or 16
    recipe = _drawn_from(source, [*set, *flags], count, rescaler, prompt)
    seed, chosen = recipe.seed if seed is None else seed, pick_device(device)
    events = draw(recipe, seed, label, out, chosen, negative)
    _show_until_written(events, chosen, json)


@app.command()
def edit(
    source: SourceArgument,
    pictures: Annotated[list[Path], typer.Argument(help="Pictures as large as the model's.")],
    task: Annotated[
        Literal["inpaint", "colorize", "superres"],
        typer.Option(help="Paint what a mask hides, add colours, or add detail."),
    ],
    mask: Annotated[
        Path | None, typer.Option(help="inpaint: a picture, white where to paint anew.")
    ] = None,
    patch: Annotated[
        int, typer.Option(min=1, help="superres: side of the squares whose means are known.")
    ] = 8,
    steps: Annotated[
        int, typer.Option(min=2, help="Points of the Karras grid; one less is evaluated.")
    ] = 40,
    sigma: Annotated[
        list[float], typer.Option(help="A noise level below sigma_max instead; several must fall.")
    ] = [],  # noqa: B006
    seed: SeedOption = None,
    label: LabelOption = [],  # noqa: B006
    out: Annotated[
        Path, typer.Option(help="A grid FILE.png of pairs, before and after, or a FOLDER.")
    ] = Path("edited.png"),
    rescaler: RescalerOption = None,
    set: SetOption = [],  # noqa: B006
    device: DeviceOption = "auto",
    json: JsonOption = False,
) -> None:
    """Edit pictures with a consistency model that was never trained for it: what is known of a
    picture stays, and the model makes up the rest."""
    from cmkit.device import pick_device
    from cmkit.edit import Task
    from cmkit.run import redraw

    recipe, chosen = _drawn_from(source, set, len(pictures), rescaler), pick_device(device)
    edited = Task(task, mask, patch, steps, tuple(sigma))
    seed = recipe.seed if seed is None else seed
    events = redraw(recipe, pictures, edited, seed, label, out, chosen)
    _show_until_written(events, chosen, json)


app.command()(compare)


@app.command()
def verify(
    runs: Annotated[list[str], typer.Argument(help="Folders of runs, or run:NAME-KEY.")],
    json: JsonOption = False,
) -> None:
    """Hold every file of runs to the digests that were kept of it; exit code 4 if one fails."""
    from cmkit.run import RunFolder, verify

    folders = [RunFolder.at(run) for run in runs]
    for run, folder in zip(runs, folders, strict=True):
        if not folder.recipe.exists():
            raise CheckpointError(f"{run}: no run folder, it has no recipe.toml")
    found = [(folder, *each) for folder in folders for each in verify(folder)]
    if json:
        listed = [{"run": str(f.path), "file": name, "fault": fault} for f, name, fault in found]
        printing.document({"schema": 1, "files": listed})
    else:
        several = len(folders) > 1
        names = [str(f.path / name) if several else name for f, name, _ in found]
        outcomes = [fault or "intact" for *_, fault in found]
        printing.table(("file", "outcome"), list(zip(names, outcomes, strict=True)))
    bad = [str(folder.path / name) for folder, name, fault in found if fault]
    if bad:
        raise CheckpointError(f"{', '.join(bad[:5])} not intact; see the table")


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="Weights: a file, a folder, or a published name.")],
    target: Annotated[Path, typer.Argument(help="The new file, or folder for diffusers.")],
    to: Annotated[str, typer.Option(help="Layout to write: cmkit, openai, diffusers, ...")],
    recipe: Annotated[
        str | None, typer.Option(help="A recipe with the backbone and data set of the weights.")
    ] = None,
    set: SetOption = [],  # noqa: B006
    drop_scales: Annotated[
        bool, typer.Option("--drop-scales", help="Write the unscaled model of a rescaled run.")
    ] = False,
    fold_rescaling: Annotated[
        str | None,
        typer.Option(
            "--fold-rescaling",
            metavar="PATH",
            help="Multiply the scales of a rescaling.json, or of the run with it, into the weights;"
            " refused where one cannot be exactly.",
        ),
    ] = None,
    partial: Annotated[
        bool,
        typer.Option(
            "--partial",
            help="Fold what can be, and write the rest beside the target as"
            " TARGET.rescaling.json, without which the new weights draw other pictures.",
        ),
    ] = False,
) -> None:
    """Rewrite weights in another project's names and order, bit for bit, as safetensors."""
    from cmkit.plugins import discover
    from cmkit.recipe import find_recipe, load

    registry = discover()
    loaded = load(find_recipe(recipe), set, registry) if recipe else None
    from cmkit.convert import convert  # the recipe is known to be sound before torch is imported

    events = convert(source, target, to, registry, loaded, drop_scales, fold_rescaling, partial)
    _shown(events, None)
    printing.line(f"{target}: written in the layout {to}")


@app.command()
def merge(
    sources: Annotated[
        list[str], typer.Argument(metavar="ADAPTER=NUMBER", help="Files or runs, what they count.")
    ],
    target: Annotated[Path, typer.Argument(help="The new .safetensors file.")],
    how: Annotated[
        Literal["add", "factors"],
        typer.Option(help="Add the changes of weights, or their factors, with cross terms."),
    ] = "add",
    fold: Annotated[
        str | None,
        typer.Option(
            metavar="RECIPE", help="Add them to the weights of this recipe, and write all of these."
        ),
    ] = None,
    set: SetOption = [],  # noqa: B006
    use: Annotated[str, typer.Option(help="The adapter of these files.")] = "lora",
) -> None:
    """Mix several adapters into one, or fold adapters into the weights of their network."""
    from cmkit.plugins import discover
    from cmkit.recipe import find_recipe, load
    from cmkit.recipe.parts import validated
    from cmkit.recipe.toml import Source

    registry = discover()
    loaded = load(find_recipe(fold), set, registry) if fold else None
    from cmkit import mixing  # the recipe is known to be sound before torch is imported

    options = mixing.options(mixing.counted(sources), how)
    part = validated(registry.load("adapter", use), options, ("merge",), Source("cmkit merge", {}))
    mixing.merge(cast("Adapter", part), target, loaded)
    printing.line(f"{target}: written from {', '.join(sources)}")


app.command()(bench)
app.command()(new)


@app.command()
def schema(
    suite: Annotated[bool, typer.Option("--suite", help="Of suites instead.")] = False,
) -> None:
    """Print the JSON Schema of recipes, from the installed parts; TOML editors complete by it."""
    from cmkit.plugins import discover
    from cmkit.recipe import schema
    from cmkit.suite.describe import suite_schema

    document = schema(discover())
    printing.document(suite_schema(document) if suite else document)


def _loaded(
    recipe: str, overrides: list[str], smoke_below: Path | None
) -> tuple[Recipe, Registry, list[str]]:
    """The recipe, or in its place a smoke recipe in that folder, and what is to be said of it."""
    from cmkit.plugins import discover
    from cmkit.recipe import find_recipe, load

    registry = discover()
    loaded = load(find_recipe(recipe), overrides, registry)
    if smoke_below is None:
        return loaded, registry, []
    from cmkit.smoke import smoke_recipe

    loaded, said = smoke_recipe(loaded, smoke_below, registry)
    return loaded, registry, said


def _plan(recipe: Recipe) -> Plan:
    from cmkit.plan import plan  # the recipe is known to be sound before torch is imported

    return plan(recipe)


@contextlib.contextmanager
def _runs_below(out: Path) -> Iterator[None]:
    """Inside, runs are found by name in --out as well."""
    from cmkit.run.folder import RUNS

    token = RUNS.set(out)
    try:
        yield
    finally:
        RUNS.reset(token)


def _drawn_from(
    source: str,
    overrides: list[str],
    images: int,
    rescaler: str | None = None,
    prompts: list[str] = [],  # noqa: B006
) -> Recipe:
    from cmkit.plugins import discover
    from cmkit.recipe import find_recipe
    from cmkit.run.finished import drawn_from

    source = str(find_recipe(source))
    return drawn_from(source, overrides, discover(), images, rescaler, prompts)


def _shown(events: Iterable[Event], device: torch.device | None, quiet: bool = False) -> Any:
    """The last of the events, all shown as they come; None without any."""
    from cmkit.cli.display import Display

    last = None
    with Display(device, quiet) as display:
        for last in events:
            display.show(last)
    return last


def _show_until_written(events: Iterator[Event], device: torch.device, json: bool) -> None:
    result = _shown(events, device, json).result
    if json:
        printing.document({"schema": 1, **result})
    else:
        printing.line(f"{result['out']}: {result['images']} images, nfe {result['nfe']}")


def _check_images(dataset: Dataset, json: bool) -> None:
    """DataError where images cannot be read, once they are listed."""
    faults = list(dataset.faults())
    if json and faults:
        printing.document({"schema": 1, "faults": faults})
    else:
        printing.first("", faults)
    if faults:
        raise DataError(f"dataset: {len(faults)} bad images; see the list, mend or remove them")
