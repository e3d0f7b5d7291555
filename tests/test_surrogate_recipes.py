"""What recipes may say of a search by interpolation, what it costs, and whole runs of it."""

import itertools
import json

import numpy as np
import pytest

from cmkit import RecipeError, discover
from cmkit.plan import plan
from cmkit.recipe import load
from cmkit.runs import run
from cmkit.search.interpolation import basis
from cmkit.stop import StopSignal
from cmkit.suite.cost import _costs
from tests.test_surrogate import CPU, RECIPE


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    path = tmp_path_factory.mktemp("recipe") / "tiny.toml"
    path.write_text(RECIPE)
    return path


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
