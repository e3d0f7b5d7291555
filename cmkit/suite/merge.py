"""Changes that a suite makes in the tables of a recipe."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from cmkit.suite.suite import Change, Reference


def merge(
    tables: dict[str, Any], change: Change, origins: dict[tuple[str, ...], tuple[str, ...]]
) -> None:
    """Merge a change into the tables of a recipe in place, and note where it was said.

    Tables are merged key by key; one that says `use` takes the place of the old one, as a list
    does; `false` removes a table, or tables.
    """
    path, value = change.path, change.value
    old = value_at(tables, path)
    if isinstance(value, dict) and "use" not in value and _merges(old, value):
        if old is None:
            _put(tables, path, {})
        for key, inner in value.items():
            merge(tables, Change((*path, key), inner, (*change.origin, key)), origins)
        return
    for known in [known for known in origins if known[: len(path)] == path]:
        del origins[known]
    origins[path] = change.origin
    if isinstance(value, Reference) and path == change.origin[-len(path) :]:
        origins[path] = (*change.origin[:-1], value.key)
    removed = value is False and (len(path) == 1 or isinstance(old, dict | list))
    _put(tables, path, None if removed else copy.deepcopy(value))


def _merges(old: Any, value: Mapping[str, Any]) -> bool:
    """Whether a table is merged into the `old` value, which may be a list of tables, by index; the
    index behind its end is one more."""
    if isinstance(old, list):
        return all(key.isdecimal() and int(key) <= len(old) for key in value)
    return old is None or isinstance(old, dict)


def value_at(tables: Any, path: tuple[str, ...]) -> Any:
    """The value at a path of keys and of indices of lists; None where there is none."""
    node = tables
    for part in path:
        if isinstance(node, list):
            node = node[int(part)] if part.isdecimal() and int(part) < len(node) else None
        else:
            node = node.get(part) if isinstance(node, dict) else None
    return node


def _put(tables: Any, path: tuple[str, ...], value: Any) -> None:
    """Set the value at `path`, or remove it where the value is None."""
    node = tables
    for part in path[:-1]:
        if isinstance(node, list):
            node = node[int(part)]
        else:
            if not isinstance(node.get(part), dict | list):
                node[part] = {}
            node = node[part]
    if isinstance(node, list):
        place = int(path[-1])
        node[place : place + 1] = [value]
    elif value is None:
        node.pop(path[-1], None)
    else:
        node[path[-1]] = value
