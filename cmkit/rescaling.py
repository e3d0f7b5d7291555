"""Scales that a search found, in a file of their own: `rescaling.json`.

Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cmkit import files
from cmkit.errors import CheckpointError
from cmkit.runs.folder import RunFolder

POLICY = "rescaling.json"
SCHEMA = 1
LARGEST = 100
"""Of scales; what is larger is no rescaling."""


@dataclass(frozen=True)
class Policy:
    """The content of `rescaling.json`."""

    rescaler: Mapping[str, Any]
    """The table [rescaler] with the numbers that were found."""
    sites: tuple[str, ...]
    """All sites of the network."""
    scales: Mapping[str, float] | None
    """The number of each site that has one; None where they depend on the noise level."""
    model: Mapping[str, str]
    """What it was found on: "weights", the digest of `cmkit.plan.model_digest`; "training", the key
    of the run's training, if it had one; "backbone"."""
    found: Mapping[str, Any] = field(default_factory=dict)
    """How it was found."""
    confirmed: Mapping[str, Any] = field(default_factory=dict)
    """The comparison with the unscaled model on fresh noise."""

    def text(self) -> str:
        """The file, with its own digest."""
        return files.sealed({"schema": SCHEMA, **asdict(self)})


def read_policy(place: str) -> Policy:
    """The policy in the file `place`, or in the run of this folder or "run:NAME-KEY".

    CheckpointError where there is none, and where it is damaged or not cmkit's.
    """
    path = RunFolder.at(place).path
    if path.is_dir():
        if not (path / POLICY).exists():
            raise CheckpointError(
                f"{path}: holds no {POLICY}; `cmkit run` writes it when the run's [search] is done"
            )
        path /= POLICY
    if not path.exists():
        raise CheckpointError(
            f"{path}: no such file; give a {POLICY}, or the folder of a run with a [search] (a"
            f" relative path counts from {Path.cwd()})"
        )
    content = files.read_json(path)
    if content.get("schema") != SCHEMA:
        raise CheckpointError(
            f"{path}: schema {content.get('schema')!r}, but this cmkit reads {SCHEMA}; give a"
            f" {POLICY}"
        )
    content = files.unsealed(path)
    content.pop("schema")
    with files.reading(path):
        policy = Policy(**{**content, "sites": tuple(content["sites"])})
        scales = policy.scales or {}
        sound = {*policy.sites} >= {*scales} and all(abs(v) <= LARGEST for v in scales.values())
        if not (sound and policy.model["weights"] and policy.rescaler["use"]):
            raise ValueError("not what cmkit wrote")
    return policy
