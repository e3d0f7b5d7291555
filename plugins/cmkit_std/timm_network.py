"""Frozen networks of timm with the weights of their publishers, as features of a metric or of a
discriminator."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import timm
import torch
from torch import nn

from cmkit import CheckpointError, DownloadError, RecipeError
from cmkit.checkpoint import read_weights
from cmkit.files import cache_folder
from cmkit.tensors import load_weights

Files = Mapping[str, str] | str | None
"""Weights of networks: a file for each name, a folder, or "random"; None = the user's cache."""


def network(name: str, weights: Path | None, key: str) -> nn.Module:
    """timm's network `name` in evaluation mode, frozen, with these weights or always the same
    random ones; CheckpointError, which names the recipe's `key`, for weights that are not its own.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = timm.create_model(name).requires_grad_(False).eval()
    if weights is None:
        return made
    own = made.state_dict()
    # Older files lack these counters, of which nothing depends.
    counters = {name: own[name] for name in own if name.endswith("num_batches_tracked")}
    load_weights(made, {**counters, **read_weights(weights)}, f"{key}: {weights}")
    return made


def weights_of(name: str, files: Files, reader: str, key: str) -> Path | None:
    """The file of the weights that `reader` needs of timm's network `name`, from what the recipe's
    `key` says; None = random weights.

    RecipeError for a name that timm does not know, DownloadError or CheckpointError for weights
    that are not on this disk.
    """
    if not timm.is_model(name):
        raise RecipeError(
            f"{reader}: timm {timm.__version__} has no network {name!r}; see timm.list_models()"
        )
    if files == "random":
        return None
    if isinstance(files, Mapping) and name in files:
        if not Path(files[name]).is_file():
            raise CheckpointError(f"{key}: {name} = {files[name]!r}: no such file")
        return Path(files[name])
    folder = Path(files) if isinstance(files, str) else cache_folder("weights/timm")
    path = folder / f"{name}.safetensors"
    if not path.is_file():
        config = timm.get_pretrained_cfg(name)
        hub = config.hf_hub_id if config and config.hf_hub_id else f"timm/{name}"
        raise DownloadError(
            f"{reader} needs the weights of {name}: put huggingface.co/{hub}'s"
            f" model.safetensors at {path}, or name a file or folder in {key}"
        )
    return path
