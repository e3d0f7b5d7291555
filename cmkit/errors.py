"""The errors that cmkit reports: one class an exit code, one line with place, value and cure."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Mapping


class CmkitError(Exception):
    """A fault that the user can mend. `str(error)` is one line: place, value, cure."""

    exit_code = 70

    def __init__(self, message: str):
        super().__init__(" ".join(message.split()))


class RecipeError(CmkitError):
    """Wrong usage, or a recipe that says something impossible."""

    exit_code = 2


class DataError(CmkitError):
    """Data that is missing, empty, corrupt, or not what the recipe says."""

    exit_code = 3


class CheckpointError(CmkitError):
    """Weights that are missing, damaged, unsafe, or of another shape."""

    exit_code = 4


class ResourceError(CmkitError):
    """No disk, memory, device, or permission."""

    exit_code = 5


class NonFiniteError(CmkitError):
    """NaN or infinity where a number was due."""

    exit_code = 6


class BusyError(CmkitError):
    """Another process holds the run folder."""

    exit_code = 7


class DownloadError(CmkitError):
    """A file that must be downloaded cannot be had, or is not the one expected."""

    exit_code = 8


class PluginError(CmkitError):
    """A plugin that is missing, broken, ambiguous, or breaks its protocol."""

    exit_code = 9


class Interrupted(CmkitError):  # noqa: N818
    """Stopped by a signal after everything was saved; the exit code is 128 + signal."""

    def __init__(self, message: str, signum: int):
        super().__init__(message)
        self.exit_code = 128 + signum


def toml_key(key: str) -> str:
    """A key as TOML says it: in quotes unless it is bare."""
    return key if re.fullmatch(r"[\w-]+", key, re.ASCII) else json.dumps(key)


def inline(value: object) -> str:
    """A value as TOML says it on one line."""
    if isinstance(value, Mapping):
        return (
            f"{{ {', '.join(f'{toml_key(key)} = {inline(one)}' for key, one in value.items())} }}"
        )
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(inline, value))}]"
    if isinstance(value, float):
        short = f"{value:.12g}"
        return short if float(short) == value else repr(value)
    return json.dumps(value)


def printable(text: str, encoding: str | None = None) -> str:
    """`text` as a terminal may be given it: what would steer it, turn its direction or is not in
    `encoding` becomes an escape such as \\x1b."""
    safe = (c if c.isprintable() else ascii(c)[1:-1] for c in text)
    encoding = encoding or "ascii"
    return "".join(safe).encode(encoding, "backslashreplace").decode(encoding)


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint at the known word nearest to `word`; "" where none is near."""
    near = difflib.get_close_matches(word, list(known), 1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A hint at the known word nearest to `word`, or at all of them."""
    known = list(known)
    more = f" and {len(known) - 100} more" if len(known) > 100 else ""
    return nearest(word, known) or f"; known: {', '.join(known[:100]) or 'none'}{more}"
