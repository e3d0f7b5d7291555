"""Where weights lie, and their tensors under the names of our network."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from torch import Tensor

from cmkit.checkpoint import (
    MANIFEST,
    newest_folder,
    read_shapes,
    read_weights,
    verify,
    weights_file,
)
from cmkit.errors import CheckpointError, did_you_mean
from cmkit.files import (
    atomic_write,
    cache_folder,
    cached_sha256,
    digest_of,
    fresh_cache,
    read_bytes,
    read_json,
    reading,
)
from cmkit.runs.folder import RunFolder
from cmkit.runs.places import chosen
from cmkit.tensors import is_pickle, read_safetensors, safetensors_shapes

if TYPE_CHECKING:
    from cmkit.denoiser import Network
    from cmkit.kinds import Backbone
    from cmkit.recipe import Recipe
    from cmkit.values import Layout

DIFFUSERS = "diffusion_pytorch_model"
_SUFFIXES = (
    ".safetensors",
    ".safetensors.index.json",
    ".fp16.safetensors",
    ".safetensors.index.fp16.json",
    ".bin",
)
"""How names of weights go on in folders of diffusers, the best first; an index lists several files,
into which it divides what is above 10 GB."""
TO_COME: ContextVar[Mapping[str, Recipe]] = ContextVar("TO_COME", default=MappingProxyType({}))
"""Weights that the runs of these recipes are yet to make: checks take them for published ones that
are to be downloaded."""


@dataclass(frozen=True)
class Weights:
    """Where the weights `name` are, and where they come from if they are published."""

    name: str
    path: Path
    url: str | None = None
    average: str | None = None
    """Which of the weights of a checkpoint; None = the average that its training samples from."""

    @property
    def missing(self) -> bool:
        """Whether they must be downloaded first."""
        return self.url is not None and not self.path.exists()


def find(name: str, backbone: Backbone) -> Weights:
    """The weights `name`: "path:FILE", "PUBLISHER:NAME" as `backbone` publishes, what it locates,
    or a path; a run may be "run:NAME-KEY" wherever it lies, and "RUN@STEP", "RUN:ema-0.9999" and
    "RUN:online" name its other weights.

    CheckpointError when there is no such file, or no such name.
    """
    if name in backbone.published:
        publisher, _, _ = name.partition(":")
        url = backbone.published[name]
        return Weights(name, cache_folder(f"weights/{publisher}") / url.rsplit("/", 1)[-1], url)
    if name in TO_COME.get():
        return Weights(name, Path(name), "")
    if located := backbone.located(name):
        return Weights(name, located)
    place, step, average = chosen(name)
    folder = RunFolder.at(place)
    path = folder.path
    if step is not None:
        path = folder.checkpoint(step)
    elif average and folder.checkpoints.is_dir():
        path = folder.checkpoints
    if path == folder.path and folder.recipe.is_file() and folder.newest_weights() == path:
        raise CheckpointError(
            f"{name}: the run has no weights of its own; finish its training, or give what its"
            " recipe has as denoiser.weights"
        )
    if path.exists():
        return Weights(name, path, average=average)
    if step is not None:
        if step == "best":
            raise CheckpointError(
                f"{name}: no best checkpoint is kept; a training with score_every keeps one"
            )
        raise CheckpointError(
            f"{name}: no checkpoint of step {step} is kept; there are"
            f" {', '.join(map(str, folder.steps())) or 'none'}"
        )
    if not name.startswith("path:") and re.fullmatch(r"[a-z][a-z0-9-]+:\w[\w.-]*", name):
        raise CheckpointError(
            f"{name}: no published weights of this backbone"
            f"{did_you_mean(name, backbone.published)};"
            " a file is written path:FILE"
        )
    raise CheckpointError(
        f"{path}: no such file; give a checkpoint, a run folder, or a published name such as"
        f" openai:ct_bedroom256 (a relative path counts from {Path.cwd()})"
    )


def start_checkpoint(name: str) -> Path:
    """The checkpoint that "RUN", "RUN@STEP" or "run:NAME-KEY@STEP" names, by default the newest;
    CheckpointError where it is not there."""
    place, step, average = chosen(name)
    if average:
        raise CheckpointError(f"{name}: training goes on from all weights; leave :{average} out")
    folder = RunFolder.at(place).with_checkpoints()
    path = folder.checkpoints if step is None else folder.checkpoint(step)
    found = newest_folder(path) if path.is_dir() else path
    if not (found / MANIFEST).is_file():
        raise CheckpointError(
            f"{name}: no checkpoint to go on from; there are"
            f" {', '.join(map(str, folder.steps())) or 'none'} in {folder.checkpoints}"
        )
    return found


ADAPTERS = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
"""How diffusers and peft call the file of an adapter in its folder."""


def adapter_file(name: str) -> Path:
    """The safetensors file of the adapter `name`: a file, a folder with one, or a run, named as
    other weights are; CheckpointError where there is none."""
    place, step, average = chosen(name)
    folder = RunFolder.at(place)
    path = folder.path
    if step is not None:
        path = folder.checkpoint(step)
    elif average and folder.checkpoints.is_dir():
        path = folder.checkpoints
    elif path.is_dir():
        inside = [path / file for file in ADAPTERS if (path / file).is_file()]
        path = inside[0] if inside else folder.newest_weights()
    if path.is_dir():
        verify(newest_folder(path))
        path = weights_file(path, average)
    if not path.is_file():
        raise CheckpointError(
            f"{name}: no weights of an adapter; give a .safetensors file, a folder with"
            f" {' or '.join(ADAPTERS)}, or a run"
        )
    return path


def identity(name: str, backbone: Backbone) -> dict[str, str]:
    """The SHA-256 of the file that holds the weights `name`; nothing before it is downloaded."""
    found = find(name, backbone)
    if found.missing:
        return {}
    path = _within(RunFolder(found.path).newest_weights()) if found.path.is_dir() else found.path
    if _is_index(path):
        with reading(path):
            sums = {file.name: cached_sha256(file) for file in (path, *_shards(path))}
        return {"weights": digest_of(json.dumps(sums))}
    return {"weights": cached_sha256(weights_file(path, found.average))}


def read(weights: Weights) -> dict[str, Tensor]:
    """All tensors of `weights`, under the names that their file gives them, on the CPU.

    A pickle is turned into safetensors first, once for each content, outside this process.
    CheckpointError when it is not what it was on first use, and for anything that is no weights.
    """
    if weights.url:
        _pin(weights.path, cached_sha256(weights.path))
    path = _file(weights)
    if _is_index(path):
        return _joined(path, read_safetensors)
    return read_weights(path, weights.average)


def shapes(weights: Weights) -> dict[str, Tensor]:
    """The tensors of `read` on the meta device: names, types and shapes from the file's head."""
    path = _file(weights)
    return (
        _joined(path, safetensors_shapes) if _is_index(path) else read_shapes(path, weights.average)
    )


def _is_index(path: Path) -> bool:
    """Whether diffusers keeps weights in several files, which `path` lists."""
    return path.name.startswith(f"{DIFFUSERS}.safetensors.index") and not path.is_dir()


def _shards(index: Path) -> dict[Path, set[str]]:
    """The files of safetensors that an index lists, beside it, and the names of tensors in each."""
    names = read_json(index).get("weight_map")
    shards: dict[Path, set[str]] = {}
    for name, file in names.items() if isinstance(names, dict) else ():
        if not isinstance(file, str) or not re.fullmatch(r"\w[\w.-]*\.safetensors", file):
            raise CheckpointError(
                f"{index}: {name} is in {file!r:.80}, not a .safetensors file beside it; fetch or"
                " save the model again"
            )
        shards.setdefault(index.with_name(file), set()).add(name)
    if not shards:
        raise CheckpointError(f"{index}: lists no files; fetch or save the model again")
    return shards


def _joined(index: Path, read: Callable[[Path], dict[str, Tensor]]) -> dict[str, Tensor]:
    """What `read` finds in all files of an index, each of which holds what the index says."""
    joined: dict[str, Tensor] = {}
    for file, names in _shards(index).items():
        found = read(file)
        if differing := sorted(found.keys() ^ names):
            raise CheckpointError(
                f"{file}: holds other tensors than {index.name} says: {differing[0]}; fetch or"
                " save the model again"
            )
        joined |= found
    return joined


def _file(weights: Weights) -> Path:
    """The safetensors file, or the folder with checkpoints, that holds `weights`."""
    path = weights.path
    if path.is_dir():
        path = _within(RunFolder(path).newest_weights())
    return path if path.is_dir() or not is_pickle(path) else _converted(path, cached_sha256(path))


def adapt(
    tensors: Mapping[str, Tensor], network: Network, layouts: Sequence[Layout]
) -> dict[str, Tensor]:
    """`tensors` under the names of `network`, from whichever of `layouts` they are in, without the
    prefix that wrappers gave all their names."""
    _, tensors = _unwrapped(tensors, network, layouts)
    if tensors.keys() != network.state_dict().keys():
        for layout in layouts:
            if layout.matches(tensors):
                return layout.read(tensors)
    return dict(tensors)


def notes(
    weights: Weights, tensors: Mapping[str, Tensor], network: Network, layouts: Sequence[Layout]
) -> Iterator[str]:
    """Sentences of what `read` and `adapt` make of the file that is not as its author wrote it."""
    pickled = not weights.path.is_dir() and is_pickle(weights.path)
    if pickled and (note := _conversion(cached_sha256(weights.path))[1]):
        yield f"{weights.name}: {note}"
    prefix, _ = _unwrapped(tensors, network, layouts)
    if prefix:
        yield f"{weights.name}: the prefix {prefix!r} of its names is left out"


def _unwrapped(
    tensors: Mapping[str, Tensor], network: Network, layouts: Sequence[Layout]
) -> tuple[str, Mapping[str, Tensor]]:
    """What is left out of the names of `tensors` (DistributedDataParallel puts "module." before
    them, torch.compile "_orig_mod." anywhere), and the tensors without it."""
    own = network.state_dict().keys()

    def fit(choice: tuple[str, Mapping[str, Tensor]]) -> float:
        names = choice[1].keys()
        known = names == own or any(layout.matches(choice[1]) for layout in layouts)
        return math.inf if known else len(names & own)

    return max(_without_prefixes(tensors), key=fit)


def _without_prefixes(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Mapping[str, Tensor]]]:
    yield "", tensors
    prefix, compiled = "", "_orig_mod."
    if any(compiled in name for name in tensors):
        prefix, tensors = compiled, {n.replace(compiled, ""): t for n, t in tensors.items()}
        yield prefix, tensors
    while len(heads := {name.partition(".")[0] for name in tensors}) == 1:
        if not all("." in name for name in tensors):
            return
        prefix += f"{heads.pop()}."
        tensors = {name.partition(".")[2]: tensor for name, tensor in tensors.items()}
        yield prefix, tensors


def _within(folder: Path) -> Path:
    """The weights of a diffusers model or pipeline folder; another folder stays itself.
    CheckpointError where it has none."""
    for inner in (folder, folder / "unet"):
        for suffix in _SUFFIXES:
            if (found := inner / f"{DIFFUSERS}{suffix}").exists():
                return found
        if (inner / "config.json").is_file():
            raise CheckpointError(
                f"{inner}: no weights, such as {DIFFUSERS}.safetensors; fetch or save it again"
            )
    return folder


def _pin(path: Path, digest: str) -> None:
    """Record a published file's SHA-256 on first use; CheckpointError when it differs later."""
    record = path.with_name(f"{path.name}.sha256")
    if not record.exists():
        atomic_write(record, f"{digest}  {path.name}\n")
    known = read_bytes(record).decode(errors="replace").split()[:1]
    if known != [digest]:
        raise CheckpointError(
            f"{path}: its SHA-256 {digest[:12]}.. is not {''.join(known)[:12]}.. of its first use"
            f" ({record.name}); if you trust the new file, delete {record}, else the file"
        )


def _converted(path: Path, digest: str) -> Path:
    """The safetensors file that a pickle of this SHA-256 became; made now if there is none."""
    target = cache_folder("converted") / f"{digest}.safetensors"
    if target.is_file() and _conversion(digest)[0] == cached_sha256(target):
        return target
    from cmkit.weights.pickles import pickle_to_safetensors

    fresh_cache(target.parent)
    note = pickle_to_safetensors(path, target)
    atomic_write(target.with_suffix(".sha256"), f"{cached_sha256(target)}\n{note}")
    return target


def _conversion(digest: str) -> tuple[str, str]:
    """The SHA-256 of what a pickle became, and the note of its conversion; empty without one."""
    record = cache_folder("converted") / f"{digest}.sha256"
    text = read_bytes(record).decode(errors="replace") if record.is_file() else ""
    converted, _, note = text.partition("\n")
    return converted, note
