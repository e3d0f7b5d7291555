"""Images as PNG files."""

from __future__ import annotations

import io
import math

from einops import rearrange
from torch import Tensor

CELL_PIXELS = 48


def grid_png(images: Tensor, columns: int | None = None) -> bytes:
    """A PNG with uint8 images (n, C, H, W), C = 1 or 3, row by row, nearly square by default.

    Images below 48 pixels are enlarged by a whole factor, without smoothing.
    """
    from PIL import Image

    count, channels, height, _ = images.shape
    columns = min(columns or math.ceil(math.sqrt(count)), count)
    rows = math.ceil(count / columns)
    padded = images.new_zeros(rows * columns, *images.shape[1:])
    padded[:count] = images
    factor = max(1, CELL_PIXELS // height)
    large = padded.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    sheet = rearrange(large, "(r k) c h w -> (r h) (k w) c", k=columns)
    picture = Image.fromarray(sheet.squeeze(2).numpy() if channels == 1 else sheet.numpy())
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
