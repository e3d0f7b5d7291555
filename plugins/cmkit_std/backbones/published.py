"""Public addresses of weights, by the names that `denoiser.weights` takes. Their licences are their
publishers': EDM's and EDM2's are not for commercial use."""

from __future__ import annotations

from collections.abc import Iterable

_ADDRESSES = {
    "openai": "https://openaipublic.blob.core.windows.net/consistency/{}.pt",
    "edm": "https://nvlabs-fi-cdn.nvidia.com/edm/pretrained/edm-{}.pkl",
    "edm2": "https://nvlabs-fi-cdn.nvidia.com/edm2/posthoc-reconstructions/edm2-{}.pkl",
}


def published(publisher: str, files: Iterable[str]) -> dict[str, str]:
    """{"publisher:file": its address}."""
    return {f"{publisher}:{file}": _ADDRESSES[publisher].format(file) for file in files}
