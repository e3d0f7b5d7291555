"""One table becomes one part, or an error that names the line, the value and the cure."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

from cmkit.errors import CmkitError, RecipeError, did_you_mean
from cmkit.kinds import Part
from cmkit.plugins import Registry
from cmkit.recipe.toml import Source


def part_of(
    kind: str,
    table: Any,
    path: tuple[str | int, ...],
    source: Source,
    registry: Registry,
    by_name: bool = False,
) -> tuple[Any, dict[str, Any]]:
    """The part that a table says, or its name there `by_name`; and the table in full."""
    if not isinstance(table, dict):
        raise source.error(path, f'expected a table such as {{ use = "{kind}-name" }}')
    use, where = table.get("use"), path if by_name else (*path, "use")
    if not isinstance(use, str):
        known = ", ".join(registry.names(kind))
        raise source.error(where, f"name the {kind} to use: {known}")
    with naming(source, where):
        model = registry.load(kind, use)
    part = validated(model, {k: v for k, v in table.items() if k != "use"}, path, source)
    return part, {"use": use, **dumped(part)}


def validated(
    model: type[Part], table: dict[str, Any], path: tuple[str | int, ...], source: Source
) -> Part:
    """The record that a table becomes; RecipeError for its first fault."""
    try:
        with naming(source, path):
            return model.model_validate_json(json.dumps(table, default=str))
    except ValidationError as error:
        raise _first_error(error, model, table, path, source) from error
    except ValueError as error:  # a number of thousands of digits
        raise source.error(path, str(error)) from error


@contextlib.contextmanager
def naming(source: Source, path: Sequence[str | int]) -> Iterator[None]:
    """Inside, an error of ours names the line of the table at `path`."""
    try:
        yield
    except CmkitError as error:
        raise type(error)(str(source.error(path, str(error)))) from error


def _first_error(
    error: ValidationError,
    model: type[BaseModel],
    table: Mapping[str, Any],
    path: tuple[str | int, ...],
    source: Source,
) -> RecipeError:
    found = error.errors(include_url=False)
    short = [f for f in found if f["type"] == "too_short"]  # a faulty item is not counted as one
    faults = [f for f in found if f not in short] or short
    fault = min(faults, key=lambda f: f["type"] != "extra_forbidden")
    where = (*path, *_real(fault["loc"], table))
    more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
    if fault["type"] == "extra_forbidden":
        return source.error(
            where, f"unknown key{did_you_mean(str(where[-1]), model.model_fields)}{more}"
        )
    if fault["type"] == "missing":
        return source.error(where, f"missing key{more}")
    message = fault["msg"].removeprefix("Value error, ").replace("Input should", "should")
    if fault["type"] == "too_short":
        message = f"name at least {fault['ctx']['min_length']}"
    shown = f" = {shown_value(fault['input'])}" if fault["loc"] else ""
    if isinstance(fault["input"], dict) and fault["input"] and "array" in message:
        name = f"{where[-1]}.{next(iter(fault['input']))}"
        message += f'; a name with a dot belongs in quotation marks: "{name}"'
    return source.error(where, f"{message}{more}", shown)


def _real(loc: tuple[str | int, ...], table: Any) -> Iterator[str | int]:
    """The parts of a pydantic location that exist in the table (it adds names of types)."""
    for n, part in enumerate(loc):
        if isinstance(table, dict) and (part in table or n == 0):
            yield part
            table = table.get(part)
        elif isinstance(table, list) and isinstance(part, int):
            yield part
            table = table[part] if part < len(table) else None


def shown_value(value: object) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def dumped(part: Part) -> dict[str, Any]:
    return part.model_dump(mode="json", exclude_none=True)
