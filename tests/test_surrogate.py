"""The search by interpolation finds what the grid finds, says how far it is off, and resumes."""

from __future__ import annotations

import functools
import itertools
import json
import math

import numpy as np
import pytest
import torch

from cmkit import Denoiser, Network, RecipeError, discover
from cmkit.errors import NonFiniteError
from cmkit.measure import meter
from cmkit.plan import build, plan
from cmkit.recipe import SearchTable, load, minimized
from cmkit.report.search import interpolation_text
from cmkit.run import run
from cmkit.sample import RepeatedDraws
from cmkit.search import (
    Cell,
    CellsDrawn,
    Interpolated,
    Scoring,
    best,
    interpolate,
    most_cells,
    surrogate,
    trace,
    trials,
)
from cmkit.search import search as search_grid
from cmkit.search.interpolation import basis, interpolations
from cmkit.stop import StopSignal
from cmkit.suite.cost import _costs

RECIPE = """\
name = "tiny"
dataset = { use = "digits" }
objective = { use = "ct", end_scales = 5, distance = "pseudo_huber" }
train = { steps = 1, batch = 8, precision = "fp32" }
rescaler = { use = "per_layer" }
sampler = { use = "multistep" }
metric = [{ use = "fidelity", kid = true, kid_subset_size = 10 }]
sample = { images = 12, precision = "fp32" }

[backbone]
use = "adm"
channels = 32
channel_mult = [1, 1]
num_res_blocks = 1
attention_resolutions = []

[search]
method = "surrogate"
images = 24
batch = 8
rerank = 2
rerank_images = 12
confirm_seeds = 2
thumbnails = 4
precision = "fp32"
grid = { skip = [0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3], emb = [0.7, 0.85, 1.0, 1.15, 1.3] }
"""
CPU = torch.device("cpu")
WIDE = "search.grid={skip=[-1.0, -0.6, -0.2, 0.1, 0.4, 0.8, 1.2, 1.7, 2.2, 3.0], emb=[1.1]}"


class Smooth(Network):
    """A small network whose images depend on every scale, as smoothly as those of a U-Net do."""

    sites = ("skip.0", "skip.1", "emb.0", "emb.1", "emb.2")

    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleList(torch.nn.Conv2d(1, 1, 3, padding=1) for _ in range(3))

    def forward(self, x, c_noise, cond, scales):
        h, emb = x, torch.sin(c_noise).view(-1, 1, 1, 1)
        for k, block in enumerate(self.blocks):
            h = torch.tanh(0.5 * block(h) + emb * scales.get(f"emb.{k}", 1)) + 0.5 * h
            h = h + torch.sin(x * scales.get(f"skip.{k}", 1))
        return h


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    path = tmp_path_factory.mktemp("recipe") / "tiny.toml"
    path.write_text(RECIPE)
    return path


@pytest.fixture(scope="module")
def scoring(recipe):
    """scoring(*overrides), of a small network; of a U-Net with `backbone`."""

    @functools.cache
    def made(*overrides, backbone=False):
        planned = plan(load(recipe, overrides, discover()))
        torch.manual_seed(0)
        denoiser = build(planned, CPU) if backbone else Denoiser(Smooth())
        for parameter in denoiser.parameters():
            if parameter.ndim > 1:  # no zero initialisation makes it blind
                torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
        reference = planned.recipe.dataset.reference()
        return Scoring(planned, planned.recipe.search, denoiser.eval(), reference, CPU)

    return made


def records(events):
    """The records as a run keeps them: cells by index, and interpolations."""
    cells, found = {}, []
    for event in events:
        if isinstance(event, Cell):
            record = {"index": event.index, **event.values, "score": event.score, **event.about}
            cells[event.index] = json.loads(json.dumps(record))
        elif isinstance(event, Interpolated):
            found.append(json.loads(json.dumps({"index": event.index, **event.record})))
    return [cells[k] for k in sorted(cells)], found


def nbytes(x):
    return x.nbytes


def state_of(given):
    draws = RepeatedDraws(given.plan.data, given.plan.recipe.seed, "search")
    return surrogate._State(given, draws, {})


def table(**keys):
    grid = {axis: tuple(map(float, values)) for axis, values in keys.pop("grid").items()}
    return SearchTable(images=4, method="surrogate", grid=grid, **keys)


def box(axes, low=0.7, high=1.4, values=21):
    ends = [high - 0.1 * k / axes for k in range(axes)]
    return {f"a{k}": np.linspace(low, end, values) for k, end in enumerate(ends)}


def places_in(by, count=200):
    rng = np.random.default_rng(0)
    return by.low + (by.high - by.low) * rng.random((count, len(by.low)))


@pytest.mark.parametrize("axes", [1, 2, 3, 4, 6])
def test_polynomials_of_its_degree_are_exact(axes):
    for by in interpolations(table(grid=box(axes))):
        powers, s = by.exponents, places_in(by)
        factors = np.random.default_rng(1).normal(size=len(powers))
        at_nodes, exact = ((x[:, None] ** powers).prod(2) @ factors for x in (by.nodes, s))
        assert np.abs(by.weights(s) @ at_nodes - exact).max() < 1e-8 * np.abs(exact).max()


@pytest.mark.parametrize("axes", [2, 5])
def test_one_degree_more_is_not(axes):
    """Else the test above would see nothing."""
    by = next(interpolations(table(grid=box(axes))))
    s = places_in(by)
    assert np.abs(by.weights(s) @ by.nodes[:, 0] ** 3 - s[:, 0] ** 3).max() > 1e-3


def test_the_error_falls_as_fast_as_the_chebyshev_series_of_the_function():
    """1 / (2 + x) is analytic in the Bernstein ellipse of rho = 2 + sqrt(3) (Trefethen, 2013,
    theorem 8.2): the error of n nodes is at most 4 M rho^(1 - n) / (rho - 1)."""
    errors = []
    for by in interpolations(table(grid={"a": np.linspace(-1, 1, 21)})):
        s = places_in(by)
        off = by.weights(s) @ (1 / (2 + by.nodes[:, 0])) - 1 / (2 + s[:, 0])
        errors.append(np.abs(off).max())
    rho = 2 + math.sqrt(3)
    for (n, error), (m, finer) in itertools.pairwise(zip((3, 5, 9), errors, strict=True)):
        assert 0.5 < (error / finer) / rho ** (m - n) < 2, (n, m)


def test_extrema_are_nested_and_hit_the_grid():
    levels = [{tuple(n) for n in by.nodes.tolist()} for by in interpolations(table(grid=box(2)))]
    assert levels[0] < levels[1] < levels[2]
    assert list(map(len, levels)) == [9, 25, 81]
    by = next(interpolations(table(grid={"a": [0.9, 0.95, 1.0, 1.05, 1.1]})))
    assert by.nodes.tolist() == [[0.9], [1.0], [1.1]]


def test_short_axes_and_axes_of_one_value_take_no_more_nodes_than_values():
    found = table(grid={"a": [1.0], "b": [2.0, 0.5], "c": [1.0, 2.0, 4.0, 5.0]})
    assert found.node_counts() == (6, 8)
    by = list(interpolations(found))[-1]
    assert {tuple(node) for node in by.nodes.tolist()} == set(
        itertools.product([1.0], [0.5, 2.0], [1.0, 2.0, 4.0, 5.0])
    )
    assert np.array_equal(by.weights(by.nodes), np.eye(8))
    one = table(grid={"a": [1.0]})
    assert one.node_counts() == (1,)
    assert next(interpolations(one)).weights([[1.0]]).tolist() == [[1.0]]


@pytest.mark.parametrize("axes", [4, 16])
def test_nodes_of_many_axes_are_the_same_at_every_start_and_fill_the_box(axes):
    by, again = (next(interpolations(table(grid=box(axes)))) for _ in range(2))
    assert np.array_equal(by.nodes, again.nodes)
    assert len(by.nodes) == math.ceil(1.5 * math.comb(axes + 2, 2))
    assert ((by.low <= by.nodes) & (by.nodes <= by.high)).all()


@pytest.mark.parametrize("backbone", [False, True], ids=["plain", "shared encoder"])
def test_the_winner_is_that_of_the_full_grid(scoring, backbone):
    given = scoring(backbone=backbone)
    assert bool(given.denoiser.network.late) == backbone
    cells, (record,) = records(interpolate(given))
    full, _ = records(search_grid(scoring('search.method="grid"', backbone=backbone)))
    assert len(cells) == len(full) == most_cells(given.plan.recipe) == 35
    (winner,), (grids,) = best(cells, 1), best(full, 1)
    assert all(winner[axis] == grids[axis] for axis in ("skip", "emb"))
    assert winner["exact"]
    assert record["held"]
    of = {(cell["skip"], cell["emb"]): cell["score"] for cell in full}
    spread = max(of.values()) - min(of.values())
    for cell in cells:
        exact = of[cell["skip"], cell["emb"]]
        assert abs(cell["score"] - exact) <= (1e-6 * exact if cell["exact"] else spread / 20)
    assert sum(cell["exact"] for cell in cells) < 20


def test_checks_are_drawn_cells_that_are_no_nodes(scoring):
    cells, (record,) = records(interpolate(scoring()))
    nodes = [tuple(node.values()) for node in record["nodes"]]
    checked = [tuple(check["values"].values()) for check in record["checks"]]
    assert not set(nodes) & set(checked)
    assert len(set(checked)) == len(checked) >= 3
    for check in record["checks"]:
        (cell,) = [c for c in cells if all(c[a] == v for a, v in check["values"].items())]
        assert cell["score"] == check["exact"] != cell["predicted"] == check["predicted"]
        assert 0 < check["rms"] < 1 / 255
    # A sweep of the nodes, the cells drawn, and few first images.
    drawn = sum(cell.get("draws", 0) for cell in cells)
    assert record["passes_of"]["nodes"] == len(nodes)
    assert record["passes_of"]["checks"] == drawn
    assert record["passes"] == sum(record["passes_of"].values())


def count_draws(monkeypatch, counted):
    original = surrogate.drawn

    def drawn(scoring, rescaler, start, encodings):
        counted.append(len(start.rows))
        return original(scoring, rescaler, start, encodings)

    monkeypatch.setattr("cmkit.search.surrogate.drawn", drawn)
    monkeypatch.setattr("cmkit.search.score.drawn", drawn)


def test_images_are_drawn_as_often_as_it_says_with_every_set_of_nodes(scoring, monkeypatch):
    monkeypatch.setattr(surrogate, "PILOT_RMS", 1.0)
    given, counted = scoring("search.tolerance=1e-9", WIDE), []
    count_draws(monkeypatch, counted)
    _, found = records(interpolate(given))
    assert len(found) == 3
    assert sum(counted) / given.table.images == pytest.approx(found[-1]["passes"])


@pytest.mark.parametrize(
    ("cells", "kept"), [(99, 0), (9, 2**30), (9, 60_000)], ids=["at once", "all kept", "some kept"]
)
def test_images_are_drawn_as_often_as_it_says(scoring, monkeypatch, cells, kept):
    given, counted = scoring(), []
    count_draws(monkeypatch, counted)
    monkeypatch.setattr(surrogate, "_cells_at_a_time", lambda *_: cells)
    monkeypatch.setattr(surrogate, "KEPT_BYTES", kept)
    _, (record,) = records(interpolate(given))
    assert sum(counted) / given.table.images == pytest.approx(record["passes"])
    sweeps = {0: 1, 2**30: 1, 60_000: 1 + 3 * 2 / 3}[kept]  # of three batches of 25 nodes one fits
    assert record["passes_of"]["nodes"] == pytest.approx(25 * sweeps)


def test_memory_does_not_grow_with_cells_beyond_their_meters(scoring, monkeypatch):
    """No tensor is larger for 70 cells than for 35, once a block holds few."""
    monkeypatch.setattr(surrogate, "BLOCK_BYTES", 8 * 8 * 64 * 4)
    sizes = []
    for grid in ("", "search.grid.emb=[0.7,0.76,0.82,0.88,0.94,1.0,1.06,1.12,1.2,1.3]"):
        given, blocks = scoring(*filter(None, [grid])), []
        original = torch.Tensor.__matmul__

        def product(a, b, blocks=blocks, original=original):
            found = original(a, b)
            blocks.append(found.numel())
            return found

        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "__matmul__", product)
            list(interpolate(given))
        sizes.append(max(blocks))
    assert sizes[0] == sizes[1] == 8 * 8 * 64


@pytest.mark.parametrize("kept", [0, 2**30], ids=["drawn again", "kept"])
def test_cells_that_do_not_fit_are_scored_in_parts(scoring, monkeypatch, kept):
    whole, (before,) = records(interpolate(scoring()))
    monkeypatch.setattr(surrogate, "METER_BYTES", 1)
    monkeypatch.setattr(surrogate, "_cells_at_a_time", lambda *_: 9)
    monkeypatch.setattr(surrogate, "KEPT_BYTES", kept)
    parts, (record,) = records(interpolate(scoring()))
    assert [cell["score"] for cell in parts] == pytest.approx([c["score"] for c in whole], rel=1e-6)
    assert record["passes_of"]["nodes"] == before["passes_of"]["nodes"] * (1 if kept else 4)


def test_as_many_cells_are_scored_at_a_time_as_full_meters_fit(scoring, monkeypatch):
    given = scoring()
    state, by = state_of(given), next(interpolations(given.table))
    filled = meter(minimized(given.plan.recipe), 24, given.reference, CPU)
    filled.add(torch.zeros(24, 1, 8, 8, dtype=torch.uint8))
    monkeypatch.setattr(surrogate, "METER_BYTES", 10 * sum(map(nbytes, filled.state().values())))
    list(state.first(surrogate.nodes_of(by)))
    assert surrogate._cells_at_a_time(state, by) == 10


def test_a_search_cut_after_any_event_ends_in_the_same_bits(scoring, monkeypatch):
    monkeypatch.setattr(surrogate, "PILOT_RMS", 1.0)
    given = scoring("search.tolerance=1e-9", WIDE)
    whole = records(interpolate(given))
    assert len(whole[1]) == 3  # every set of nodes, and then not held
    count = len(list(interpolate(given)))
    for cut in range(0, count, count // 8):
        events, begun = [], None
        running = interpolate(given)
        for event in itertools.islice(running, cut):
            events.append(event)
            if isinstance(event, CellsDrawn) and event.unfinished:
                begun = event.unfinished() or begun
        running.close()
        cells, found = records(events)
        again = Scoring(given.plan, given.table, given.denoiser, given.reference, CPU, begun)
        more = records(interpolate(again, tuple(cells), tuple(found)))
        ended = {cell["index"]: cell for cell in [*cells, *more[0]]}
        assert [ended[k] for k in sorted(ended)] == whole[0], cut
        assert [*found, *more[1]] == whole[1], cut


def test_a_lost_record_is_made_again(scoring):
    given = scoring()
    whole, found = records(interpolate(given))
    for lost in (0, 20, len(whole) - 1):
        stored = [cell for cell in whole if cell["index"] != lost]
        more, again = records(interpolate(given, tuple(stored)))
        ended = {cell["index"]: cell for cell in [*stored, *more]}
        assert [ended[k] for k in sorted(ended)] == whole
        assert again == found


def test_a_bound_that_cannot_be_held_is_said_and_more_nodes_are_tried_first(scoring, monkeypatch):
    monkeypatch.setattr(surrogate, "PILOT_RMS", 1.0)
    _, found = records(interpolate(scoring("search.tolerance=1e-9", WIDE)))
    assert [record["refines"] for record in found] == [True, True, False]
    assert not any(record["held"] for record in found)
    assert [record["index"] for record in found] == [0, 1, 2]
    assert [len(record["nodes"]) for record in found] == [3, 5, 9]
    assert [record["passes_of"]["nodes"] for record in found] == [3, 8, 17]
    said = [interpolation_text(record, "fid") for record in found]
    assert "the bound 1e-09 on fid does not hold" in said[0]
    assert said[0].endswith("more nodes follow")
    assert said[2].endswith("read the interpolated scores with care")


def test_the_pilot_takes_more_nodes_where_the_first_images_are_off(scoring):
    _, found = records(interpolate(scoring("search.tolerance=1000", WIDE)))
    first, *_, last = found[0]["pilot"]
    assert first["nodes"] == 3
    assert first["rms"] > 1 / 255
    assert last["nodes"] == len(found[0]["nodes"]) > 3
    assert last["rms"] < first["rms"]
    assert found[0]["held"]


def test_all_cells_are_nodes_where_an_axis_has_few_values(scoring):
    cells, (record,) = records(interpolate(scoring("search.grid={skip=[0.9, 1.1], emb=[1.0]}")))
    assert [cell["exact"] for cell in cells] == [True, True, True]
    assert [cell.get("candidate", True) for cell in cells] == [True, True, False]  # (1, 1)
    assert record["held"]
    assert len(record["nodes"]) == 2


def test_a_check_that_is_drawn_again_for_its_error_stays_a_check():
    record = {"nodes": 9, "exact": False, "score": 2.0}
    once = surrogate._exact(record)
    assert once == {"nodes": 9, "exact": True, "predicted": 2.0, "draws": 1}
    assert surrogate._exact({**once, "score": 2.1}) == {**once, "draws": 2}


@pytest.mark.parametrize("images", [40, 41])
def test_the_standard_error_is_that_of_a_mean(images):
    """The jackknife of a mean is s / sqrt(n), where each group is one image."""
    x = np.random.default_rng(0).normal(size=images)
    left_out = (x.sum() - x) / (images - 1)
    error = surrogate.jackknife(left_out.tolist())
    assert error == pytest.approx(x.std(ddof=1) / math.sqrt(images))
    assert surrogate.jackknife([1.0, None]) is None
    assert surrogate.jackknife([]) is None


@pytest.mark.slow
def test_the_standard_error_is_near_the_spread_over_other_noise(scoring):
    given = scoring("search.images=200", "search.batch=100")
    errors, scores = [], []
    for seed in range(10):
        draws = RepeatedDraws(given.plan.data, seed, "search")
        state = surrogate._State(given, draws, {})
        with torch.inference_mode():
            events = surrogate._with_error(state, (0.9, 1.0))
            try:
                while True:
                    next(events)
            except StopIteration as done:
                score, error, _ = done.value
        scores.append(score)
        errors.append(error)
    assert 0.5 < np.mean(errors) / np.std(scores, ddof=1) < 2


FIVE = ("skip.0", "skip.1", "emb.0", "emb.1", "emb.2")
SITES = ", ".join(f'"{site}"=[0.8, 0.9, 1.0, 1.1, 1.2]' for site in FIVE)
SITES = f"search.grid={{{SITES}}}"


def test_of_many_axes_cells_by_lot_and_a_descent_are_scored(scoring):
    given = scoring(SITES, "search.candidates=60", "search.tolerance=1000")
    cells, (record,) = records(interpolate(given))
    recipe = given.plan.recipe
    assert 30 < len(cells) <= most_cells(recipe) == 60
    assert len(record["nodes"]) == math.ceil(1.5 * math.comb(7, 2)) == record["passes_of"]["nodes"]
    way = trace(recipe, [{**c, "score": c.get("predicted", c["score"])} for c in cells])
    assert way[0]["axis"] == "skip.0"
    assert {cell["exact"] for cell in cells} == {True, False}
    assert cells[0] | dict.fromkeys(recipe.search.grid, 1.0) == cells[0]  # the rescaler's own
    for check in record["checks"]:
        assert check["rms"] < 0.02


def test_a_descent_ends_where_no_axis_moves(recipe):
    made = load(recipe, [SITES, "search.candidates=200"], discover())
    grid = made.search.grid
    target = [0.9, 1.1, 1.2, 0.8, 1.0]

    class Far(dict):
        def __missing__(self, at):
            return sum((a - b) ** 2 for a, b in zip(at, target, strict=True))

    *_, (_, tried) = trials(made, Far())
    assert tried[0] == dict(zip(grid, target, strict=True))
    assert len(list(trials(made, Far()))) <= 1 + 2 * len(grid)
    few = load(recipe, [SITES, "search.candidates=26"], discover())
    tried = [tuple(cell.values()) for _, cells in trials(few, Far()) for cell in cells]
    assert 13 + 4 < len(set(tried)) <= 26


def test_multistep_samplers_and_other_metrics_are_interpolated_too(scoring):
    sampler = "sampler={use='multistep', sigmas=[1.0]}"
    cells, (record,) = records(interpolate(scoring(sampler, "search.minimize='kid_mean'")))
    assert len(cells) == 35
    assert record["passes_of"]["nodes"] == 2 * len(record["nodes"])  # two evaluations an image
    assert all(check["rms"] < 0.05 for check in record["checks"])


def test_a_node_that_is_not_finite_stops_the_search_with_its_place(scoring, monkeypatch):
    given = scoring()
    original = surrogate.drawn

    def drawn(scoring, rescaler, start, encodings):
        x0 = original(scoring, rescaler, start, encodings)
        return x0 * (math.nan if rescaler.skip == 1.3 else 1)

    monkeypatch.setattr("cmkit.search.surrogate.drawn", drawn)
    with pytest.raises(NonFiniteError, match=r"images at \{'skip': 1.3, 'emb': 0.7\} hold NaN"):
        list(interpolate(given))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("tolerance=0", "greater than 0"),
        ("tolerance=-1.0", "greater than 0"),
        ("tolerance=inf", "finite number"),
        ("tolerance=nan", "finite number"),
        ("candidates=1", "greater than or equal to 2"),
        ("candidates=100000", "less than or equal to 10000"),
        ("rounds=2", 'rounds = 2 is of method = "coordinate"'),
        ("images=10, search.minimize='kid_mean'", "search.images = 10: the standard error"),
        ('grid."skip.9"=[1.0, 1.1]', "no 'skip.9'"),
        ("grid.skip=[1e9, 1.0]", "less than or equal to 100"),
    ],
)
def test_bad_input_is_refused_with_its_place(recipe, change, words):
    with pytest.raises(RecipeError, match="search") as caught:
        plan(load(recipe, [f"search.{part}" for part in change.split(", search.")], discover()))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("method", ["grid", "coordinate"])
@pytest.mark.parametrize("key", ["tolerance", "candidates"])
def test_keys_of_this_method_are_refused_beside_another(recipe, method, key):
    with pytest.raises(RecipeError, match=rf'{key} = 3 is of method = "surrogate"; add it'):
        load(recipe, [f"search.method='{method}'", f"search.{key}=3"], discover())


def test_more_axes_than_nodes_can_carry_are_refused_with_their_number(recipe):
    axes = ", ".join(f'"skip.{k}"=[0.9, 1.1]' for k in range(35))
    load(recipe, [f"search.grid={{{axes}}}"], discover())
    with pytest.raises(RecipeError, match="36 numbers take 1,055 nodes") as caught:
        load(recipe, [f'search.grid={{{axes}, "skip.35"=[0.9, 1.1]}}'], discover())
    assert "of which 1,024 are the most: name at most 35" in str(caught.value)
    fixed = ", ".join(f'"emb.{k}"=[1.0]' for k in range(9))  # take no nodes
    load(recipe, [f"search.grid={{{axes}, {fixed}}}"], discover())


def test_the_cost_is_that_of_the_nodes_and_of_the_cells_drawn(recipe):
    made = load(recipe, [], discover())
    assert made.search.passes() == (9 + 5, 25 + 5, 35 + 5)
    cell = type("Cell", (), {"recipe": made, "group": "", "name": "a"})()
    assert _costs(cell, plan(made)).searched == 14 * 24 + 2 * 12 + 2 * 2 * 24


def finish(recipe, out, cut=None):
    registry = discover()
    running = run(plan(load(recipe, [], registry)), registry, out, CPU, StopSignal())
    if cut is None:
        *_, last = running
        return last.folder, last.report
    list(itertools.islice(running, cut))
    running.close()
    return None


@pytest.mark.slow
def test_a_run_resumes_and_its_report_says_how_cells_were_found(recipe, tmp_path):
    folder, report = finish(recipe, tmp_path / "whole")
    found = report["stages"]["search"]
    by = found["surrogate"]
    assert len(found["cells"]) == 35
    assert all((folder / node["samples"]).exists() for node in by["nodes"])
    assert {"axes", "low", "high", "exponents", "matrix", "pilot", "checks", "passes"} <= by.keys()
    exponents, matrix = np.array(by["exponents"]), np.array(by["matrix"])
    nodes = np.array([[node[axis] for axis in by["axes"]] for node in by["nodes"]])
    terms = basis(nodes, np.array(by["low"]), np.array(by["high"]), exponents)
    assert terms @ matrix == pytest.approx(np.eye(len(nodes)), abs=1e-6)
    assert "Images between nodes are" in (folder / "report.html").read_text()
    for cut in (9, 25, 50):
        finish(recipe, tmp_path / f"{cut}", cut=cut)
        again, _ = finish(recipe, tmp_path / f"{cut}")
        for name in ("surrogate.jsonl", "rerank.jsonl", "confirm.jsonl"):
            files = [home / "search" / name for home in (folder, again)]
            assert len({file.read_bytes() for file in files}) == 1, (cut, name)
        ends = [json.loads((h / "search.json").read_text())["cells"] for h in (folder, again)]
        assert ends[0] == ends[1]
