"""What is encoded of a data set, and the rows of it that are kept."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cmkit.batches import to_x0
from cmkit.denoiser import Cond
from cmkit.errors import NonFiniteError, RecipeError
from cmkit.files import digest_of
from cmkit.kinds import Codec, Coder, Dataset, Part, Pictures, Prompts, TextEncoder
from cmkit.latents.store import Store, ahead
from cmkit.values import DataSpec

FORMAT = 1
"""Of the rows: part of the key, so that another cmkit makes others."""
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
PROMPTS = 32
"""Prompts at a time: as many each time, so that features depend on the prompt alone."""
CODED = 8
"""Pictures at a time, where no table says it."""


class Kept(NamedTuple):
    """What is kept of a data set; None = is encoded on the fly, or there is none."""

    latents: Store | None = None
    text: Store | None = None

    @property
    def stores(self) -> list[Store]:
        return [store for store in self if store]


def kept_of(
    dataset: Dataset, data: DataSpec, codec: Codec | None, text: TextEncoder | None, dtype: str
) -> Kept:
    """The stores of all latents and all prompts of a data set, whose pictures are as `data` says;
    they need not be there yet.

    RecipeError where its pictures have no numbers, or it has no captions.
    """
    latents = _latents(dataset, data, codec, dtype) if codec else None
    return Kept(latents, _text(dataset, text, dtype) if text else None)


def _latents(dataset: Dataset, data: DataSpec, codec: Codec, dtype: str) -> Store:
    pictures = dataset.pictures()
    if pictures is None:
        raise RecipeError(
            "the pictures of this data set have no numbers, by which latents are kept; say cache ="
            " false, or cache.latents = false, to encode them at every step"
        )
    about = {
        "format": FORMAT,
        "pictures": pictures.fingerprint(),
        "count": len(pictures),
        "shape": [data.channels, data.resolution],
        "mirrored": pictures.flip,
        "codec": _about(codec),
        "dtype": dtype,
    }
    latent = codec.spec(data)
    numbers = 2 * (1 + pictures.flip) * latent.channels * latent.resolution**2
    return Store("latents", about, len(pictures), numbers * DTYPES[dtype].itemsize)


def _text(dataset: Dataset, text: TextEncoder, dtype: str) -> Store:
    """A row for each caption, and the unconditional prompt as the last one."""
    captions, spec = captions_of(dataset), text.spec()
    about = {
        "format": FORMAT,
        "captions": digest_of("\0".join(captions)),
        "count": len(captions),
        "text": _about(text),
        "dtype": dtype,
    }
    numbers = spec.length * spec.width + (spec.pooled or 0)
    return Store("text", about, len(captions) + 1, numbers * DTYPES[dtype].itemsize)


def captions_of(dataset: Dataset) -> Sequence[str]:
    """The captions; RecipeError where there are none."""
    captions = dataset.captions()
    if captions is None:
        raise RecipeError(
            "the pictures of this data set have no captions, which a text encoder is for; choose"
            " another data set, or drop [text]"
        )
    return captions


def _about(part: Part) -> dict[str, Any]:
    """All of a part that may decide what it computes: its class, options and files."""
    options = {
        key: value
        for key, value in part.model_dump(mode="json").items()
        if "cache" in part.read_by.get(key, ("cache",))
    }
    own = type(part)
    name = f"{own.__module__}.{own.__qualname__}"
    return {"class": name, "options": options, "files": dict(part.identity())}


def work(
    dataset: Dataset,
    part: Codec | TextEncoder,
    store: Store,
    shards: Sequence[int],
    batch: int,
    device: torch.device,
) -> Iterator[tuple[int, dict[str, Tensor] | None]]:
    """Compute those `shards` of a store, `batch` pictures at a time: (rows, None) after each few
    rows, and (0, tensors) with each whole shard.

    NonFiniteError names the picture or the prompt of which a number is NaN, or too large.
    """
    dtype, few = DTYPES[store.about["dtype"]], batch if isinstance(part, Codec) else PROMPTS
    every = [store.shards[shard] for shard in shards]
    chunks = (rows[k : k + few] for rows in every for k in range(0, len(rows), few))
    if isinstance(part, Codec):
        encoded = _latents_of(dataset, part, chunks, device, dtype)
    else:
        encoded = _features_of(dataset, part, chunks, device, dtype)
    with contextlib.closing(encoded):
        for rows in every:
            parts: list[dict[str, Tensor]] = []
            for k in range(0, len(rows), few):
                parts.append(next(encoded))
                yield len(rows[k : k + few]), None
            yield 0, {name: torch.cat([one[name] for one in parts]) for name in parts[0]}


def _latents_of(
    dataset: Dataset,
    codec: Codec,
    chunks: Iterator[range],
    device: torch.device,
    dtype: torch.dtype,
) -> Generator[dict[str, Tensor]]:
    """Mean and standard deviation, (B, crops, c, h, w), of the latents of pictures, and of their
    mirror images where the data set has them."""
    pictures = dataset.pictures()
    assert pictures is not None
    coder, decodes = codec.load(device), False
    with ThreadPoolExecutor(16, thread_name_prefix="decode") as threads:

        def read() -> Iterator[tuple[range, Tensor]]:
            for rows in chunks:
                pictures[rows[0]]  # those that decode all at once do it here, in one thread
                yield rows, torch.stack(list(threads.map(pictures.__getitem__, rows)))

        for rows, images in ahead(read(), 2):
            x0 = to_x0(images.to(device))
            crops = [x0, x0.flip(-1)] if pictures.flip else [x0]
            coded = [encode(coder, crop, len(rows)) for crop in crops]
            decodes = decodes or _decodes(coder, coded[0][0][:1])
            values = {"mean": torch.stack([mean for mean, _ in coded], 1)}
            if coded[0][1] is not None:
                values["std"] = torch.stack([std for _, std in coded if std is not None], 1)
            cures = "look at the picture, and choose another precision or codec"
            yield _finite(values, dtype, lambda k: _name(pictures, rows[k]), "codec", cures)  # noqa: B023


def _decodes(coder: Coder, latents: Tensor) -> bool:
    """True; NonFiniteError, before anything is trained, where sound latents have no picture."""
    with torch.no_grad():
        if latents.isfinite().all() and not coder.decode(latents).isfinite().all():
            raise NonFiniteError(
                "codec: its decoder gives NaN or infinity for the first picture; choose another"
                " precision or codec"
            )
    return True


def _features_of(
    dataset: Dataset,
    text: TextEncoder,
    chunks: Iterator[range],
    device: torch.device,
    dtype: torch.dtype,
) -> Generator[dict[str, Tensor]]:
    """Features of captions by number, and of the unconditional prompt behind the last one."""
    captions, prompts = captions_of(dataset), text.load(device)
    for rows in chunks:
        said = [captions[row] for row in rows if row < len(captions)]
        values = features(prompts, said)
        if len(said) < len(rows):
            null = rows_of(prompts.null)
            values = {name: torch.cat([value, null[name]]) for name, value in values.items()}
        names = [repr(text[:60]) for text in said] + ["the unconditional prompt"]
        cure = "shorten the prompt, or choose another text encoder"
        yield _finite(values, dtype, lambda k: f"prompt {names[k]}", "text encoder", cure)  # noqa: B023


def encode(coder: Coder, x0: Tensor, batch: int) -> tuple[Tensor, Tensor | None]:
    """Mean and standard deviation, contiguous float32, of the latents of x0, `batch` at a time."""
    with torch.no_grad():
        coded = [coder.encode(part) for part in x0.split(batch)]
    mean = torch.cat([mean for mean, _ in coded]).contiguous()
    stds = [std for _, std in coded if std is not None]
    return mean, torch.cat(stds).contiguous() if stds else None


def features(prompts: Prompts, said: Sequence[str]) -> dict[str, Tensor]:
    """The fields of Cond that hold the features of prompts, PROMPTS at a time."""
    found = []
    with torch.no_grad():
        for first in range(0, max(len(said), 1), PROMPTS):
            few = list(said[first : first + PROMPTS])
            rows = rows_of(prompts(few + [""] * (PROMPTS - len(few))))
            found.append({name: value[: len(few)] for name, value in rows.items()})
    return {name: torch.cat([one[name] for one in found]) for name in found[0]}


def rows_of(cond: Cond) -> dict[str, Tensor]:
    """The fields of a prompt's Cond that are there."""
    both = {"text": cond.text, "pooled": cond.pooled}
    return {name: value for name, value in both.items() if value is not None}


def whole(side: int, count: int, device: torch.device) -> Tensor:
    """`Cond.size` (B, 6) of pictures of `side` pixels that were not cropped."""
    size = [side, side, 0, 0, side, side]
    return torch.tensor([size], dtype=torch.float32, device=device).expand(count, 6)


def _name(pictures: Pictures, index: int) -> str:
    """How an error calls a picture: by its number, and its file where the data set says it."""
    name = getattr(getattr(pictures, "source", None), "name", None)
    return f"picture {index}" + (f" ({name(index)})" if name else "")


def _finite(
    values: Mapping[str, Tensor], dtype: torch.dtype, name: Any, what: str, cure: str
) -> dict[str, Tensor]:
    """The values on the CPU as `dtype`; NonFiniteError names the first row that is not finite."""
    rounded = {}
    for key, value in values.items():
        rounded[key] = value.to(dtype).cpu()
        bad = (~rounded[key].flatten(1).isfinite().all(1)).nonzero()
        if len(bad):
            row = int(bad[0])
            if value[row].isfinite().all():
                most = float(value[row].abs().max())
                cure = f'say cache.dtype = "bf16" or "fp32", which hold {most:.3g}'
            raise NonFiniteError(f"{name(row)}: the {what}'s {key} is not finite; {cure}")
    return rounded
