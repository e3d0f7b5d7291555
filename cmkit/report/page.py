"""The page: what a run's report says, arranged for the template."""

from __future__ import annotations

import base64
import hashlib
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cmkit.report import figures
from cmkit.report.curve import curve_of, curve_svg, scores_svg
from cmkit.report.figures import LEVELS, count, number, score
from cmkit.report.samples import evaluations, samples_page, shown_page, size_of
from cmkit.report.search import FEW, axis_label, cell_data, confirm_page, search_page
from cmkit.runs.folder import RunFolder

HERE = Path(__file__).parent
CLASSES = 200
"""Classes that the page lists."""
UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def write_report(folder: RunFolder) -> Path:
    """The path of `report.html`, written with `heatmap.png` and `loss.png` into a run's folder.

    Raises CheckpointError when report.json is missing or not one that cmkit wrote, DataError when
    a picture is outside the folder or is no PNG, ResourceError when the disk refuses.
    """
    from cmkit.report.sliders import sliders_page

    with folder.reading_report() as written:
        report = scrub(written)
        stages = report["stages"]
        sample, confirm = stages.get("sample"), stages.get("search", {}).get("confirm")
        room = 1 if "search" in stages else 2
        samples = samples_page(sample, report, folder, room) if sample else None
        shown = shown_page(stages["train"], folder, room) if "train" in stages else None
        less = size_of(samples, shown) // 2
        search = search_page(stages["search"], folder, less) if "search" in stages else None
        side = report.get("data", {}).get("resolution")
        sliders = sliders_page(stages["search"], folder, side, less) if search else None
        curve = curve_of(folder.log()) if "train" in stages else None
        scores = stages.get("train", {}).get("scores")
        pictures = {
            **({"heatmap": figures.heatmap_png(search)} if search else {}),
            **({"loss": figures.loss_png(curve, scores)} if curve else {}),
        }
        variables = {
            **{key: report[key] for key in ("name", "hash", "seconds", "citations")},
            "time": report["time"].replace("T", " ").replace("+00:00", " UTC"),
            "smoke": report.get("smoke", False),
            "headlines": list(_headlines(report)),
            "samples": samples,
            "classes": _classes(report.get("data", {})),
            "search": search,
            "confirm": confirm_page(confirm) if confirm else None,
            "metrics": _metrics(stages["metric"]) if "metric" in stages else None,
            "train": stages.get("train"),
            "shown": shown,
            "curve": curve_svg(curve) if curve else None,
            "scores": scores_svg(curve, scores) if curve and scores else None,
            "costs": _costs(stages),
            "recipe": _toml(report["recipe"]),
            "environment": _environment(report["environment"]),
            "cells": cell_data(search),
            "sliders": sliders,
            "levels": LEVELS,
        }
        page = render(HERE, "report", variables, _ramp(), ("sliders",) if sliders else ())
    for name, png in pictures.items():
        folder.keep_picture(name, png)
    folder.keep_page(page)
    return folder.page


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


def scrub(value: Any) -> Any:
    """The same value without the home folder's path, credentials in URLs, and characters that
    steer a terminal, turn the direction of text or are none: pages are handed around."""
    if isinstance(value, dict):
        return {key: scrub(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [scrub(item) for item in value]
    if not isinstance(value, str):
        return value
    value = UNSAFE.sub("\N{REPLACEMENT CHARACTER}", value)
    home = str(Path.home())
    if len(home) > 1:
        value = re.sub(rf"(?<![\w.~/-]){re.escape(home)}(?![\w.-])", "~", value)
    return re.sub(r"(\b\w+://)[^/\s@]*@", r"\1", value)


def _headlines(report: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """(label, value, note) of the few numbers that a reader wants first."""
    stages = report["stages"]
    search, metric, sample, train = map(stages.get, ("search", "metric", "sample", "train"))
    if search and (confirm := search.get("confirm")):
        before, after = confirm["plain"]["mean"], confirm["rescaled"]["mean"]
        change = f"{signed(100 * (after - before) / before, 2)} %, " if before else ""
        seeds = f"{len(confirm['seeds'])} seeds of {number(confirm['images'])} images"
        label = f"{search['minimize']} on fresh noise"
        yield label, f"{score(before)} → {score(after)}", change + seeds
    if search:
        axes, cells = search["axes"], f"of {len(search['cells'])} cells"
        best = [search["best"][axis] for axis in axes]
        if len(axes) <= FEW:
            where = " · ".join(axis_label(search, axis) for axis in axes)
            yield "best scales", " · ".join(map(number, best)), f"{where}, {cells}"
        else:
            moved = sum(value != 1 for value in best)
            yield "best scales", f"{moved} of {len(best)}", f"other than 1, {cells}"
    if metric and metric["values"]:
        wanted = search["minimize"] if search else "fid"
        name = wanted if wanted in metric["values"] else next(iter(metric["values"]))
        said = f"{number(sample['images'])} images, {evaluations(sample['nfe'])}" if sample else ""
        yield f"{name} of the samples", score(metric["values"][name]), said
    if train:
        yield "parameters", count(train["parameters"]), f"{number(train['steps'])} training steps"
    yield "time", duration(report["seconds"]), str(report["environment"].get("device", ""))


def _classes(data: Mapping[str, Any]) -> dict[str, Any] | None:
    """The classes by number with their names and counts, where one of these is known."""
    names, counts = data.get("classes") or (), data.get("counts") or ()
    every = list(itertools.zip_longest(range(max(len(names), len(counts))), names, counts))
    return {"rows": every[:CLASSES], "more": max(0, len(every) - CLASSES)} if every else None


def _metrics(stage: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The numbers, grouped by their provenance."""
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
    """A fact as text, long digests cut to 12 digits."""
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
            "work": stage.get("line", ""),
        }
        for name, stage in stages.items()
    ]


def _environment(environment: Mapping[str, Any]) -> list[tuple[str, str]]:
    packages = environment.get("packages", {})
    rows = [(key, str(value)) for key, value in environment.items() if key != "packages"]
    return rows + [(name, str(version)) for name, version in packages.items()]


def _toml(recipe: Mapping[str, Any]) -> str:
    """The recipe as TOML, without the query of a URL, which may be a key."""
    import tomlkit

    text = tomlkit.dumps(recipe).strip()
    return re.sub(r"(\b\w+://[^\s?#\"']*)\?[^\s#\"']*", r"\1?…", text)


def render(
    home: Path,
    name: str,
    variables: Mapping[str, Any],
    rules: str = "",
    more: Sequence[str] = (),
) -> str:
    """The page of the template `name`.html.j2 in the folder `home`, with `name`.js and the scripts
    `more` after it, the style of reports, that of `name`.css and more `rules`.

    Its Content-Security-Policy allows this style and this script alone.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    # autoescape is a plain True: select_autoescape() does not know the suffix .html.j2
    environment = Environment(
        loader=FileSystemLoader([home, HERE]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {f.__name__: f for f in (number, score, signed, duration, count)}
    styles = dict.fromkeys((HERE / "report.css", home / f"{name}.css"))
    style = "".join(path.read_text("utf-8") for path in styles) + rules
    script = "".join((home / f"{part}.js").read_text("utf-8") for part in (name, *more))
    policy = (
        f"default-src 'none'; img-src data:; style-src '{_hash(style)}';"
        f" script-src '{_hash(script)}'; base-uri 'none'; form-action 'none'"
    )
    assert "</" not in style + script
    return environment.get_template(f"{name}.html.j2").render(
        variables,
        policy=policy,
        style=Markup(style),  # noqa: S704
        script=Markup(script),  # noqa: S704
    )


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _ramp() -> str:
    """A rule for each level of the colour scale: the policy forbids style attributes."""
    colours = [figures.colour(level / (LEVELS - 1)) for level in range(LEVELS)]
    return "".join(
        f".q{level} {{ background: {back}; color: {ink}; fill: {back} }}\n"
        for level, (back, ink) in enumerate(colours)
    )
