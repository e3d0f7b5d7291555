"""Store what a suite came to, and write RESULTS.md and its pictures from what is stored.

cmkit bench digits --jobs 2
python benchmarks/results.py runs/digits    # benchmarks/results/digits.json, images/, RESULTS.md
python benchmarks/results.py --check        # fails where RESULTS.md or a picture is not current
"""

from __future__ import annotations

import argparse
import io
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin

from cmkit.errors import CmkitError
from cmkit.files import atomic_write, sha256_of
from cmkit.plugins import discover
from cmkit.report.figures import number, score
from cmkit.runs.folder import RunFolder
from cmkit.suite.collect import of_results, results
from cmkit.suite.figures import Curve, Point, first_samples, quality_png
from cmkit.suite.noise import SameNoise
from cmkit.suite.page_runs import styles_of

HERE = Path(__file__).parent
PAGE = HERE / "RESULTS.md"
MARK = "<!-- {} {}: written by benchmarks/results.py; do not edit. -->"
PICTURES = ("quality", "samples")
SCORES = ("fid", "kid_mean", "precision", "recall", "confident")
HEADS = {"kid_mean": "KID x 1,000", "confident": "sure", "fid": "FID"}
SHOWN, ENLARGED = 24, 2
"""Samples in a line of the picture, and pixels for each of theirs."""


def store(folder: Path) -> str:
    """Write the results of a finished suite and its pictures; its name."""
    found = results(of_results(folder), SameNoise(discover()))
    missing = [line.title for line in found.lines if line.failures]
    if missing:
        raise CmkitError(f"{folder}: {', '.join(missing)} lack seeds; cmkit bench goes on")
    document = found.document()
    for line in document["lines"]:
        line["runs"] = {str(seed): Path(run).name for seed, run in line["runs"].items()}
    path = stored(found.name)
    for place in (path, picture(found.name, PICTURES[0])):
        place.parent.mkdir(exist_ok=True)
    atomic_write(path, json.dumps(document, indent=1, sort_keys=True) + "\n")
    plain = [line for line in found.lines if line.axis.get("rescaling", "off") == "off"]
    rows = list(dict.fromkeys(line.row for line in plain))
    styles = styles_of(found, [(row, row) for row in rows])
    curves = []
    for row in rows:
        own = [line for line in plain if line.row == row]
        means = [(line.facts["nfe"], line.scores[SCORES[0]]) for line in own]
        points = [
            Point(nfe, s.mean.value, s.mean.low, s.mean.high, tuple(s.values.values()))
            for nfe, s in means
        ]
        curves.append(Curve(row, styles[row], tuple(points)))
    label = f"{HEADS[SCORES[0]]}, not rescaled"
    pictures = (quality_png(curves, "network evaluations a sample", label, True), grid(plain))
    for kind, png in zip(PICTURES, pictures, strict=True):
        atomic_write(picture(found.name, kind), signed(png, sha256_of(path)))
    return found.name


def grid(lines: Sequence[Any]) -> bytes:
    """A PNG of the first samples of the first seed, a row for each line."""
    rows = []
    for line in lines:
        images = first_samples(RunFolder(Path(line.runs[min(line.runs)])).sample_files(), SHOWN)
        framed = np.pad(
            images.repeat(ENLARGED, 1).repeat(ENLARGED, 2), ((0, 0), (1, 1), (1, 1), (0, 0))
        )
        rows.append(np.concatenate([*framed], 1))
    pixels = np.concatenate(rows)
    buffer = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).save(buffer, "PNG")
    return buffer.getvalue()


def signed(png: bytes, digest: str) -> bytes:
    """The PNG with the digest of the results that it shows."""
    about = PngImagePlugin.PngInfo()
    about.add_text("results", digest)
    buffer = io.BytesIO()
    with Image.open(io.BytesIO(png)) as image:
        image.save(buffer, "PNG", pnginfo=about, optimize=True)
    return buffer.getvalue()


def stored(name: str) -> Path:
    return HERE / "results" / f"{name}.json"


def picture(name: str, kind: str) -> Path:
    return HERE / "images" / f"{name}_{kind}.png"


def section(document: Mapping[str, Any]) -> Iterator[str]:
    """The part of RESULTS.md that tells a suite."""
    name, baseline = document["name"], document["baseline"]
    about = document["provenance"]
    yield MARK.format("begin", name)
    yield ""
    versions = f"cmkit {about['cmkit']}, torch {about['torch']}"
    yield f"{versions}, {about['device']}, {about['time'][:10]}. Means over seeds, ± half of their"
    yield '95 % interval (Student\'s t); "rescaled" with scales that a search found for each seed,'
    yield '"gain" what these change on noise that no search saw. The word is beside'
    yield f"`{baseline}` at as many evaluations, corrected by Holm for all comparisons."
    yield ""
    lines = document["lines"]
    known = [key for key in SCORES if any(key in line["scores"] for line in lines)]
    titles = [HEADS.get(key, key) for key in known]
    first = titles[0]
    heads = ["row", "NFE", "steps", "train s", first, f"{first} rescaled", "gain", *titles[1:]]
    heads += [f"{first} beside {baseline}"]
    yield f"| {' | '.join(heads)} |"
    yield f"|{'---|' * len(heads)}"
    row = None
    for line in lines:
        if line["axis"].get("rescaling", "off") != "off":
            continue
        yield f"| {' | '.join(_cells(line, _rescaled(line, lines), known, row != line['row']))} |"
        row = line["row"]
    yield ""
    for kind in PICTURES:
        yield f"![{kind} of the rows of the suite {name}](images/{picture(name, kind).name})"
        yield ""
    notes = list(dict.fromkeys(line["note"] for line in lines if line["note"]))
    rows = {line["note"]: line["row"] for line in lines}
    yield from (f"- `{rows[note]}`: {note}" for note in notes)
    yield from (f"- {note}" for note in document["notes"])
    yield ""
    yield MARK.format("end", name)


def _rescaled(line: Mapping[str, Any], lines: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The same line with scales that a search found; empty where there is none."""
    axis = {**line["axis"], "rescaling": "global"}
    same = (o for o in lines if o["row"] == line["row"] and o["axis"] == axis)
    return next(same, {})


def _cells(
    line: Mapping[str, Any], rescaled: Mapping[str, Any], known: Sequence[str], first: bool
) -> Iterator[str]:
    training = line["facts"].get("training", {})
    yield from (f"`{line['row']}`" if first else "", number(line["facts"]["nfe"]))
    yield from (number(training.get(key)) if first else "" for key in ("steps", "seconds"))
    yield _mean(line, known[0])
    yield _mean(rescaled, known[0]) if rescaled else ""
    gain = rescaled.get("facts", {}).get("gain")
    yield f"{gain['value']:+.2g} [{gain['low']:+.2g}, {gain['high']:+.2g}]" if gain else ""
    yield from (_mean(line, key) for key in known[1:])
    verdict = line["verdicts"].get(known[0])
    yield verdict["word"] if verdict else ""


def _mean(line: Mapping[str, Any], key: str) -> str:
    if key not in line["scores"]:
        return ""
    mean = line["scores"][key]["mean"]
    times = 1000 if key == "kid_mean" else 1
    half = "" if mean["high"] is None else f" ± {number(times * (mean['high'] - mean['value']), 2)}"
    return f"{score(times * mean['value'])}{half}"


def page() -> str:
    """RESULTS.md with the sections of all stored suites as they should be."""
    text = PAGE.read_text("utf-8")
    for path in sorted((HERE / "results").glob("*.json")):
        document = json.loads(path.read_text("utf-8"))
        ends = (re.escape(MARK.format(end, document["name"])) for end in ("begin", "end"))
        written = "\n".join(section(document))
        text, found = re.subn(".*?".join(ends), lambda _, new=written: new, text, flags=re.DOTALL)
        if found != 1:
            raise CmkitError(f"{PAGE}: no place for {document['name']}")
    return text


def stale() -> list[str]:
    """What does not show the stored results."""
    found = [] if PAGE.read_text("utf-8") == page() else [str(PAGE)]
    for path in sorted((HERE / "results").glob("*.json")):
        for kind in PICTURES:
            with Image.open(picture(path.stem, kind)) as image:
                if image.info.get("results") != sha256_of(path):
                    found.append(str(picture(path.stem, kind)))
    return found


def main() -> None:
    """Store and write, or check."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", help="of a finished suite")
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    if options.check:
        sys.exit("\n".join(f"{name}: not current" for name in stale()) or 0)
    if options.folder:
        print(stored(store(options.folder)))
    atomic_write(PAGE, page())


if __name__ == "__main__":
    main()
