"""The commands on models: draw, edit, write for others."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer

from cmkit.cli import completion, printing
from cmkit.cli.parts import DeviceOption, JsonOption, SetOption
from cmkit.runs.places import find_run, run_names

if TYPE_CHECKING:
    import torch

    from cmkit.kinds import Adapter
    from cmkit.recipe import Recipe
    from cmkit.runs import Event

SourceArgument = Annotated[
    str,
    typer.Argument(
        help="A finished run, by name (NAME, how it begins, NAME@latest) or folder, or pushed to"
        " hub:OWNER/NAME; a recipe with denoiser.weights; or a pipeline of diffusers: its folder or"
        " hub:OWNER/NAME.",
        autocompletion=completion.sources,
    ),
]
SeedOption = Annotated[
    int | None, typer.Option(min=0, help="Seed of the noise; absent = the recipe's.")
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
        Path | None,
        typer.Option(
            help="A grid FILE.png, arrays FILE.npz, or a FOLDER of PNG files; absent = samples.png,"
            " samples-2.png, ..",
        ),
    ] = None,
    rescaler: RescalerOption = None,
    set: SetOption = [],  # noqa: B006
    device: DeviceOption = "auto",
    json: JsonOption = False,
) -> None:
    """Draw images from a finished run, with the scales that its search found, or from a recipe
    with weights. An image depends on the seed and its number alone."""
    from cmkit.device import pick_device
    from cmkit.runs import draw

    said = {"denoiser.guidance": guidance, "sampler.steps": steps}
    flags = [f"{key}={value}" for key, value in said.items() if value is not None]
    count = count or len(prompt) or 16
    recipe = _drawn_from(source, [*set, *flags], count, rescaler, prompt)
    seed, chosen = recipe.seed if seed is None else seed, pick_device(device)
    events = draw(recipe, seed, label, out or _free("samples"), chosen, negative)
    _until_written(events, chosen, json)


def edit(
    source: SourceArgument,
    pictures: Annotated[
        list[Path], typer.Argument(help="Pictures as large as the model's, or any with --fit.")
    ],
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
    fit: Annotated[
        bool, typer.Option("--fit", help="Crop and resize pictures of other sizes.")
    ] = False,
    steps: Annotated[
        int, typer.Option(min=2, help="Points of the Karras grid; one less is evaluated.")
    ] = 40,
    sigma: Annotated[
        list[float], typer.Option(help="A noise level below sigma_max instead; several must fall.")
    ] = [],  # noqa: B006
    seed: SeedOption = None,
    label: LabelOption = [],  # noqa: B006
    out: Annotated[
        Path | None,
        typer.Option(
            help="A grid FILE.png of pairs, before and after, or a FOLDER; absent = edited.png,"
            " edited-2.png, ..",
        ),
    ] = None,
    rescaler: RescalerOption = None,
    set: SetOption = [],  # noqa: B006
    device: DeviceOption = "auto",
    json: JsonOption = False,
) -> None:
    """Edit pictures with a consistency model that was never trained for it: what is known of a
    picture stays, and the model makes up the rest."""
    from cmkit.device import pick_device
    from cmkit.edit import Task
    from cmkit.runs import redraw

    recipe, chosen = _drawn_from(source, set, len(pictures), rescaler), pick_device(device)
    edited = Task(task, mask, patch, steps, tuple(sigma), fit)
    seed = recipe.seed if seed is None else seed
    events = redraw(recipe, pictures, edited, seed, label, out or _free("edited"), chosen)
    _until_written(events, chosen, json)


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

    source = find_run(source) or source
    fold = fold_rescaling and (find_run(fold_rescaling) or fold_rescaling)
    events = convert(source, target, to, registry, loaded, drop_scales, fold, partial)
    watch(events, None)
    printing.line(f"{target}: written in the layout {to}")


def export(
    source: SourceArgument,
    folder: Annotated[Path, typer.Argument(help="The new folder.")],
    to: Annotated[
        Literal["diffusers", "onnx", "torch", "cmkit"],
        typer.Option(help="What is to open it: a library, or cmkit itself from the hub."),
    ],
    rescaler: RescalerOption = None,
    drop_scales: Annotated[
        bool, typer.Option("--drop-scales", help="Write the unscaled model of a rescaled run.")
    ] = False,
    push: Annotated[
        str | None,
        typer.Option(metavar="OWNER/NAME", help="Push it to this model of the Hugging Face Hub."),
    ] = None,
    license: Annotated[
        str | None, typer.Option(help="Licence of the weights for the card, such as mit.")
    ] = None,
    set: SetOption = [],  # noqa: B006
    device: DeviceOption = "auto",
    json: JsonOption = False,
) -> None:
    """Write what `sample` draws from for others, with a model card: as a whole pipeline, which
    DiffusionPipeline.from_pretrained opens (diffusers); as the denoiser, a graph for any batch with
    its noise levels in model.json (onnx, torch); or as the run without its checkpoints (cmkit).

    It is opened again and compared with cmkit's on the same noise: where they differ by more than
    half a step of 255, or by 0.001 in a graph, nothing is left, and the exit code is 4. Found
    scales are folded into the weights where that is exact, and are part of a graph."""
    from cmkit.device import pick_device
    from cmkit.export import export
    from cmkit.export.writing import Order
    from cmkit.plugins import discover
    from cmkit.runs.finished import run_at

    recipe, chosen = _drawn_from(source, set, 1, rescaler), pick_device(device)
    run, unscaled = run_at(find_run(source) or source), drop_scales or rescaler == "off"
    order = Order(folder, to, run, unscaled, push, license)
    events = export(recipe, order, discover(), chosen)
    result = watch(events, chosen, json).result
    if json:
        printing.document({"schema": 1, **result})
        return
    printing.line(f"{folder}: written{_as_what(result)}")
    if "difference" in result:
        printing.line(_compared(result))
    if "pushed" in result:
        printing.line(f"pushed to {result['pushed']}")


def _as_what(result: dict[str, Any]) -> str:
    if "pipeline" in result:
        return f" as {result['pipeline']} with {result['scheduler']}"
    return f", with {result['file']} and model.json" if "file" in result else ""


def _compared(result: dict[str, Any]) -> str:
    if "pipeline" in result:
        return (
            f"opened again, its picture differs by {result['difference']:.2g} of 255 from cmkit's"
        )
    return (
        f"opened again, it differs by {result['difference']:.2g} from the original on the same"
        f" noise, in batches of 1 to 3; {result['tolerance']:g} is allowed"
    )


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

    counted = mixing.counted(sources)
    options = mixing.options({find_run(name) or name: n for name, n in counted.items()}, how)
    part = validated(registry.load("adapter", use), options, ("merge",), Source("cmkit merge", {}))
    mixing.merge(cast("Adapter", part), target, loaded)
    printing.line(f"{target}: written from {', '.join(sources)}")


def _drawn_from(
    source: str,
    overrides: list[str],
    images: int,
    rescaler: str | None = None,
    prompts: list[str] = [],  # noqa: B006
) -> Recipe:
    from cmkit.plugins import discover
    from cmkit.recipe import find_recipe
    from cmkit.runs.finished import drawn_from

    source = find_run(source) or str(find_recipe(source, others=run_names()))
    rescaler = rescaler and (find_run(rescaler) or rescaler)
    return drawn_from(source, overrides, discover(), images, rescaler, prompts)


def watch(events: Iterable[Event], device: torch.device | None, quiet: bool = False) -> Any:
    """The last of the events, all shown as they come; None without any."""
    from cmkit.cli.display import Display

    last = None
    with Display(device, quiet) as display:
        for last in events:
            display.show(last)
    return last


def _free(stem: str) -> Path:
    """The first of STEM.png, STEM-2.png, .. that is not there."""
    names = itertools.chain([f"{stem}.png"], (f"{stem}-{k}.png" for k in itertools.count(2)))
    return next(path for path in map(Path, names) if not path.exists())


def _until_written(events: Iterator[Event], device: torch.device, json: bool) -> None:
    result = watch(events, device, json).result
    if json:
        printing.document({"schema": 1, **result})
    else:
        printing.line(f"{result['out']}: {result['images']} images, nfe {result['nfe']}")
