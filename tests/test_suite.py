"""A suite: what it says becomes ordinary recipes, which share what can be shared."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from cmkit import PluginError, RecipeError, discover
from cmkit.recipe import load, run_name, stage_keys
from cmkit.suite.cells import cells
from cmkit.suite.groups import selected, unpaid
from cmkit.suite.merge import merge
from cmkit.suite.suite import ROW_KEYS, Change, SuiteTable, load_suite

ROOT = Path(__file__).parent.parent
BASE = """\
name = "base"
dataset = { use = "digits" }
backbone = { use = "adm", channels = 32, channel_mult = [1], num_res_blocks = 1, null_class = true }
objective = { use = "ct", end_scales = 20, distance = "l2" }

[train]
steps = 700
batch = 128

[rescaler]
use = "global"
skip = 0.9

[sampler]
use = "multistep"

[sample]
images = 100

[[metric]]
use = "fidelity"
fid = true
"""
HEAD = """\
name = "digits"
base = "base.toml"
seeds = [0, 1]
baseline = "ct"
budget = { steps = 500 }
"""
NFE = """\
[axis.nfe]
1 = { sampler = { use = "multistep" } }
2 = { sampler = { use = "multistep", sigmas = [0.8] } }
"""
CT = "[row.ct]\n"
EDM = """\
[row.edm]
objective = { use = "edm" }
denoiser.precond = "edm"
axis.nfe = { 3 = { sampler = { use = "heun", steps = 2 } } }
"""
CD = """\
[row.cd]
teacher = { row = "edm" }
objective = { use = "cd", num_sigmas = 18, distance = "l2" }
denoiser = { init = "teacher" }
"""
REGISTRY = discover()


@pytest.fixture
def suite(tmp_path):
    """Write a suite beside its base, and load it."""

    def write(*texts, base=BASE):
        (tmp_path / "base.toml").write_text(base)
        path = tmp_path / "s.toml"
        path.write_text("".join(texts))
        return load_suite(path)

    return write


def by_title(found):
    return {cell.recipe.name: cell for cell in found}


def loaded(suite, **options):
    return by_title(cells(suite, REGISTRY, **options))


# -- what a cell is


def merged(base, *changes):
    tables = json.loads(json.dumps(base))
    for n, change in enumerate(changes):
        merge(tables, Change((), change, (str(n),)), {})
    return tables


@pytest.mark.parametrize(
    ("base", "change", "result"),
    [
        ({"train": {"lr": 1, "batch": 2}}, {"train": {"lr": 3}}, {"train": {"lr": 3, "batch": 2}}),
        ({"a": {"use": "x", "k": 1}}, {"a": {"k": 2}}, {"a": {"use": "x", "k": 2}}),
        ({"a": {"use": "x", "k": 1}}, {"a": {"use": "x"}}, {"a": {"use": "x"}}),
        ({"a": {"k": [1, 2]}}, {"a": {"k": [3]}}, {"a": {"k": [3]}}),
        ({"a": {"k": 1}}, {"a": False}, {}),
        ({}, {"a": False}, {}),
        ({"a": {"k": True}}, {"a": {"k": False}}, {"a": {"k": False}}),
        ({"a": {"b": {"k": 1}}}, {"a": {"b": False}}, {"a": {}}),
        ({"m": [{"k": 1}]}, {"m": False}, {}),
        ({"m": [{"k": 1}]}, {"m": {"1": {"use": "x"}}}, {"m": [{"k": 1}, {"use": "x"}]}),
        ({"m": [{"k": 1}]}, {"m": {"2": {"use": "x"}}}, {"m": {"2": {"use": "x"}}}),
        ({"m": [{"use": "x"}, {"k": 1}]}, {"m": {"1": {"k": 2}}}, {"m": [{"use": "x"}, {"k": 2}]}),
        ({}, {"a": {"b": {"c": 1}}}, {"a": {"b": {"c": 1}}}),
        ({"a": 1}, {}, {"a": 1}),
    ],
)
def test_a_change_is_merged_a_part_and_a_list_replaced_and_false_removes(base, change, result):
    assert merged(base, change) == result


def test_a_later_change_wins_and_the_base_stays_as_it_is(suite):
    s = suite(
        HEAD,
        '[axis]\n"train.lr" = [1e-3, 1e-4]\n',
        "[row.ct]\ntrain.lr = 1e-2\nrescaler = false\n[row.plain]\ntrain.batch = 64\n",
    )
    before = json.dumps(s.base)
    found = loaded(s)
    assert json.dumps(s.base) == before
    assert found["ct-0.001-s0"].recipe.train.lr == 1e-3
    assert found["ct-0.001-s0"].recipe.rescaler is None
    assert found["plain-0.0001-s1"].recipe.train.batch == 64
    assert found["plain-0.0001-s1"].recipe.rescaler.skip == 0.9


def test_cells_come_in_the_order_of_rows_axes_and_seeds_and_are_named_after_them(suite):
    found = cells(suite(HEAD, NFE, CT, EDM), REGISTRY)
    assert [cell.recipe.name for cell in found] == [
        "ct-1-s0", "ct-1-s1", "ct-2-s0", "ct-2-s1", "edm-3-s0", "edm-3-s1",
    ]  # fmt: skip
    assert [(c.row, dict(c.axis), c.seed) for c in found[2:5]] == [
        ("ct", {"nfe": "2"}, 0),
        ("ct", {"nfe": "2"}, 1),
        ("edm", {"nfe": "3"}, 0),
    ]
    assert all(cell.recipe.seed == cell.seed for cell in found)
    assert all(re.fullmatch(rf"{c.recipe.name}-[0-9a-f]{{8}}", c.name) for c in found)


def test_a_cell_is_the_recipe_that_its_file_says_and_has_its_key(suite, tmp_path):
    for cell in cells(suite(HEAD, NFE, CT, EDM, CD), REGISTRY):
        path = tmp_path / "cell.toml"
        path.write_text(cell.recipe.toml())
        alone = load(path, [], REGISTRY)
        assert run_name(alone) == cell.name
        assert stage_keys(alone) == stage_keys(cell.recipe)
        assert alone.resolved == cell.recipe.resolved


def test_a_row_has_its_own_values_of_an_axis_or_chooses_or_leaves_it_out(suite):
    own = "axis.nfe = [2]\n[row.b]\nsampler.sigmas = [3.0]\naxis.nfe = false\n"
    found = loaded(suite(HEAD.replace('"ct"', '"a"'), NFE, "[row.a]\n", own))
    assert list(found) == ["a-2-s0", "a-2-s1", "b-s0", "b-s1"]
    assert found["b-s0"].recipe.sampler.sigmas == (3.0,)


def test_an_axis_is_any_key_whose_values_may_be_parts(suite):
    axis = '[axis]\nrescaler = [false, { use = "global", skip = 0.8 }]\n"metric.0.kid" = [true]\n'
    found = loaded(suite(HEAD, axis, CT))
    assert list(found) == ["ct-off-on-s0", "ct-off-on-s1", "ct-global-on-s0", "ct-global-on-s1"]
    assert found["ct-off-on-s0"].recipe.rescaler is None
    assert found["ct-global-on-s0"].recipe.rescaler.skip == 0.8
    assert found["ct-global-on-s0"].recipe.metric[0].kid


def test_the_base_may_be_a_recipe_that_comes_with_cmkit(suite):
    s = suite(HEAD.replace("base.toml", "digits_rescaled_ct"), "[row.ct]\nsearch = false\n")
    assert loaded(s)["ct-s0"].recipe.train.lr == 1e-3


# -- what cells share


def test_cells_that_differ_after_training_share_it_and_wait_for_the_first(suite):
    axes = NFE + '[axis]\nrescaler = [false, { use = "global", skip = 0.8 }]\n'
    found = loaded(suite(HEAD, axes, CT))
    for seed in (0, 1):
        first = found[f"ct-1-off-s{seed}"]
        assert first.group == first.name
        assert first.needs == ()
        for other in ("1-global", "2-off", "2-global"):
            cell = found[f"ct-{other}-s{seed}"]
            assert (cell.group, cell.needs) == (first.name, (first.name,))
    keys = {stage_keys(cell.recipe)["train"] for cell in found.values()}
    assert len(keys) == 2


def test_a_teacher_is_a_training_alone_whatever_its_row_does_besides(suite):
    rows = EDM.replace("axis.nfe = { 3", "axis.nfe = { 9 = { sampler = { use = "
                       '"heun", steps = 5 } }, 3')  # fmt: skip
    found = loaded(suite(HEAD, NFE, rows, CD, CT))
    for seed in (0, 1):
        teacher = found[f"edm-train-s{seed}"]
        assert (teacher.alone, list(teacher.recipe.stages)) == (True, ["train"])
        assert found[f"edm-9-s{seed}"].needs == found[f"edm-3-s{seed}"].needs == (teacher.name,)
        for nfe in ("1", "2"):
            cell = found[f"cd-{nfe}-s{seed}"]
            assert cell.recipe.teacher.table.weights == f"run:{teacher.name}"
            assert cell.needs[0] == teacher.name
        assert found[f"cd-2-s{seed}"].group == found[f"cd-1-s{seed}"].name
        assert found[f"cd-2-s{seed}"].needs == (teacher.name, found[f"cd-1-s{seed}"].name)
    more = loaded(suite(HEAD, NFE, rows, "sample.images = 7\n", CD, CT))
    assert more["edm-3-s0"].name != found["edm-3-s0"].name
    assert more["cd-1-s0"].name == found["cd-1-s0"].name


def test_a_teacher_has_the_students_value_of_an_axis_that_changes_training(suite):
    axis = '[axis]\n"denoiser.sigma_data" = [0.5, 0.4]\n'
    edm = EDM.partition("axis")[0]
    found = loaded(suite(HEAD, axis, CD, edm, CT))
    for value in ("0.5", "0.4"):
        (teacher,) = found[f"edm-{value}-s1"].needs
        assert found[f"cd-{value}-s1"].recipe.teacher.table.weights == f"run:{teacher}"


def test_a_row_may_start_from_another_rows_weights_and_two_rows_share_one_training(suite):
    rows = (
        'denoiser = { weights = { row = "edm" }, precond = "edm" }\n[row.twin]\nrescaler.skip=1.0\n'
    )
    found = loaded(suite(HEAD, CT, EDM.partition("axis")[0], "[row.ect]\n", rows))
    assert found["ect-s0"].recipe.denoiser.weights == f"run:{found['edm-train-s0'].name}"
    assert found["twin-s1"].group == found["ct-s1"].name


def test_a_teacher_may_have_a_teacher(suite):
    again = CD.replace("row.cd", "row.again").replace('"edm"', '"cd"')
    again = again.replace('{ row = "cd" }', '{ row = "cd", precond = "consistency" }')
    found = loaded(suite(HEAD, NFE, again, CD, EDM, CT))
    middle = found["cd-train-s0"]
    assert (found["again-1-s0"].needs, middle.needs) == (
        (middle.name,),
        (found["edm-train-s0"].name,),
    )


# -- budgets


def steps(suite, **options):
    return {name: cell.recipe.train.steps for name, cell in loaded(suite, **options).items()}


def test_a_budget_of_images_is_steps_of_the_rows_batch_rounded_down(suite):
    head = HEAD.replace("steps = 500", "images = 64_100")
    rows = CT + "[row.b]\ntrain.batch = 64\n[row.free]\nbudget = false\ntrain.steps = 7\n"
    found = steps(suite(head, rows))
    assert (found["ct-s0"], found["b-s0"], found["free-s0"]) == (500, 1001, 7)


def test_a_budget_of_evaluations_or_seconds_asks_what_a_step_costs_once_for_each_training(suite):
    asked = []

    def cost(recipe):
        asked.append(recipe.name)
        return {"CT": 4, "CD": 6, "EDM": 3}[type(recipe.objective).__name__] / 10

    for unit in ("evaluations", "seconds"):
        s = suite(HEAD.replace("steps = 500", f"{unit} = 60.0"), NFE, CT, EDM, CD)
        assert s.measured
        found = steps(s, cost=cost)
        assert {found[f"ct-{nfe}-s{seed}"] for nfe in (1, 2) for seed in (0, 1)} == {150}
        assert (found["edm-3-s0"], found["cd-1-s1"]) == (200, 100)
        assert sorted(asked) == ["cd-1-s0", "ct-1-s0", "edm-3-s0"]
        asked.clear()
        assert len(cells(s, REGISTRY)) == 12


def test_a_teacher_is_paid_from_the_students_budget_where_the_suite_says_so(suite):
    head = HEAD.replace("steps = 500", "steps = 500, teacher = true")
    edm = EDM + "budget = false\ntrain.steps = 200\n"
    found = steps(suite(head, NFE, CT, edm, CD))
    assert (found["edm-3-s0"], found["cd-1-s0"], found["ct-1-s0"]) == (200, 300, 500)
    with pytest.raises(
        RecipeError, match=r"s.toml:5: budget.steps = 500: nothing is left for cd-1"
    ):
        loaded(suite(head, NFE, CT, EDM, CD))


def test_cells_that_have_all_values_of_a_table_are_excluded(suite):
    exclude = "exclude = [{ nfe = 1, rescaler = false }, { row = 'cd', nfe = '2' }]\n"
    axes = '[axis]\nrescaler = [false, { use = "global", skip = 0.8 }]\n' + NFE
    s = suite(HEAD, exclude, axes, CT, EDM + "axis.rescaler = [false]\n", CD)
    assert [title for title in loaded(s) if title.endswith("s0")] == [
        "ct-off-2-s0", "ct-global-1-s0", "ct-global-2-s0", "edm-train-s0", "edm-off-3-s0",
        "cd-global-1-s0",
    ]  # fmt: skip
    assert s.count() == len([cell for cell in loaded(s).values() if not cell.alone]) == 10


def test_cells_that_are_chosen_bring_what_they_need(suite):
    found = cells(suite(HEAD, NFE, CT, EDM, CD), REGISTRY)
    chosen = selected(found, {"row": "cd", "nfe": "2", "seed": "1"})
    assert {(cell.row, cell.seed) for cell in chosen} == {("edm", 1), ("cd", 1)}
    assert "cd-2-s1" in by_title(chosen)
    assert [cell for cell in found if cell in chosen] == chosen
    assert {need for cell in chosen for need in cell.needs} <= {cell.name for cell in chosen}
    assert {cell.row for cell in selected(found, {"objective": "ct"})} == {"ct"}
    with pytest.raises(RecipeError, match="--where row=dc: no cell is so"):
        selected(found, {"row": "dc"})
    with pytest.raises(RecipeError, match="--where nef: no such key; did you mean 'nfe'"):
        selected(found, {"nef": "1"})


def test_costs_that_others_bore_are_said(suite):
    found = cells(suite(HEAD, NFE, CT, EDM, CD), REGISTRY)
    assert list(unpaid(found)) == ["cd: the costs leave out the training of edm that is used"]
    assert not list(unpaid([cell for cell in found if cell.row == "ct"]))


def test_the_baseline_of_an_axis_is_a_label_of_it(suite):
    assert suite(HEAD.replace('"ct"', "{ nfe = 2 }"), NFE, CT).table.baseline == {"nfe": "2"}
    axis = "[axis]\nrescaler = [false]\n"
    found = suite(HEAD.replace('"ct"', "{ rescaler = false }"), axis, CT)
    assert found.table.baseline == {"rescaler": "off"}


def test_the_suite_on_rescaling_shares_the_trainings_of_the_digits_suite():
    def trainings(name, without):
        s = load_suite(ROOT / "benchmarks" / "suites" / f"{name}.toml")
        rows = {key: row for key, row in s.rows.items() if key not in without}
        table = s.table.model_copy(update={"seeds": (0, 1)})
        found = cells(replace(s, rows=rows, table=table), REGISTRY, cost=lambda recipe: 512.0)
        keys = {(cell.row, cell.seed, stage_keys(cell.recipe)["train"]) for cell in found}
        return keys, found

    outside = ("ect", "meanflow", "scm")  # of packages that may not be here
    every, _ = trainings("digits", outside)
    shared, found = trainings("rescaling", outside)
    assert len(shared) == 2 * 6
    assert shared < every
    places = [(cell.axis["nfe"], cell.axis["rescaling"]) for cell in found if cell.row == "ct"]
    assert ("2", "per_timestep") in places
    assert ("1", "per_timestep") not in places
    for cell in (cell for cell in found if cell.axis):
        held = [metric.heldout for metric in cell.recipe.metric]
        assert held == [False, False] + [True] * (cell.row != "edm")
        assert cell.recipe.search is None or cell.recipe.search.minimize == "fid"


def test_the_suite_of_the_page_is_one(suite):
    page = (ROOT / "docs" / "suites.md").read_text("utf-8")
    text = page.partition("```toml\n")[2].partition("```")[0]
    found = loaded(suite(text.replace("digits_ct.toml", "base.toml")))
    assert len(found) == 3 * (4 + 1 + 4 + 1)
    assert found["cd-global-2-s1"].group == found["cd-off-1-s1"].name


# -- bad input


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        ((HEAD,), "s.toml: no cell: add a row, such as [row.ct]"),
        ((HEAD.replace("[0, 1]", "[]"), CT), "s.toml:3: seeds = []: "),
        ((HEAD.replace("[0, 1]", "[0, 0]"), CT), "s.toml:3: seeds = [0, 0]: 0 stands twice"),
        ((HEAD.replace("seeds", "seed"), CT), "s.toml:3: seed: unknown key; did you mean 'seeds'?"),
        ((HEAD.replace('"ct"', '"cd"'), CT), 's.toml:4: baseline = "cd": no such row; did'),
        (
            (HEAD.replace('"ct"', "{ nef = 1 }"), NFE, CT),
            "s.toml:4: baseline.nef: no such axis; did you mean 'nfe'?",
        ),
        (
            (HEAD.replace('"ct"', "{ nfe = 3 }"), NFE, CT),
            "s.toml:4: baseline.nfe = 3: no such value; known: 1, 2",
        ),
        ((HEAD.replace('"ct"', "{}"), NFE, CT), "s.toml:4: baseline = {}: "),
        ((HEAD, "exclude = [{}]\n", CT), "s.toml:6: exclude"),
        ((HEAD, "exclude = [{ row = 'tc' }]\n", CT), "= \"tc\": no such value; did you mean 'ct'?"),
        (
            (HEAD, "exclude = [{ nef = 1 }]\n", NFE, CT),
            "s.toml:6: exclude.0.nef: no such axis;",
        ),
        ((HEAD, "exclude = [{ nfe = 3 }]\n", NFE, CT), "exclude.0.nfe = 3: no such value; known"),
        ((HEAD, "exclude = [{ row = 'ct' }]\n", NFE, CT, EDM), "row.ct: all of its cells are"),
        ((HEAD.replace("base.toml", "bose.toml"), CT), 's.toml:2: base = "bose.toml": no such'),
        ((HEAD.replace("steps = 500", "step = 500"), CT), "budget.step: unknown key; did you mean"),
        ((HEAD.replace("500", "500, images = 9"), CT), "one unit, not steps and images; drop"),
        ((HEAD.replace("steps = 500", ""), CT), "s.toml:5: budget: say one of steps, images"),
        ((HEAD.replace("budget", "#"), CT), "s.toml:6: row.ct: it trains, and the suite has no"),
        ((HEAD, "[axis]\nnfe = []\n", CT), "s.toml:7: axis.nfe: no value"),
        (
            (HEAD, '[axis]\n"sampelr.steps" = [1]\n', CT),
            "unknown key of a recipe; did you mean 'sampler'?",
        ),
        (
            (HEAD, '[axis]\n"train.bacth" = [1, 2]\n', CT),
            "s.toml:7: axis.train.bacth: unknown key; did you mean 'batch'? (in row ct)",
        ),
        ((HEAD, "[axis]\nseed = [1]\n", CT), "axis.seed: unknown key of a recipe; say seeds"),
        (
            (HEAD, "[axis]\ntrain.lr = [1]\n", CT),
            'expected "table.key" = [its values], in quotation',
        ),
        (
            (HEAD, NFE.replace("sampler =", "smapler ="), CT),
            "s.toml:7: axis.nfe.1.smapler: unknown",
        ),
        (
            (HEAD, '[axis]\n"train.lr" = [0.1, 0.1]\n', CT),
            "the value 0.1 is called '0.1' like another",
        ),
        (
            (HEAD, '[axis]\n"train.betas" = [[0, 0]]\n', CT),
            "the value [0, 0] has no short name; name",
        ),
        ((HEAD, '[axis]\n"train.steps" = [1, 2]\n', CT), "axis.train.steps: the budget decides"),
        ((HEAD, CT, CT), "s.toml:7: not TOML: [row.ct] stands twice; join the two, or"),
        ((HEAD, "[row.ct]\nobjetive = 3\n"), "s.toml:7: row.ct.objetive: unknown key; did you"),
        ((HEAD, "[row.ct]\nname = 'x'\n"), "s.toml:7: row.ct.name: a row has none: a cell is"),
        ((HEAD, "[row.ct]\nseed = 1\n"), "s.toml:7: row.ct.seed: a row has none: say seeds"),
        ((HEAD, "[row.ct]\nbudget = {steps = 1}\n"), "s.toml:7: row.ct.budget"),
        ((HEAD, "[row.ct]\ntrain.steps = 1\n"), "s.toml:7: row.ct.train.steps: the budget decides"),
        ((HEAD, NFE, "[row.ct]\naxis.nef = [1]\n"), "s.toml:10: row.ct.axis.nef: the suite has no"),
        (
            (HEAD, NFE, "[row.ct]\naxis.nfe = [3]\n"),
            "s.toml:10: row.ct.axis.nfe = 3: no such value",
        ),
        (
            (HEAD, "[row.ct]\nobjective = { use = 'ict', scales = 3 }\n"),
            "row.ct.objective.scales: unk",
        ),
        (
            (HEAD, "[row.ct]\n\nobjective = { use = 'itc' }\n"),
            "s.toml:8: row.ct.objective.use: no objective is called 'itc'; did you mean 'ict'?",
        ),
        (
            (HEAD, "[row.ct]\nobjective.end_scales = -2\n"),
            "s.toml:7: row.ct.objective.end_scales = -2",
        ),
        ((HEAD, "[row.ct]\ndenoiser.sigma_max = 0.001\n"), "s.toml:7: row.ct.denoiser"),
        ((HEAD, "[row.ct]\nsampler = 3\n"), "s.toml:7: row.ct.sampler: expected a table such as"),
        (
            (HEAD, "[row.ct]\nteacher = { row = 'edn' }\n", EDM.partition("axis")[0]),
            "s.toml:7: row.ct.teacher.row = \"edn\": no such row; did you mean 'edm'?",
        ),
        (
            (HEAD, "[row.ct]\nteacher.row = 'old'\n", "[row.old]\ntrain = false\n"),
            's.toml:7: row.ct.teacher.row = "old": that row trains nothing; name one',
        ),
        (
            (HEAD, "[row.ct]\nteacher.row = 'b'\n[row.b]\ndenoiser.weights = { row = 'ct' }\n"),
            "each waits for the training of the next: ct -> b -> ct; break the circle",
        ),
        ((HEAD, "[row.ct]\nteacher.row = 'ct'\n"), "of the next: ct -> ct; break the circle"),
        ((HEAD, "[row.ct]\nteacher = { row = 'a', weights = 'b' }\n"), "a row and weights; drop"),
        (
            (HEAD, NFE, EDM.replace("3 =", "a = { train.lr = 1e-3 }, b ="), CD, CT),
            "cannot tell which training is meant, edm-a-s0 and edm-b-s0 differ",
        ),
        (
            (HEAD, CT, "[row.too]\n"),
            "s.toml:7: row.too: cells ct-s0 and too-s0 are the same run: drop one of the rows",
        ),
        (
            (HEAD, '[axis]\n"train.log_every" = [1, 2]\n', CT),
            "cells ct-1-s0 and ct-2-s0 are the same run: an axis changes nothing in it",
        ),
        (
            (HEAD, NFE, CT, "[row.ct-1]\ntrain.lr = 1.0\naxis.nfe = false\n"),
            "two cells are called 'ct-1-s0', the other of row ct",
        ),
        ((HEAD.replace("[0, 1]", "[]"), CT), "s.toml:3: seeds = []: name at least 1"),
        (("exclude = [{}]\n", HEAD, CT), "s.toml:1: exclude.0 = {}: name at least 1"),
        ((HEAD.replace("[0, 1]", "[-1]"), CT), "seeds.0 = -1: should be greater than or equal"),
        (
            (HEAD.replace('"ct"', f'"{"x" * 62}"'), f"[row.{'x' * 62}]\n"),
            "of more than 64 characters",
        ),
    ],
)
def test_a_fault_of_a_suite_is_one_line_with_its_place_and_cure(suite, texts, said):
    with pytest.raises((RecipeError, PluginError)) as caught:
        cells(suite(*texts), REGISTRY)
    assert said in str(caught.value)
    assert not re.search(r"\n|more\)", str(caught.value))


def test_a_fault_of_the_base_names_the_base(suite):
    for old, new, said in (
        ("batch = 128", "batch = -1", "base.toml:8: train.batch = -1"),
        ("batch = 128", "", "base.toml:6: train.batch: missing key (in row ct of "),
        ("[sampler]", "[smapler]", "base.toml:14: smapler: unknown key"),
        ("[sampler]", "[sampler", "base.toml:14: not TOML"),
    ):
        with pytest.raises(RecipeError, match=re.escape(said)):
            cells(suite(HEAD, CT, base=BASE.replace(old, new)), REGISTRY)


def test_many_cells_are_refused_before_any_is_loaded(suite):
    axes = '[axis]\n"train.lr" = [{}]\n"objective.use" = ["nothing"]\n'
    values = ", ".join(f"{n}e-6" for n in range(1, 5001))
    s = suite(HEAD, axes.format(values), CT)
    with pytest.raises(RecipeError) as caught:
        cells(s, REGISTRY)
    assert str(caught.value).endswith(
        "s.toml: 10,000 cells, more than 200: 500 steps a training, at most 5e+06 in all; name"
        " fewer values, rows or seeds, or say --yes"
    )


# -- costs


@pytest.fixture
def of_objective(suite):
    """Evaluations a training step of an objective takes for each image."""
    from cmkit.suite.cost import per_image

    recipe = loaded(suite(HEAD, NFE, CT, EDM, CD))["cd-1-s0"].recipe

    def count(objective, **tables):
        return per_image(replace(recipe, objective=objective, **tables))

    return count


def test_evaluations_of_a_training_step_are_those_that_its_paper_counts(of_objective):
    for name, options, evaluations in (
        ("ct", {"distance": "l2"}, 3 + 1),
        ("ict", {}, 3 + 1),
        ("edm", {}, 3),
        ("cd", {"distance": "l2"}, 3 + 2 + 1),
        ("cd", {"distance": "l2", "solver": "euler"}, 3 + 1 + 1),
        ("pd", {}, 3 + 2),
        ("lcm", {"num_sigmas": 100, "distance": "l2"}, 3 + 2 * 1 + 1),
    ):
        model = REGISTRY.load("objective", name)
        assert of_objective(model(**options)) == evaluations, name


@pytest.mark.slow
def test_evaluations_of_ctm_follow_from_its_gaps(of_objective):
    """Jump, score matching: 3 each; the frozen jump to sigma_min: 1, passed back twice: for the
    gradient and for the adaptive weight; two jumps of the target; Heun's solver over the gap."""
    model = REGISTRY.load("objective", "ctm")
    common = {"num_sigmas": 18, "distance": "l2"}
    assert of_objective(model(max_gap=1, **common)) == 3 + 3 + (1 + 2) + 2 + 2
    mean_gap = (1 + 4 + 9) / (1 + 2 + 3)
    found = of_objective(model(max_gap=3, **common))
    assert found == pytest.approx(11 + 2 * mean_gap, rel=0.03)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("package", "module", "name", "options", "evaluations"),
    [
        ("scm", "cmkit_scm.scm", "SCM", {"learned_weight": False}, 3 + 2),
        ("scm", "cmkit_scm.scm", "SCM", {"learned_weight": False, "distil": True}, 3 + 2 + 1),
        ("scm", "cmkit_scm.scm", "SCM", {"learned_weight": False, "derivative": "difference"}, 6),
        ("meanflow", "cmkit_meanflow.objective", "MeanFlow", {}, 3 + 2),
    ],
)
def test_a_derivative_in_forward_mode_is_one_more_pass(
    of_objective, monkeypatch, package, module, name, options, evaluations
):
    import importlib

    monkeypatch.syspath_prepend(ROOT / "plugins" / f"cmkit-{package}" / "src")
    model = getattr(importlib.import_module(module), name)
    assert of_objective(model(**options)) == evaluations


def test_other_networks_of_a_step_count_by_their_operations(of_objective, suite):
    import torch

    from cmkit import Companion
    from cmkit.plan import plan

    recipe = loaded(suite(HEAD, CT))["ct-s0"].recipe
    flops = plan(recipe).flops
    pixels, width = 64, flops // (2 * 64 * 64)

    class Beside(REGISTRY.load("objective", "edm")):
        def companions(self, data):
            return {"beside": Companion(torch.nn.Linear(pixels, width))}

        def loss(self, models, x0, cond, phase, rng):
            beside = models.companions["beside"](x0.flatten(1)).mean(1)
            return super().loss(models, x0, cond, phase, rng) + beside

    share = 2 * pixels * width / flops
    assert of_objective(Beside()) == pytest.approx(3 + 2 * share)  # no gradient of its input


# -- the command


@pytest.mark.slow
def test_check_prints_cells_what_they_share_and_what_they_cost(cmkit, tmp_path, suite):
    suite(HEAD, NFE, CT, EDM, CD)
    code, out, err = cmkit("bench", tmp_path / "s.toml", "--check")
    assert (code, err) == (0, "")
    assert re.search(
        r"cd-2-s1-\w{8} +cd +2 +1 +training of cd-1-s1-\w+; teacher edm-train-s1-\w+\n", out
    )
    assert re.search(
        r"edm-train-s0-\w+ trains\n  -> edm-3-s0-\w+ samples it\n  -> cd-1-s0-\w+ starts from it\n",
        out,
    )
    assert re.search(r"cd-1 +\S+ +1 +500 +64,000 +384,000 +100 ", out)
    assert re.search(r"cd-2 +\S+ +2 +200 ", out)
    assert re.search(r"all, 2 seeds +3,000 +384,000 +1,664,000 ", out)
    suite(HEAD, NFE, CT)
    code, out, _ = cmkit("bench", tmp_path / "s.toml", "--check", "--json")
    document = json.loads(out)
    assert [cell["axis"] for cell in document["cells"]] == [{"nfe": n} for n in "1122"]
    assert [cell["cost"]["trained"] for cell in document["cells"]] == [500 * 128 * 4] * 2 + [0] * 2


def test_check_knows_the_scalings_of_weights_that_are_yet_to_come(cmkit, tmp_path, suite):
    ve = EDM.partition("axis")[0].replace('precond = "edm"', 'precond = "ve"')
    suite(HEAD, CT, ve, "[row.ect]\ndenoiser.weights = { row = 'edm' }\n")
    code, _, err = cmkit("bench", tmp_path / "s.toml", "--check")
    assert code == 2
    assert "s.toml:11: row.ect.denoiser.weights: run:edm-train-s0-" in err
    assert 'was trained under other scalings; set the precond beside it to { use = "ve"' in err


def test_a_bad_suite_is_one_line_and_exit_code_2(cmkit, tmp_path, suite):
    suite(HEAD, "[row.ct]\nobjective.end_scale = 2\n".replace("[row.ct]", "[row.ct]"))
    code, out, err = cmkit("bench", tmp_path / "s.toml", "--check")
    assert (code, out) == (2, "")
    assert err == (
        f"error: {tmp_path}/s.toml:7: row.ct.objective.end_scale: unknown key; did you mean"
        " 'end_scales'?\n"
    )
    code, _, err = cmkit("bench", tmp_path / "none.toml", "--check")
    assert code == 2
    assert "none.toml: cannot be read: No such file or directory" in err


def test_yes_takes_more_cells(cmkit, tmp_path, suite, monkeypatch):
    monkeypatch.setattr("cmkit.suite.cells.MOST", 3)
    monkeypatch.setattr("cmkit.cli.bench._check", lambda *_: None)
    suite(HEAD, NFE, CT)
    assert cmkit("bench", tmp_path / "s.toml", "--check")[0] == 2
    assert cmkit("bench", tmp_path / "s.toml", "--check", "--yes")[0] == 0


def test_the_schema_of_suites_has_their_keys_and_those_of_every_part(cmkit):
    code, out, _ = cmkit("schema", "--suite")
    assert code == 0
    document = json.loads(out)
    assert set(document["properties"]) == set(SuiteTable.model_fields)
    assert document["additionalProperties"] is False
    changes = document["$defs"]["changes"]["properties"]
    own = document["properties"]["row"]["additionalProperties"]
    assert {*changes, *own["properties"]} == set(ROW_KEYS)
    assert own["unevaluatedProperties"] is False
    assert "objective.ict" in document["$defs"]
    assert "required" not in document["$defs"]["train"]
    by_number = changes["metric"]["anyOf"][-1]["patternProperties"]  # metric.0.kid = true
    assert [bool(re.search(p, key)) for p in by_number for key in ("0", "12", "kid")] == [1, 1, 0]
    for reference in re.findall(r'"\$ref": "#/\$defs/([^"]+)"', out):
        assert reference in document["$defs"]
