"""The checks of a part of any kind, of a manifest, and of all that an installed package offers."""

from __future__ import annotations

import importlib
import inspect
import json
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
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
from cmkit.plugins import Plugin, Row, api_version, blame, discover
from cmkit.recipe import NAME
from cmkit.testing.protocol import ProtocolError, Report, shown


def check_part(part: Part, **options: Any) -> None:
    """Check a part by the check of its kind, which takes `options`."""
    for kind, cls in CLASSES.items():
        if isinstance(part, cls):
            getattr(cmkit.testing, f"check_{kind}")(part, **options)
            return
    raise ProtocolError(
        f"{type(part).__name__}: a part is an instance of one of the kinds; its bases"
        f" are {', '.join(base.__name__ for base in type(part).__mro__[1:-1])}; subclass one of"
        f" {', '.join('cmkit.' + cls.__name__ for cls in CLASSES.values())}"
    )


def check_manifest(manifest: str | Sequence[Plugin], seconds: float = 1.0) -> None:
    """Check a manifest: a module's name, or what its `cmkit_register` returns.

    A fresh Python imports the module, then every target: no torch, and at most `seconds` of
    processor time for the module itself, beyond cmkit's own.
    """
    report = Report(manifest if isinstance(manifest, str) else "manifest")
    plugins = _registered(report, manifest) if isinstance(manifest, str) else list(manifest)
    report.require(
        isinstance(plugins, list) and bool(plugins) and {*map(type, plugins)} == {Plugin},
        "cmkit_register returns a list of cmkit.Plugin",
        f"{shown(plugins)}",
        "return [cmkit.Plugin(kind, name, target, summary)]",
    )
    seen: set[tuple[str, str]] = set()
    for plugin in plugins:
        _check_plugin(report, plugin, seen)
    module = manifest if isinstance(manifest, str) else "cmkit.plugins"
    targets = [plugin.target.partition(":")[0] for plugin in plugins]
    taken, torch_by = _fresh_imports(report, [module, *targets])
    report.require(
        taken <= seconds,
        f"a manifest is imported by every command, within {seconds:g} s",
        f"{module} took {taken:.2f} s",
        "import in it nothing but cmkit",
    )
    report.require(
        not torch_by,
        "neither a manifest nor a module that it names imports torch, so that listing is instant",
        f"importing {torch_by} imports it",
        "import torch inside functions, or put that code in a sibling module",
    )


def _registered(report: Report, module: str) -> Any:
    with report.trying("a manifest can be imported", "try `python -c 'import ...'`"):
        found = importlib.import_module(module)
    register: Any = getattr(found, "cmkit_register", None)
    report.require(
        inspect.isfunction(register) and hasattr(register, "cmkit_impl"),
        "a manifest has a function cmkit_register with @cmkit.hookimpl",
        "there is none",
        "write one, decorated, that returns a list of cmkit.Plugin",
    )
    with report.trying("cmkit_register takes nothing", "compare docs/plugins.md"):
        return register()


def _check_plugin(report: Report, plugin: Plugin, seen: set[tuple[str, str]]) -> None:
    key = (plugin.kind, plugin.name)
    report.require(
        key not in seen,
        "a package offers a name of a kind once",
        f"{plugin.kind} {plugin.name!r} twice",
        "rename one",
    )
    seen.add(key)
    report.require(
        plugin.kind in CLASSES and plugin.api == api_version,
        f"a part is of a known kind, for cmkit API {api_version}",
        f"kind {plugin.kind!r}, API {plugin.api}",
        f"choose among {', '.join(CLASSES)}",
    )
    report.require(
        NAME.fullmatch(plugin.name) is not None and plugin.name == plugin.name.lower(),
        "a name is of lower-case letters, digits, '_', '-' and '.'",
        f"{plugin.name!r}",
        "take the lower-case acronym of its paper",
    )
    report.require(
        bool(plugin.summary.strip()) and len(plugin.summary.splitlines()) == 1,
        "a summary is one line, shown by `cmkit plugins`",
        f"{plugin.summary!r} for {plugin.name}",
        "say what it is in a few words",
    )
    module, _, attribute = plugin.target.partition(":")
    with report.trying(f"target {plugin.target!r} can be imported", "name 'module:Class'"):
        found = getattr(importlib.import_module(module), attribute)
    wanted, lacking = CLASSES[plugin.kind], sorted(getattr(found, "__abstractmethods__", ()))
    report.require(
        isinstance(found, type) and issubclass(found, wanted) and not lacking,
        f"the target of a {plugin.kind} is a cmkit.{wanted.__name__} with all its methods",
        f"{plugin.target} is {found!r} without {', '.join(lacking) or 'that base'}",
        f"derive it from cmkit.{wanted.__name__} and write what it lacks",
    )


IMPORTS = """\
import json, sys, time
sys.path[:], names = json.loads(sys.argv[1])
import cmkit.plugins, cmkit.kinds
start, torch_by = time.process_time(), ""
__import__(names[0])
seconds = time.process_time() - start
for name in names:
    __import__(name)
    torch_by = torch_by or ("torch" in sys.modules and name)
print(json.dumps([seconds, torch_by]))
"""


def _fresh_imports(report: Report, names: Sequence[str]) -> tuple[float, str]:
    """Seconds of the first import in a fresh Python, and the first of `names` that brings torch."""
    command = [sys.executable, "-c", IMPORTS, json.dumps([sys.path, names])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    report.require(
        done.returncode == 0,
        "a fresh Python can import a manifest and its targets",
        (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1],
        "look at what importing them does",
    )
    taken, torch_by = json.loads(done.stdout.splitlines()[-1])
    return taken, torch_by


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
        place = blame(error.__cause__, [row]) if error.__cause__ else ""
        return Verdict(row.kind, row.name, "fail", f"{error}{f'; at {place}' * bool(place)}")
    except Exception as error:
        reason, place = " ".join(str(error).split())[:200], blame(error, [row])
        said = f"{type(error).__name__}: {reason}{f'; at {place}' * bool(place)}"
        return Verdict(row.kind, row.name, "fail", said)
    return Verdict(row.kind, row.name, "pass")


def _named(name: str, dist: str) -> bool:
    """Whether two spellings of a distribution are one (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower() == re.sub(r"[-_.]+", "-", dist).lower()
