"""A recipe shrunk, so that it can be tried anywhere in a minute, without its data and weights."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from cmkit.errors import CheckpointError, DownloadError, printable
from cmkit.files import OFFLINE, atomic_write, digest_of
from cmkit.plugins import Registry
from cmkit.recipe import Recipe, load
from cmkit.recipe.parts import naming, part_of
from cmkit.recipe.tables import PART_TABLES, kinds_inside
from cmkit.runs.places import make_out
from cmkit.runs.reuse import differences

WEIGHTS = "smoke-weights"
"""The folder below --out of invented weights."""
RECIPES = "smoke-recipes"
HEAD = (
    "cmkit run {file}",
    "",
    "Written by --smoke: the recipe below is shrunk, its data and weights are invented, and its",
    "numbers mean nothing. Changed in {recipe}:",
)


def smoke(recipe: Recipe, out: Path, registry: Registry) -> dict[str, Any]:
    """The tables of a recipe with what each of its parts changes by `Part.smallest`, and with names
    of invented weights below `out` in place of those that it names."""
    with _offline():
        return _smoke(recipe, out, registry)


def _smoke(recipe: Recipe, out: Path, registry: Registry) -> dict[str, Any]:
    tables = {**recipe.resolved, "name": f"smoke-{recipe.name}"[:64], "smoke": True}
    tables.pop("expected", None)  # it is of the recipe's own size
    tables.pop("tracker", None)  # its numbers mean nothing
    with naming(recipe.source, ("dataset",)):
        tables["dataset"] = _changed(tables["dataset"], recipe.dataset.smallest())
    dataset, _ = part_of("dataset", tables["dataset"], ("dataset",), recipe.source, registry)
    data = dataset.declared() or dataset.spec()
    own = {key: getattr(recipe, key) for key in PART_TABLES[1:]} | dict(recipe.stages)
    for key, part in own.items():
        if part and key != "metric":
            tables[key] = _changed(tables[key], part.smallest(data))
    if recipe.metric:
        pairs = zip(tables["metric"], recipe.metric, strict=True)
        tables["metric"] = [_changed(table, metric.smallest(data)) for table, metric in pairs]
    for key, owner in (("denoiser", recipe), ("teacher", recipe.teacher)):
        if key not in tables:
            continue
        for kind in kinds_inside(table := tables[key]):
            if changes := getattr(owner, kind).smallest(data):
                said = table[kind] if isinstance(table[kind], dict) else {"use": table[kind]}
                tables[key] = {**tables[key], kind: _changed(said, changes)}
        if "weights" in table:
            tables[key] = {**tables[key], "weights": invented(tables, key, out)}
    return json.loads(json.dumps(tables))  # type: ignore[no-any-return]


def smoke_recipe(recipe: Recipe, out: Path, registry: Registry) -> tuple[Recipe, list[str]]:
    """The recipe `smoke`, written as a file below `out` beside its invented weights, and sentences
    of where it is and what was put in the place of files."""
    import tomlkit

    check_whole(recipe)
    tables = smoke(recipe, out, registry)
    file = out / RECIPES / f"{tables['name']}.toml"
    was, now = (
        {**each, "metric": dict(enumerate(each.get("metric", ())))}
        for each in (recipe.resolved, tables)
    )
    found = list(differences(was, {**now, "name": recipe.name, "smoke": None}))
    said = [f"{now}; it was {was}" for now, was in found]
    head = [line.format(file=file, recipe=recipe.source.file) for line in HEAD]
    lines = "".join(f"# {printable(line, 'utf-8')}".rstrip() + "\n" for line in (*head, *said))
    make_out(file.parent)
    atomic_write(file, f"{lines}\n{tomlkit.dumps(tables)}")
    shrunk = load(file, [], registry)
    write_weights(shrunk)
    swapped = [line for line, (_, was) in zip(said, found, strict=True) if was.startswith('"')]
    first = f"smoke run of {recipe.source.file}, shrunk in {file}: its numbers mean nothing"
    return shrunk, [first, *swapped]


def check_whole(recipe: Recipe) -> None:
    """Raise what is at fault with a recipe as it is, before it is shrunk, as far as it shows
    without its files."""
    from cmkit.plan.checks import check_stages
    from cmkit.plan.fit import check_network

    check_stages(recipe)
    if recipe.rescaler:
        try:
            recipe.rescaler.settled()
        except CheckpointError:  # a file that is not here, in whose place another part is put
            recipe = replace(recipe, rescaler=None)
    if known := recipe.dataset.declared():
        # Of a codec or a network that is named by its weights, only what is here can be checked.
        with _offline(), suppress(CheckpointError, DownloadError):
            check_network(recipe, known)


@contextmanager
def _offline() -> Iterator[None]:
    """Inside, no part asks the network."""
    token = OFFLINE.set(True)
    try:
        yield
    finally:
        OFFLINE.reset(token)


def write_weights(recipe: Recipe) -> None:
    """Write the invented weights that a smoke recipe names: fresh ones of its networks, drawn by
    its seed, with noise added, since layers that begin as zeros would hide what is before them."""
    import torch

    from cmkit.plan import conditions_of, naming_table, networks
    from cmkit.tensors import save_weights

    data = networks.space_of(recipe, recipe.dataset.spec())
    with torch.random.fork_rng(devices=[]), naming_table(recipe, "backbone"):
        torch.manual_seed(recipe.seed)
        made = {}
        if recipe.denoiser.weights:
            conditions = conditions_of(recipe, data)
            made[recipe.denoiser.weights] = networks.built(recipe.backbone, data, conditions)
        if given := recipe.teacher:
            teacher = networks.teacher_of(given, recipe.denoiser, data)
            made[given.table.weights] = teacher.network
        for path, network in ((Path(weights), network) for weights, network in made.items()):
            if path.parent.name == WEIGHTS:  # others are a run's
                with torch.no_grad():
                    for parameter in network.parameters():
                        parameter.add_(torch.randn_like(parameter), alpha=0.02)
                make_out(path.parent)
                save_weights(path, network.state_dict())


def _changed(table: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    kept = {} if "use" in changes else table
    return {key: value for key, value in {**kept, **changes}.items() if value is not None}


def invented(tables: Mapping[str, Any], key: str, out: Path) -> str:
    """The file below `out` for invented weights of the table `key`, named after all that decides
    their shapes; `write_weights` writes it."""
    about = {name: tables.get(name) for name in ("seed", "dataset", "backbone", "objective", key)}
    about[key] = {name: value for name, value in tables[key].items() if name != "weights"}
    digest = digest_of(json.dumps(about, sort_keys=True))[:8]
    return str(out / WEIGHTS / f"{key}-{digest}.safetensors")
