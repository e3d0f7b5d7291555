"""Pictures as data URIs of bounded size."""

from __future__ import annotations

import base64
import io
import struct
from pathlib import Path
from typing import Any

from cmkit.errors import DataError
from cmkit.run.folder import RunFolder

SHEET_PIXELS, CELL_PIXELS = 1280, 640
TINY_PIXELS = 600


def picture_of(folder: RunFolder, name: str, limit: int) -> dict[str, Any]:
    """Attributes of an <img> at most `limit` pixels wide; `src` is None when the file is gone."""
    path = folder.picture(name)
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
