"""Figures of a suite's page: curves of lines with their names beside them, and rows of samples."""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cmkit.files import reading, require_regular
from cmkit.report.figures import count, figure_png, image, plain_ticks, webp

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray
    from PIL.Image import Image

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Told apart by the colour-blind (Okabe and Ito, 2008)."""
BLACK = "#1d1f24"
MARKERS = {
    "o": "M6 2a4 4 0 1 0 .01 0Z",
    "s": "M2.5 2.5h7v7h-7Z",
    "^": "M6 1.5 10.5 10h-9Z",
    "D": "M6 1 11 6 6 11 1 6Z",
    "v": "M6 10.5 10.5 2h-9Z",
    "P": "M4.3 1.5h3.4v2.8h2.8v3.4H7.7v2.8H4.3V7.7H1.5V4.3h2.8Z",
    "X": "M3.5 1 6 3.5 8.5 1 11 3.5 8.5 6 11 8.5 8.5 11 6 8.5 3.5 11 1 8.5 3.5 6 1 3.5Z",
}
"""Of matplotlib, and as SVG paths of 12 by 12; as many as make 42 pairs with six colours."""
DASHES = ("-", "--", ":", "-.")
WIDTH, HEIGHT, ROW, LONGEST, DPI = 7.0, 3.8, 0.2, 28, 150
"""Inches of a figure and for a name beside it, letters of a name, pixels of an inch."""
SHOWN, SMALLEST, LARGEST, PAPER = 16, 48, 96, 250
"""Samples in a row, the fewest and the most pixels of one, and the grey between them."""
ROWS_BYTES = 2 * 2**20
"""Of all rows of samples together, before they are written in base 64."""


@dataclass(frozen=True)
class Style:
    """How a line is drawn: colour and marker are those of its row, dashes tell variants apart."""

    colour: str
    marker: str
    dash: str
    hollow: bool

    @classmethod
    def of(cls, row: int | None, variant: int) -> Style:
        """For the variant of a row with this number; None is the baseline's, which is black."""
        place = row or 0
        colour = BLACK if row is None else COLOURS[place % len(COLOURS)]
        marker = [*MARKERS][place % len(MARKERS)]
        return cls(colour, marker, DASHES[variant % len(DASHES)], variant % 2 == 1)

    @property
    def path(self) -> str:
        """The marker as an SVG path."""
        return MARKERS[self.marker]

    @property
    def fill(self) -> str:
        """The colour inside the marker."""
        return "#ffffff" if self.hollow else self.colour


@dataclass(frozen=True)
class Point:
    """A number of a line: mean, interval if there is one, and value of each seed."""

    x: float
    value: float
    low: float | None
    high: float | None
    seeds: tuple[float, ...]
    note: str = ""


@dataclass(frozen=True)
class Curve:
    """A line of a figure, and what is written at its end."""

    title: str
    style: Style
    points: tuple[Point, ...]


def quality_png(curves: Sequence[Curve], x_label: str, y_label: str, nfe: bool) -> bytes:
    """A PNG of a number by network evaluations a sample (`nfe`), or by a cost of training: means
    with intervals, and a small dot for each seed."""
    figure, axes = _frame([curve.title for curve in curves])
    every = [point for curve in curves for point in curve.points]
    places = sorted({point.x for point in every})
    logarithmic = places[0] > 0 and places[-1] >= (1.5 if nfe else 5) * places[0]
    if logarithmic:
        axes.set_xscale("log", base=2 if nfe else 10)
    _scale_y(axes, every)
    ends = []
    for index, curve in enumerate(curves):
        # side by side where they share a place, or they would hide each other
        shift = index / max(len(curves) - 1, 1) - 0.5 if nfe else 0.0
        xs = [
            point.x * 1.25**shift if logarithmic else point.x + 0.3 * shift
            for point in curve.points
        ]
        ends.append((xs[-1], curve.points[-1].value))
        _draw(axes, curve, xs)
    if nfe:
        axes.set_xticks(_apart(places) if logarithmic else places)
    axes.minorticks_off()
    axes.xaxis.set_major_formatter(lambda value, _: count(value))
    axes.margins(x=0.06)
    _name(axes, [curve.title for curve in curves], ends)
    axes.set_xlabel(x_label, parse_math=False)
    axes.set_ylabel(y_label, parse_math=False)
    return figure_png(figure)


def losses_png(
    curves: Sequence[tuple[str, Style, Sequence[tuple[Sequence[int], Sequence[float]]]]],
) -> bytes:
    """A PNG of the losses of trainings by their steps: of each name several seeds' (steps, losses),
    the first drawn strongest."""
    figure, axes = _frame([title for title, _, _ in curves])
    ends = []
    for _, style, seeds in curves:
        for k, (steps, losses) in enumerate(seeds):
            strong: dict[str, Any] = (
                {"linewidth": 1.5} if k == 0 else {"linewidth": 0.7, "alpha": 0.5}
            )
            axes.plot(steps, losses, color=style.colour, linestyle=style.dash, **strong)
        ends.append((seeds[0][0][-1], seeds[0][1][-1]))
    if all(min(losses) > 0 for _, _, seeds in curves for _, losses in seeds):
        axes.set_yscale("log")
    plain_ticks(axes)
    axes.xaxis.set_major_formatter(lambda step, _: count(step))
    axes.margins(x=0.01)
    _name(axes, [title for title, _, _ in curves], ends)
    axes.set(xlabel="training step", ylabel="loss")
    return figure_png(figure)


def _frame(titles: Sequence[str]) -> tuple[Figure, Axes]:
    """An empty figure with room for the names beside it."""
    from matplotlib.figure import Figure

    height = max(HEIGHT, ROW * len(titles) + 0.8)
    left, bottom, top = 0.75, 0.55, 0.15
    right = 0.4 + 0.075 * min(max(map(len, titles)), LONGEST)
    figure = Figure((WIDTH, height), dpi=DPI)
    size = ((WIDTH - left - right) / WIDTH, (height - bottom - top) / height)
    axes = figure.add_axes((left / WIDTH, bottom / height, *size))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.7)
    axes.set_axisbelow(True)
    return figure, axes


def _scale_y(axes: Axes, points: Sequence[Point]) -> None:
    """Limits by means and seeds: intervals over few seeds, which can be many times as long, are cut
    where they leave half as much again on each side."""
    inner = [value for point in points for value in (point.value, *point.seeds)]
    ends = [end for point in points for end in (point.low, point.high) if end is not None]
    logarithmic = min(inner) > 0 and max(inner) >= 8 * min(inner)
    to, back = (math.log, math.exp) if logarithmic else (float, float)
    low, high = to(min(inner)), to(max(inner))
    room = 0.5 * (high - low) or 0.1 * abs(high) or 1.0
    lowest, highest = min([*ends, min(inner)]), max([*ends, max(inner)])
    bottom = max(low - room, to(lowest)) if lowest > 0 or not logarithmic else low - room
    top = min(high + room, to(highest))
    pad = 0.06 * (top - bottom) or 0.05 * abs(top) or 0.5
    axes.set_yscale("log" if logarithmic else "linear")
    axes.set_ylim(back(bottom - pad), back(top + pad))
    plain_ticks(axes)


def _draw(axes: Axes, curve: Curve, xs: Sequence[float]) -> None:
    style, ys = curve.style, [point.value for point in curve.points]
    axes.plot(xs, ys, color=style.colour, linestyle=style.dash, linewidth=1.2, alpha=0.8)
    for x, point in zip(xs, curve.points, strict=True):
        if point.low is not None and point.high is not None:
            axes.vlines(x, point.low, point.high, color=style.colour, linewidth=1.6, alpha=0.55)
        axes.plot([x] * len(point.seeds), point.seeds, ".", color=style.colour, ms=3, alpha=0.6)
        if point.note:
            place: dict[str, Any] = {"xytext": (5, 3), "textcoords": "offset points", "size": 6.5}
            axes.annotate(point.note, (x, point.value), color="#55575d", parse_math=False, **place)
    marker: dict[str, Any] = {"marker": style.marker, "ms": 6, "mfc": style.fill, "mew": 1.2}
    axes.plot(xs, ys, linestyle="", color=style.colour, **marker)


def _name(axes: Axes, titles: Sequence[str], ends: Sequence[tuple[float, float]]) -> None:
    """Write each name to the right of the plot, at the height of the curve's end or near it."""
    axes.autoscale_view()
    inside = axes.transData + axes.transAxes.inverted()
    places = [inside.transform(end) for end in ends]
    gap = ROW * DPI / axes.bbox.height
    heights = _spread([min(max(float(y), 0.0), 1.0) for _, y in places], gap)
    style: dict[str, Any] = {"color": "#a8a8a8", "linewidth": 0.7, "linestyle": ":"}
    for title, (x, y), height in zip(titles, places, heights, strict=True):
        shown = title if len(title) <= LONGEST else f"{title[: LONGEST - 1]}…"
        at = axes.transAxes
        axes.plot([x, 1.04], [y, height], transform=at, clip_on=False, zorder=1, **style)
        axes.text(
            1.05, height, shown, color=BLACK, size=9, va="center", parse_math=False, transform=at
        )


def _spread(places: Sequence[float], gap: float) -> list[float]:
    """Places from 0 to 1 moved as little as needed to be `gap` apart, in the same order."""
    order = sorted(range(len(places)), key=places.__getitem__)
    blocks: list[list[float]] = []  # pool adjacent violators, of places less their rank's gaps
    for rank, index in enumerate(order):
        blocks.append([places[index] - rank * gap])
        while len(blocks) > 1 and np.mean(blocks[-2]) > np.mean(blocks[-1]):
            blocks[-2:] = [blocks[-2] + blocks[-1]]
    level = [float(np.mean(block)) for block in blocks for _ in block]
    most = 1 - (len(places) - 1) * gap
    found = dict(
        zip(order, (min(max(x, 0.0), most) + k * gap for k, x in enumerate(level)), strict=True)
    )
    return [found[index] for index in range(len(places))]


def _apart(places: Sequence[float]) -> list[float]:
    """Those of rising places that are a quarter of an octave apart, so that their labels fit."""
    kept: list[float] = []
    for place in places:
        if not kept or place >= 1.2 * kept[-1]:
            kept.append(place)
    return kept


def first_samples(files: Iterable[Path], most: int = SHOWN) -> NDArray[np.uint8]:
    """The first images (n, H, W, C) of `.npz` files, n at most `most`, of which no more is read.

    CheckpointError for a damaged file.
    """
    found: list[NDArray[np.uint8]] = []
    for path in files:
        if (wanted := most - sum(map(len, found))) <= 0:
            break
        with reading(path):
            require_regular(path)
            try:
                with zipfile.ZipFile(path) as archive:
                    found.append(_first(archive, wanted))
            except OSError:
                raise
            except Exception as error:  # zipfile and numpy raise almost anything
                raise ValueError(error) from error
    return np.concatenate(found) if found else np.empty((0, 1, 1, 1), np.uint8)


def _first(archive: zipfile.ZipFile, most: int) -> NDArray[np.uint8]:
    with archive.open("arr_0.npy") as stream:
        np.lib.format.read_magic(stream)
        shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
        if dtype != np.uint8 or len(shape) != 4 or shape[3] not in (1, 3) or min(shape) < 1:
            raise ValueError(f"arr_0 is {dtype} {shape}, not images")
        shape = (min(shape[0], most), *shape[1:])
        return np.frombuffer(stream.read(math.prod(shape)), np.uint8).reshape(shape)


def sample_row(images: NDArray[np.uint8], most: int) -> dict[str, Any]:
    """Attributes of an <img> of images (n, H, W, C) side by side, of about `most` bytes."""
    large = images
    if images.shape[1] > LARGEST:
        size = (LARGEST * images.shape[2] // images.shape[1], LARGEST)
        small = [_picture(pixels).resize(size) for pixels in images]
        large = np.stack([np.asarray(one).reshape(*size[::-1], -1) for one in small])
    factor = max(1, SMALLEST // large.shape[1])
    large = large.repeat(factor, 1).repeat(factor, 2)
    gap = max(3, large.shape[2] // 12)
    framed = np.pad(large, ((0, 0), (0, 0), (0, gap), (0, 0)), constant_values=PAPER)
    picture = _picture(np.concatenate([*framed], 1)[:, :-gap])
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    data = buffer.getvalue()
    if len(data) > most:
        data = webp(picture.convert("RGB"), picture.width, most)
    return image("samples", data, picture.width, picture.height)


def _picture(pixels: NDArray[np.uint8]) -> Image:
    from PIL import Image

    return Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
