"""What a stranger's package must be: public names alone, quick to list, and whole recipes."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import cmkit
from cmkit.plan import plan
from cmkit.plugins import register
from cmkit.recipe import load, run_name
from cmkit.train import start, train

HOME = Path(__file__).parent.parent
RECIPES = HOME / "recipes"
PROJECT = tomllib.loads((HOME / "pyproject.toml").read_text("utf-8"))
ENTRIES = [
    EntryPoint(name, value, "cmkit")
    for name, value in PROJECT["project"]["entry-points"]["cmkit"].items()
]
MODULES = sorted((HOME / "src" / "cmkit_ect").glob("*.py"))
CPU = torch.device("cpu")
SMALL = [
    "backbone.channel_mult=[1]",
    "backbone.num_res_blocks=1",
    "backbone.attention_resolutions=[]",
    "backbone.num_head_channels=16",
    "train.batch=8",
    "train.warmup=0",
    "train.log_every=1",
]


@pytest.fixture(scope="module")
def registry():
    others = [entry for entry in entry_points(group="cmkit") if entry.name != "ect"]
    return register([*others, *ENTRIES])


def test_the_entry_point_offers_the_parts_with_their_paper(registry):
    offered = [row for row in registry.rows if row.plugin and "cmkit_ect" in row.plugin.target]
    assert {row.kind for row in offered if row.name == "ect"} == {"objective", "sampler"}
    assert all("arXiv:2406.14548" in row.plugin.cite for row in offered)
    for row in offered:
        assert registry.load(row.kind, "ect")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_a_module_uses_public_names_of_cmkit_alone(path):
    tree = ast.parse(path.read_text("utf-8"))
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            assert all(not a.name.startswith(("cmkit.", "cmkit_std")) for a in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module == "cmkit.functional":
            assert {a.name for a in node.names} <= set(cmkit.functional.__all__)
        elif isinstance(node, ast.ImportFrom):
            assert not node.module.startswith(("cmkit.", "cmkit_std"))
            names |= {a.name for a in node.names} if node.module == "cmkit" else set()
        elif isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "cmkit":
            names.add(node.attr)
    assert names <= set(cmkit.__all__)


def test_the_parts_can_be_listed_and_checked_without_torch():
    names = ", ".join(f"cmkit_ect.{path.stem}" for path in MODULES)
    code = f"import sys, {names}; sys.exit('torch' in sys.modules)"
    path = str(HOME / "src")
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = [{path!r}, *{sys.path!r}]; {code}"],
        check=False,
    )
    assert done.returncode == 0


@pytest.mark.parametrize(
    ("override", "place", "cure"),
    [
        ("objective.q=1.0", "objective.q = 1.0", "greater than 1"),
        ("objective.q=0.5", "objective.q = 0.5", "greater than 1"),
        ("objective.k=-1.0", "objective.k = -1.0", "greater than or equal to 0"),
        ("objective.b=-0.1", "objective.b = -0.1", "greater than or equal to 0"),
        ("objective.c=-0.1", "objective.c = -0.1", "greater than or equal to 0"),
        ("objective.p_std=0.0", "objective.p_std = 0.0", "greater than 0"),
        ("objective.stage_steps=0", "objective.stage_steps = 0", "greater than or equal to 1"),
        ("objective.stages=3", "objective.stages", "stage_steps"),
        ("sampler.sigmas=[0.8, 0.8]", "sampler", "must fall"),
        ("sampler.sigmas=[0.0]", "sampler.sigmas", "greater than 0"),
    ],
)
def test_a_bad_value_is_refused_in_one_line_that_says_where_and_why(
    registry, override, place, cure
):
    with pytest.raises(cmkit.RecipeError) as caught:
        load(RECIPES / "digits_ect.toml", [override], registry)
    message = str(caught.value)
    assert "\n" not in message
    assert place in message
    assert cure in message


def test_scalings_that_are_no_identity_at_0_are_refused(registry):
    recipe = load(RECIPES / "digits_ect.toml", ['denoiser.precond="consistency"'], registry)
    with pytest.raises(
        cmkit.RecipeError, match=r'denoiser.precond = .* set denoiser.precond = "edm"'
    ):
        plan(recipe)


def test_the_pair_of_recipes_fits_together_and_takes_the_budget_of_improved_training(registry):
    teacher = load(RECIPES / "digits_teacher.toml", [], registry)
    student = load(RECIPES / "digits_ect.toml", [], registry)
    other = load(HOME.parent.parent / "recipes" / "digits_rescaled_ct.toml", [], registry)
    assert student.denoiser.weights == f"run:{run_name(teacher)}"
    assert teacher.train.steps + student.train.steps == other.train.steps
    for key in ("dataset", "backbone"):
        assert teacher.resolved[key] == student.resolved[key] == other.resolved[key]
    assert teacher.train.batch == student.train.batch == other.train.batch


@pytest.mark.parametrize(
    ("name", "steps", "q", "stages", "ema"),
    [("ect_cifar10", 200_000, 2.0, 8, 0.9999), ("ect_cifar10_1hour", 8_000, 256.0, 1, 0.9993)],
)
def test_settings_on_cifar10_are_the_official_ones(name, steps, q, stages, ema, registry):
    """run_ecm.sh and run_ecm_1hour.sh of locuslab/ect."""
    recipe = load(RECIPES / f"{name}.toml", [], registry)
    assert recipe.denoiser.weights in recipe.backbone.published
    assert (recipe.train.steps, recipe.train.batch, recipe.train.lr) == (steps, 128, 1e-4)
    assert (recipe.train.ema, recipe.train.optimizer) == ((ema,), "radam")
    assert (recipe.objective.q, recipe.objective.c) == (q, 0.0)
    last = recipe.objective.phase(steps - 1, steps)
    assert (last.log["stage"] + 1, recipe.backbone.dropout) == (stages, 0.2)


def test_settings_on_imagenet64_are_the_official_ones(registry):
    """run_imgnet_ecm.sh and preset edm2-img64-s of locuslab/ect, branch imgnet."""
    recipe = load(RECIPES / "ect_imagenet64.toml", [], registry)
    table, objective, backbone = recipe.train, recipe.objective, recipe.backbone
    assert recipe.denoiser.weights in backbone.published
    assert (table.steps, table.batch, table.lr, table.sqrt_decay) == (100_000, 128, 1e-3, 2000)
    assert (table.optimizer, table.betas, table.weight_decay) == ("adamw", (0.9, 0.99), 0.0)
    assert (table.ema, table.ema_warmup) == ((0.9999,), False)
    assert (objective.q, objective.k, objective.b, objective.c) == (4.0, 8.0, 1.0, 0.06)
    assert (objective.p_mean, objective.p_std, objective.weighting) == (-0.8, 1.6, "snr")
    assert (backbone.channels, backbone.dropout, backbone.dropout_resolution) == (192, 0.4, 16)
    last = objective.phase(table.steps - 1, table.steps)
    assert last.log["stage"] == 3


@pytest.mark.parametrize("name", sorted(path.stem for path in RECIPES.glob("*.toml")))
def test_a_recipe_opens_with_its_command(name):
    first = (RECIPES / f"{name}.toml").read_text("utf-8").splitlines()[0]
    assert first == f"# cmkit run plugins/cmkit-ect/recipes/{name}.toml"


def test_tuning_starts_from_the_diffusion_model_and_trains(registry, tmp_path):
    steps = ["train.steps=2", *SMALL]
    teacher = start(plan(load(RECIPES / "digits_teacher.toml", steps, registry)), CPU)
    assert [step.log["loss"] > 0 for step in train(teacher)] == [True, True]
    trained = teacher.models.online.network.state_dict()
    before = {name: tensor.clone().contiguous() for name, tensor in trained.items()}
    save_file(before, tmp_path / "teacher.safetensors")
    steps += [f'denoiser.weights="{tmp_path}/teacher.safetensors"', "objective.stage_steps=1"]
    student = start(plan(load(RECIPES / "digits_ect.toml", steps, registry)), CPU)
    for name, tensor in student.models.online.network.state_dict().items():
        assert torch.equal(tensor, before[name])
    logs = [step.log for step in train(student)]
    assert [log["stage"] for log in logs] == [0, 1]
    assert all(log["loss"] > 0 for log in logs)
    after = student.models.online.network.state_dict()
    assert any(not torch.equal(after[name], tensor) for name, tensor in before.items())
