"""Public addresses of weights, by the names that `denoiser.weights` takes, and what they need
beside them. Their licences are their publishers': those of EDM, EDM2 and DiT are not for commercial
use."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from cmkit import Backbone, Precond
from cmkit.errors import RecipeError, inline
from cmkit_std.preconds.discrete import Discrete
from cmkit_std.preconds.edm import EDM

_ADDRESSES = {
    "openai": "https://openaipublic.blob.core.windows.net/consistency/{}.pt",
    "edm": "https://nvlabs-fi-cdn.nvidia.com/edm/pretrained/edm-{}.pkl",
    "edm2": "https://nvlabs-fi-cdn.nvidia.com/edm2/posthoc-reconstructions/edm2-{}.pkl",
    "dit": "https://dl.fbaipublicfiles.com/DiT/models/{}.pt",
    "guided-diffusion": "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/{}.pt",
}
_LINEAR = {"spacing": "linear", "beta_start": 1e-4, "beta_end": 0.02}
_COSINE = {"spacing": "cosine"}


def published(publisher: str, files: Iterable[str]) -> dict[str, str]:
    """{"publisher:file": its address}."""
    return {f"{publisher}:{file}": _ADDRESSES[publisher].format(file) for file in files}


def check_published(weights: str, backbone: Backbone, precond: Precond, **options: Any) -> None:
    """RecipeError unless these published weights are used with their `options` of the backbone, and
    with a precond that gives the network what it was trained on."""
    from cmkit.traits import interchangeable

    for name, needed in options.items():
        if (given := getattr(backbone, name) or False) != needed:
            raise RecipeError(
                f"{weights}: needs backbone.{name} = {inline(needed)}, not {inline(given)}"
            )
    publisher, _, file = weights.partition(":")
    trained: Precond = EDM()
    said = '"edm", or "consistency" for a consistency model'
    if publisher in ("dit", "guided-diffusion"):
        schedule = _COSINE if file.startswith("64x64") else _LINEAR
        trained = Discrete.model_validate(schedule)
        said = inline({"use": "discrete", **schedule})
    if not interchangeable(trained.scalings, precond.scalings):
        raise RecipeError(
            f"{weights}: was trained under other scalings; beside it set precond = {said}"
        )
