"""The search by interpolation finds what the grid finds, says how far it is off, and resumes."""

from __future__ import annotations

import functools
import itertools
import json
import math

import numpy as np
import pytest
import torch

from cmkit import Denoiser, Network, discover
from cmkit.errors import NonFiniteError
from cmkit.measure import meter
from cmkit.plan import build, plan
from cmkit.recipe import load, minimized
from cmkit.report.search import interpolation_text
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
from cmkit.search.interpolation import interpolations

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
    said = interpolation_text({**record, "nodes": [{}]}, "fid")
    assert said.startswith("1 node, ")
    assert " in 1 cell that was drawn to see it, bound " in said


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
    with pytest.raises(NonFiniteError, match=r"images at skip = 1.3, emb = 0.7 hold NaN"):
        list(interpolate(given))
