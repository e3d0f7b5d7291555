"""The command that measures finished runs once more."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from cmkit.cli import printing
from cmkit.cli.models import watch
from cmkit.cli.parts import DeviceOption, JsonOption, SetOption
from cmkit.cli.runs import RunsArgument
from cmkit.runs.places import run_place


def measure(
    runs: RunsArgument,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER|NAME|NAME:PATH|TABLE",
            help="Pictures to compare with: a folder of pictures, a data set by its name or as"
            ' NAME:PATH, or a table such as {use="digits", split="test"}; absent = the recipe\'s.',
        ),
    ] = None,
    count: Annotated[
        int | None,
        typer.Option(
            "--count",
            "-n",
            min=1,
            help="Images; more than the run's samples are drawn anew. Absent = all samples.",
        ),
    ] = None,
    set: SetOption = [],  # noqa: B006
    device: DeviceOption = "auto",
    json: JsonOption = False,
) -> None:
    """Measure finished runs without training: their samples, beside other pictures or with other
    metrics. With RUN@STEP, RUN:AVERAGE, more images than there are samples, or a --set that changes
    what is drawn, images are drawn anew, as the run would draw them.

    What is found is kept in the run's measured.jsonl, for `cmkit runs show`."""
    from cmkit.device import pick_device
    from cmkit.plugins import discover
    from cmkit.runs import measure_run, to_measure
    from cmkit.suite.runs import data_words

    registry, chosen = discover(), pick_device(device)
    places = [run_place(run) for run in runs]
    every = [to_measure(place, data, set, registry, count) for place in places]
    found: list[dict[str, Any]] = [
        {"run": run, **watch(measure_run(one, chosen), chosen, json).result}
        for run, one in zip(runs, every, strict=True)
    ]
    if json:
        printing.document({"schema": 1, "measured": found})
        return
    numbers = list(dict.fromkeys(number for one in found for number in one["values"]))
    rows = [
        [one["run"], f"{one['images']:,}", *(_number(one["values"].get(n)) for n in numbers)]
        for one in found
    ]
    printing.table(("run", "images", *numbers), rows)
    beside = {record["reference"] for one in found for record in one["provenance"]}
    reference = ", ".join(f"{fingerprint[:12]}.." for fingerprint in sorted(beside))
    printing.line(f"beside {data_words(found[0]['data'])}, reference {reference}")


def _number(value: float | None) -> str:
    from cmkit.report.figures import score

    return score(value)
