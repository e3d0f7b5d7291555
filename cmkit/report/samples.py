"""The samples on the page: whole sheets, pictures with their prompts, in other numbers of steps and
during the training."""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cmkit.report import figures
from cmkit.report.figures import image, number, opened, picture_of, webps
from cmkit.runs.folder import RunFolder

if TYPE_CHECKING:
    from PIL.Image import Image

FIGURES, FIGURE_PIXELS, TINY_SIDE = 24, 256, 100
"""Samples that stand alone with their prompts, their largest side, and that below which a picture
is enlarged without smoothing."""
STEPS_IMAGES = 8
"""Most pictures in a row of another number of steps."""
SHOWN_STEPS = 24
"""Steps of the training whose pictures are on the page."""
LETTERS = 300
"""Of a prompt as text; the whole of it is the title of its picture."""


def samples_page(
    stage: Mapping[str, Any], report: Mapping[str, Any], folder: RunFolder, room: int
) -> dict[str, Any]:
    """What the page says of the stage `sample`: facts, sheets, and where there are prompts the
    first pictures alone with theirs, and `others` as "number · prompt"; with `room` times the
    bytes of pictures that a page with a search has."""
    data = report.get("data", {})
    labels, names = stage.get("labels", ()), data.get("classes")
    shown = [names[label] if names else str(label) for label in labels]
    columns = math.ceil(math.sqrt(len(shown))) or 1
    rows = [shown[k : k + columns] for k in range(0, len(shown), columns)]
    rule = {"data": "in the proportions of the data", "uniform": "each as often as any other"}
    facts = {"images": stage["images"], "nfe": evaluations(stage["nfe"]), "classes": rows}
    facts["rule"] = rule.get(stage.get("label_rule", ""))
    pictures = {
        key: picture_of(folder, stage[key], figures.SHEET_PIXELS, figures.SHEET_BYTES)
        if stage.get(key)
        else None
        for key in ("before", "after")
    }
    prompts, single = stage.get("prompts", []), []
    if prompts and stage.get("after"):
        count, most = min(len(prompts), FIGURES), room * figures.FIGURE_BYTES
        single = stored(cells(folder, stage["after"], data["resolution"], count), most)
    facts["figures"] = _captioned(single, prompts)
    facts["others"] = [
        f"{k} · {_text(prompt)}" for k, prompt in enumerate(prompts, 1) if k > len(single)
    ]
    facts["steps"] = _in_steps(stage.get("steps", {}), folder, room * figures.STEPS_BYTES)
    facts["columns"] = [_said(prompt) for prompt in prompts[:STEPS_IMAGES]]
    return {**facts, **pictures, "scales": ", ".join(_scales(stage.get("scales", {})))}


def shown_page(stage: Mapping[str, Any], folder: RunFolder, room: int) -> dict[str, Any] | None:
    """Pictures drawn during the training, for the slider: `steps`, evenly spaced where there are
    many, each a label with its pictures, and captioned `figures` of the last; None without any."""
    found = stage.get("shown")
    steps = sorted((int(step), name) for step, name in found["steps"].items()) if found else []
    steps = [each for each in steps if folder.picture(each[1]).is_file()]
    if not found or not steps:
        return None
    if (last := len(steps) - 1) >= SHOWN_STEPS:
        steps = [steps[round(k * last / (SHOWN_STEPS - 1))] for k in range(SHOWN_STEPS)]
    drawn = {step: cells(folder, name, found["side"], found["images"]) for step, name in steps}
    every = iter(stored([*itertools.chain(*drawn.values())], room * figures.SHOWN_BYTES))
    pictures = {step: list(itertools.islice(every, len(own))) for step, own in drawn.items()}
    return {
        "figures": _captioned(pictures[steps[-1][0]], found["prompts"]),
        "steps": [
            {"label": f"step {number(step)}", "sources": [each["src"] for each in own]}
            for step, own in pictures.items()
        ],
    }


def size_of(samples: Mapping[str, Any] | None, shown: Mapping[str, Any] | None) -> int:
    """Bytes of the pictures that these have beside the sheets."""
    sources = [source for step in (shown or {}).get("steps", ()) for source in step["sources"]]
    if samples:
        pictures = (*samples["figures"], *samples["steps"])
        sources += [each["picture"]["src"] or "" for each in pictures]
    return 3 * sum(map(len, sources)) // 4


def cells(folder: RunFolder, name: str, side: int, count: int) -> list[Image]:
    """The first `count` images of `side` pixels on a sheet of `grid_png`; none where the file is
    gone or is no such sheet."""
    import numpy as np
    from PIL.Image import fromarray

    from cmkit.report.sliders import tiles

    path = folder.picture(name)
    images = tiles(np.asarray(opened(path)), side) if path.is_file() else None
    return [] if images is None else [fromarray(pixels) for pixels in images[:count]]


def stored(pictures: Sequence[Image], most: int) -> list[dict[str, Any]]:
    """Attributes of an <img> for each of some pictures of one size: as they are, or smaller where
    they have more than about `most` bytes together."""
    found = []
    for picture in pictures:
        picture.save(buffer := io.BytesIO(), "PNG")
        found.append(buffer.getvalue())
    side = min(pictures[0].width, FIGURE_PIXELS) if pictures else 0
    if pictures and (side < pictures[0].width or sum(map(len, found)) > most):
        found = webps(pictures, side, most)
    return [{**image("", data, side, side), "tiny": side < TINY_SIDE} for data in found]


def _captioned(
    pictures: Sequence[Mapping[str, Any]], prompts: Sequence[str]
) -> list[dict[str, Any]]:
    """Pictures, each with its prompt, if any."""
    said: list[dict[str, Any]] = [_said(prompt) for prompt in prompts[: len(pictures)]]
    said += [{"text": None}] * (len(pictures) - len(said))
    return [{"picture": one, **own} for one, own in zip(pictures, said, strict=True)]


def _said(prompt: str) -> dict[str, str]:
    return {"text": _text(prompt), "whole": " ".join(prompt.split())}


def _text(prompt: str) -> str:
    """A prompt on one line, at most LETTERS long."""
    line = " ".join(prompt.split())
    return line if len(line) <= LETTERS else f"{line[: LETTERS - 1]}…"


def _in_steps(steps: Mapping[str, str], folder: RunFolder, most: int) -> list[dict[str, Any]]:
    """A row of pictures for each number of steps, rising, of about `most` bytes together."""
    each = most // max(len(steps), 1)
    return [
        {
            "label": "1 step" if many == 1 else f"{number(many)} steps",
            "picture": picture_of(folder, name, figures.SHEET_PIXELS, each),
        }
        for many, name in sorted((int(count), name) for count, name in steps.items())
    ]


def evaluations(nfe: int) -> str:
    """What a sample costs."""
    return "one step each" if nfe == 1 else f"{nfe} evaluations each"


def _scales(scales: Mapping[str, Any]) -> Iterator[str]:
    """A rescaler's values, those of single sites by their names."""
    for name, value in scales.items():
        if isinstance(value, dict):
            yield from _scales(value)
        elif isinstance(value, list):
            yield f"{name} [{', '.join(map(number, value))}]"
        else:
            yield f"{name} {number(value)}"
