"""The laws of every part as a record."""

from __future__ import annotations

import json

from cmkit.kinds import Part
from cmkit.recipe import fields
from cmkit.testing.protocol import Says


def check_fields(part: Part) -> None:
    """A part is a frozen record whose every field is explained, and survives a recipe."""
    say = Says(part)
    model = type(part)
    say.unless(
        bool((model.__doc__ or "").strip()) and model.__doc__ != model.__mro__[1].__doc__,
        "a part's docstring is its help",
        "there is none",
        "write one below the class line",
    )
    for option, wanted in (("frozen", True), ("extra", "forbid"), ("strict", True)):
        say.unless(
            model.model_config.get(option) == wanted,
            f"a part has {option} = {wanted!r}, so that a recipe means what it says",
            f"model_config has {option} = {model.model_config.get(option)!r}",
            "drop that entry of model_config",
        )
    with say.trying("its fields have a JSON schema", "use types that TOML can hold"):
        described = list(fields(model))
    for entry in described:
        say.unless(
            bool(entry["meaning"]),
            "every field has a docstring, its help in `cmkit plugins show` and in editors",
            f"{entry['key']} has none",
            'write """...""" on the line below the field',
        )
    with say.trying("its values survive JSON", "use types that TOML can hold"):
        again = model.model_validate_json(json.dumps(part.model_dump(mode="json")))
    say.unless(
        again == part,
        "a part read from the resolved recipe is the same part",
        f"{part!r} came back as {again!r}",
        "let no validator change a value that is already resolved",
    )
