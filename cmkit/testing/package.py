"""The check of a part of any kind, and of all that an installed package offers."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any

from pydantic import ValidationError

import cmkit.testing
from cmkit.errors import (
    CheckpointError,
    CmkitError,
    DataError,
    DownloadError,
    PluginError,
    ResourceError,
)
from cmkit.kinds import CLASSES, Part
from cmkit.plugins import Row, discover
from cmkit.testing.manifest import check_manifest
from cmkit.testing.protocol import ProtocolError


def check_part(part: Part, **options: Any) -> None:
    """Check a part by the check of its kind, which takes `options`."""
    for kind, cls in CLASSES.items():
        if isinstance(part, cls):
            getattr(cmkit.testing, f"check_{kind}")(part, **options)
            return
    raise ProtocolError(
        f"{type(part).__name__}: a part is an instance of one of the seven kinds; its bases are"
        f" {', '.join(base.__name__ for base in type(part).__mro__[1:-1])}; subclass one of"
        f" {', '.join('cmkit.' + cls.__name__ for cls in CLASSES.values())}"
    )


@dataclass(frozen=True)
class Verdict:
    """What `cmkit plugins check` says of one part: "pass", "fail", or "not checked" and why."""

    kind: str
    name: str
    outcome: str
    detail: str = ""


def check_package(dist: str) -> Iterator[Verdict]:
    """Verdicts on each manifest of an installed package, and on each of its parts.

    A part is made from its defaults, or from the table `examples["kind.name"]` of its manifest. One
    that lacks a required key, files, weights or memory is "not checked". PluginError when no
    package of that name has an entry point in the group `cmkit`.
    """
    entries = [e for e in entry_points(group="cmkit") if e.dist and _named(e.dist.name, dist)]
    if not entries:
        known = sorted({row.dist for row in discover().rows})
        raise PluginError(f"no installed package {dist!r} offers parts; known: {', '.join(known)}")
    examples: dict[str, dict[str, Any]] = {}
    for entry in entries:
        try:
            check_manifest(entry.module)
            examples |= getattr(importlib.import_module(entry.module), "examples", {})
        except CmkitError as error:
            yield Verdict("manifest", entry.module, "fail", str(error))
        else:
            yield Verdict("manifest", entry.module, "pass")
    for row in discover().rows:
        if _named(row.dist, dist) and row.plugin:
            yield _verdict(row, examples.get(f"{row.kind}.{row.name}"))
        elif _named(row.dist, dist):
            yield Verdict(row.kind, row.name, "fail", row.broken or "")


def _verdict(row: Row, example: Mapping[str, Any] | None) -> Verdict:
    try:
        model = discover().load(row.kind, row.qualified)
        part = model.model_validate_json(json.dumps(example or {}))
        check_part(part)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        place = f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}"
        if example is None and fault["type"] == "missing":
            cure = f'examples = {{"{row.kind}.{row.name}": {{...}}}} in the manifest'
            return Verdict(row.kind, row.name, "not checked", f"{place}; name {cure}")
        return Verdict(row.kind, row.name, "fail", f"its example is refused: {place}")
    except (DataError, CheckpointError, DownloadError, ResourceError) as error:
        return Verdict(row.kind, row.name, "not checked", str(error))
    except CmkitError as error:
        return Verdict(row.kind, row.name, "fail", str(error))
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        return Verdict(row.kind, row.name, "fail", f"{type(error).__name__}: {reason}")
    return Verdict(row.kind, row.name, "pass")


def _named(name: str, dist: str) -> bool:
    """Whether two spellings of a distribution are one (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower() == re.sub(r"[-_.]+", "-", dist).lower()
