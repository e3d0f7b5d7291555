"""The search on the page: cells in rows, the winner, the comparison on fresh noise."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from cmkit.recipe.search_table import TUNERS
from cmkit.report.curve import finite_or_none
from cmkit.report.figures import (
    CELL_PIXELS,
    CELLS_BYTES,
    LEAST_BYTES,
    LEVELS,
    number,
    picture_of,
    score,
)
from cmkit.runs.folder import RunFolder

FEW = 4
"""Up to so many numbers of a rescaler are all written out."""
MANY = 12
"""So many of them that are not 1."""


def axis_label(stage: Mapping[str, Any], name: str) -> str:
    """The name of a rescaler's number on the page."""
    return str(stage.get("labels", {}).get(name, name))


def search_page(stage: Mapping[str, Any], folder: RunFolder, less: int = 0) -> dict[str, Any]:
    """The cells of a search in rows, as the page and the heatmap show them, with `less` bytes of
    pictures than CELLS_BYTES; a cell's `level` is its place on the colour scale."""
    axes, records, best = stage["axes"], stage["cells"], stage["best"]
    ones = f"({', '.join('1' for _ in axes)})" if len(axes) <= FEW else "all 1"
    plain = next((cell for cell in records if all(cell[name] == 1 for name in axes)), None)
    scores = [finite_or_none(cell["score"]) for cell in records]
    cuts = [_cut(record, stage) for record in records]
    norm = _norm([v for v, cut in zip(scores, cuts, strict=True) if v is not None and not cut])
    room = CELLS_BYTES - less
    pictures = _pictured(scores, records.index(plain) if plain else None, room)
    most = room // (len(pictures) + 2)  # two of them are on the page twice
    cells = []
    for index, (record, value, cut) in enumerate(zip(records, scores, cuts, strict=True)):
        label = _label(record, axes)
        winner = all(record[name] == best[name] for name in axes)
        marks = ["best" if winner else ones if record is plain else "", f"of {cut}" if cut else ""]
        beside = plain if plain and plain.get("images") == record.get("images") else None
        level = None if value is None or cut else round(float(norm(value)) * (LEVELS - 1))
        cells.append(
            {
                "index": index,
                "label": label,
                "name": label,
                "mark": ", ".join(filter(None, marks)),
                "cut": cut,
                "score": value,
                "text": score(value),
                "level": level,
                "winner": winner,
                "kept": False,
                "plain": record is plain,
                "note": ("" if record.get("exact", True) else "interpolated; ")
                + _against(value, finite_or_none(beside["score"]) if beside else None, cut),
                "picture": picture_of(folder, record["samples"], CELL_PIXELS, most)
                if winner or index in pictures
                else {"name": record["samples"], "src": None},
            }
        )
    edges = [
        name
        for name, values in axes.items()
        if len(values) > 2 and best[name] in (min(values), max(values))
    ]
    tuned = stage.get("method") in TUNERS
    layout = (_steps if stage.get("descent") else _trials if tuned else _grid)(stage, cells)
    shown = [cell for row in layout["rows"] for cell in row["cells"] if cell]
    return {
        **layout,
        "cells": cells,
        "start": next((cell for cell in shown if cell["winner"]), shown[0]),
        "plain": next((cell for cell in cells if cell["plain"]), None),
        "ones": ones,
        "edges": edges,
        "minimize": stage["minimize"],
        "images": stage.get("images"),
        "trials": tuned,
        "rungs": stage.get("rungs", ()),
        "reranked": len(stage.get("rerank", {}).get("cells", [])),
        "rerank_images": stage.get("rerank", {}).get("images"),
        "interpolation": interpolation_text(by, stage["minimize"])
        if (by := stage.get("surrogate"))
        else "",
        "norm": norm,
        "log": type(norm).__name__ == "LogNorm",
    }


def _grid(stage: Mapping[str, Any], cells: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Rows of a grid: the first axis runs across, all others down, rising upward."""
    first, *others = axes = stage["axes"]
    found = {tuple(r[name] for name in axes): c for r, c in zip(stage["cells"], cells, strict=True)}
    rows = []
    for high in reversed(list(itertools.product(*(axes[name] for name in others)))):
        row = [found.get((across, *high)) for across in axes[first]]
        rows.append({"label": ", ".join(map(number, high)), "cells": row})
    return {
        "descent": False,
        "across": axis_label(stage, first),
        "down": ", ".join(axis_label(stage, name) for name in others),
        "columns": [number(value) for value in axes[first]],
        "rows": rows,
    }


def _steps(stage: Mapping[str, Any], cells: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A row for each step of a search by coordinates: the values of its axis, rising; `kept` is
    the one that the search went on with."""
    rows: list[dict[str, Any]] = []
    for step in stage["descent"]:
        axis, places = step["axis"], step["cells"]
        kept = min(places, key=lambda k: _rank(cells[k]))  # the first of equals
        row = []
        for k in sorted(places, key=lambda k: stage["cells"][k][axis]):
            own = number(stage["cells"][k][axis])
            mark = f"{own}, best" if cells[k]["winner"] else own
            mark += f", of {cells[k]['cut']}" if cells[k]["cut"] else ""
            row.append({**cells[k], "name": f"{axis} {own}", "mark": mark, "kept": k == kept})
        rows.append({"label": axis_label(stage, axis), "cells": row})
    width = max(len(row["cells"]) for row in rows)
    for step_row in rows:
        step_row["cells"] += [None] * (width - len(step_row["cells"]))
    return {"descent": True, "across": "", "down": "", "columns": [""] * width, "rows": rows}


def _pictured(scores: Sequence[float | None], plain: int | None, room: int) -> set[int]:
    """The cells whose pictures are on the page: the best, as many as fit, and the unscaled one."""
    ranks = [math.inf if value is None else value for value in scores]
    best = sorted(range(len(ranks)), key=lambda k: (ranks[k], k))[: room // LEAST_BYTES]
    return {*best} | ({plain} if plain is not None else set())


def _trials(stage: Mapping[str, Any], cells: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Rows of a search by trials, ten or more in a row, in their order; `kept` are those that were
    the best so far."""
    width = max(10, math.ceil(len(cells) ** 0.5))
    least, shown = math.inf, []
    for cell in cells:
        kept = _rank(cell) < least
        least = min(least, _rank(cell))
        shown.append({**cell, "name": f"{cell['index'] + 1}, {cell['label']}", "kept": kept})
    rows = []
    for first in range(0, len(shown), width):
        row = shown[first : first + width]
        label = f"{first + 1} to {first + len(row)}"
        rows.append({"label": label, "cells": row + [None] * (width - len(row))})
    return {"descent": False, "across": "", "down": "", "columns": [""] * width, "rows": rows}


def _cut(record: Mapping[str, Any], stage: Mapping[str, Any]) -> int | None:
    """How many images a cell has that halving cut; None for a whole one."""
    images = record.get("images")
    return None if images in (None, stage.get("images")) else images


def _rank(cell: Mapping[str, Any]) -> float:
    """The score of a whole cell; those of fewer images do not compare with it."""
    return math.inf if cell["score"] is None or cell["cut"] else cell["score"]


def _label(cell: Mapping[str, Any], axes: Mapping[str, Any]) -> str:
    """The values of a cell; of more than FEW only those that are not 1, of more than MANY of these
    the farthest from 1."""
    shown = [name for name in axes if len(axes) <= FEW or cell[name] != 1]
    far = sorted(shown, key=lambda name: -abs(cell[name] - 1))[:MANY]
    text = ", ".join(f"{name} {number(cell[name])}" for name in shown if name in far)
    return text + f" and {len(shown) - MANY} more" * (len(shown) > MANY) or "all 1"


def _norm(scores: Sequence[float]) -> Any:
    """A colour scale over the scores: logarithmic where they span a factor of four or more."""
    from matplotlib.colors import LogNorm, Normalize

    low, high = min(scores, default=0.0), max(scores, default=1.0)
    return LogNorm(low, high) if low > 0 and high >= 4 * low else Normalize(low, high)


def _against(value: float | None, plain: float | None, cut: int | None) -> str:
    """How a score compares with that of the unscaled model, on as many images."""
    if value is None:
        return "not a number"
    if cut:
        return f"cut, with {number(cut)} images"
    if plain is None or value == plain:
        return ""
    return f"{score(abs(value - plain))} {'below' if value < plain else 'above'} the unscaled one"


def interpolation_text(by: Mapping[str, Any], name: str) -> str:
    """What a person is told of the entry "surrogate" of a search that minimizes `name`: what it
    cost, how far interpolated scores are from exact ones, and whether that is within the bound."""
    nodes, checks = by["nodes"], by["checks"]
    said = f"{len(nodes)} node{'s' * (len(nodes) != 1)}"
    said += f", {number(round(by['passes'], 1))} network passes an image"
    if not checks:
        return f"{said}: every cell is a node" if by["held"] else f"{said}: no cell has a score"
    off = [
        abs(check["predicted"] - check["exact"])
        for check in checks
        if None not in (check["predicted"], check["exact"])
    ]
    worst = number(float(f"{max(off):.2g}")) if len(off) == len(checks) else "not a number"
    bound = "unknown" if by["tolerance"] is None else number(float(f"{by['tolerance']:.2g}"))
    where = "1 cell that was" if len(checks) == 1 else f"{len(checks)} cells that were"
    where += " drawn to see it"
    if by["held"]:
        return f"{said}: interpolated {name} is at most {worst} off in {where}, bound {bound}"
    cure = "more nodes follow" if by["refines"] else "read the interpolated scores with care"
    return f"{said}: the bound {bound} on {name} does not hold, {worst} off in {where}; {cure}"


def confirm_page(stage: Mapping[str, Any]) -> dict[str, Any]:
    """The comparison on fresh noise, with every place on a common scale of 0 to 100."""
    plain, rescaled, difference = stage["plain"], stage["rescaled"], stage["difference"]
    ends = [x for one in (plain, rescaled) for x in (one["low"], one["high"], *one["values"])]
    low, span = min(ends), (max(ends) - min(ends)) or 1.0

    def place(value: float) -> float:
        return float(round(3 + 94 * (value - low) / span, 2))

    rows = [
        {
            "label": label,
            **{key: one[key] for key in ("mean", "low", "high")},
            "at": {key: place(one[key]) for key in ("mean", "low", "high")},
            "dots": [place(value) for value in one["values"]],
        }
        for label, one in (("unscaled", plain), ("rescaled", rescaled))
    ]
    helps, harms = difference["high"] < 0, difference["low"] > 0
    return {
        "rows": rows,
        "difference": difference,
        "outcome": "better" if helps else "worse" if harms else "open",
        "verdict": stage["verdict"],
        "headline": stage["verdict"].partition(":")[0].rstrip(".") + ".",
        "seeds": len(plain["values"]),
        "images": stage.get("images"),
    }


def cell_data(search: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """What the script shows of each cell."""
    return [
        {"label": c["label"], "score": c["text"], "note": c["note"], "src": c["picture"]["src"]}
        for c in (search["cells"] if search else ())
    ]
