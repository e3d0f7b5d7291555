"""Images as PNG files, and picture files as images."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from cmkit.errors import DataError
from cmkit.files import require_regular

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "PPM")
"""Formats that are read. Pillow knows dozens more, some of which (PostScript) are programs."""
CELL_PIXELS = 48
GAP_GREY = 64
STAMP = "smoke run:\nmeaningless"


def grid_png(images: Tensor, columns: int | None = None) -> bytes:
    """A PNG with uint8 images (n, C, H, W), C = 1 or 3, row by row, nearly square by default.

    Images below 48 pixels are enlarged by a whole factor, without smoothing. A thin grey line keeps
    them apart.
    """
    count, channels, height, _ = images.shape
    columns = min(columns or math.ceil(math.sqrt(count)), count)
    rows = math.ceil(count / columns)
    factor, gap = grid_layout(height)
    large = images.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    cell = [n + gap for n in large.shape[2:]]
    framed = large.new_full((rows * columns, channels, *cell), GAP_GREY)
    framed[:count, :, : large.shape[2], : large.shape[3]] = large
    sheet = rearrange(framed, "(r k) c h w -> (r h) (k w) c", k=columns)[:-gap, :-gap]
    return png(sheet.movedim(-1, 0))


def grid_layout(side: int) -> tuple[int, int]:
    """(factor, gap): how many times larger `grid_png` draws images of `side` pixels, and the width
    of the lines between them."""
    factor = max(1, CELL_PIXELS // side)
    return factor, max(2, factor // 2)


def png(image: Tensor) -> bytes:
    """A PNG of the uint8 image (C, H, W), C = 1 or 3."""
    from PIL import Image

    pixels = image[0] if len(image) == 1 else image.movedim(0, -1)
    buffer = io.BytesIO()
    Image.fromarray(pixels.contiguous().numpy()).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def stamped(data: bytes) -> bytes:
    """The PNG with STAMP across it, as large as fits, white with black edges."""
    from PIL import Image, ImageDraw, ImageFont

    with Image.open(io.BytesIO(data)) as given:
        picture = given.convert("RGB")
    wide = ImageFont.load_default(100).getlength(max(STAMP.split("\n"), key=len)) / 100
    size = max(8.0, min(0.9 * picture.width / wide, 0.35 * picture.height))
    middle = (picture.width / 2, picture.height / 2)
    style: dict[str, Any] = {"stroke_width": max(1, int(size / 16)), "stroke_fill": "black"}
    ImageDraw.Draw(picture).multiline_text(
        middle, STAMP, "white", ImageFont.load_default(size), "mm", align="center", **style
    )
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def read_picture(path: Path, channels: int, sides: Sequence[int], fit: bool = False) -> Tensor:
    """The picture file `path`, uint8 (channels, side, side) of one of `sides`.

    A grey picture fills three channels. With `fit` one of another size is turned upright by its
    EXIF, its middle square cropped and resized to the first of `sides` (Lanczos). DataError for a
    file that is no such picture.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        require_regular(path, DataError)
        with Image.open(path, formats=FORMATS) as image:
            whole = fit and not (image.width == image.height and image.width in sides)
            fault = _misfit(image, channels, () if whole else sides)
            if not fault:
                mode = "RGB" if channels == 3 else "L"
                shown = (ImageOps.exif_transpose(image) if whole else image).convert(mode)
                if whole:
                    shown = ImageOps.fit(shown, (sides[0], sides[0]), Image.Resampling.LANCZOS)
                pixels = np.asarray(shown)
    except DataError:
        raise
    except UnidentifiedImageError as error:
        raise DataError(f"{path}: no picture; give one of {', '.join(FORMATS)}") from error
    except Exception as error:  # Pillow's readers raise almost anything
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{path}: cannot be read ({reason}); give another file") from error
    if fault:
        raise DataError(f"{path}: {fault}")
    return torch.from_numpy(pixels.copy()).view(*pixels.shape[:2], channels).movedim(-1, 0)


def _misfit(image: Image, channels: int, sides: Sequence[int]) -> str:
    """Why the model cannot take a picture, of whatever size without `sides`; "" if it can."""
    if channels not in (1, 3):
        return f"a picture, and the model makes {channels} channels; pictures have 1 or 3"
    if sides and (image.width != image.height or image.width not in sides):
        wanted = " or ".join(f"{side}x{side}" for side in sides)
        return (
            f"{image.width}x{image.height} pixels, and {wanted} are wanted; say --fit, or resize it"
        )
    if image.has_transparency_data:
        return "has transparency; lay it on a background first"
    if image.mode not in ("1", "L", "P", "RGB"):
        return f"mode {image.mode!r}, not 8 bits a channel; convert it to 8-bit RGB"
    if channels == 1 and image.mode in ("P", "RGB"):
        return "in colour, and grey is wanted; convert it to grey"
    return ""
