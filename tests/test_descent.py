"""The search by coordinates: it finds, resumes, and draws nothing twice."""

import collections
import functools
import itertools

import pytest
import torch

from cmkit import RecipeError, discover
from cmkit.plan import build, plan
from cmkit.recipe import load, with_values
from cmkit.runs import drawn_from, run
from cmkit.search import Cell, CellsDrawn, Scoring, most_cells, search, trace, trials
from cmkit.stop import StopSignal

RECIPE = """\
name = "tiny"
dataset = { use = "digits" }
objective = { use = "ct", end_scales = 5, distance = "pseudo_huber" }
train = { steps = 1, batch = 8, precision = "fp32" }
rescaler = { use = "per_layer", emb = 1.1 }
sampler = { use = "multistep" }
metric = [{ use = "fidelity" }]
sample = { images = 12, precision = "fp32" }

[backbone]
use = "adm"
channels = 32
channel_mult = [1, 1]
num_res_blocks = 1
attention_resolutions = []

[search]
method = "coordinate"
images = 12
batch = 6
rerank = 2
rerank_images = 12
confirm_seeds = 2
precision = "fp32"

[search.grid]
skip = [0.8, 1.0, 1.2]
emb = [0.9, 1.0]
"skip.1" = [0.8, 1.4]
"emb.2" = [0.7, 1.0]
"""
BEST = {"skip": 1.2, "emb": 0.9, "skip.1": 1.4, "emb.2": 0.7}
CPU = torch.device("cpu")


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "tiny.toml"
    path.write_text(RECIPE)
    return path


@pytest.fixture
def toy(recipe, monkeypatch):
    """search(overrides, stored) whose score is the distance from BEST, and what it has drawn."""
    drawn = []

    def scored(scoring, rescalers, *_):
        drawn.append([tuple(rescaler.value_of(axis) for axis in BEST) for rescaler in rescalers])
        yield CellsDrawn(0, 1)
        return [(distance(values), torch.empty(0)) for values in drawn[-1]]

    monkeypatch.setattr("cmkit.search.cells.scored", scored)

    @functools.cache
    def built(*overrides):
        made = plan(load(recipe, overrides, discover()))
        return made, build(made, CPU)

    def start(stored=(), *overrides):
        made, denoiser = built(*overrides)
        scoring = Scoring(made, made.recipe.search, denoiser, None, CPU)
        return made.recipe, search(scoring, stored)

    return start, drawn


def distance(values):
    far = sum((a - b) ** 2 for a, b in zip(values, BEST.values(), strict=True))
    return None if values[0] == 0.8 else far  # a cell without a score never wins


def kept(events):
    return [
        {"index": event.index, **event.values, "score": event.score}
        for event in events
        if isinstance(event, Cell)
    ]


def test_the_best_of_a_separable_score_is_found_in_one_round(toy):
    start, _ = toy
    recipe, found = start()
    records = kept(found)
    winner = min((r for r in records if r["score"] is not None), key=lambda r: r["score"])
    assert {axis: winner[axis] for axis in BEST} == BEST
    assert [record["index"] for record in records] == list(range(len(records)))
    assert len(records) == most_cells(recipe) == 1 + 2 + 2 + 2 + 2
    own = {"skip": 1.0, "emb": 1.1, "skip.1": 1.0, "emb.2": 1.1}
    assert records[0] == {"index": 0, **own, "score": pytest.approx(0.4)}


def test_cells_that_share_the_encoder_are_drawn_together(toy):
    start, drawn = toy
    kept(start()[1])
    assert [len(row) for row in drawn] == [3, 1, 1, 2, 1, 1]


def test_members_follow_their_family_until_they_are_searched_themselves(toy):
    start, _ = toy
    records = kept(start()[1])
    both = [(record["skip"], record["skip.1"]) for record in records[:4]]
    assert both == [(1, 1), (0.8, 0.8), (1.2, 1.2), (1.2, 1.2)]
    assert {r["skip.1"] for r in records[5:7]} == {0.8, 1.4}


@pytest.mark.parametrize("grid", [["skip", "skip.0"], ["skip.1", "skip", "skip.0"]])
def test_levels_and_families_may_be_searched_in_any_order(recipe, grid):
    """The numbers of a cell always make the very rescaler that was tried."""
    axes = ", ".join(f'"{axis}" = [0.5, {k}.5]' for k, axis in enumerate(grid, 1))
    rescaler = 'rescaler={use="per_timestep", sigmas=[1.0, 2.0, 80.0]}'
    sets = [rescaler, f"search.grid={{{axes}}}", "search.rounds=2"]
    made = load(recipe, sets, discover())
    scores = collections.defaultdict(lambda: -len(scores))  # whatever is new is better
    made_from = {}
    for _, tried in trials(made, scores):
        for cell in tried:
            found = with_values(made, cell)
            assert made_from.setdefault(tuple(cell.values()), found.skip) == found.skip
            assert all(found.value_of(axis) == cell[axis] for axis in grid if "." in axis)
            assert found.skip[-1] == cell["skip"]
    assert len(made_from) > 5


@pytest.mark.parametrize("overrides", [(), ("search.rounds=3",), ("search.method='grid'",)])
def test_no_cell_is_drawn_twice(toy, overrides):
    start, drawn = toy
    recipe, found = start((), *overrides)
    records = kept(found)
    every = list(itertools.chain(*drawn))
    assert len(every) == len(set(every)) == len(records) <= most_cells(recipe)


def test_a_second_round_sees_what_the_first_has_chosen(toy, monkeypatch):
    """A valley askew: one round ends beside its bottom."""
    start, _ = toy

    def askew(values):
        skip, emb = values[:2]
        return (skip - emb) ** 2 + 0.1 * (skip + emb) ** 2

    monkeypatch.setitem(globals(), "distance", askew)
    values = [0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
    grid = f"search.grid={{skip={values}, emb={values}}}"
    ends = []
    for rounds in (1, 2, 3):
        records = kept(start((), grid, f"search.rounds={rounds}")[1])
        ends.append(min(record["score"] for record in records))
    assert ends[0] > ends[1] > ends[2]


def test_a_search_cut_after_any_event_goes_on_to_the_same_cells(toy):
    start, drawn = toy
    whole = kept(start()[1])
    count = len(list(start()[1]))
    for cut in range(count):
        records = kept(itertools.islice(start()[1], cut))
        before = len(list(itertools.chain(*drawn)))
        records += kept(start(tuple(records))[1])
        assert records == whole, cut
        assert len(list(itertools.chain(*drawn))) - before <= len(whole)


def test_the_way_is_told_by_the_records_alone(toy):
    start, _ = toy
    recipe, found = start()
    records = kept(found)
    way = trace(recipe, records)
    assert [step["axis"] for step in way] == list(BEST)
    assert [step["cells"] for step in way] == [[0, 1, 2], [2, 3, 4], [3, 5, 6], [6, 7, 8]]
    grid = ("search.method='grid'", "search.grid={skip=[1.0]}")
    recipe, found = start((), *grid)
    assert trace(recipe, kept(found)) == []


def test_without_any_score_the_search_stays_where_it_is(recipe):
    made = load(recipe, [], discover())
    tried = [cells for _, cells in trials(made, collections.defaultdict(lambda: None))]
    assert all(cells[0] == tried[0][0] for cells in tried)


def finish(recipe, out, *overrides, cut=None):
    registry = discover()
    made = plan(load(recipe, overrides, registry))
    running = run(made, registry, out, CPU, StopSignal())
    if cut is None:
        *_, last = running
        return last.folder, last.report
    list(itertools.islice(running, cut))
    running.close()
    return None


@pytest.mark.slow
def test_a_run_searches_by_coordinates_resumes_and_draws_with_its_winner(recipe, tmp_path):
    folder, report = finish(recipe, tmp_path / "whole")
    found = report["stages"]["search"]
    assert found["method"] == "coordinate"
    assert len(found["cells"]) == 9
    assert {*BEST} < found["cells"][0].keys()
    assert [step["axis"] for step in found["descent"]] == list(BEST)
    winner = {axis: found["best"][axis] for axis in BEST}
    scales = report["stages"]["sample"]["scales"]
    assert winner == {"skip": scales["skip"], "emb": scales["emb"], **scales["sites"]}
    assert drawn_from(folder, [], discover(), 1).rescaler.value_of("skip.1") == winner["skip.1"]
    plain = drawn_from(folder, ["rescaler.skip=1.0"], discover(), 1).rescaler
    assert (plain.value_of("skip.1"), plain.emb) == (1.0, winner["emb"])
    for cut in (7, 12, 17):
        finish(recipe, tmp_path / f"{cut}", cut=cut)
        again, _ = finish(recipe, tmp_path / f"{cut}")
        for name in ("cells.jsonl", "rerank.jsonl", "confirm.jsonl"):
            files = [home / "search" / name for home in (folder, again)]
            assert len({file.read_bytes() for file in files}) == 1, (cut, name)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ('grid."skip.9"=[1.0]', "no 'skip.9'; it has skip.0 to skip.3, emb.0 to emb."),
        ("grid.skpi=[1.0]", "no such number; known: skip, emb"),
        ("grid={skip.1=[1.0]}", 'belongs in quotation marks: "skip.1"'),
        ('grid."skip.1"=[1e9]', "less than or equal to 100"),
        ("rounds=0", "greater than or equal to 1"),
        ("rounds=100000", "less than or equal to 100"),
    ],
)
def test_axes_that_the_rescaler_lacks_are_refused_with_their_place(recipe, change, words):
    with pytest.raises(RecipeError, match=r"search\.(grid|rounds)") as caught:
        plan(load(recipe, [f"search.{change}"], discover()))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_absurd_grid_is_refused_with_the_other_method(recipe):
    grid = ", ".join(
        f'"skip.{k}" = [{", ".join(str(v / 10) for v in range(1, 10))}]' for k in range(16)
    )
    text = RECIPE.split("[search.grid]")[0] + f"grid = {{ {grid} }}\n"
    recipe.write_text(text)
    load(recipe, [], discover())
    with pytest.raises(RecipeError, match=r"1.85e\+15 cells") as caught:
        load(recipe, ["search.method='grid'"], discover())
    assert 'set method = "coordinate", which tries 144' in str(caught.value)
    with pytest.raises(RecipeError, match='rounds = 2 is of method = "coordinate"'):
        load(recipe, ["search.method='grid'", "search.rounds=2"], discover())
    with pytest.raises(RecipeError, match=r"1.44e\+04 cells"):
        load(recipe, ["search.rounds=100"], discover())


def test_the_line_of_a_quoted_axis_is_found(recipe):
    recipe.write_text(RECIPE.replace('"emb.2"', '"emb.2x"'))
    line = RECIPE.splitlines().index('"emb.2" = [0.7, 1.0]') + 1
    with pytest.raises(RecipeError, match=r"tiny\.toml"):
        plan(load(recipe, [], discover()))
    recipe.write_text(RECIPE.replace('"emb.2" = [0.7', '"emb.2" = [nan'))
    with pytest.raises(RecipeError, match=rf"tiny\.toml:{line}: search\.grid\.emb\.2"):
        load(recipe, [], discover())


def test_most_cells_counts_a_start_that_is_off_the_grid(recipe):
    made = load(recipe, ["search.rounds=2", "rescaler.skip=0.95"], discover())
    assert most_cells(made) == 1 + 2 * (3 + 2 + 2 + 2)
