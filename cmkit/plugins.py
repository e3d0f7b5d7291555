"""Finds the parts that installed packages offer, without importing any of them."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import pluggy

from cmkit.errors import PluginError, did_you_mean
from cmkit.kinds import CLASSES, Part

api_version = 1
KINDS = tuple(CLASSES)

hookspec = pluggy.HookspecMarker("cmkit")
hookimpl = pluggy.HookimplMarker("cmkit")


@dataclass(frozen=True)
class Plugin:
    """One part that a package offers.

    `target` is "module:Class", imported only when a recipe names the part. `cite` is the full
    reference of the paper that the part implements; reports print it.
    """

    kind: str
    name: str
    target: str
    summary: str
    cite: str | None = None
    api: int = api_version


class Hooks:
    """The hooks that a package may implement; cmkit calls them once, never inside a loop."""

    @hookspec
    def cmkit_register(self) -> list[Plugin]:
        """Return the parts that this package offers. Must not import torch."""
        raise NotImplementedError

    @hookspec
    def cmkit_run_finished(self, folder: str, report: dict[str, Any]) -> None:
        """Called once, when every stage of a run is done, with its folder and its `report.json`."""


@dataclass(frozen=True)
class Row:
    """A line of `cmkit plugins`: a part with its origin, or the reason why there is none."""

    kind: str
    name: str
    dist: str
    version: str
    plugin: Plugin | None = None
    broken: str | None = None

    @property
    def qualified(self) -> str:
        return f"{self.dist}:{self.name}"

    @property
    def origin(self) -> str:
        return f"{self.dist} {self.version}"


class Registry:
    """All rows, and the way from a name in a recipe to a class."""

    def __init__(self, rows: Iterable[Row], manager: pluggy.PluginManager | None = None):
        self.rows = sorted(rows, key=lambda row: (row.kind, row.name, row.dist))
        self.manager = manager or _new_manager()

    def names(self, kind: str) -> list[str]:
        """Names of `kind` that a recipe may use, sorted; a clash appears only qualified."""
        rows = [row for row in self.rows if row.kind == kind and row.plugin]
        bare = [row.name for row in rows]
        return sorted({r.name if bare.count(r.name) == 1 else r.qualified for r in rows})

    def find(self, kind: str, name: str) -> Row:
        """The one row that `name`, bare or qualified, means; PluginError says which are near."""
        rows = [r for r in self.rows if r.kind == kind and name in (r.name, r.qualified)]
        if len(rows) == 1 and rows[0].plugin:
            return rows[0]
        if len(rows) == 1:
            raise PluginError(f"{kind} {name!r} of {rows[0].origin} is broken: {rows[0].broken}")
        if rows:
            choices = " or ".join(repr(row.qualified) for row in rows)
            raise PluginError(f"{kind} {name!r} is offered by several packages: say {choices}")
        hint = did_you_mean(name, self.names(kind))
        broken = "; ".join(f"{row.origin}: {row.broken}" for row in self.rows if not row.plugin)
        hint += f" (broken packages: {broken})" if broken else ""
        raise PluginError(f"no {kind} is called {name!r}{hint}")

    def load(self, kind: str, name: str) -> type[Part]:
        """The class behind (kind, name); PluginError when its import fails or it is no part."""
        row = self.find(kind, name)
        assert row.plugin is not None
        target, what = row.plugin.target, f"{kind} {row.name!r} of {row.origin}"
        module, _, attribute = target.partition(":")
        try:
            found = getattr(import_module(module), attribute)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            place = "; at ".join(filter(None, (_reason(error), blame(error, [row]))))
            raise PluginError(f"{what} cannot be imported: {place}") from error
        wanted = CLASSES[kind]
        if not (isinstance(found, type) and issubclass(found, wanted)):
            raise PluginError(f"{what}: {target} is not a cmkit.{wanted.__name__}")
        if missing := sorted(getattr(found, "__abstractmethods__", ())):
            raise PluginError(f"{what}: {target} lacks {', '.join(missing)}")
        return found


@cache
def discover() -> Registry:
    """The registry of every installed package with an entry point in the group `cmkit`."""
    return register(entry_points(group="cmkit"))


def register(entries: Iterable[EntryPoint]) -> Registry:
    """The registry of these entry points, each tried alone: a broken one becomes a row."""
    manager = _new_manager()
    rows: list[Row] = []
    for entry in sorted(entries, key=lambda e: (e.dist.name if e.dist else "", e.name)):
        dist, version = (entry.dist.name, entry.dist.version) if entry.dist else ("?", "?")
        try:
            offered = _manifest(manager, entry, f"{dist}:{entry.name}")
            rows += [Row(p.kind, p.name, dist, version, *_judge(p)) for p in offered]
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # a plugin may even call sys.exit
            rows.append(Row("?", entry.name, dist, version, None, _reason(error)))
    return Registry(rows, manager)


def _manifest(manager: pluggy.PluginManager, entry: EntryPoint, name: str) -> list[Plugin]:
    """The parts that a manifest offers, which is registered under `name` if all is well."""
    had_torch = "torch" in sys.modules
    module = entry.load()
    if "torch" in sys.modules and not had_torch:
        raise PluginError(
            f"manifest {entry.value} imports torch; name its parts as 'module:Class' strings"
        )
    manager.register(module, name)
    try:
        known = [hook for hook in vars(Hooks) if hook.startswith("cmkit_")]
        for hook in vars(module):
            if manager.parse_hookimpl_opts(module, hook) is not None and hook not in known:
                raise PluginError(f"unknown hook {hook!r}{did_you_mean(hook, known)}")
        others = [plugin for plugin in manager.get_plugins() if plugin is not module]
        offers = manager.subset_hook_caller("cmkit_register", others)()
        plugins = [plugin for offer in offers for plugin in offer]
        for plugin in plugins:
            if not isinstance(plugin, Plugin):
                raise PluginError(f"cmkit_register must return cmkit.Plugin items, not {plugin!r}")
    except BaseException:
        manager.unregister(module)
        raise
    return plugins


def _judge(plugin: Plugin) -> tuple[Plugin | None, str | None]:
    """(plugin, None) when usable, (None, reason) when not."""
    if plugin.kind not in KINDS:
        return None, f"unknown kind {plugin.kind!r}; kinds are {', '.join(KINDS)}"
    if plugin.api != api_version:
        return None, f"written for cmkit API {plugin.api}, this is {api_version}"
    if plugin.target.count(":") != 1:
        return None, f"target {plugin.target!r} is not 'module:Class'"
    return plugin, None


def _new_manager() -> pluggy.PluginManager:
    manager = pluggy.PluginManager("cmkit")
    manager.add_hookspecs(Hooks)
    return manager


def _reason(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def blame(error: BaseException, rows: Iterable[Row]) -> str:
    """The package of another than cmkit in whose code `error` arose, with its file and line;
    "" where it is in none."""
    origins = {
        row.plugin.target.split(":")[0].split(".")[0]: row.origin
        for row in rows
        if row.plugin and row.dist != "cmkit"
    }
    place, traceback = "", error.__traceback__
    while traceback:
        frame = traceback.tb_frame
        if origin := origins.get(frame.f_globals.get("__name__", "").split(".")[0]):
            place = f"{origin}, {frame.f_code.co_filename}:{traceback.tb_lineno}"
        traceback = traceback.tb_next
    return place


def public_rows(registry: Registry) -> Iterator[dict[str, Any]]:
    """The rows as `cmkit plugins --json` prints them."""
    for row in registry.rows:
        origin = {"kind": row.kind, "name": row.name, "package": row.dist, "version": row.version}
        about = {key: getattr(row.plugin, key, None) for key in ("summary", "cite", "target")}
        yield {**origin, **about, "broken": row.broken}
