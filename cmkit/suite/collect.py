"""Finished cells and runs become lines of a table, with intervals, verdicts and notes."""

from __future__ import annotations

import datetime
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cmkit import files
from cmkit.errors import CheckpointError, RecipeError
from cmkit.plugins import Registry
from cmkit.runs.folder import RunFolder
from cmkit.suite.cells import Cell
from cmkit.suite.differing import differing
from cmkit.suite.groups import Group, Where, check_baseline, check_where, chosen, of_seed, unpaid
from cmkit.suite.intervals import Interval, mean_interval
from cmkit.suite.judge import biased, independent, of_one, verdicts_of
from cmkit.suite.noise import SameNoise
from cmkit.suite.results import SCHEMA, Baseline, Line, Results, Score, Verdict
from cmkit.suite.runs import Run, alike, caveats, cost_of, directions, read_run
from cmkit.suite.suite import Suite
from cmkit.suite.tables import APART
from cmkit.suite.work import SuiteFolder

if TYPE_CHECKING:
    from cmkit.suite.cost import Costs


@dataclass
class Gathered:
    """The groups of a suite, or of runs that were named one by one."""

    name: str
    """Of the suite; empty without one."""
    baseline: Baseline | None
    groups: list[Group]
    notes: list[str]
    about: dict[str, Any]
    """Provenance of the whole."""


def collect(
    suite: Suite,
    cells: Sequence[Cell],
    folder: SuiteFolder,
    same_noise: SameNoise,
    costs: Mapping[str, Costs] | None = None,
) -> Results:
    """The results of a suite, of whichever of its cells are finished."""
    return results(of_suite(suite, cells, folder, costs), same_noise)


def of_suite(
    suite: Suite, cells: Sequence[Cell], folder: SuiteFolder, costs: Mapping[str, Costs] | None
) -> Gathered:
    """The groups of a suite's cells; `costs` by the names of those that share no training."""
    groups: dict[tuple[str, ...], Group] = {}
    kept, notes = dict[str, Any](), list[str]()
    if folder.results.exists() and not costs:
        try:
            known = of_results(folder.path).groups
            kept = {run.folder.path.name: g.cost for g in known for run in g.runs.values()}
        except CheckpointError as error:
            notes.append(f"{error}; until then evaluations of training are not shown")
    for cell in (cell for cell in cells if not cell.alone):
        key = (cell.row, *cell.axis.values())
        if key not in groups:
            groups[key] = Group(cell.row, cell.axis, suite.rows[cell.row].note)
        group = groups[key]
        group.recipes.append(cell.recipe.resolved)
        if cell.name in kept:
            group.cost = kept[cell.name]
        if costs:
            cost = costs[cell.group]
            group.cost = {"evaluations": cost.trained, "parameters": cost.parameters}
        try:
            if folder.finished(cell):
                group.runs[cell.seed] = read_run(folder.run(cell).path)
            else:
                group.failures[cell.seed] = _why(cell, {c.name: c for c in cells}, folder)
        except CheckpointError as error:
            group.failures[cell.seed] = str(error)
    about = {
        "command": f"cmkit bench {suite.path}",
        "suite": str(suite.path),
        "suite_sha256": files.sha256_of(suite.path),
        "suite_file": suite.path.read_text("utf-8"),
        "base_file": Path(suite.base_source.file).read_text("utf-8"),
    }
    notes += unpaid(cells)
    return Gathered(suite.name, suite.table.baseline, [*groups.values()], notes, about)


def _why(cell: Cell, cells: Mapping[str, Cell], folder: SuiteFolder) -> str:
    """Why a cell is not finished."""
    if failure := folder.failure(cell):
        return f"{failure['reason']}; see {failure['log']}"
    for name in cell.needs:
        if name in cells and not folder.trained(name) and (failure := folder.failure(cells[name])):
            return f"needs the training of {name}, which failed: {failure['reason']}"
    return "not finished"


def of_results(folder: Path) -> Gathered:
    """The groups that results.json in a suite's folder names, their runs read anew;
    CheckpointError where it is not there or was not written by `keep`."""
    path = SuiteFolder(folder).results
    if not path.exists():
        raise CheckpointError(
            f"{folder}: no run folder, and no suite's that cmkit bench has ended in; name the"
            " suite's file"
        )
    try:
        found = files.unsealed(path)
    except CheckpointError as error:
        raise CheckpointError(
            f"{path}: damaged; name the suite's file, or run cmkit bench again"
        ) from error
    if found.get("schema") != SCHEMA:
        raise CheckpointError(
            f"{path}: schema {found.get('schema')!r}, but this cmkit reads {SCHEMA}; run cmkit"
            " bench again"
        )
    with files.reading(path):
        groups = []
        for line in found["lines"]:
            cost = {"evaluations": line["facts"].get("training", {}).get("evaluations")}
            cost["parameters"] = line["facts"].get("parameters")
            failures = {int(seed): why for seed, why in line["failures"].items()}
            group = Group(line["row"], line["axis"], line["note"], {}, failures, [], cost)
            for seed, name in line["runs"].items():
                try:
                    run = group.runs[int(seed)] = read_run(folder / name)
                    group.recipes.append(run.recipe)
                except CheckpointError as error:
                    group.failures[int(seed)] = str(error)
            groups.append(group)
        about = {key: found["provenance"].get(key) for key in ("suite", "suite_sha256")}
        return Gathered(found["name"], found["baseline"], groups, [], about)


def of_runs(folders: Sequence[Path]) -> Gathered:
    """Runs that are named one by one, in groups of those whose recipes differ in the seed alone."""
    groups: list[Group] = []
    notes = []
    by_key: dict[str, list[Group]] = {}
    for folder in dict.fromkeys(folders):
        place = RunFolder(folder)
        if place.recipe.is_file() and not place.finished:
            notes.append(f"{folder}: not finished, left out")
            continue
        run = read_run(folder)
        same = by_key.setdefault(_without_seed(run), [])
        group = next((group for group in same if run.seed not in group.runs), None)
        if group is None:
            group = Group(run.name, {})
            groups.append(group)
            same.append(group)
        else:
            group.row = _plain_name(run)
        group.runs[run.seed] = run
        group.recipes.append(run.recipe)
    rows = [group.row for group in groups]
    for group in groups:
        if rows.count(group.row) > 1:
            group.row = str(next(iter(group.runs.values())).folder.path)
    every = ([*group.runs] for group in groups)
    seeds = [own[0] if len(own) == 1 else own for own in every]
    recipes = [group.recipes[0] for group in groups]
    apart = differing([{**r, "seed": seed} for r, seed in zip(recipes, seeds, strict=True)])
    for group, differs in zip(groups, apart, strict=True):
        group.differs = differs
    return Gathered("", None, groups, notes, {})


def _plain_name(run: Run) -> str:
    """The name of its recipe without the seed that a suite's cells have in theirs."""
    return re.sub(rf"-s{run.seed}$", "", str(run.recipe["name"]))


def _without_seed(run: Run) -> str:
    """What is equal in runs that differ in the seed alone, teachers that differ in it included."""
    recipe = {**run.recipe, "name": _plain_name(run), "seed": None}
    for table in ("teacher", "denoiser"):
        weights = str(recipe.get(table, {}).get("weights", ""))
        beside = run.folder.path.parent / weights.removeprefix("run:")
        if weights.startswith("run:") and RunFolder(beside).reported:
            recipe[table] = {**recipe[table], "weights": _without_seed(read_run(beside))}
    return json.dumps(recipe, sort_keys=True)


def gather(paths: Sequence[Path], registry: Registry, out: Path | None = None) -> Gathered:
    """The groups of suites, which are files or folders, and of run folders, in one table.

    `out` is the folder of a suite's runs, where that is not runs/NAME. CheckpointError where no
    run is finished.
    """
    from cmkit.suite.cells import cells
    from cmkit.suite.suite import load_suite

    parts: dict[Path, Gathered] = {}
    runs: dict[Path, Path] = {}
    for path in paths:
        if path.suffix == ".toml":
            suite = load_suite(path)
            folder = SuiteFolder(out or Path("runs") / suite.name)
            unit = suite.table.budget.unit if suite.table.budget else ""
            if unit == "seconds":  # only bench knows the names of its cells
                parts[folder.path.resolve()] = of_results(folder.path)
                continue
            found = cells(suite, registry, suite.count())
            if unit == "evaluations":
                from cmkit.suite.cost import per_step

                found = cells(suite, registry, suite.count(), per_step)
            parts[folder.path.resolve()] = of_suite(suite, found, folder, None)
        elif SuiteFolder(path).results.exists() or (path / "recipes").is_dir():
            parts.setdefault(path.resolve(), of_results(path))
        else:
            runs.setdefault(path.resolve(), path)
    names = [part.name for part in parts.values()]
    for home, part in parts.items():
        part.name = part.name if names.count(part.name) == 1 else os.path.relpath(home)
    every = [*parts.values(), *([of_runs([*runs.values()])] if runs else [])]
    rows = [{group.row for group in part.groups} for part in every]
    for part, own in zip(every, rows, strict=True):
        others = set().union(*(other for other in rows if other is not own))
        name = part.name or "runs"
        for group in part.groups:
            group.row = f"{name}/{group.row}" if group.row in others else group.row
        if isinstance(part.baseline, str) and part.baseline in others:
            part.baseline = f"{name}/{part.baseline}"
    groups = [group for part in every for group in part.groups]
    if not any(group.runs for group in groups):
        first = paths[0]
        run = f"cmkit run {first}/recipe.toml --out {first.parent}"
        cure = f"cmkit bench {first}" if first.suffix == ".toml" else run
        raise CheckpointError(f"{first}: not finished; {cure}")
    return Gathered(
        ", ".join(dict.fromkeys(part.name for part in every if part.name)),
        next((part.baseline for part in every if part.baseline), None),
        groups,
        [note for part in every for note in part.notes],
        {key: value for part in every for key, value in part.about.items()},
    )


def results(gathered: Gathered, same_noise: SameNoise, where: Where | None = None) -> Results:
    """The table of what was gathered, of the lines that `where` chooses.

    Verdicts are corrected for the comparisons of all lines, shown or not. RecipeError for a
    baseline or a key of `where` that is not there, or a smoke run beside real ones.
    """
    groups, baseline = gathered.groups, gathered.baseline
    where = where or {}
    check_where(groups, where)
    if "seed" in where:
        own = (of_seed(group, where["seed"]) for group in groups)
        groups = [group for group in own if group.runs or group.failures]
        if not groups:
            raise RecipeError(f"--where seed={where['seed']}: no run has that seed")
    check_baseline(groups, baseline)
    runs = [run for group in groups for run in group.runs.values()]
    notes = list(gathered.notes)
    notes += _smoke(runs)
    better = directions(runs, same_noise.registry, notes)
    scores = [dict(_scores(group, notes)) for group in groups]
    notes += [*caveats(runs), *_damaged(runs), *_missing(groups), *_biased(runs)]
    notes += _further(groups)
    verdicts = verdicts_of(groups, scores, baseline, better, same_noise, notes)
    lines = [
        _line(group, own, said)
        for group, own, said in zip(groups, scores, verdicts, strict=True)
        if chosen(group, where)
    ]
    if not lines:
        said = " ".join(f"{key}={value}" for key, value in where.items())
        raise RecipeError(f"--where {said}: no line is so")
    shown = Results(gathered.name, baseline, tuple(lines), (), (), {}, better)
    return replace(
        shown,
        columns=tuple(_columns(lines)),
        notes=tuple(dict.fromkeys(notes)),
        provenance=_provenance(gathered.about, runs),
    )


def keep(found: Results, folder: SuiteFolder) -> None:
    """Write results.json into a suite's folder, in which runs have their names alone."""
    document = found.document()
    for line in document["lines"]:
        line["runs"] = {seed: Path(run).name for seed, run in line["runs"].items()}
    files.atomic_write(folder.results, files.sealed(json.loads(json.dumps(document))))


def _smoke(runs: Sequence[Run]) -> Iterator[str]:
    """A note where all are smoke runs; RecipeError where some are."""
    smoke = [run for run in runs if run.smoke]
    if smoke and len(smoke) < len(runs):
        where = smoke[0].folder.path
        raise RecipeError(f"{where}: a smoke run, whose numbers mean nothing; leave it out")
    if smoke:
        yield "smoke runs, shrunk and on invented data: the numbers mean nothing"


def _damaged(runs: Sequence[Run]) -> Iterator[str]:
    """Notes of damaged files beside an intact report.json."""
    for run in runs:
        try:
            run.folder.status()
        except CheckpointError as error:
            yield f"{error}; the numbers are those of report.json, which is intact"


def _missing(groups: Sequence[Group]) -> Iterator[str]:
    """Notes of seeds that are not finished."""
    for group in groups:
        every = len(group.runs) + len(group.failures)
        whys = "; ".join(f"seed {seed}: {why}" for seed, why in group.failures.items())
        if whys:
            yield f"{group.title}: {len(group.runs)} of {every} seeds; {whys}"


def _further(groups: Sequence[Group]) -> Iterator[str]:
    """A note of the keys in which runs differ beyond those that have columns."""
    if more := list(dict.fromkeys(key for group in groups for key in group.differs))[APART:]:
        yield f"the recipes differ as well in {', '.join(more)}"


def _biased(runs: Sequence[Run]) -> Iterator[str]:
    """Notes of Frechet distances of too few images."""
    for run in runs:
        for number in run.scores:
            if biased(run, number):
                record = run.provenance[number]
                width, n = record["features"][number], record["images"]
                yield (
                    f"{number} of {n:,} images is biased, as {width:,} features want at least"
                    f" {5 * width:,}: it decides nothing here, trust KID"
                )


def _scores(group: Group, notes: list[str]) -> Iterator[tuple[str, Score]]:
    """The group's numbers over its seeds, of those that are measured as most are."""
    every = len(group.runs) + len(group.failures)
    for number in dict.fromkeys(n for run in group.runs.values() for n in run.scores):
        ways: list[tuple[Mapping[str, str], dict[int, float]]] = []
        for seed, run in sorted(group.runs.items()):
            if number in run.scores:
                way = run.measured(number)
                values = next((v for known, v in ways if alike(known, way)), None)
                if values is None:
                    values = {}
                    ways.append((way, values))
                values[seed] = run.scores[number]
        measured, kept = max(ways, key=lambda each: len(each[1]))
        for _, others in ways:
            if others is not kept:
                seeds = ", ".join(map(str, others))
                notes.append(f"{group.title}: {number} of seed {seeds} was measured in another way")
        runs = [group.runs[seed] for seed in kept]
        mean = mean_interval(list(kept.values()))
        if not independent(runs):
            mean = replace(mean, of=of_one(mean.of, "of one checkpoint"))
        images = runs[0].provenance[number].get("images") or runs[0].facts["images"] or 0
        yield number, Score(kept, every, mean, images, measured)


def _columns(lines: Sequence[Line]) -> Iterator[tuple[str, Mapping[str, str]]]:
    """A number has a column for each way that it was measured in."""
    for number in dict.fromkeys(n for line in lines for n in (*line.scores, *line.expected)):
        ways: list[Mapping[str, str]] = []
        for line in lines:
            way = line.scores[number].measured if number in line.scores else None
            if way is not None and not any(alike(way, other) for other in ways):
                ways.append(way)
        yield from ((number, way) for way in ways or [{}])


def _line(group: Group, scores: Mapping[str, Score], verdicts: Mapping[str, Verdict]) -> Line:
    runs = [group.runs[seed] for seed in sorted(group.runs)]
    facts: dict[str, Any] = {}
    for key in dict.fromkeys(key for run in runs for key in run.facts):
        values = list(dict.fromkeys(run.facts.get(key, 1) for run in runs))
        facts[key] = values[0] if len(values) == 1 else ", ".join(map(str, values))
    facts |= cost_of(runs)
    if group.cost.get("parameters"):
        facts.setdefault("parameters", group.cost["parameters"])
    if "training" in facts and group.cost.get("evaluations"):
        facts["training"]["evaluations"] = group.cost["evaluations"]
    if gain := _gain(runs):
        facts["gain"] = gain
    first = runs[0] if runs else None
    return Line(
        group.row,
        dict(group.axis),
        group.note,
        {seed: str(run.folder.path) for seed, run in sorted(group.runs.items())},
        group.failures,
        scores,
        verdicts,
        facts,
        dict(first.expected) if first else {},
        first.source if first else None,
        group.differs,
    )


def _gain(runs: Sequence[Run]) -> dict[str, Any] | None:
    """What rescaling changes on fresh noise: of one run over its noise seeds, of several over these
    runs. Keys "number", "plain", "rescaled" and those of the difference's interval."""
    searches = [run.stages["search"] for run in runs if "search" in run.stages]
    if not searches or len({found["minimize"] for found in searches}) > 1:
        return None
    confirmed = [found["confirm"] for found in searches]
    differences = [each["difference"] for each in confirmed]
    interval = mean_interval([each["mean"] for each in differences])
    if len(runs) == 1:
        low, high = differences[0]["low"], differences[0]["high"]
        noises = len(confirmed[0]["seeds"])
        interval = Interval(
            interval.value, low, high, None, f"of this checkpoint, over {noises} noise seeds"
        )
    plain, rescaled = (
        sum(each[name]["mean"] for each in confirmed) / len(confirmed)
        for name in ("plain", "rescaled")
    )
    about = {"number": searches[0]["minimize"], "plain": plain, "rescaled": rescaled}
    return {**about, **asdict(interval)}


def _provenance(about: Mapping[str, Any], runs: Sequence[Run]) -> dict[str, Any]:
    """Of the whole: versions and devices of all runs, and the time."""
    found = {key: value for key, value in about.items() if value}
    for key in ("cmkit", "torch", "device"):
        values = dict.fromkeys(str(r.environment[key]) for r in runs if key in r.environment)
        if values:
            found[key] = ", ".join(values)
    now = datetime.datetime.now(datetime.UTC)
    return {**found, "time": now.isoformat(timespec="seconds")}
