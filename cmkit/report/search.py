"""The search on the page: cells in rows, the winner, the comparison on fresh noise."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from cmkit.report.curve import finite_or_none
from cmkit.report.figures import CELL_PIXELS, CELLS_BYTES, LEVELS, number, picture_of, score
from cmkit.run.folder import RunFolder

FEW = 4
"""Up to so many numbers of a rescaler are all written out."""


def axis_label(stage: Mapping[str, Any], name: str) -> str:
    """The name of a rescaler's number on the page."""
    return str(stage.get("labels", {}).get(name, name))


def search_page(stage: Mapping[str, Any], folder: RunFolder) -> dict[str, Any]:
    """The cells of a search in rows, as the page and the heatmap show them; a cell's `level` is
    its place on the colour scale."""
    axes, records, best = stage["axes"], stage["cells"], stage["best"]
    ones = f"({', '.join('1' for _ in axes)})" if len(axes) <= FEW else "all 1"
    plain = next((cell for cell in records if all(cell[name] == 1 for name in axes)), None)
    scores = [finite_or_none(cell["score"]) for cell in records]
    norm = _norm([value for value in scores if value is not None])
    most = max(CELLS_BYTES // max(len(records), 1), 2000)
    cells = []
    for index, (record, value) in enumerate(zip(records, scores, strict=True)):
        label = _label(record, axes)
        winner = all(record[name] == best[name] for name in axes)
        cells.append(
            {
                "index": index,
                "label": label,
                "name": label,
                "mark": "best" if winner else ones if record is plain else "",
                "score": value,
                "text": score(value),
                "level": None if value is None else round(float(norm(value)) * (LEVELS - 1)),
                "winner": winner,
                "kept": False,
                "plain": record is plain,
                "note": ("" if record.get("exact", True) else "interpolated; ")
                + _against(value, finite_or_none(plain["score"]) if plain else None),
                "picture": picture_of(folder, record["samples"], CELL_PIXELS, most),
            }
        )
    edges = [
        name
        for name, values in axes.items()
        if len(values) > 2 and best[name] in (min(values), max(values))
    ]
    layout = _steps(stage, cells) if stage.get("descent") else _grid(stage, cells)
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
        scores = [math.inf if cells[k]["score"] is None else cells[k]["score"] for k in places]
        kept = places[scores.index(min(scores))]
        row = []
        for k in sorted(places, key=lambda k: stage["cells"][k][axis]):
            own = number(stage["cells"][k][axis])
            mark = f"{own}, best" if cells[k]["winner"] else own
            row.append({**cells[k], "name": f"{axis} {own}", "mark": mark, "kept": k == kept})
        rows.append({"label": axis_label(stage, axis), "cells": row})
    width = max(len(row["cells"]) for row in rows)
    for step_row in rows:
        step_row["cells"] += [None] * (width - len(step_row["cells"]))
    return {"descent": True, "across": "", "down": "", "columns": [""] * width, "rows": rows}


def _label(cell: Mapping[str, Any], axes: Mapping[str, Any]) -> str:
    """The values of a cell; of more than FEW only those that are not 1."""
    shown = [name for name in axes if len(axes) <= FEW or cell[name] != 1]
    return ", ".join(f"{name} {number(cell[name])}" for name in shown) or "all 1"


def _norm(scores: Sequence[float]) -> Any:
    """A colour scale over the scores: logarithmic where they span a factor of four or more."""
    from matplotlib.colors import LogNorm, Normalize

    low, high = min(scores, default=0.0), max(scores, default=1.0)
    return LogNorm(low, high) if low > 0 and high >= 4 * low else Normalize(low, high)


def _against(value: float | None, plain: float | None) -> str:
    """How a score compares with that of the unscaled model."""
    if value is None:
        return "not a number"
    if plain is None or value == plain:
        return ""
    return f"{score(abs(value - plain))} {'below' if value < plain else 'above'} the unscaled one"


def interpolation_text(by: Mapping[str, Any], name: str) -> str:
    """What a person is told of the entry "surrogate" of a search that minimizes `name`: what it
    cost, how far interpolated scores are from exact ones, and whether that is within the bound."""
    said = f"{len(by['nodes'])} nodes, {number(round(by['passes'], 1))} network passes an image"
    checks = by["checks"]
    if not checks:
        return f"{said}: every cell is a node" if by["held"] else f"{said}: no cell has a score"
    off = [
        abs(check["predicted"] - check["exact"])
        for check in checks
        if None not in (check["predicted"], check["exact"])
    ]
    worst = number(float(f"{max(off):.2g}")) if len(off) == len(checks) else "not a number"
    bound = "unknown" if by["tolerance"] is None else number(float(f"{by['tolerance']:.2g}"))
    where = f"{len(checks)} cells that were drawn to see it"
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
