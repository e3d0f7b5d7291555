"""Store what the suite on rescaling came to, and write its part of docs/rescaling.md.

CMKIT_RUNS=runs/digits cmkit bench rescaling --yes --jobs 2
python benchmarks/verdict.py runs/rescaling    # benchmarks/results/rescaling/, docs/rescaling.md
python benchmarks/verdict.py --check           # fails where the page is not current
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cmkit.errors import CmkitError
from cmkit.files import atomic_write
from cmkit.plugins import discover
from cmkit.report.figures import number, score
from cmkit.suite.collect import of_results, results
from cmkit.suite.noise import SameNoise

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "rescaling.md"
STORED = HERE / "results" / "rescaling"
FIGURE = PAGE.parent / "images" / "rescaling_verdict.png"
MARK = "<!-- {} verdict: written by benchmarks/verdict.py; do not edit. -->"
AXIS, BASELINES = "rescaling", ("off", "global")
NUMBERS = {
    "fid": "beside the training images",
    "heldout_fid": "beside held-out images",
}
Document = Mapping[str, Any]


def store(folder: Path) -> None:
    """Write the results of a finished suite beside each baseline."""
    for value in BASELINES:
        gathered = of_results(folder)
        gathered.baseline = {AXIS: value}
        found = results(gathered, SameNoise(discover()))
        if missing := [line.title for line in found.lines if line.failures]:
            raise CmkitError(f"{folder}: {', '.join(missing)} lack seeds; cmkit bench goes on")
        document = found.document()
        for line in document["lines"]:
            line["runs"] = {str(seed): Path(run).name for seed, run in line["runs"].items()}
        STORED.mkdir(parents=True, exist_ok=True)
        atomic_write(
            STORED / f"{value}.json", json.dumps(document, indent=1, sort_keys=True) + "\n"
        )


def section(beside: Mapping[str, Document]) -> Iterator[str]:
    """Lines of the page, of the results beside each baseline."""
    plain = beside["off"]
    about, lines = plain["provenance"], plain["lines"]
    seeds = max(len(line["runs"]) for line in lines)
    versions = f"cmkit {about['cmkit']}, torch {about['torch']}, {about['device']}"
    yield f"{versions}, {about['time'][:10]}; {seeds} training seeds. Means ± half of their 95 %"
    yield "interval, then differences with theirs."
    yield ""
    for key, where in NUMBERS.items():
        yield f"### FID {where}"
        yield ""
        yield from _counts(beside, key)
        yield ""
        yield from _table(beside, key)
        yield ""
    for value, document in beside.items():
        notes = [note for note in document["notes"] if any(f"{key}:" in note for key in NUMBERS)]
        yield from (f"- beside {value}: {note}" for note in notes)


def _others(lines: Sequence[Document], baseline: str) -> list[str]:
    """The policies that are judged beside a baseline."""
    known = dict.fromkeys(line["axis"].get(AXIS) for line in lines)
    return [value for value in known if value and value not in ("off", baseline)]


def _counts(beside: Mapping[str, Document], key: str) -> Iterator[str]:
    """How often each policy is better, worse, or neither."""
    for baseline, document in beside.items():
        for value in _others(document["lines"], baseline):
            words = Counter(
                line["verdicts"][key]["word"]
                for line in document["lines"]
                if line["axis"].get(AXIS) == value and key in line["verdicts"]
            )
            told = ", ".join(f"{words[word]} {word}" for word in ("better", "worse", "cannot tell"))
            yield f"- `{value}` beside `{baseline}`: {told}, of {words.total()}"


def _table(beside: Mapping[str, Document], key: str) -> Iterator[str]:
    judged = [
        (baseline, value)
        for baseline, document in beside.items()
        for value in _others(document["lines"], baseline)
    ]
    heads = ["row", "NFE", "off", *(f"{value} less {baseline}" for baseline, value in judged)]
    yield f"| {' | '.join(heads)} |"
    yield f"|{'---|' * len(heads)}"
    for line in beside["off"]["lines"]:
        if line["axis"].get(AXIS) != "off" or key not in line["scores"]:
            continue
        said = []
        for baseline, value in judged:
            at = (line["row"], {**line["axis"], AXIS: value})
            same = (o for o in beside[baseline]["lines"] if (o["row"], o["axis"]) == at)
            found: Document = next(same, {"verdicts": {}})
            said.append(_verdict(found["verdicts"].get(key)))
        if any(said):
            of = [f"`{line['row']}`", number(line["facts"]["nfe"])]
            yield f"| {' | '.join([*of, _mean(line['scores'][key]['mean']), *said])} |"


def _mean(mean: Document) -> str:
    half = "" if mean["high"] is None else f" ± {number(mean['high'] - mean['value'], 2)}"
    return f"{score(mean['value'])}{half}"


def _verdict(verdict: Document | None) -> str:
    if verdict is None:
        return ""
    found = verdict["difference"]
    between = "" if found["low"] is None else f" [{found['low']:+.2g}, {found['high']:+.2g}]"
    word = verdict["word"] if verdict["word"] == "cannot tell" else f"**{verdict['word']}**"
    return f"{found['value']:+.2g}{between} {word}"


def _relative(beside: Mapping[str, Document], value: str) -> Iterator[tuple[str, list[float]]]:
    """Of a policy, for each row and number of evaluations, the change of the held-out FID beside
    the unscaled model and the ends of its interval, in per cent of the unscaled model's mean."""
    lines, key = beside["off"]["lines"], "heldout_fid"
    plain = {
        (line["row"], line["axis"]["nfe"]): line["scores"][key]["mean"]["value"]
        for line in lines
        if line["axis"].get(AXIS) == "off" and key in line["scores"]
    }
    for line in lines:
        if line["axis"].get(AXIS) == value:
            at = (line["row"], line["axis"]["nfe"])
            found = line["verdicts"][key]["difference"]
            ends = [100 * found[end] / plain[at] for end in ("value", "low", "high")]
            yield f"{at[0]}, {line['facts']['nfe']}", ends


def figure(beside: Mapping[str, Document]) -> bytes:
    """A PNG of the relative changes of the held-out FID with their intervals."""
    from matplotlib.figure import Figure

    from cmkit.report.figures import figure_png

    drawn = Figure((6.4, 5.2), dpi=110)
    axes = drawn.add_subplot()
    names: list[str] = []
    policies = _others(beside["off"]["lines"], "off")
    for k, (value, mark) in enumerate(zip(policies, "osD", strict=False)):
        for name, (middle, low, high) in _relative(beside, value):
            if name not in names:
                names.append(name)
            y, colour = names.index(name) + 0.22 * (k - 1), f"C{k}"
            axes.plot([low, high], [y, y], color=colour, linewidth=1.5)
            axes.plot([middle], [y], mark, color=colour, markersize=4)
        axes.plot([], [], f"-{mark}", color=f"C{k}", markersize=4, label=value)
    axes.axvline(0, color="#888888", linewidth=0.8)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel("change of the held-out FID beside the unscaled model, %")
    axes.set_ylabel("model, network evaluations")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", color="#e6e6e6", linewidth=0.7)
    axes.legend(frameon=False, loc="upper left")
    return figure_png(drawn)


def stored() -> dict[str, Document]:
    """The stored results, by their baseline."""
    files = {value: STORED / f"{value}.json" for value in BASELINES}
    return {value: json.loads(p.read_text("utf-8")) for value, p in files.items() if p.exists()}


def page() -> str:
    """docs/rescaling.md as it should be."""
    begin, end = (MARK.format(word) for word in ("begin", "end"))
    before, found, rest = PAGE.read_text("utf-8").partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise CmkitError(f"{PAGE}: {begin} .. {end} is not there")
    beside = stored()
    written = "\n".join(section(beside)) if beside else ""
    return "\n".join(filter(None, (f"{before}{begin}", written, f"{end}{after}")))


def main() -> None:
    """Store and write, or check."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", help="of the finished suite")
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    if options.check:
        sys.exit(None if PAGE.read_text("utf-8") == page() else f"{PAGE}: not current")
    if options.folder:
        store(options.folder)
    atomic_write(FIGURE, figure(stored()))
    atomic_write(PAGE, page())


if __name__ == "__main__":
    main()
