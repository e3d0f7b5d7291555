"""Recipes described for editors (JSON Schema) and for people (fields as text)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from cmkit.kinds import Part
from cmkit.plugins import Registry
from cmkit.recipe.tables import NAME, PART_TABLES, REQUIRED, core_tables, kinds_inside


def schema(registry: Registry) -> dict[str, Any]:
    """JSON Schema of recipes, built from every part that can be imported."""
    definitions: dict[str, Any] = {}

    def refer(model: type[Part], use: str | None = None, name: str = "") -> dict[str, Any]:
        body = model.model_json_schema(ref_template=f"#/$defs/{name}.{{model}}")
        for key, inner in body.pop("$defs", {}).items():
            definitions[f"{name}.{key}"] = inner
        if use is not None:
            body["properties"] = {"use": {"const": use}, **body.get("properties", {})}
            body["required"] = ["use", *body.get("required", [])]
        definitions[name] = body
        return {"$ref": f"#/$defs/{name}"}

    def choice(kind: str) -> dict[str, Any]:
        options = []
        for name in registry.names(kind):
            try:
                options.append(refer(registry.load(kind, name), name, f"{kind}.{name}"))
            except Exception:  # noqa: S112 - a stranger's class may raise anything
                continue  # `cmkit plugins` shows it as broken; an editor cannot complete it
        return {"oneOf": options} if options else {"type": "object"}

    properties: dict[str, Any] = {
        "name": {"type": "string", "pattern": f"^{NAME.pattern}$"},
        "seed": {"type": "integer", "minimum": 0, "default": 0},
        "smoke": {"type": "boolean", "default": False},
    }
    properties |= {kind: choice(kind) for kind in PART_TABLES}
    properties |= {key: refer(model, name=key) for key, model in core_tables().items()}
    for key, model in core_tables().items():
        for kind in kinds_inside(model.model_fields):
            entry = definitions[key]["properties"][kind]
            entry["anyOf"] = [{"enum": registry.names(kind)}, choice(kind)]
    for kind in ("metric", "tracker"):
        properties[kind] = {"type": "array", "items": choice(kind)}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "cmkit recipe",
        "type": "object",
        "additionalProperties": False,
        "required": list(REQUIRED),
        "properties": properties,
        "$defs": definitions,
    }


def fields(model: type[Part]) -> Iterator[dict[str, str]]:
    """Key, type with bounds, default and meaning of each field of a part, as text."""
    body = model.model_json_schema()
    for key, entry in body.get("properties", {}).items():
        default = json.dumps(entry.get("default"))
        yield {
            "key": key,
            "type": _type(entry),
            "default": "required"
            if key in body.get("required", ())
            else ("absent" if default == "null" else default),
            "meaning": entry.get("description", ""),
        }


def _type(entry: Mapping[str, Any]) -> str:
    """A JSON Schema type in words: `integer, 1 to 64`, `list of number, above 0`."""
    if "anyOf" in entry:
        return " or ".join(_type(e) for e in entry["anyOf"] if e.get("type") != "null")
    if "enum" in entry or "const" in entry:
        return " or ".join(json.dumps(value) for value in entry.get("enum", [entry.get("const")]))
    kind = "table" if "$ref" in entry else entry.get("type", "any")
    if kind == "array":
        inner = entry.get("items") or (entry.get("prefixItems") or [{}])[0]
        return f"list of {_type(inner)}"
    if kind == "object":
        inner = entry.get("additionalProperties")
        return f"table of {_type(inner)}" if isinstance(inner, dict) else "table"
    low = entry.get("minimum", entry.get("exclusiveMinimum"))
    high = entry.get("maximum", entry.get("exclusiveMaximum"))
    bounds = []
    if low is not None:
        bounds.append(f"{'above' if 'exclusiveMinimum' in entry else 'from'} {_plain_number(low)}")
    if high is not None:
        bounds.append(f"{'below' if 'exclusiveMaximum' in entry else 'to'} {_plain_number(high)}")
    return f"{kind}, {' '.join(bounds)}" if bounds else str(kind)


def _plain_number(value: float) -> str:
    return f"{int(value):,}" if value == int(value) else f"{value:g}"
