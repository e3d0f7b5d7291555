"""From encoded pictures (PNG, JPEG, ..) to training batches and to the reference of metrics."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL import __version__ as VERSION

from cmkit import CheckpointError, DataError
from cmkit.files import atomic_write, cache_folder, digest_of, read_json
from cmkit.pictures import FORMATS
from cmkit_std.datasets.pixels import Images, Labels, pool

MAX_PIXELS = 2**26
RESIDENT_BYTES = 2**31
READ_AHEAD = 4096
NAMED = 20
"""Bad pictures that an error names."""
MODES = frozenset({"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr"})
DEEP = frozenset({"I;16", "I;16B", "I;16L", "I;16N"})
"""Grey of 16 bits; a PGM of more than 8 is read as 32, scaled to 16. Pillow reads colour of 16 bits
as the upper 8, of a PPM rounded."""
ORIENTATION = 0x0112
TURNED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What makes a picture upright, by its EXIF orientation (EXIF 2.3, 4.6.4 A)."""

Shape = tuple[int, int]
"""Channels, and height = width."""


class Source(Protocol):
    """Encoded pictures by number; two are equal, and hash so, while no picture changed."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """How errors call picture `index`."""

    def open_picture(self, index: int) -> Path | BinaryIO:
        """What Pillow is to read picture `index` from."""

    def fingerprint(self) -> str:
        """What changes whenever a picture does."""


class Lasting(Source, Protocol):
    """Pictures of which it is kept which can be used."""

    place: str
    """Where they are."""

    def key(self, index: int) -> str:
        """What changes whenever picture `index` may have; "" where that is not known."""


def check(source: Source, indices: Sequence[int], bad: Iterable[str] = ()) -> None:
    """DataError that names those whose header is not that of a picture that can be used, after
    those of which something else is `bad`."""
    headers = verdicts(source, indices, lambda index: _open(source, index).close())
    refuse([*bad, *filter(None, headers)])


def refuse(bad: Sequence[str]) -> None:
    """DataError of what is wrong with each picture, if with any."""
    if len(bad) > 1:
        more = f"; and {len(bad) - NAMED} more, which cmkit check --data lists" * (len(bad) > NAMED)
        raise DataError(f"{len(bad)} pictures cannot be used: {'; '.join(bad[:NAMED])}{more}")
    if bad:
        raise DataError(bad[0])


def undecodable(source: Source, shape: Shape) -> Iterator[str]:
    """What is wrong with each picture that `decode` refuses; reads them all."""
    every = range(len(source))
    return filter(None, verdicts(source, every, lambda index: decode(source, index, shape)))


def verdicts(
    source: Source, indices: Sequence[int], read: Callable[[int], object]
) -> Iterator[str]:
    """What is wrong with each picture, by the DataError of `read`; "" where it is right."""

    def fault(index: int) -> str:
        try:
            read(index)
        except DataError as error:
            return str(error)
        return ""

    with pool() as threads, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow only warns of what `_open` refuses
        for first in range(0, len(indices), READ_AHEAD):
            yield from threads.map(fault, indices[first : first + READ_AHEAD])


@functools.lru_cache(maxsize=1)
def judged(source: Lasting, shape: Shape) -> tuple[str, ...]:
    """What is wrong with each picture, "" where nothing is; each is decoded once, and the verdict
    kept in the user's cache by its key."""
    record = cache_folder("pictures") / f"{digest_of(f'{source.place} {shape} {VERSION}')}.json"
    known: dict[str, Any] = {}
    if record.exists():
        with contextlib.suppress(CheckpointError):  # damaged: all are decoded again
            known = read_json(record)
    keys = [source.key(index) for index in range(len(source))]
    new = [index for index, key in enumerate(keys) if not key or key not in known]
    found = dict(
        zip(new, verdicts(source, new, lambda index: decode(source, index, shape)), strict=True)
    )
    if new:
        known |= {keys[index]: fault for index, fault in found.items()}
        record.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(record, json.dumps({key: known[key] for key in keys if key}))
    return tuple(str(found.get(index, known[key])) for index, key in enumerate(keys))


class Decoder(Images):
    """Pictures of shape (C, R, R), decoded when asked for, or once if they all fit in memory."""

    def __init__(
        self,
        source: Source,
        shape: Shape,
        labels: Labels | None = None,
        flip: bool = False,
        upright: bool = False,
    ):
        self.source, self.shape, self.labels, self.flip = source, shape, labels, flip
        self.upright = upright

    def __len__(self) -> int:
        return len(self.source)

    def row(self, index: int) -> np.ndarray:
        held = self.held
        return decode(self.source, index, self.shape, self.upright) if held is None else held[index]

    def fingerprint(self) -> str:
        """SHA-256 of the source's fingerprint, the shape, and whether pictures are upright."""
        about = f"{self.source.fingerprint()} {self.shape}" + " upright" * self.upright
        return hashlib.sha256(about.encode()).hexdigest()

    @functools.cached_property
    def held(self) -> np.ndarray | None:
        channels, resolution = self.shape
        fits = len(self) * channels * resolution**2 <= RESIDENT_BYTES
        return _decoded(self.source, self.shape, self.upright) if fits else None


def decode(source: Source, index: int, shape: Shape, upright: bool = False) -> np.ndarray:
    """Picture `index` resized and cropped, (C, R, R) uint8, turned as its EXIF orientation says if
    `upright`; DataError when it is damaged."""
    channels, resolution = shape
    with _open(source, index) as image:
        try:
            image.load()
            picture = _flat(image, "RGB" if channels == 3 else "L")
            if upright and (turn := TURNED.get(_orientation(image))) is not None:
                picture = picture.transpose(turn)
            picture = cropped(picture, resolution)
        except Exception as error:  # Pillow's decoders raise almost anything
            raise _damaged(source.name(index), error) from error
    return np.asarray(picture).reshape(resolution, resolution, channels).transpose(2, 0, 1).copy()


def cropped(image: Image.Image, resolution: int) -> Image.Image:
    """The middle square, (resolution, resolution): box halvings, then bicubic (ADM).

    ValueError for a strip so narrow that enlarging it would take more than MAX_PIXELS.
    """
    while min(image.size) >= 2 * resolution:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = resolution / min(image.size)
    size = (round(image.width * scale), round(image.height * scale))
    if size[0] * size[1] > MAX_PIXELS:
        raise ValueError(f"{image.width}x{image.height} is too narrow a strip")
    image = image.resize(size, Image.Resampling.BICUBIC)
    left, top = (image.width - resolution) // 2, (image.height - resolution) // 2
    return image.crop((left, top, left + resolution, top + resolution))


def _open(source: Source, index: int) -> Image.Image:
    """The picture's header only; DataError for no picture, too many pixels, or a strange mode."""
    stream = source.open_picture(index)
    try:
        image = Image.open(stream, formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(
            f"{source.name(index)}: {error}; at most {MAX_PIXELS} pixels: shrink it"
        ) from error
    except UnidentifiedImageError as error:
        raise DataError(
            f"{source.name(index)}: not a picture of {', '.join(FORMATS)}; convert it, or move it"
            " away"
        ) from error
    except Exception as error:  # Pillow's readers raise almost anything
        raise _damaged(source.name(index), error) from error
    fault = ""
    if image.width * image.height > MAX_PIXELS:
        fault = f"{image.width}x{image.height} pixels, more than {MAX_PIXELS} in all; shrink it"
    elif image.mode not in MODES and not _deep(image):
        fault = f"mode {image.mode!r}, not 8 or 16 bits a channel; convert it to 8-bit RGB"
    if fault:
        image.close()
        raise DataError(f"{source.name(index)}: {fault}")
    return image


def _damaged(name: str, error: Exception) -> DataError:
    if isinstance(error, PermissionError):
        return DataError(f"{name}: {error.strerror}; give this user permission to read it")
    reason = str(error) or type(error).__name__
    return DataError(f"{name}: cannot be decoded ({reason}); replace it or move it away")


def _deep(image: Image.Image) -> bool:
    """Whether it is grey of 16 bits."""
    return image.mode in DEEP or (image.mode == "I" and image.format == "PPM")


def _orientation(image: Image.Image) -> int | None:
    """Its EXIF orientation; None where it has none, or no EXIF that can be read."""
    try:
        return image.getexif().get(ORIENTATION)
    except Exception:  # the picture is sound: viewers show it as it is stored
        return None


def _flat(image: Image.Image, mode: str) -> Image.Image:
    """The picture in `mode`, of 16 bits the upper 8, transparency laid on white."""
    if _deep(image):
        values = np.asarray(image)
        grey = (values >> 8).astype(np.uint8)
        if isinstance(clear := image.info.get("transparency"), int):
            grey[values == clear] = 255
        return Image.fromarray(grey).convert(mode)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert(mode)


@functools.lru_cache(maxsize=2)  # those of training and those that are held out
def _decoded(source: Source, shape: Shape, upright: bool) -> np.ndarray:
    """All pictures, (N, C, R, R) uint8; decoded again when the source changed."""
    with pool() as threads:
        every = threads.map(lambda n: decode(source, n, shape, upright), range(len(source)))
        return np.stack(list(every))
