"""What differs between recipes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cmkit.errors import inline

ASIDE = ("name", "expected")
"""Keys that say nothing of how a run goes."""
LONGEST = 40
"""Characters of a value that are shown."""


def differing(recipes: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Of each resolved recipe its keys, dotted as --set takes them, whose values are not equal in
    all, with these in words: {"objective": "ict", "train.lr": "0.001"}.

    A part of another name is told by that; its options, by what differs among those of its own.
    """
    found: list[dict[str, str]] = [{} for _ in recipes]
    whole = {n: {k: v for k, v in r.items() if k not in ASIDE} for n, r in enumerate(recipes)}
    for n, path, value in _apart("", whole):
        found[n][path] = value
    return found


def _apart(path: str, values: Mapping[int, Any]) -> Iterator[tuple[int, str, str]]:
    """(number of the recipe, path, value in words) of what is not equal below a path."""
    if len({json.dumps(value, sort_keys=True) for value in values.values()}) == 1:
        return
    known = {n: value for n, value in values.items() if value is not None}
    if all(isinstance(value, Mapping) for value in known.values()):
        by_use: dict[Any, dict[int, Any]] = {}
        for n, table in known.items():
            by_use.setdefault(table.get("use"), {})[n] = table
        if len(by_use) > 1 or len(known) < len(values):
            yield from ((n, path, _words(table)) for n, table in known.items())
        for tables in by_use.values():
            for key in dict.fromkeys(key for table in tables.values() for key in table):
                inner = {n: table.get(key) for n, table in tables.items()}
                yield from _apart(f"{path}.{key}" if path else key, inner)
    elif all(isinstance(value, list) and _is_tables(value) for value in values.values()) and (
        len(set(map(len, values.values()))) == 1
    ):
        length = len(next(iter(values.values())))
        for k in range(length):
            inner = {n: value[k] for n, value in values.items()}
            yield from _apart(path if length == 1 else f"{path}.{k}", inner)
    else:
        yield from ((n, path, _words(value)) for n, value in known.items())


def _is_tables(value: Sequence[Any]) -> bool:
    return bool(value) and all(isinstance(one, Mapping) for one in value)


def _words(value: Any) -> str:
    """A value as TOML says it, text without quotation marks; a part by its name."""
    if isinstance(value, Mapping):
        return str(value.get("use", "yes"))
    if isinstance(value, list) and _is_tables(value):
        return " + ".join(map(_words, value))
    text = value if isinstance(value, str) else inline(value)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 2]}.."
