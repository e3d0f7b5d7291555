"""Images as PNG files."""

from __future__ import annotations

import io
import math

from einops import rearrange
from torch import Tensor

CELL_PIXELS = 48
GAP_GREY = 64


def grid_png(images: Tensor, columns: int | None = None) -> bytes:
    """A PNG with uint8 images (n, C, H, W), C = 1 or 3, row by row, nearly square by default.

    Images below 48 pixels are enlarged by a whole factor, without smoothing. A thin grey line keeps
    them apart.
    """
    from PIL import Image

    count, channels, height, _ = images.shape
    columns = min(columns or math.ceil(math.sqrt(count)), count)
    rows = math.ceil(count / columns)
    factor = max(1, CELL_PIXELS // height)
    large = images.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    gap = max(2, factor // 2)
    framed = large.new_full(
        (rows * columns, channels, *(n + gap for n in large.shape[2:])), GAP_GREY
    )
    framed[:count, :, : large.shape[2], : large.shape[3]] = large
    sheet = rearrange(framed, "(r k) c h w -> (r h) (k w) c", k=columns)[:-gap, :-gap]
    picture = Image.fromarray(sheet.squeeze(2).numpy() if channels == 1 else sheet.numpy())
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
