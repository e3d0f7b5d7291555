"""The commands."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from itertools import chain, groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cmkit.cli import completion, printing
from cmkit.cli.bench import bench
from cmkit.cli.compare import compare
from cmkit.cli.measure import measure
from cmkit.cli.models import convert, edit, export, merge, sample, watch
from cmkit.cli.parts import DeviceOption, JsonOption, SetOption, new, plugins_app
from cmkit.cli.recipes import recipes_app
from cmkit.cli.runs import RunsArgument, folder_of, runs_app
from cmkit.errors import CheckpointError, DataError, inline
from cmkit.runs.places import find_run
from cmkit.stop import StopSignal

if TYPE_CHECKING:
    from cmkit.kinds import Dataset
    from cmkit.plan import Plan
    from cmkit.plugins import Registry
    from cmkit.recipe import Recipe

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
    str,
    typer.Argument(
        help="A recipe file, or the bare name of one that comes with cmkit: see `cmkit recipes`.",
        autocompletion=completion.recipes,
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
app.add_typer(runs_app, name="runs")
app.add_typer(recipes_app, name="recipes")


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        import cmkit

        printing.line(cmkit.__version__)
        raise typer.Exit


@app.command(epilog="Example: cmkit run digits_rescaled_ct --set train.steps=2000")
def run(
    recipe: RecipeArgument,
    set: SetOption = [],  # noqa: B006 - the option is called --set
    from_: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="RUN[@STEP]",
            help="Go on from the training of a run.",
            autocompletion=completion.runs,
        ),
    ] = None,
    smoke: SmokeOption = False,
    out: OutOption = Path("runs"),
    device: DeviceOption = "auto",
    json: JsonOption = False,
) -> None:
    """Carry a recipe out, or go on where it stopped: train, search, sample, measure, report."""
    with _runs_below(out):
        begun = [f"train.start={inline(find_run(from_) or from_)}"] if from_ else []
    loaded, registry, said = _loaded(recipe, [*set, *begun], out if smoke else None)
    from cmkit.device import pick_device
    from cmkit.runs import Note, run, run_folder, shown

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
        report = watch(chain(map(Note, said), [start], events), chosen, json).report
    if json:
        printing.document({**report, "folder": str(folder.path)})
    else:
        printing.results(folder, report)


@app.command(epilog="Example: cmkit check digits_rescaled_ct --set train.steps=2000")
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
    from cmkit.plan import cache_bytes, check_disk, cut_note, sigma_data_note
    from cmkit.recipe import stage_keys
    from cmkit.runs import as_begun, changes, inputs_of, outlook, run_folder
    from cmkit.runs.inputs import chosen_precision
    from cmkit.runs.policies import check_training
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
    bad, held = loaded.dataset.left_out(), loaded.dataset.heldout()
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
        "pictures": inputs["dataset"].get("images"),
        "held_out": held.identity().get("images") if held else None,
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
    notes = [*said, *plan.notes, *filter(None, [sigma_data_note(plan), cut_note(plan)])]
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


app.command(epilog="Example: cmkit sample digits@latest -n 25 --label 3")(sample)
app.command(epilog="Example: cmkit edit digits@latest my.png --task inpaint --mask mask.png")(edit)
app.command(epilog="Example: cmkit compare digits@latest ct-1a2b3c4d --sort fid")(compare)
app.command(epilog="Example: cmkit measure digits@latest --data my_pictures")(measure)


@app.command(epilog="Example: cmkit verify digits@latest")
def verify(
    runs: RunsArgument,
    json: JsonOption = False,
) -> None:
    """Hold every file of runs to the digests that were kept of it; exit code 4 if one fails."""
    from cmkit.runs import verify

    folders = [folder_of(run) for run in runs]
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


app.command(epilog="Example: cmkit convert digits@latest digits.safetensors --to openai")(convert)
app.command(epilog="Example: cmkit export runs/lcm_sd15-1a2b3c4d lcm_sd15 --to diffusers")(export)
app.command(
    epilog="Example: cmkit merge style.safetensors=0.8 lcm_lora_sd15@latest=1 both.safetensors"
)(merge)
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
    from cmkit.runs.places import RUNS

    token = RUNS.set(out)
    try:
        yield
    finally:
        RUNS.reset(token)


def _check_images(dataset: Dataset, json: bool) -> None:
    """DataError where images cannot be read, once they are listed."""
    faults = list(dataset.faults())
    if json and faults:
        printing.document({"schema": 1, "faults": faults})
    else:
        printing.first("", faults)
    if faults:
        raise DataError(f"dataset: {len(faults)} bad images; see the list, mend or remove them")
