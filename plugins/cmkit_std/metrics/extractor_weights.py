"""The weights of a metric's extractor: the file, where it can be had, and whether it is the one."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch_fidelity import register_feature_extractor
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

from cmkit import CheckpointError, DownloadError, RecipeError
from cmkit.files import cached_sha256
from cmkit_std.metrics import (
    digits_net,
    emoji_net,
    random_net,  # noqa: F401 - registers its extractor
)
from cmkit_std.metrics.extract import Extractor
from cmkit_std.metrics.fidelity_options import DIGITS, EMOJI, INCEPTION


class Weights(NamedTuple):
    """A public file of weights. torch-fidelity unpickles it, so no other file is handed over."""

    file: str
    folder: str
    sha256: str

    @property
    def url(self) -> str:
        """Where it can be had."""
        return f"https://{self.folder}/{self.file}"


PUBLIC = {
    INCEPTION: Weights(
        "weights-inception-2015-12-05-6726825d.pth",
        "github.com/toshas/torch-fidelity/releases/download/v0.2.0",
        "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
    ),
    "vgg16": Weights(
        "vgg16-397923af.pth",
        "download.pytorch.org/models",
        "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0",
    ),
}

SHIPPED = {
    DIGITS: digits_net.SHA256["digits_features"],
    EMOJI: emoji_net.SHA256["emoji_features"],
}
"""The SHA-256 of weights that come with cmkit."""


def find(name: str, given: str | None, download: bool) -> Extractor:
    """The extractor `name` with the file of its weights, `given` or where it is kept.

    RecipeError for a name that nobody knows, DownloadError for weights that are not on this disk
    and may not be fetched, CheckpointError for others than the published ones.
    """
    if name in SHIPPED:
        if given:
            raise RecipeError(f"metric.weights: {name} ships its own weights; leave it out")
        return Extractor(name, None, SHIPPED[name])
    file = _published(name, given, download) if name in PUBLIC else _other(name, given, download)
    return Extractor(name, str(file), cached_sha256(file)) if file else Extractor(name, None, None)


def _published(name: str, given: str | None, download: bool) -> Path:
    public = PUBLIC[name]
    file = _given(given) if given else Path(torch.hub.get_dir(), "checkpoints", public.file)
    if not file.is_file():
        if not download:
            raise DownloadError(
                f"fidelity: extractor {name} needs {public.file}: put {public.url} into"
                f" {file.parent}, or name a copy in metric.weights, or set metric.download = true;"
                f' or choose another extractor: "timm-NAME", or for small pictures "{EMOJI}"'
            )
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(
                public.url, str(file), hash_prefix=public.sha256, progress=False
            )
        except (OSError, RuntimeError) as error:
            raise DownloadError(
                f"{public.url}: {error}; download it elsewhere and put it at {file}"
            ) from error
    if (found := cached_sha256(file)) != public.sha256:
        raise CheckpointError(
            f"{file}: SHA-256 {found[:12]}.. is not that of {public.file},"
            f" {public.sha256[:12]}..; remove it and download {public.url}"
        )
    return file


def _other(name: str, given: str | None, download: bool) -> Path | None:
    """The file for an extractor that timm, torch-fidelity or another package knows."""
    if name.startswith("timm-"):
        from cmkit_std.metrics.timm_extractor import TimmExtractor
        from cmkit_std.timm_network import weights_of

        if name not in FEATURE_EXTRACTORS_REGISTRY:
            register_feature_extractor(name, TimmExtractor)
        network = name.removeprefix("timm-")
        files = None if given is None else {network: str(Path(given).expanduser())}
        return weights_of(network, files, "fidelity.extractor", "metric.weights")
    if name not in FEATURE_EXTRACTORS_REGISTRY:
        raise RecipeError(
            f"fidelity.extractor = {name!r}: nobody registered it with torch-fidelity; known:"
            f" auto, timm-NAME, {', '.join(sorted(FEATURE_EXTRACTORS_REGISTRY))}"
        )
    if given:
        return _given(given)
    if name.startswith(("clip-", "dinov2-")) and not download:
        raise DownloadError(
            f"fidelity: extractor {name} needs weights that torch-fidelity would download;"
            " name a copy in metric.weights, or set metric.download = true"
        )
    return None


def _given(weights: str) -> Path:
    file = Path(weights).expanduser()
    if not file.is_file():
        raise CheckpointError(f"metric.weights = {weights!r}: no such file")
    return file
