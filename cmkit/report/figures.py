"""The figures of a run as PNG, its pictures as data URIs, and numbers as text."""

from __future__ import annotations

import base64
import io
import math
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cmkit.errors import DataError
from cmkit.files import read_bytes
from cmkit.runs.folder import RunFolder

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL.Image import Image

COLOURS, LEVELS = "viridis_r", 24
SHEET_PIXELS, CELL_PIXELS, TINY_PIXELS = 1280, 640, 600
CELLS_BYTES, SPRITE_BYTES, SHEET_BYTES = 800_000, 800_000, 200_000
"""Of the pictures of all cells on a page, of what the sliders mix, and of a sheet of samples, which
are two; in base 64, a third longer, 2.7 MB of a page that is to stay under 3."""
FIGURE_BYTES, STEPS_BYTES, SHOWN_BYTES = 200_000, 100_000, 400_000
"""Of samples that stand alone, in other numbers of steps, and during the training, all together:
twice that on a page without a search, whose cells and sliders have that much less."""
LEAST_BYTES = 1300
"""Of a cell's picture: where there are too many cells, the best of them have pictures."""


def number(value: object, digits: int = 3) -> str:
    """A value as text: three digits, commas between thousands, a dash for None and NaN."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "–"  # noqa: RUF001
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int) or abs(value) >= 10**digits:
        return f"{value:,.0f}"
    return f"{value:.{digits}g}"


def score(value: object, digits: int = 3) -> str:
    """A measured number with trailing zeros: 20.0 beside 19.6."""
    if isinstance(value, float) and 0 < abs(value) < 10**digits:
        return f"{value:#.{digits}g}".rstrip(".")
    return number(value, digits)


def count(value: float) -> str:
    """A large count with its unit: 2.13 M."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return number(value)


def colour(share: float) -> tuple[str, str]:
    """(fill, legible text) at a place of the colour scale, 0 to 1; low scores are bright."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    red, green, blue, _ = colormaps[COLOURS](share)
    light = 0.2126 * red**2.2 + 0.7152 * green**2.2 + 0.0722 * blue**2.2
    return to_hex((red, green, blue)), "#14171f" if light > 0.18 else "#ffffff"


def heatmap_png(search: Mapping[str, Any]) -> bytes:
    """A PNG of the scored cells. Frames: thick for the winner, thin for what a search by
    coordinates kept, dashed for the unscaled cell."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure

    rows, columns = search["rows"], search["columns"]
    height, width = len(rows), len(columns)
    size = 0.62 if max(width, height) <= 16 else 10 / max(width, height)
    figure = Figure((2.6 + size * width, 1.5 + size * height), dpi=160, layout="constrained")
    axes = figure.add_subplot()
    for y, row in enumerate(rows):
        for x, cell in enumerate(row["cells"]):
            if cell:
                _draw_cell(axes, x, y, cell, 15 * size)
    axes.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5), aspect="equal")
    axes.set_xticks(range(width), columns)
    axes.set_yticks(range(height), [row["label"] for row in rows])
    axes.set_xlabel(search["across"], parse_math=False)
    axes.set_ylabel(search["down"], parse_math=False)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    scale = ScalarMappable(search["norm"], colormaps[COLOURS])
    bar = figure.colorbar(scale, ax=axes, shrink=0.9, aspect=30 if height > 3 else 8)
    plain_ticks(bar.ax)
    bar.outline.set_visible(False)
    bar.set_label(f"{search['minimize']} (lower is better)", parse_math=False)
    return figure_png(figure)


def _draw_cell(axes: Axes, x: int, y: int, cell: Mapping[str, Any], points: float) -> None:
    from matplotlib.patches import Rectangle

    level = cell["level"]
    fill, ink = ("#e4e4e4", "#555555") if level is None else colour(level / (LEVELS - 1))
    axes.add_patch(Rectangle((x - 0.48, y - 0.48), 0.96, 0.96, facecolor=fill))
    axes.text(x, y, cell["text"], color=ink, size=points, ha="center", va="center")
    if cell["winner"] or cell["kept"] or cell["plain"]:
        width = 2.4 if cell["winner"] else 1.0
        style = "-" if cell["winner"] or cell["kept"] else "--"
        line: dict[str, Any] = {"linestyle": style, "linewidth": width}
        axes.add_patch(Rectangle((x - 0.43, y - 0.43), 0.86, 0.86, fill=False, ec=ink, **line))
    if cell["mark"]:
        size = 0.55 * points
        axes.text(x, y + 0.27, cell["mark"], color=ink, size=size, ha="center", va="center")


def loss_png(curve: Mapping[str, Any], scores: Mapping[str, Any] | None = None) -> bytes:
    """The loss curve as a PNG, with a line wherever N has doubled, and quick scores beside it."""
    from matplotlib.figure import Figure

    figure = Figure((7.2, 3.4), dpi=160, layout="constrained")
    axes = figure.add_subplot()
    for step, sigmas in curve["marks"]:
        axes.axvline(step, color="#bbbbbb", linewidth=0.8, linestyle=":")
        place = (step, 1.01)
        axes.annotate(f"N={sigmas}", place, xycoords=("data", "axes fraction"), size=7)
    axes.plot(curve["steps"], curve["losses"], color="#1f4e8c", linewidth=1.4)
    axes.set_yscale("log" if curve["log"] else "linear")
    plain_ticks(axes)
    axes.xaxis.set_major_formatter(lambda step, _: count(step))
    axes.set(xlabel="step", ylabel="loss")
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.01)
    if scores:
        beside = axes.twinx()
        steps = [int(step) for step in scores["steps"]]
        beside.plot(steps, [*scores["steps"].values()], "o-", color="#b3541e", ms=3, lw=1)
        beside.plot(scores["best"]["step"], scores["best"]["score"], "o", color="#b3541e", ms=6)
        beside.set_ylabel(f"{scores['of']}, {count(scores['images'])} images")
        plain_ticks(beside)
        beside.spines[["top"]].set_visible(False)
    return figure_png(figure)


def plain_ticks(axes: Axes) -> None:
    """Numbers on the y axis as the page writes them: 0.2, not 2 x 10^-1."""
    from matplotlib.ticker import LogLocator, NullFormatter

    if axes.get_yscale() == "log":
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(lambda value, _: number(value))
    axes.yaxis.set_minor_formatter(NullFormatter())


def figure_png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None}, bbox_inches="tight")
    return buffer.getvalue()


def picture_of(folder: RunFolder, name: str, limit: int, most: int = 2**21) -> dict[str, Any]:
    """Attributes of an <img> at most `limit` pixels wide and of about `most` bytes; `src` is None
    when the file is gone."""
    path = folder.picture(name)
    if not path.is_file():
        return {"name": name, "src": None}
    data = read_bytes(path)
    if data[:8] != b"\x89PNG\r\n\x1a\n" or len(data) < 24:
        raise DataError(f"{path}: not a PNG picture; delete it, or run the recipe again")
    width, height = struct.unpack(">II", data[16:24])
    if width > limit or len(data) > most:
        data = webp(opened(path), min(width, limit), most)
        height, width = height * min(width, limit) // width, min(width, limit)
    return image(name, data, width, height)


def image(name: str, data: bytes, width: int, height: int) -> dict[str, Any]:
    """Attributes of an <img> with the bytes of a PNG or WebP."""
    kind = "png" if data[:4] == b"\x89PNG" else "webp"
    source = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    tiny = width < TINY_PIXELS
    return {"name": name, "src": source, "width": width, "height": height, "tiny": tiny}


def opened(path: Path) -> Image:
    """A picture file in RGB; DataError where it is damaged."""
    from PIL import Image

    try:
        with Image.open(path, formats=("PNG",)) as picture:
            return picture.convert("RGB")
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: {error}; delete it, or run the recipe again") from error


QUALITIES = ((1, 85), (1, 60), (1, 35), (2, 60), (2, 30), (4, 30), (8, 30))
"""(divisor of the width, quality) of what is stored of a picture, the best first."""


def webp(whole: Image, width: int, most: int) -> bytes:
    """A WebP of a picture, at most `width` wide, the best of about `most` bytes: 400 cells of 25
    noisy pictures would make a page of 100 MB."""
    return webps([whole], width, most)[0]


def webps(pictures: Sequence[Image], width: int, most: int) -> list[bytes]:
    """WebPs of pictures of one size, as `webp`, of one quality and about `most` bytes together."""
    from PIL.Image import Resampling

    found: list[bytes] = []
    for divisor, quality in QUALITIES:
        found, left = [], most
        for whole in pictures:
            height = whole.height * width // whole.width
            size = (max(width // divisor, 1), max(height // divisor, 1))
            buffer = io.BytesIO()
            whole.resize(size, Resampling.LANCZOS).save(buffer, "WEBP", quality=quality)
            found.append(buffer.getvalue())
            left -= len(found[-1])
            if left < 0 and (divisor, quality) != QUALITIES[-1]:
                break
        else:
            return found
    return found
