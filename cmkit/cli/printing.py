"""What the commands print on stdout, in which foreign names cannot steer the terminal."""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from cmkit.errors import printable

if TYPE_CHECKING:
    from cmkit.runs import RunFolder
    from cmkit.values import DataSpec

LISTED = 20
"""Lines of a list that are printed."""


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Plain columns; drawing them with rich would double the time that listing takes."""
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    for row in (heads, *rows):
        cells = (text.ljust(width) for text, width in zip(row, widths, strict=True))
        line("  ".join(cells).rstrip())


def document(content: Any) -> None:
    """Print one JSON document."""
    print(json.dumps(content, indent=1, ensure_ascii=True).replace("\x7f", "\\u007f"))


def line(text: str) -> None:
    """Print one line, in which foreign names cannot steer the terminal."""
    print(printable(text, sys.stdout.encoding))


def paragraph(text: str, indent: str) -> None:
    """Print words in lines of at most 100 characters, each after `indent`."""
    for row in textwrap.wrap(text, 100 - len(indent), break_on_hyphens=False):
        line(f"{indent}{row}")


def aside(text: str) -> None:
    """Print one line on stderr, as `line` does on stdout."""
    print(printable(text, sys.stderr.encoding), file=sys.stderr)


def human(value: Any) -> str:
    """A value in three digits or with commas between thousands."""
    if isinstance(value, float):
        return f"{value:,.3g}" if value < 100 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def size(count: int) -> str:
    """Bytes in three digits: "12.3 MB"."""
    value, units = float(count), ["B", "kB", "MB", "GB", "TB"]
    while value >= 999.5 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{value:.3g} {units[0]}"


def first(label: str, lines: Sequence[str]) -> None:
    """Print the first LISTED of the lines, each after `label`, and how many more there are."""
    for text in lines[:LISTED]:
        line(f"{label}{text}")
    if len(lines) > LISTED:
        line(f"{label}and {len(lines) - LISTED} more; --json lists all")


def classes(data: DataSpec) -> None:
    """The classes that have names or counts, by number."""
    for number in range(min(data.num_classes or 0, LISTED)):
        name = data.classes[number] if data.classes else ""
        count = f"{data.counts[number]:,} images" if data.counts else ""
        if name or count:
            line(f"{f'class {number}':<20} {f'{name}  {count}'.strip()}")
    if max(len(data.classes), len(data.counts)) > LISTED:
        line(f"{'classes':<20} and {(data.num_classes or 0) - LISTED} more; --json lists all")


def results(folder: RunFolder, report: dict[str, Any]) -> None:
    """Print where the page is, the winner and verdict of the search, and the metrics."""
    stages = report["stages"]
    line(f"report: {folder.page}")
    if report.get("smoke"):
        line("a smoke run: the numbers below mean nothing")
    if "search" in stages:
        found = stages["search"]
        winner = " ".join(f"{axis} = {found['best'][axis]:g}" for axis in found["axes"])
        line(f"winner of the search: {winner}")
        line(found["confirm"]["verdict"])
    for name, value in stages.get("metric", {}).get("values", {}).items():
        line(f"{name} = {value:.6g}")
