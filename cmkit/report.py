"""The page a person opens: `report.html`, one file made of what a run's folder holds."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import itertools
import json
import math
import re
import statistics
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cmkit.errors import CheckpointError, DataError, ResourceError
from cmkit.figures import LEVELS, colour, count, heatmap_png, loss_png, number, score

SCHEMA = 1
AXES = {"skip": "skip (s0)", "emb": "emb (s1)"}
SHEET_PIXELS, CELL_PIXELS = 1280, 640
TINY_PIXELS = 600
FEW = 4
"""Numbers of a rescaler that are written out wherever they are spoken of."""
CURVE_POINTS = 400
HERE = Path(__file__).parent


def write_report(folder: Path) -> Path:
    """The path of `report.html`, written with `heatmap.png` and `loss.png` into a run's folder.

    Raises CheckpointError when report.json is missing or not one that cmkit wrote, DataError when
    a picture is outside the folder or is no PNG, ResourceError when the disk refuses.
    """
    from cmkit.files import atomic_write

    path = folder / "report.json"
    report = _scrub(_read(path))
    with _malformed(path):
        stages = report["stages"]
        search = _search(stages["search"], folder) if "search" in stages else None
        curve = _curve(_read_log(folder / "log.jsonl")) if "train" in stages else None
        files: dict[str, bytes | str] = {}
        if search:
            files["heatmap.png"] = heatmap_png(search)
        if curve:
            files["loss.png"] = loss_png(curve)
        files["report.html"] = _render(_page(report, folder, search, curve))
    for name, content in files.items():
        atomic_write(folder / name, content)
    return folder / "report.html"


def signed(value: float, digits: int = 3) -> str:
    """A difference with its sign."""
    return ("+" if value > 0 else "\N{MINUS SIGN}" if value < 0 else "") + score(abs(value), digits)


def duration(seconds: float) -> str:
    """A time in its two largest units."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    hours, minutes = whole // 3600, whole % 3600 // 60
    if hours:
        return f"{hours:,} h {minutes:02} min"
    return f"{minutes} min {whole % 60:02} s" if minutes else f"{whole} s"


def _read(path: Path) -> dict[str, Any]:
    try:
        report = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise CheckpointError(
            f"{path}: {error.strerror}; `cmkit run` writes it when every stage is done"
        ) from error
    except ValueError as error:
        raise CheckpointError(f"{path}: damaged ({error}); run the recipe again") from error
    schema = report.get("schema") if isinstance(report, dict) else None
    if schema != SCHEMA:
        raise CheckpointError(
            f"{path}: schema {schema!r}, but this cmkit reads {SCHEMA}; run the recipe again"
        )
    return dict(report)


@contextlib.contextmanager
def _malformed(path: Path) -> Iterator[None]:
    """Inside, an odd field becomes a CheckpointError, and an OSError a ResourceError."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise CheckpointError(
            f"{path}: not a report that cmkit wrote ({type(error).__name__}: {error}); run the"
            " recipe again"
        ) from error
    except OSError as error:
        raise ResourceError(
            f"{error.filename or path}: cannot be read: {error.strerror}; mend it, then run again"
        ) from error


def _read_log(path: Path) -> list[dict[str, Any]]:
    """The finite records of a training log; whatever else is in it, a torn line, is left out."""
    records = []
    for line in path.read_text("utf-8", "replace").splitlines() if path.is_file() else ():
        with contextlib.suppress(ValueError, AttributeError):
            record = json.loads(line)
            step, loss, sigmas = map(_finite, map(record.get, ("step", "loss", "num_sigmas")))
            if step is not None and loss is not None:
                records.append({"step": int(step), "loss": loss, "num_sigmas": int(sigmas or 0)})
    return records


def _scrub(value: Any) -> Any:
    """The same value without the home folder's path and without credentials in URLs."""
    if isinstance(value, dict):
        return {key: _scrub(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_scrub(item) for item in value]
    if not isinstance(value, str):
        return value
    home = str(Path.home())
    if len(home) > 1:
        value = re.sub(rf"(?<![\w.~/-]){re.escape(home)}(?![\w.-])", "~", value)
    return re.sub(r"(\b\w+://)[^/\s@]*@", r"\1", value)


def _finite(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _picture(folder: Path, name: str, limit: int) -> dict[str, Any]:
    """An <img>: `src` as a data URI, at most `limit` pixels wide, or no `src` when it is gone."""
    path = (folder / name).resolve()
    if Path(name).is_absolute() or not path.is_relative_to(folder.resolve()):
        raise DataError(
            f"{folder / 'report.json'}: picture {name!r} is outside the run's folder; correct it,"
            " or run the recipe again"
        )
    if not path.is_file():
        return {"name": name, "src": None}
    data = path.read_bytes()
    if data[:8] != b"\x89PNG\r\n\x1a\n" or len(data) < 24:
        raise DataError(f"{path}: not a PNG picture; delete it, or run the recipe again")
    width, height = struct.unpack(">II", data[16:24])
    kind = "png"
    if width > limit:
        data, kind, height, width = _shrunk(path, limit), "webp", height * limit // width, limit
    source: str = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    tiny = width < TINY_PIXELS
    return {"name": name, "src": source, "width": width, "height": height, "tiny": tiny}


def _shrunk(path: Path, width: int) -> bytes:
    """A WebP of a picture, `width` wide: 49 cells of 1280 pixels would make a page of 100 MB."""
    from PIL import Image

    buffer = io.BytesIO()
    try:
        with Image.open(path) as picture:
            height = picture.height * width // picture.width
            small = picture.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: {error}; delete it, or run the recipe again") from error
    small.save(buffer, "WEBP", quality=85)
    return buffer.getvalue()


def _search(stage: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The cells of a search in rows, as the page and the heatmap show them."""
    axes = stage["axes"]
    names = list(axes)
    records = stage["cells"]
    ones = f"({', '.join('1' for _ in names)})" if len(names) <= FEW else "all 1"
    plain = next((cell for cell in records if all(cell[name] == 1 for name in names)), None)
    scores = [_finite(cell["score"]) for cell in records]
    norm = _norm([value for value in scores if value is not None])
    cells = [
        {**_cell(record, stage, plain, norm, ones), "index": index}
        for index, record in enumerate(records)
    ]
    for cell in cells:
        cell["picture"] = _picture(folder, cell["file"], CELL_PIXELS)
    layout = _steps(stage, cells) if stage.get("descent") else _grid(stage, cells)
    shown = [cell for row in layout["rows"] for cell in row["cells"] if cell]
    return {
        **layout,
        "cells": cells,
        "start": next((cell for cell in shown if cell["winner"]), shown[0]),
        "plain": next((cell for cell in cells if cell["plain"]), None),
        "ones": ones,
        "edges": [name for name in names if _on_edge(stage["best"][name], axes[name])],
        "minimize": stage["minimize"],
        "images": stage.get("images"),
        "reranked": len(stage.get("rerank", {}).get("cells", [])),
        "rerank_images": stage.get("rerank", {}).get("images"),
        "norm": norm,
        "log": type(norm).__name__ == "LogNorm",
    }


def _grid(stage: Mapping[str, Any], cells: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A grid's rows: the first axis runs across, all others down, rising upward."""
    first, *others = axes = stage["axes"]
    found = {tuple(r[name] for name in axes): c for r, c in zip(stage["cells"], cells, strict=True)}
    rows = []
    for high in reversed(list(itertools.product(*(axes[name] for name in others)))):
        row = [found.get((across, *high)) for across in axes[first]]
        rows.append({"label": ", ".join(map(number, high)), "cells": row})
    return {
        "descent": False,
        "across": AXES.get(first, first),
        "down": ", ".join(AXES.get(name, name) for name in others),
        "columns": [number(value) for value in axes[first]],
        "rows": rows,
    }


def _steps(stage: Mapping[str, Any], cells: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A row for each step of a search by coordinates: the values of its axis, rising, the one that
    the search went on with marked as `kept`."""
    rows = []
    for step in stage["descent"]:
        axis, places = step["axis"], step["cells"]
        scores = [math.inf if cells[k]["score"] is None else cells[k]["score"] for k in places]
        kept = places[scores.index(min(scores))]
        row = []
        for k in sorted(places, key=lambda k: stage["cells"][k][axis]):
            own = number(stage["cells"][k][axis])
            mark = f"{own}, best" if cells[k]["winner"] else own
            row.append({**cells[k], "name": f"{axis} {own}", "mark": mark, "kept": k == kept})
        rows.append({"label": AXES.get(axis, axis), "cells": row})
    width = max(len(row["cells"]) for row in rows)
    for row in rows:
        row["cells"] += [None] * (width - len(row["cells"]))
    return {"descent": True, "across": "", "down": "", "columns": [""] * width, "rows": rows}


def _cell(
    cell: Mapping[str, Any],
    stage: Mapping[str, Any],
    plain: Mapping[str, Any] | None,
    norm: Any,
    ones: str,
) -> dict[str, Any]:
    """What the page says of one cell; `level` is its place on the colour scale."""
    value = _finite(cell["score"])
    winner = all(cell[name] == stage["best"][name] for name in stage["axes"])
    label = _label(cell, stage["axes"])
    return {
        "label": label,
        "name": label,
        "mark": "best" if winner else ones if cell is plain else "",
        "score": value,
        "text": score(value),
        "level": None if value is None else round(float(norm(value)) * (LEVELS - 1)),
        "winner": winner,
        "kept": False,
        "plain": cell is plain,
        "note": _against(value, _finite(plain["score"]) if plain else None),
        "file": cell["samples"],
    }


def _label(cell: Mapping[str, Any], axes: Mapping[str, Any]) -> str:
    """A cell's values; of many only those that are not 1."""
    shown = [name for name in axes if len(axes) <= FEW or cell[name] != 1]
    return ", ".join(f"{name} {number(cell[name])}" for name in shown) or "all 1"


def _on_edge(value: float, values: Sequence[float]) -> bool:
    return len(values) > 2 and value in (min(values), max(values))


def _norm(scores: Sequence[float]) -> Any:
    """A colour scale over the scores: logarithmic where they span a factor of four or more."""
    from matplotlib.colors import LogNorm, Normalize

    low, high = min(scores, default=0.0), max(scores, default=1.0)
    return LogNorm(low, high) if low > 0 and high >= 4 * low else Normalize(low, high)


def _against(value: float | None, plain: float | None) -> str:
    if value is None:
        return "not a number"
    if plain is None or value == plain:
        return ""
    return f"{score(abs(value - plain))} {'below' if value < plain else 'above'} the unscaled one"


def _confirm(stage: Mapping[str, Any]) -> dict[str, Any]:
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


def _curve(records: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The loss over the steps, averaged to at most CURVE_POINTS points."""
    if len(records) < 2:
        return None
    size = math.ceil(len(records) / CURVE_POINTS)
    chunks = [records[i : i + size] for i in range(0, len(records), size)]
    steps = [chunk[-1]["step"] for chunk in chunks]
    losses = [statistics.fmean(record["loss"] for record in chunk) for chunk in chunks]
    sigmas = [chunk[-1]["num_sigmas"] for chunk in chunks]
    logarithmic = min(losses) > 0 and max(losses) >= 10 * min(losses)
    return {
        "steps": steps,
        "losses": losses,
        "sigmas": sigmas,
        "marks": _doublings(steps, sigmas),
        "log": logarithmic,
        "smoothed": size,
    }


def _doublings(steps: Sequence[int], sigmas: Sequence[int]) -> list[tuple[int, int]]:
    """(step, N) wherever N - 1, the intervals, has at least doubled since the last such place."""
    marks: list[tuple[int, int]] = []
    for step, sigma in zip(steps, sigmas, strict=True):
        if sigma and (not marks or sigma - 1 >= 2 * (marks[-1][1] - 1)):
            marks.append((step, sigma))
    return marks


def _curve_svg(curve: Mapping[str, Any]) -> dict[str, Any]:
    """The curve, its ticks and the doublings of N in per cent of the plot, y downward."""
    from matplotlib.ticker import LogLocator, MaxNLocator

    steps, losses = curve["steps"], curve["losses"]
    even = MaxNLocator(4, steps=[1, 2, 5, 10])
    height = math.log if curve["log"] else float
    low, high = height(min(losses)), height(max(losses))
    low, high = low - 0.04 * (high - low), high + 0.04 * (high - low) or 1.0

    def x(step: float) -> float:
        return round(100 * step / (steps[-1] or 1), 3)

    def y(loss: float) -> float:
        return round(100 * (high - height(loss)) / ((high - low) or 1), 3)

    locator = LogLocator(subs=(1, 2, 5)) if curve["log"] else even
    ticks = [float(v) for v in locator.tick_values(min(losses), max(losses))]
    levels = [v for v in ticks if v > 0 or not curve["log"]]
    across = [float(v) for v in even.tick_values(0, steps[-1])]
    points = [(x(step), y(loss)) for step, loss in zip(steps, losses, strict=True)]
    return {
        "line": " ".join(f"{a},{b}" for a, b in points),
        "points": points,
        "levels": [(y(v), number(v)) for v in levels if 4 < y(v) < 100],
        "across": [(x(v), count(v)) for v in across if 0 <= x(v) <= 100],
        "marks": [(x(step), sigma) for step, sigma in curve["marks"]],
    }


def _page(
    report: Mapping[str, Any],
    folder: Path,
    search: Mapping[str, Any] | None,
    curve: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """What the template shows."""
    stages = report["stages"]
    confirm = stages.get("search", {}).get("confirm")
    sample = stages.get("sample")
    return {
        **{key: report[key] for key in ("name", "hash", "seconds", "citations")},
        "time": report["time"].replace("T", " ").replace("+00:00", " UTC"),
        "headlines": list(_headlines(report)),
        "samples": _samples(sample, folder) if sample else None,
        "search": search,
        "confirm": _confirm(confirm) if confirm else None,
        "metrics": _metrics(stages["metric"]) if "metric" in stages else None,
        "train": stages.get("train"),
        "curve": _curve_svg(curve) if curve else None,
        "costs": _costs(stages),
        "recipe": _toml(report["recipe"]),
        "environment": _environment(report["environment"]),
        "data": {"cells": _cell_data(search), "curve": _curve_data(curve)},
    }


def _headlines(report: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """(label, value, note) of the few numbers that a reader wants first."""
    stages = report["stages"]
    search, metric = stages.get("search"), stages.get("metric")
    sample, train = stages.get("sample"), stages.get("train")
    if search and search.get("confirm"):
        confirm = search["confirm"]
        before, after = confirm["plain"]["mean"], confirm["rescaled"]["mean"]
        change = f"{signed(100 * (after - before) / before, 2)} %, " if before else ""
        seeds = f"{len(confirm['seeds'])} seeds of {number(confirm['images'])} images"
        yield (
            f"{search['minimize']} on fresh noise",
            f"{score(before)} → {score(after)}",
            change + seeds,
        )
    if search:
        axes, cells = search["axes"], f"of {len(search['cells'])} cells"
        best = [search["best"][axis] for axis in axes]
        if len(axes) <= FEW:
            where = " · ".join(AXES.get(axis, axis) for axis in axes)
            yield "best scales", " · ".join(map(number, best)), f"{where}, {cells}"
        else:
            moved = sum(value != 1 for value in best)
            yield "best scales", f"{moved} of {len(best)}", f"other than 1, {cells}"
    if metric and metric["values"]:
        wanted = search["minimize"] if search else "fid"
        name = wanted if wanted in metric["values"] else next(iter(metric["values"]))
        images = f"{number(sample['images'])} images, {_nfe(sample['nfe'])}" if sample else ""
        yield f"{name} of the samples", score(metric["values"][name]), images
    if train:
        yield "parameters", count(train["parameters"]), f"{number(train['steps'])} training steps"
    yield "time", duration(report["seconds"]), str(report["environment"].get("device", ""))


def _nfe(nfe: int) -> str:
    return "one step each" if nfe == 1 else f"{nfe} evaluations each"


def _samples(stage: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    scales = ", ".join(_scales(stage.get("scales", {})))
    return {
        "images": stage["images"],
        "nfe": _nfe(stage["nfe"]),
        "scales": scales,
        **{
            key: _picture(folder, stage[key], SHEET_PIXELS) if stage.get(key) else None
            for key in ("before", "after")
        },
    }


def _scales(scales: Mapping[str, Any]) -> Iterator[str]:
    """A rescaler's values, those of single sites by their names."""
    for name, value in scales.items():
        if isinstance(value, dict):
            yield from _scales(value)
        elif isinstance(value, list):
            yield f"{name} [{', '.join(map(number, value))}]"
        else:
            yield f"{name} {number(value)}"


def _metrics(stage: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The numbers, grouped by what must stand beside them."""
    left = dict(stage["values"])
    groups = []
    for source in [*stage["provenance"], {}]:
        names = [name for name in left if name in source.get("numbers", left)]
        values = {name: left.pop(name) for name in names}
        facts = {key: _short(value) for key, value in source.items() if key != "numbers"}
        if values:
            groups.append({"values": values, "facts": facts})
    return groups


def _short(value: object) -> str:
    """A fact as text; of a long digest its first 12 digits."""
    return re.sub(r"\b([0-9a-f]{12})[0-9a-f]{20,}\b", r"\1…", number(value))


def _costs(stages: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each stage's seconds, share of the longest one in per cent, peak memory and work done."""
    longest = max((stage["seconds"] for stage in stages.values()), default=0) or 1
    return [
        {
            "stage": name,
            "seconds": stage["seconds"],
            "share": round(100 * stage["seconds"] / longest, 2),
            "memory": stage.get("peak_memory_mib"),
            "work": _work(name, stage),
        }
        for name, stage in stages.items()
    ]


def _work(name: str, stage: Mapping[str, Any]) -> str:
    if name == "train":
        return f"{number(stage['steps'])} steps, {number(stage['images_per_second'])} images/s"
    if name == "search":
        return f"{len(stage['cells'])} cells of {number(stage.get('images'))} images"
    if name == "sample":
        return f"{number(stage['images'])} images"
    return ", ".join(stage["values"]) if name == "metric" else ""


def _environment(environment: Mapping[str, Any]) -> list[tuple[str, str]]:
    packages = environment.get("packages", {})
    rows = [(key, str(value)) for key, value in environment.items() if key != "packages"]
    return rows + [(name, str(version)) for name, version in packages.items()]


def _toml(recipe: Mapping[str, Any]) -> str:
    """The recipe as TOML, without the query of a URL, which may be a key."""
    import tomlkit

    text = tomlkit.dumps(_without_none(recipe)).strip()
    return re.sub(r"(\b\w+://[^\s?#\"']*)\?[^\s#\"']*", r"\1?…", text)


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, list) else value


def _cell_data(search: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """What the script shows of each cell."""
    return [
        {
            "label": cell["label"],
            "score": cell["text"],
            "note": cell["note"],
            "src": cell["picture"]["src"],
        }
        for cell in (search["cells"] if search else ())
    ]


def _curve_data(curve: Mapping[str, Any] | None) -> list[str]:
    """What the script says of each point of the curve."""
    if not curve:
        return []
    return [
        f"step {number(step)} · loss {number(loss)}" + (f" · N = {sigmas}" if sigmas else "")
        for step, loss, sigmas in zip(curve["steps"], curve["losses"], curve["sigmas"], strict=True)
    ]


def _render(page: Mapping[str, Any]) -> str:
    """The page's HTML; the policy in its head lets only this very style and script act."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    # autoescape is a plain True: select_autoescape() does not know the suffix .html.j2
    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {f.__name__: f for f in (number, score, signed, duration)}
    style = (HERE / "report.css").read_text("utf-8") + _ramp()
    script = (HERE / "report.js").read_text("utf-8")
    policy = (
        f"default-src 'none'; img-src data:; style-src '{_hash(style)}';"
        f" script-src '{_hash(script)}'; base-uri 'none'; form-action 'none'"
    )
    assert "</" not in style + script
    return environment.get_template("report.html.j2").render(
        page,
        policy=policy,
        style=Markup(style),  # noqa: S704
        script=Markup(script),  # noqa: S704
        levels=LEVELS,
    )


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _ramp() -> str:
    """A rule for each level of the colour scale: the policy forbids style attributes."""
    colours = [colour(level / (LEVELS - 1)) for level in range(LEVELS)]
    return "".join(
        f".q{level} {{ background: {back}; color: {ink}; fill: {back} }}\n"
        for level, (back, ink) in enumerate(colours)
    )
