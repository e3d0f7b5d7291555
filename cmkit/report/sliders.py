"""The sliders on the page: stored pictures of a search, and how the browser mixes them at the
scales between."""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cmkit.report.figures import SPRITE_BYTES, image, opened
from cmkit.report.search import axis_label
from cmkit.runs.folder import RunFolder

Pixels = NDArray[np.uint8]
SIZES = (
    *((images, 96) for images in (25, 16, 9, 4)),
    *((4, side) for side in (64, 48, 32, 24)),
    *((2, side) for side in (48, 32)),
    *((1, side) for side in (48, 32, 24, 16)),
)
"""(images, largest side) of what is stored of a cell, the best first."""
PIXELS = 2**23
"""Of all pictures together, which the browser holds and mixes."""
NUMBERS = 20_000
"""Of the matrix of an interpolation on the page: with the polynomials of many axes, sliders move
only those whose winner is farthest from 1."""


def sliders_page(
    stage: Mapping[str, Any], folder: RunFolder, side: int | None, less: int = 0
) -> dict[str, Any] | None:
    """What the script needs to draw at any scales, for images of `side` pixels.

    None where it cannot be right: one cell, a cell or a picture that is missing, more pictures than
    fit. A model is one set of axes: `nodes` are the pictures of its cells, the last axis fastest,
    or with "matrix" those of the nodes of a polynomial with weights basis @ matrix. A search by
    coordinates has a model of one axis for each line, the other numbers as they were there.
    """
    find = _polynomial if stage.get("surrogate") else _steps if stage.get("descent") else _grid
    names: list[str] = []
    found = enumerate(find(stage, names))
    models = [{"line": k, **model.page(stage)} for k, model in found if model.axes]
    paths = [folder.picture(name) for name in names]
    if side is None or not models or not all(path.is_file() for path in paths):
        return None
    stored = _stored(paths, side, SPRITE_BYTES - less)
    return stored and {
        **stored,
        "pictures": len(paths),
        "models": models,
        "smoke": folder.smoke,
        "how": _how(models, len(paths)),
        "sliders": max(min(2, len(model["axes"])) for model in models),
    }


@dataclass(frozen=True)
class _Model:
    """Scales that the sliders reach, and what is stored there."""

    label: str
    axes: Mapping[str, Sequence[float]]
    """Values of each to stop at, rising."""
    start: Mapping[str, float]
    """Where the sliders begin; the values of numbers that they do not move as well."""
    cells: Sequence[int]
    """Places of the cells within reach."""
    nodes: Sequence[Any]
    """Pictures of the cells; of a polynomial (picture, values) of the nodes within reach."""
    polynomial: Mapping[str, Any] | None = None

    def page(self, stage: Mapping[str, Any]) -> dict[str, Any]:
        def within(values: Mapping[str, float]) -> list[float] | None:
            """The axes' values, if the numbers that no slider moves are those of the start."""
            fixed = all(values[a] == v for a, v in self.start.items() if a not in self.axes)
            return [values[axis] for axis in self.axes] if fixed else None

        ends = {axis: (values[0], values[-1]) for axis, values in self.axes.items()}
        ones = dict.fromkeys(self.start, 1.0)
        return {
            "label": self.label,
            "axes": [
                {"name": axis, "label": axis_label(stage, axis), "values": list(values)}
                for axis, values in self.axes.items()
            ],
            "start": within(self.start),
            "best": within(stage["best"]),
            "plain": within(ones) if all(a <= 1 <= b for a, b in ends.values()) else None,
            "cells": [[k, *(stage["cells"][k][axis] for axis in self.axes)] for k in self.cells],
            "nodes": list(self.nodes),
            **(self.polynomial or {}),
        }


def _number(names: list[str], name: str) -> int:
    """The place of a picture in the list, which grows where it is new."""
    if name not in names:
        names.append(name)
    return names.index(name)


def _grid(stage: Mapping[str, Any], names: list[str]) -> Iterator[_Model]:
    """The model of a whole grid."""
    places = {tuple(r[axis] for axis in stage["axes"]): k for k, r in enumerate(stage["cells"])}
    axes = {axis: sorted(set(values)) for axis, values in stage["axes"].items()}
    every = [places.get(values) for values in itertools.product(*axes.values())]
    cells = [k for k in every if k is not None]
    pictures = [stage["cells"][k].get("samples") for k in cells]
    if len(cells) == len(every) and all(pictures):
        names += pictures
        moving = {axis: values for axis, values in axes.items() if len(values) > 1}
        start = {axis: stage["best"][axis] for axis in axes}
        yield _Model("", moving, start, cells, range(len(cells)))


def _steps(stage: Mapping[str, Any], names: list[str]) -> Iterator[_Model]:
    """A model for each line of a search by coordinates."""
    records, best = stage["cells"], stage["best"]
    for step in stage["descent"]:
        axis = step["axis"]
        cells = sorted(step["cells"], key=lambda k: records[k][axis])
        won = [k for k in cells if all(records[k][a] == best[a] for a in stage["axes"])]
        finite = [k for k in cells if records[k]["score"] is not None] or cells
        kept = min(finite, key=lambda k: records[k]["score"] or 0.0)
        start = {a: records[(won or [kept])[0]][a] for a in stage["axes"]}
        nodes = [_number(names, records[k]["samples"]) for k in cells]
        axes = {axis: [records[k][axis] for k in cells]} if len(cells) > 1 else {}
        yield _Model(axis_label(stage, axis), axes, start, cells, nodes)


def _polynomial(stage: Mapping[str, Any], names: list[str]) -> Iterator[_Model]:
    """The model of a search by interpolation, the numbers that no slider moves at the winner."""
    found, best = stage["surrogate"], stage["best"]
    axes, nodes = list(found["axes"]), found["nodes"]
    low, high = np.array(found["low"], float), np.array(found["high"], float)
    exponents, matrix = np.array(found["exponents"], int), np.array(found["matrix"], float)
    moving = [k for k in range(len(axes)) if high[k] > low[k]]
    far = sorted(moving, key=lambda k: -abs(best[axes[k]] - 1) / (high[k] - low[k]))
    while far and len(np.unique(exponents[:, moving], axis=0)) * len(nodes) > NUMBERS:
        moving.remove(far.pop())
    fixed = [k for k in range(len(axes)) if k not in moving]
    width = np.where(high > low, high - low, 1)
    x = ((2 * np.array([best[axis] for axis in axes]) - low - high) / width).clip(-1, 1)
    factor = np.cos(exponents * np.arccos(x))[:, fixed].prod(1)
    terms, term = np.unique(exponents[:, moving], axis=0, return_inverse=True)
    rows = np.zeros((len(terms), len(nodes)))
    np.add.at(rows, term.ravel(), factor[:, None] * matrix)

    def reached(record: Mapping[str, Any]) -> bool:
        return all(record[axes[k]] == best[axes[k]] for k in fixed)

    cells = [k for k, record in enumerate(stage["cells"]) if reached(record)]
    near = [(k, node) for k, node in enumerate(nodes) if reached(node)]
    names += [node["samples"] for node in nodes]
    stops = {
        axes[k]: sorted(
            {
                float(low[k]),
                float(high[k]),
                best[axes[k]],
                *({1.0} if low[k] <= 1 <= high[k] else ()),
            }
            | {node[axes[k]] for _, node in near}
            | {stage["cells"][c][axes[k]] for c in cells}
        )
        for k in moving
    }
    yield _Model(
        "",
        stops,
        {axis: best[axis] for axis in axes},
        cells,
        [[k, *(node[axis] for axis in stops)] for k, node in near],
        {
            "low": low[moving].tolist(),
            "high": high[moving].tolist(),
            "exponents": terms.tolist(),
            "matrix": [[float(f"{value:.7g}") for value in row] for row in rows],
        },
    )


def _how(models: Sequence[Mapping[str, Any]], pictures: int) -> str:
    if "matrix" in models[0]:
        return f"Between: the polynomial through the images of {pictures} nodes, pixel by pixel."
    return "Between cells: a cubic through the four nearest of each axis, pixel by pixel."


def tiles(sheet: Pixels, side: int) -> Pixels | None:
    """The images of a sheet of `grid_png`, (n, side, side, 3), without the empty places at its
    end; None where it is no sheet of images of `side` pixels."""
    from cmkit.pictures import GAP_GREY, grid_layout

    factor, gap = grid_layout(side)
    step = factor * side + gap
    if (sheet.shape[0] + gap) % step or (sheet.shape[1] + gap) % step:
        return None
    padded = np.pad(sheet, ((0, gap), (0, gap), (0, 0)))
    rows, columns = (n // step for n in padded.shape[:2])
    cells = padded.reshape(rows, step, columns, step, 3).swapaxes(1, 2).reshape(-1, step, step, 3)
    images = cells[:, : factor * side : factor, : factor * side : factor]
    drawn = np.flatnonzero((images != GAP_GREY).any((1, 2, 3)))
    return images[: drawn[-1] + 1] if len(drawn) else images


def _stored(paths: Sequence[Path], side: int, room: int) -> dict[str, Any] | None:
    """The pictures in one lossless sprite of at most `room` bytes, as many and as large images of
    each as fit: its tiles are the images of the first picture, of the second, and so on."""
    from cmkit.pictures import grid_layout

    first = tiles(np.asarray(opened(paths[0])), side)
    if first is None:
        return None
    shown = len(first)
    sizes = dict.fromkeys((min(images, shown), min(most, side)) for images, most in SIZES)
    every: Pixels | None = None
    for images, pixels in sizes:
        if len(paths) * images * pixels**2 > PIXELS:
            continue
        if every is None or every.shape[2] > pixels:
            read = [_scaled(path, side, images, pixels) for path in paths]
            if any(one is None for one in read):
                return None
            every = np.stack([one for one in read if one is not None])
        every = every[:, :images]
        few = every[:: math.ceil(len(paths) / 9)]  # to compress all of them takes a while
        if len(_sprite(few)[0]) / len(few) > room / len(paths):
            continue
        data, across = _sprite(every)
        if len(data) <= room:
            factor, gap = grid_layout(pixels)
            return {
                "sprite": image("", data, 0, 0)["src"],
                "across": across,
                "channels": 1 if (every == every[..., :1]).all() else 3,
                "images": images,
                "side": pixels,
                "factor": factor,
                "gap": gap,
                "columns": math.ceil(math.sqrt(images)),
                "shown": "" if (images, pixels) == (shown, side) else _part(images, shown, pixels),
            }
    return None


def _part(images: int, of: int, pixels: int) -> str:
    which = f"the first {images} of {of} images" if images < of else "the images"
    return f"Here {which}, {pixels} pixels wide, so that the page stays small."


def _scaled(path: Path, side: int, images: int, pixels: int) -> Pixels | None:
    """The first images of a sheet, (images, pixels, pixels, 3)."""
    from PIL import Image

    found = tiles(np.asarray(opened(path)), side)
    if found is None:
        return None
    kept = np.zeros((images, pixels, pixels, 3), np.uint8)
    for place, one in zip(kept, found, strict=False):
        picture = Image.fromarray(one)
        if pixels < side:
            picture = picture.resize((pixels, pixels), Image.Resampling.BOX)
        place[:] = np.asarray(picture)
    return kept


def _sprite(every: Pixels) -> tuple[bytes, int]:
    """A lossless WebP of images (nodes, n, side, side, 3) one after the other, row by row, and how
    many are in a row."""
    from PIL import Image

    nodes, images, side = every.shape[:3]
    total = nodes * images
    across = math.ceil(math.sqrt(total))
    rows = math.ceil(total / across)
    whole = np.zeros((rows * across, side, side, 3), np.uint8)
    whole[:total] = every.reshape(total, side, side, 3)
    sheet = whole.reshape(rows, across, side, side, 3).swapaxes(1, 2)
    buffer = io.BytesIO()
    picture = Image.fromarray(sheet.reshape(rows * side, across * side, 3))
    picture.save(buffer, "WEBP", lossless=True, quality=50, method=3)
    return buffer.getvalue(), across
