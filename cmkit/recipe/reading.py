"""Reading a recipe: each table validated by the part or record that it belongs to."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cmkit.errors import CheckpointError, PluginError, did_you_mean
from cmkit.files import read_json
from cmkit.kinds import Backbone, Part
from cmkit.plugins import Registry
from cmkit.recipe import tables as known
from cmkit.recipe.parts import dumped, part_of, shown_value, validated
from cmkit.recipe.recipe import Recipe, Teacher
from cmkit.recipe.toml import Source, changed, read


def load(path: str | Path, overrides: Sequence[str], registry: Registry) -> Recipe:
    """The recipe in the file `path` with `key=value` overrides applied.

    Raises RecipeError for whatever is wrong with the text, PluginError for a part that is missing
    or broken. Imports the parts that it names and nothing else.
    """
    return from_tables(*read(path, overrides), registry)


def load_pipeline(folder: str, overrides: Sequence[str], registry: Registry) -> Recipe | None:
    """The recipe that draws from a pipeline of diffusers, its folder or "hub:OWNER/NAME", with
    `key=value` overrides applied; None for what is none.

    CheckpointError where no installed backbone knows such a pipeline.
    """
    index = Path(folder) / "model_index.json"
    if not folder.startswith("hub:") and not index.is_file():
        return None
    for name in registry.names("backbone"):
        try:
            backbone = registry.load("backbone", name)
        except PluginError:  # a broken part; `cmkit plugins` lists it
            continue
        assert issubclass(backbone, Backbone)
        if found := backbone.recipe_of(folder):
            tables = {"name": "pipeline", **copy.deepcopy(dict(found))}
            return from_tables(tables, changed(tables, Source(folder, {}), overrides), registry)
    kind = read_json(index).get("_class_name") if index.is_file() else "pipeline"
    raise CheckpointError(
        f"{folder}: no installed backbone draws from a {kind}; install cmkit-latent for those of"
        " Stable Diffusion, or draw with diffusers"
    )


def from_tables(tables: Mapping[str, Any], source: Source, registry: Registry) -> Recipe:
    """The recipe that `tables` say, whose values stand where `source` says; errors as of `load`."""
    for key in tables:
        if key not in known.KEYS:
            raise source.error((key,), f"unknown key{did_you_mean(key, known.KEYS)}")
    for key in known.REQUIRED:
        if key not in tables:
            raise source.error((), f"the key {key!r} is missing")
    name, seed = tables["name"], tables.get("seed", 0)
    if not isinstance(name, str) or not known.NAME.fullmatch(name):
        raise source.error(
            ("name",), "use 1 to 64 letters, digits, '.', '_' or '-'", f" = {shown_value(name)}"
        )
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**63:
        raise source.error(("seed",), "expected a whole number from 0", f" = {shown_value(seed)}")
    smoke = tables.get("smoke", False)
    if not isinstance(smoke, bool):
        raise source.error(("smoke",), "expected true or false", f" = {shown_value(smoke)}")
    resolved: dict[str, Any] = {"name": name, "seed": seed, **({"smoke": True} if smoke else {})}
    parts: dict[str, Any] = dict.fromkeys(known.PART_TABLES)
    for kind in known.PART_TABLES:
        if kind in tables:
            parts[kind], resolved[kind] = part_of(kind, tables[kind], (kind,), source, registry)
    records: dict[str, Any] = {}
    encodes, train = parts["codec"] or parts["text"], "train" in tables
    if tables.get("cache") is True:
        tables = {**tables, "cache": {}}
    if tables.get("cache") is False:
        resolved["cache"] = False
        tables = {key: table for key, table in tables.items() if key != "cache"}
    elif "cache" in tables and not encodes:
        raise source.error(("cache",), "nothing to encode; add [codec] or [text], or drop it")
    elif encodes and train:
        tables = {"cache": {}, **tables}
    for key, model in known.core_tables().items():
        if key not in tables and key != "denoiser":
            continue
        inner, table = _parts_inside(key, model, tables.get(key, {}), source, registry)
        if key == "denoiser":
            parts |= inner
            ends = zip(("sigma_min", "sigma_max"), inner["precond"].levels, strict=True)
            table = {**dict(ends), **table}
        records[key] = validated(model, table, (key,), source)
        resolved[key] = dumped(records[key])
        if key == "teacher":
            records[key] = Teacher(records[key], **{"backbone": parts["backbone"], **inner})
    lists: dict[str, tuple[Any, ...]] = {}
    for kind, example in (("metric", "fidelity"), ("tracker", "csv")):
        said = tables.get(kind, [])
        if not isinstance(said, list):
            hint = f'expected a list of tables: [[{kind}]] use = "{example}"'
            raise source.error((kind,), hint)
        pairs = [part_of(kind, t, (kind, k), source, registry) for k, t in enumerate(said)]
        lists[kind] = tuple(part for part, _ in pairs)
        if pairs:
            resolved[kind] = [table for _, table in pairs]
    if lists["metric"]:
        records["metric"] = known.stage_class("metric")()
    return Recipe(
        name=name,
        seed=seed,
        denoiser=records["denoiser"],
        teacher=records.get("teacher"),
        stages={key: records[key] for key in known.STAGES if key in records},
        expected=records.get("expected"),
        metric=lists["metric"],
        tracker=lists["tracker"],
        resolved=resolved,
        source=source,
        smoke=smoke,
        **parts,
    )


def _parts_inside(
    key: str, model: type[Part], table: Any, source: Source, registry: Registry
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The parts inside the table [key], by kind, and the table with their defaults written out.

    A part without options may be said by its name, and is written so.
    """
    if not isinstance(table, dict):
        raise source.error((key,), "expected a table")
    parts = {}
    for kind in known.kinds_inside(model.model_fields):
        said = table.get(kind, model.model_fields[kind].default)
        if said is not None:
            by_name, path = isinstance(said, str), (key, kind)
            full = {"use": said} if by_name else said
            parts[kind], plain = part_of(kind, full, path, source, registry, by_name)
            table = {**table, kind: plain if len(plain) > 1 else plain["use"]}
    return parts, table
