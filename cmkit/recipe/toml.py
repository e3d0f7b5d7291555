"""TOML text and the line of every value in it, so that each error can name its place."""

from __future__ import annotations

import difflib
import json
import re
import stat
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cmkit.errors import RecipeError
from cmkit.files import CURES

MAX_BYTES = 256 * 1024
MAX_KEY_PARTS = 64


@dataclass(frozen=True)
class Source:
    """Where each value came from, so that an error can say it."""

    file: str
    lines: Mapping[tuple[str, ...], int]
    overrides: Mapping[tuple[str, ...], str] = field(default_factory=dict)
    """What --set said, by the path that it changed."""

    def error(self, path: Sequence[str | int], message: str, value: str = "") -> RecipeError:
        """RecipeError: `file:line: key value: message`."""
        keys = tuple(str(part) for part in path)
        shown = _cut(".".join(keys))
        if any(keys[: len(done)] == done for done in self.overrides):
            return RecipeError(f"--set {shown}{value}: {message}")
        line = next(
            (self.lines[keys[:n]] for n in range(len(keys), 0, -1) if keys[:n] in self.lines), 0
        )
        place = f"{self.file}:{line}" if line else self.file
        return RecipeError(
            f"{place}: {shown}{value}: {message}" if shown else f"{place}: {message}"
        )


def read(path: str | Path, overrides: Sequence[str]) -> tuple[dict[str, Any], Source]:
    """The tables of the TOML file `path` after `key=value` overrides, and where each came from.

    Raises RecipeError for text that cannot be read, is no TOML, or is too large or too nested.
    """
    text = _text(path)
    file = str(path)
    tables = _parse(text, file)
    return tables, changed(tables, Source(file, _lines(text)), overrides)


def changed(tables: dict[str, Any], source: Source, overrides: Sequence[str]) -> Source:
    """`source` with the `key=value` overrides, which are applied to `tables` in place."""
    return replace(source, overrides={_override(tables, item): item for item in overrides})


def _text(path: str | Path) -> str:
    path = Path(path)
    try:
        info = path.stat()
        if not stat.S_ISREG(info.st_mode):
            raise RecipeError(f"{path}: not a file; name a recipe such as ct.toml")
        if info.st_size > MAX_BYTES:
            raise RecipeError(f"{path}: {info.st_size} bytes; a recipe has at most {MAX_BYTES}")
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: byte {error.start} is not UTF-8; save it as UTF-8") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        cure = CURES.get(getattr(error, "errno", 0))
        said = f"; {cure}" if cure else _similar_file(path)
        raise RecipeError(f"{path}: cannot be read: {reason}{said}") from error


def _similar_file(path: Path) -> str:
    try:
        siblings = [str(p) for p in path.parent.glob("*.toml")]
    except (OSError, ValueError):
        return ""
    near = difflib.get_close_matches(str(path), siblings, 1)
    return f"; did you mean {near[0]}?" if near else ""


def _parse(text: str, file: str) -> dict[str, Any]:
    _check_keys(text, file)
    try:
        return _loads(text)
    except tomllib.TOMLDecodeError as error:
        at = re.search(r" \(at line (\d+), column \d+\)$", str(error))
        place = f"{file}:{at[1]}" if at else file
        said = str(error)[: at.start() if at else None]
        if twice := re.fullmatch(r"Cannot declare \((.*?),?\) twice", said):
            table = ".".join(twice[1].replace("'", "").split(", "))
            said = f"[{table}] stands twice; join the two, or give one another name"
        raise RecipeError(f"{place}: not TOML: {said}") from error
    except ValueError as error:
        raise RecipeError(f"{file}: {error}") from error


def _loads(text: str) -> dict[str, Any]:
    """As tomllib.loads; ValueError also for values nested too deep or of too many digits."""
    try:
        tables = tomllib.loads(text)
        json.dumps(tables, default=str)  # as errors show values, and parts take them
    except RecursionError as error:
        raise ValueError("values are nested too deep") from error
    return tables


def _check_keys(text: str, place: str) -> None:
    """RecipeError for a key of more than MAX_KEY_PARTS parts: tomllib's time is quadratic in it."""
    for number, line in enumerate(text.split("\n"), 1):
        if line.count(".") < MAX_KEY_PARTS or line.lstrip().startswith("#"):
            continue
        if any(piece.count(".") >= MAX_KEY_PARTS for piece in re.split(r"[=,\[\]{}#]", line)):
            raise RecipeError(f"{place}:{number}: a key has at most {MAX_KEY_PARTS} parts")


# Neither tomllib nor tomlkit says on which line a value stood, so headers and keys are looked for.
# A repetition that ends in + never gives back what it took: on any line the time is linear.
_BARE = r"[A-Za-z0-9_-]++"
_PART = re.compile(rf"""{_BARE}|"(?:[^"\\]|\\.)*+"|'[^']*+'""")
_NAME = rf"(?:{_PART.pattern})(?:[ \t]*+\.[ \t]*+(?:{_PART.pattern}))*+"
_HEADER = re.compile(rf"[ \t]*+(\[\[?+)[ \t]*+({_NAME})[ \t]*+\]")
_KEY = re.compile(rf"[ \t]*+({_NAME})[ \t]*+=")
_INLINE = re.compile(rf"(?:^|,)[ \t]*+({_NAME})[ \t]*+=")


def _lines(text: str) -> dict[tuple[str, ...], int]:
    """Dotted path -> line number."""
    lines: dict[tuple[str, ...], int] = {}
    counts: dict[tuple[str, ...], int] = {}
    table: tuple[str, ...] = ()
    last: tuple[str, ...] = ()
    for number, line in enumerate(text.split("\n"), 1):
        if line.lstrip().startswith("#"):
            continue
        if header := _HEADER.match(line):
            table = _split(header[2])
            if header[1] == "[[":
                counts[table] = counts.get(table, -1) + 1
                table = (*table, str(counts[table]))
            last = table
            lines.setdefault(table, number)
            continue
        if key := _KEY.match(line):
            last = (*table, *_split(key[1]))
            lines.setdefault(last, number)
            if line[key.end() :].lstrip().startswith("["):
                counts[last] = -1
        for inline in line.split("{")[1:]:
            inside = last
            if last in counts and last != table:  # one of a list of inline tables
                counts[last] += 1
                inside = (*last, str(counts[last]))
                lines.setdefault(inside, number)
            for name in _INLINE.finditer(inline):
                lines.setdefault((*inside, *_split(name[1])), number)
    return lines


def _split(key: str) -> tuple[str, ...]:
    """Parts of a dotted key; a quoted one may hold dots."""
    return tuple(part.strip("\"'") for part in _PART.findall(key))


def key_path(key: str) -> tuple[str, ...]:
    """Parts of a dotted key such as train.steps, as TOML splits it; () for what is no key."""
    return _split(key) if re.fullmatch(_NAME, key.strip()) else ()


def _override(tables: dict[str, Any], item: str) -> tuple[str, ...]:
    """Apply one `table.key=value` in place; the path that it changed."""
    key, equals, text = item.partition("=")
    path = key_path(key)
    if not equals or not 0 < len(path) <= MAX_KEY_PARTS:
        raise RecipeError(f"--set {_cut(item)}: expected table.key=value, such as train.steps=100")
    node: Any = tables
    path = _indexed(tables, path)
    for part in path[:-1]:
        node = _child(node, part, item)
    value = _override_value(text.strip(), item)
    if isinstance(node, list) and path[-1] == str(len(node)) and isinstance(value, dict):
        node.append(value)  # one more of [[metric]]
    elif isinstance(node, list):
        node[_index(node, path[-1], item)] = value
    else:
        node[path[-1]] = value
    return path


def _indexed(tables: dict[str, Any], path: tuple[str, ...]) -> tuple[str, ...]:
    """`path` with the index 0 where it leaves out that of a list of one table."""
    node: Any = tables
    full: list[str] = []
    for part in path:
        if isinstance(node, list) and len(node) == 1 and not part.isdecimal():
            full, node = [*full, "0"], node[0]
        full.append(part)
        node = node.get(part) if isinstance(node, dict) else None
    return tuple(full)


def _child(node: Any, part: str, item: str) -> Any:
    child = node[_index(node, part, item)] if isinstance(node, list) else node.setdefault(part, {})
    if not isinstance(child, dict | list):
        raise RecipeError(f"--set {_cut(item)}: {_cut(part)!r} is a value, not a table")
    return child


def _index(node: list[Any], part: str, item: str) -> int:
    if not part.isdecimal() or len(part) > 9 or int(part) >= len(node):
        which = "" if part.isdecimal() else f", such as metric.0.{_cut(part)}"
        raise RecipeError(
            f"--set {_cut(item)}: {_cut(part)!r} is not an index from 0 to {len(node) - 1}; say"
            f" which of the list is meant{which}"
        )
    return int(part)


def _override_value(text: str, item: str) -> Any:
    try:
        _check_keys(text, f"--set {_cut(item)}")
        parsed = _loads(f"value = {text}")
        if len(parsed) > 1:
            raise ValueError("more than one value")
        return parsed["value"]
    except ValueError as error:
        if re.fullmatch(r"[A-Za-z_/~.][\w/~.:+ -]*+", text):
            return text  # a bare word or path, as shells deliver it
        raise RecipeError(
            f"--set {_cut(item)}: {_cut(text)!r} is not a TOML value; quote strings: '\"text\"'"
        ) from error


def _cut(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:200]}.."
