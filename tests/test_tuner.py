"""Searches of many numbers by Optuna, and successive halving over images."""

import functools
import importlib.util
import itertools
import random
from types import SimpleNamespace

import pytest
import torch

from cmkit import RecipeError, discover
from cmkit.errors import PluginError
from cmkit.plan import build, plan
from cmkit.recipe import load, with_values
from cmkit.runs import run
from cmkit.search import (
    Cell,
    CellsDrawn,
    Scoring,
    best,
    most_cells,
    most_images,
    search,
    trace,
    trials,
    tuner,
)
from cmkit.search.tuner import group
from cmkit.smoke import smoke
from cmkit.stop import StopSignal
from cmkit.suite.cost import _costs

RECIPE = """\
name = "tiny"
dataset = { use = "digits" }
objective = { use = "ct", end_scales = 5, distance = "pseudo_huber" }
train = { steps = 2, batch = 8, lr = 0.01, precision = "fp32" }
rescaler = { use = "per_layer" }
sampler = { use = "multistep" }
metric = [{ use = "fidelity" }]
sample = { images = 16, precision = "fp32" }

[backbone]
use = "adm"
channels = 32
channel_mult = [1, 1]
num_res_blocks = 1
attention_resolutions = []

[search]
images = 16
batch = 3
rerank = 1
rerank_images = 12
confirm_seeds = 2
confirm_images = 6
precision = "fp32"
thumbnails = 5

[search.grid]
skip = [0.7, 1.3]
emb = [0.8, 1.0, 1.2]
"skip.1" = [0.9, 1.4]
"emb.2" = [0.7, 1.2]
"""
BEST = {"skip": 1.1, "emb": 0.9, "skip.1": 1.2, "emb.2": 0.8}
TPE, CMAES = ("search.method='tpe'", "search.trials=24"), ("search.method='cmaes'",)
CMAES += ("search.trials=24",)
HALVING = ("search.halving=4", "search.rungs=2")
METHODS = {
    "tpe": TPE,
    "cmaes": CMAES,
    "grid halved": HALVING,
    "coordinate halved": (
        "search.method='coordinate'",
        "search.halving=2",
        "search.rounds=2",
        "search.grid.emb=[0.8, 0.9, 1.2]",
    ),
    "tpe halved": (*TPE, *HALVING),
    "cmaes halved thrice": (*CMAES, "search.halving=2", "search.rungs=4"),
}
CPU = torch.device("cpu")


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "tiny.toml"
    path.write_text(RECIPE)
    return path


def distance(values):
    """Of a cell from BEST, in few images as in many."""
    return sum((a - b) ** 2 for a, b in zip(values, BEST.values(), strict=True))


@pytest.fixture
def toy(recipe, monkeypatch):
    """search(overrides, stored) whose score is the distance from BEST, and the (values, images)
    that it has drawn; a third of the box has no score. Few images flatter, so that each cut cell
    has a lower score than any whole one."""
    drawn = []

    def scored(scoring, rescalers, draws, count, rungs):
        values = [tuple(rescaler.value_of(axis) for axis in BEST) for rescaler in rescalers]
        drawn.extend((cell, count) for cell in values)
        yield CellsDrawn(0, 1)
        scores = [distance(cell) + count if cell[0] > 0.9 else None for cell in values]
        return [(score, torch.empty(0)) for score in scores]

    monkeypatch.setattr("cmkit.search.cells.scored", scored)

    @functools.cache
    def built(*overrides):
        made = plan(load(recipe, overrides, discover()))
        return made, build(made, CPU)

    def start(overrides, stored=()):
        made, denoiser = built(*overrides)
        scoring = Scoring(made, made.recipe.search, denoiser, None, CPU)
        return made.recipe, search(scoring, stored)

    return start, drawn


def kept(events):
    return [
        {"index": e.index, **e.values, "score": e.score, "images": e.images}
        for e in events
        if isinstance(e, Cell)
    ]


@pytest.mark.parametrize("overrides", METHODS.values(), ids=METHODS)
def test_a_search_cut_after_any_event_goes_on_to_the_same_cells(toy, overrides):
    """Cells are asked for again, to the bit, and a stored one is never drawn again."""
    start, drawn = toy
    recipe, found = start(overrides)
    whole, first = kept(found), list(drawn)
    assert sorted(record["index"] for record in whole) == list(range(len(whole)))
    assert len(whole) <= most_cells(recipe)
    assert kept(start(overrides)[1]) == whole
    total = len(list(start(overrides)[1]))
    for cut in {*range(1, total, total // 5), total - 1}:
        records = kept(itertools.islice(start(overrides)[1], cut))
        drawn.clear()
        assert records + kept(start(overrides, tuple(records))[1]) == whole, cut
        stored = [tuple(record[axis] for axis in BEST) for record in records]
        assert not {cell for cell, _ in drawn} & {*stored}
        assert {*drawn} <= {*first}


@pytest.mark.parametrize("name", ["grid halved", "cmaes halved thrice"])
def test_a_record_that_was_lost_is_made_again(toy, name):
    start, _ = toy
    whole = kept(start(METHODS[name])[1])
    for lost in whole[::4]:
        records = [record for record in whole if record != lost]
        assert kept(start(METHODS[name], records)[1]) == [lost]


@pytest.mark.parametrize("method", ["tpe", "cmaes"])
def test_a_tuner_finds_a_minimum_that_random_cells_do_not(recipe, method):
    axes = [f'"skip.{k}" = [0.6, 1.4]' for k in range(4)]
    axes += [f'"emb.{k}" = [0.6, 1.4]' for k in range(4)]
    sets = [f"search.grid={{{', '.join(axes)}}}", f"search.method='{method}'"]
    drawing = random.Random(7)
    target = [drawing.uniform(0.7, 1.3) for _ in axes]

    def far(values):
        return sum((a - b) ** 2 for a, b in zip(values, target, strict=True))

    by_chance = min(far([drawing.uniform(0.6, 1.4) for _ in axes]) for _ in range(120))
    made = load(recipe, [*sets, "search.trials=120"], discover())
    scores = {}
    for _, tried in trials(made, scores):
        scores |= {tuple(cell.values()): far(cell.values()) for cell in tried}
    assert min(scores.values()) < by_chance / 2
    assert len(scores) == most_cells(made) == 120


@pytest.mark.parametrize("method", ["tpe", "cmaes"])
def test_trials_begin_with_the_own_numbers_and_stay_within_the_ranges(recipe, method):
    sets = [f"search.method='{method}'", "search.trials=40", 'search.grid."emb.2"=[0.7]']
    own = ["rescaler.skip=1.25", "rescaler.emb=0.5"]
    made = load(recipe, [*sets, *own], discover())
    scores = {}
    found = []
    for _, tried in trials(made, scores):
        found.extend(tried)
        scores |= {tuple(cell.values()): distance(cell.values()) for cell in tried}
    assert found[0] == {"skip": 1.25, "emb": 0.8, "skip.1": 1.25, "emb.2": 0.7}
    for axis, (low, high) in {"skip": (0.7, 1.3), "emb": (0.8, 1.2), "emb.2": (0.7, 0.7)}.items():
        assert all(low <= cell[axis] <= high for cell in found)
    assert len({cell["skip"] for cell in found}) > 30
    assert all(with_values(made, cell).value_of("skip.1") == cell["skip.1"] for cell in found)
    others = trials(load(recipe, [*sets, *own, "seed=1"], discover()), scores)
    assert next(others)[1] == found[:1]
    second = next(others)[1]
    assert second != found[1 : 1 + len(second)]


@pytest.mark.parametrize("overrides", METHODS.values(), ids=METHODS)
def test_halving_draws_what_its_closed_form_says(toy, overrides):
    """Of each list the best 1 in eta, rounded up, go on; scores of other rungs decide nothing."""
    start, drawn = toy
    recipe, found = start(overrides)
    records = kept(found)
    table = recipe.search
    rungs = table.rung_images
    images = dict.fromkeys(rungs, 0)
    for _, count in drawn:
        images[count] += 1
    spent = sum(dict(drawn).values())  # what a cell has last, of which the rest is a part
    most, whole = most_images(recipe)
    if table.method == "coordinate":
        assert spent <= most
        seen, in_order = set(), sorted(records, key=lambda record: record["index"])
        for step in trace(recipe, in_order):
            new = [k for k in step["cells"] if k not in seen]
            seen |= {*new}
            assert sum(in_order[k]["images"] == 16 for k in new) == -(-len(new) // 2)
    else:
        assert (spent, images[rungs[-1]]) == (most, whole)
    assert sum(record["images"] == table.images for record in records) == images[rungs[-1]]
    if table.halving is None:
        assert most == table.images * most_cells(recipe)
    if table.method is None:
        assert (images, spent) == ({4: 24, 16: 6}, 24 * 4 + 6 * 12)
        ranked = sorted((r for r in records if r["score"]), key=lambda r: distance_of(r))
        assert {r["index"] for r in records if r["images"] == 16} == {
            record["index"] for record in ranked[:6]
        }
    if table.rungs == 4:  # 1, 8, 8 and 7 cells: a generation of 7 is halved to 4, 2 and 1
        assert spent == 16 + 2 * (8 * 2 + 4 * 2 + 2 * 4 + 8) + (7 * 2 + 4 * 2 + 2 * 4 + 8)
        assert images[16] == 4
    if table.method == "tpe" and table.halving:
        assert group(recipe) == 4
        assert images == {4: 23, 16: 1 + 5 + 1}  # the first alone, five times four, and three


def distance_of(record):
    return distance([record[axis] for axis in BEST])


def test_a_search_by_coordinates_goes_on_with_whole_cells_alone(toy):
    """It takes the same way as without halving, where cells rank the same in few images."""
    start, _ = toy
    sets = ("search.method='coordinate'", "search.grid.skip=[0.7, 1.1, 1.2, 1.3]")
    ends = []
    for overrides in (sets, (*sets, *HALVING)):
        found = kept(start(overrides)[1])
        winner = best([record for record in found if record["images"] == 16], 1)[0]
        ends.append({axis: winner[axis] for axis in BEST})
    assert ends[0] == ends[1]
    assert ends[0]["skip"] == 1.1


def test_a_suite_says_what_a_search_costs(recipe):
    """One evaluation an image: of the cells, of the best again, of the comparison."""

    def searched(*overrides):
        made = plan(load(recipe, overrides, discover()))
        return _costs(SimpleNamespace(recipe=made.recipe, group="other", name=""), made).searched

    rest = 1 * 12 + 2 * 2 * 6
    assert searched() == 24 * 16 + rest
    assert searched(*HALVING) == 24 * 4 + 6 * 12 + rest
    assert searched(*TPE) == 24 * 16 + rest
    assert searched(*TPE, *HALVING) == 24 * 4 + 7 * 12 + rest
    assert searched("search.method='coordinate'") == (1 + 2 + 2 + 2 + 2) * 16 + rest


def finish(recipe, out, *overrides, cut=None):
    registry = discover()
    running = run(plan(load(recipe, overrides, registry)), registry, out, CPU, StopSignal())
    if cut is None:
        *_, last = running
        return last.folder, last.report
    count = len(list(itertools.islice(running, cut)))
    running.close()
    return count


@pytest.mark.slow
@pytest.mark.parametrize(
    "sets",
    [
        ("search.method='tpe'", "search.trials=6", "search.halving=2", "search.rungs=3"),
        ("search.method='cmaes'", "search.trials=7"),
        ("search.grid={skip=[0.7, 0.9, 1.1, 1.3]}", "search.halving=4", "search.rungs=2"),
    ],
    ids=["tpe halved", "cmaes", "grid halved"],
)
def test_a_killed_run_goes_on_to_the_same_files(recipe, tmp_path, monkeypatch, sets):
    monkeypatch.setattr("cmkit.runs.job.SAVE_SECONDS", 0.0)
    folder, report = finish(recipe, tmp_path / "whole", *sets)
    found = report["stages"]["search"]
    assert found["best"]["score"] is not None
    if "search.halving" in str(sets):
        images = {cell["images"] for cell in found["cells"]}
        assert images <= {*found["rungs"]}
        assert found["rungs"][-1] == 16
        assert len(images) > 1
    for cut, seconds in ((9, 0.0), (17, 1e9), (24, 0.0)):
        monkeypatch.setattr("cmkit.runs.job.SAVE_SECONDS", seconds)
        assert finish(recipe, tmp_path / f"{cut}", *sets, cut=cut) == cut
        again, _ = finish(recipe, tmp_path / f"{cut}", *sets)
        for name in ("cells.jsonl", "rerank.jsonl", "confirm.jsonl"):
            files = [home / "search" / name for home in (folder, again)]
            assert len({file.read_bytes() for file in files}) == 1, (cut, name)


BAD = {
    "trials=0": ("greater than or equal to 1", TPE),
    "trials=10001": ("less than or equal to 10000", TPE),
    "trials=9": ('trials = 9 is of method = "tpe" and "cmaes"', ()),
    "method='cmaes'": ("needs trials, the number of its cells", ()),
    "rounds=2": ('rounds = 2 is of method = "coordinate"', TPE),
    "grid={skip=[0.9]}": ("needs a range: give an axis of the grid two values", TPE),
    "grid={skip=[0.9, 1.1], emb=[1.0]}": ('needs two axes with a range; set method = "tpe"', CMAES),
    'grid."skip.9"=[1.0, 1.1]': ("no 'skip.9'", TPE),
    'grid."skip.1"=[1.0, 1e9]': ("less than or equal to 100", TPE),
    "halving=1": ("greater than or equal to 2", ()),
    "halving=9": ("2 rungs of halving = 9 up to 16 images begin with 1", ()),
    "rungs=9": ("9 rungs of halving = 4 up to 16 images begin with 0", HALVING),
    "rungs=2": ("rungs = 2 are of halving; add halving = 4", ()),
}


@pytest.mark.parametrize("change", BAD)
def test_keys_that_do_not_fit_are_refused_in_one_line(recipe, change):
    words, before = BAD[change]
    with pytest.raises(RecipeError, match="search") as caught:
        plan(load(recipe, [*before, f"search.{change}"], discover()))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("method", "package"), [("tpe", "optuna"), ("cmaes", "cmaes")])
def test_an_absent_extra_is_named_with_its_cure(recipe, monkeypatch, method, package):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == package else found(name)
    )
    made = load(recipe, [f"search.method='{method}'", "search.trials=9"], discover())
    with pytest.raises(PluginError, match=rf"search\.method.*the package {package}; pip") as caught:
        plan(made)
    assert str(caught.value).endswith("pip install 'cmkit[search]'")
    plan(load(recipe, [], discover()))


def test_optuna_is_imported_by_its_own_search_alone():
    assert not hasattr(tuner, "optuna")


@pytest.mark.parametrize("overrides", METHODS.values(), ids=METHODS)
def test_a_shrunk_search_keeps_its_method_and_is_valid(recipe, tmp_path, overrides):
    registry = discover()
    grid = 'search.grid={"skip.0"=[0.9, 1.1], "skip.1"=[0.9, 1.1], emb=[1.0]}'
    for sets in (overrides, (*overrides, grid)):
        made = load(recipe, sets, registry)
        shrunk = smoke(made, tmp_path, registry)["search"]
        assert bool(shrunk.get("halving")) == bool(made.search.halving)
        assert shrunk.get("trials") == (4 if made.search.trials else None)


def test_a_shrunk_search_keeps_the_ends_of_the_first_of_a_family(recipe):
    grid = 'search.grid={"skip.0"=[0.9, 1.0, 1.1], "skip.1"=[0.5, 3.0], emb=[1.0]}'
    made = load(recipe, [grid], discover())
    shrunk = made.search.smallest(made.dataset.spec())
    assert shrunk["grid"] == {"skip.0": [0.9, 1.1], "emb": [1.0]}
