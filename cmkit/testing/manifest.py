"""The laws of a manifest, the module that says what a package offers."""

from __future__ import annotations

import importlib
import inspect
import json
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from cmkit.kinds import CLASSES
from cmkit.plugins import Plugin, api_version
from cmkit.recipe import NAME
from cmkit.testing.protocol import Says, told

MANIFEST_SECONDS = 1.0


def check_manifest(manifest: str | Sequence[Plugin], seconds: float = MANIFEST_SECONDS) -> None:
    """The laws of a manifest, a module's name or what its `cmkit_register` returns.

    A fresh Python imports the module, then every target: no torch, and at most `seconds` for the
    module itself, of processor time, beyond cmkit's own.
    """
    say = Says(manifest if isinstance(manifest, str) else "manifest")
    plugins = list(_registered(say, manifest) if isinstance(manifest, str) else manifest)
    seen: set[tuple[str, str]] = set()
    for plugin in plugins:
        _check_plugin(say, plugin, seen)
    module = manifest if isinstance(manifest, str) else "cmkit.plugins"
    targets = [plugin.target.partition(":")[0] for plugin in plugins]
    told = _fresh_imports(say, module, list(dict.fromkeys(targets)))
    say.unless(
        told["seconds"] <= seconds,
        f"a manifest is imported by every command, within {seconds:g} s",
        f"{module} took {told['seconds']:.2f} s",
        "import in it nothing but cmkit",
    )
    say.unless(
        not told["torch"],
        "neither a manifest nor a module that it names imports torch, so that listing is instant",
        f"importing {told['torch']} imports it",
        "import torch inside functions, or put that code in a sibling module",
    )


def _registered(say: Says, module: str) -> list[Plugin]:
    with say.trying("a manifest can be imported", "try `python -c 'import ...'`"):
        found = importlib.import_module(module)
    register = getattr(found, "cmkit_register", None)
    say.unless(
        inspect.isfunction(register) and hasattr(register, "cmkit_impl"),
        "a manifest has a function cmkit_register with @cmkit.hookimpl",
        "there is none",
        "write one, decorated, that returns a list of cmkit.Plugin",
    )
    assert register is not None
    with say.trying("cmkit_register takes nothing", "compare docs/plugins.md"):
        plugins = register()
    say.unless(
        isinstance(plugins, list) and len(plugins) > 0,
        "cmkit_register returns a list of cmkit.Plugin",
        f"{told(plugins)}",
        "return [cmkit.Plugin(kind, name, target, summary)]",
    )
    return plugins


def _check_plugin(say: Says, plugin: Plugin, seen: set[tuple[str, str]]) -> None:
    say.unless(
        isinstance(plugin, Plugin),
        "cmkit_register returns a list of cmkit.Plugin",
        f"{plugin!r} in it",
        "cmkit.Plugin(kind, name, target, summary)",
    )
    key = (plugin.kind, plugin.name)
    say.unless(
        key not in seen,
        "a package offers a name of a kind once",
        f"{plugin.kind} {plugin.name!r} twice",
        "rename one",
    )
    seen.add(key)
    say.unless(
        plugin.kind in CLASSES and plugin.api == api_version,
        f"a part is of a known kind, for cmkit API {api_version}",
        f"kind {plugin.kind!r}, API {plugin.api}",
        f"choose among {', '.join(CLASSES)}",
    )
    say.unless(
        NAME.fullmatch(plugin.name) is not None and plugin.name == plugin.name.lower(),
        "a name is of lower-case letters, digits, '_', '-' and '.'",
        f"{plugin.name!r}",
        "take the lower-case acronym of its paper",
    )
    say.unless(
        bool(plugin.summary.strip()) and len(plugin.summary.splitlines()) == 1,
        "a summary is one line, shown by `cmkit plugins`",
        f"{plugin.summary!r} for {plugin.name}",
        "say what it is in a few words",
    )
    module, _, attribute = plugin.target.partition(":")
    with say.trying(f"target {plugin.target!r} can be imported", "name 'module:Class'"):
        found = getattr(importlib.import_module(module), attribute)
    wanted = CLASSES[plugin.kind]
    say.unless(
        isinstance(found, type)
        and issubclass(found, wanted)
        and not getattr(found, "__abstractmethods__", None),
        f"the target of a {plugin.kind} is a cmkit.{wanted.__name__} with all its methods",
        f"{plugin.target} is {found!r}"
        f" without {', '.join(sorted(getattr(found, '__abstractmethods__', ()))) or 'that base'}",
        f"derive it from cmkit.{wanted.__name__} and write what it lacks",
    )


def _fresh_imports(say: Says, module: str, targets: list[str]) -> dict[str, Any]:
    """{"seconds": of the manifest's import, "torch": the first module that brings torch}."""
    code = (
        "import json, sys, time\n"
        f"sys.path[:] = {sys.path!r}\n"
        "import cmkit.plugins, cmkit.kinds\n"
        "start, first = time.process_time(), ''\n"
        f"for name in {[module, *targets]!r}:\n"
        "    __import__(name)\n"
        "    if name == " + repr(module) + ":\n"
        "        seconds = time.process_time() - start\n"
        "    if 'torch' in sys.modules and not first:\n"
        "        first = name\n"
        "print(json.dumps({'seconds': seconds, 'torch': first}))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    say.unless(
        done.returncode == 0,
        "a fresh Python can import a manifest and its targets",
        (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1],
        "look at what importing them does",
    )
    return dict(json.loads(done.stdout.splitlines()[-1]))
