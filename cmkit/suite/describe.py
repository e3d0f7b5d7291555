"""Suites described for editors, as JSON Schema."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cmkit.recipe import NAME
from cmkit.suite.suite import CHANGEABLE, SuiteTable


def suite_schema(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """JSON Schema of suites, from that of recipes: what a row changes is a part in full, which says
    `use`, or some keys of a table, or false, which removes it."""
    own = SuiteTable.model_json_schema(ref_template="#/$defs/suite.{model}")
    definitions = {f"suite.{key}": inner for key, inner in own.pop("$defs").items()}
    row = {"type": "object", "additionalProperties": False, "required": ["row"]}
    row |= {"properties": {"row": {"type": "string"}}}
    for key, body in recipe["$defs"].items():
        if key in CHANGEABLE:  # a table of which a row says some keys
            body = {k: v for k, v in body.items() if k != "required"}
            if key in ("denoiser", "teacher"):
                weights = {"anyOf": [body["properties"]["weights"], row]}
                body["properties"] = {**body["properties"], "weights": weights}
            if key == "teacher":
                body["properties"]["row"] = {"type": "string"}
        definitions[key] = body
    some = {"type": "object", "not": {"required": ["use"]}}
    by_number = {
        "type": "object",
        "patternProperties": {"^[0-9]+$": {"type": "object"}},
        "additionalProperties": False,
    }
    definitions["changes"] = {
        "type": "object",
        "properties": {
            key: {"anyOf": [recipe["properties"][key], some, {"const": False}]}
            if "oneOf" in recipe["properties"][key]
            else {"anyOf": [recipe["properties"][key], {"const": False}]}
            for key in CHANGEABLE
        },
    }
    definitions["changes"]["properties"]["metric"]["anyOf"].append(by_number)
    changes = {"$ref": "#/$defs/changes", "unevaluatedProperties": False}
    values = {"type": "array", "minItems": 1}
    named = {"type": "object", "minProperties": 1, "additionalProperties": changes}
    axes = {"type": "object", "additionalProperties": {"anyOf": [values, named]}}
    axes_of_row = {"anyOf": [values, named, {"const": False}]}
    own["properties"]["axis"] |= axes
    own["properties"]["name"]["pattern"] = f"^{NAME.pattern}$"
    own["properties"]["row"]["additionalProperties"] = {
        **changes,
        "properties": {
            "note": {"type": "string", "description": "What the row is, for the table."},
            "budget": {"const": False, "description": "Let the row say train.steps itself."},
            "axis": {"type": "object", "additionalProperties": axes_of_row},
        },
    }
    return {
        "$schema": recipe["$schema"],
        **own,
        "title": "cmkit suite",
        "$defs": definitions,
    }
