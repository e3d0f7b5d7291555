"""Metrics beside images that no training saw."""

from __future__ import annotations

import json

import pytest
import torch
from cmkit_std.datasets.cifar10 import CIFAR10
from cmkit_std.datasets.digits import Digits
from cmkit_std.datasets.fashion_mnist import FashionMNIST
from cmkit_std.datasets.invented import Invented
from cmkit_std.metrics.fidelity import Fidelity

from cmkit import RecipeError, discover
from cmkit.plan.checks import check_stages
from cmkit.recipe import load, minimized, stage_keys
from cmkit.runs.inputs import inputs_of

CPU = torch.device("cpu")
RECIPE = """\
name = "held"
dataset = { use = "digits" }
backbone = { use = "adm", channels = 8, channel_mult = [1], num_res_blocks = 1, norm_groups = 4 }
objective = { use = "ct", end_scales = 5, distance = "l2" }
rescaler = { use = "global" }
train = { steps = 2, batch = 8, precision = "fp32" }
sampler = { use = "multistep" }
sample = { images = 40, batch = 40, precision = "fp32" }

[search]
images = 20
minimize = "heldout_fid"
grid = { skip = [0.5] }
rerank = 0
confirm_seeds = 2

[[metric]]
use = "fidelity"

[[metric]]
use = "fidelity"
heldout = true
"""


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "held.toml"
    path.write_text(RECIPE)
    return path


@pytest.mark.parametrize(
    "dataset", [Digits(), FashionMNIST(), CIFAR10(path="x", reference_npz="y"), Invented()]
)
def test_a_training_split_holds_out_images_and_these_hold_out_none(dataset):
    held = dataset.heldout()
    assert held != dataset
    assert held.heldout() is None
    assert getattr(held, "reference_npz", None) is None
    if isinstance(dataset, Digits | Invented):
        assert held.spec().resolution == dataset.spec().resolution
        ours, theirs = (
            {each.images[k].numpy().tobytes() for k in range(len(each.images))}
            for each in (dataset.reference(), held.reference())
        )
        assert not ours & theirs


def test_numbers_of_held_out_images_have_names_of_their_own(path):
    recipe = load(path, [], discover())
    check_stages(recipe)
    assert minimized(recipe).heldout
    assert minimized(load(path, ["search.minimize=fid"], discover())) == recipe.metric[0]
    # that a metric compares with the data set's own images is no part of a key
    plain = load(path, ["metric.0.heldout=false"], discover())
    assert stage_keys(plain) == stage_keys(recipe)
    inputs = inputs_of(recipe, recipe.dataset.spec(), CPU)
    contents = recipe.dataset.heldout().identity()["contents"]
    assert inputs["metric"] == inputs["minimized"] == {
        "heldout_images": 355, "heldout_contents": contents
    }  # fmt: skip
    assert stage_keys(recipe, inputs) != stage_keys(recipe, {**inputs, "metric": {}})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("metric.1.heldout=false", "held.toml:20: metric.1: it gives 'fid', as metric.0 does"),
        ("metric.0.heldout=true", "metric.1: it gives 'heldout_fid', as metric.0 does: switch"),
        ("dataset.split=test", "metric.1.heldout = true: dataset digits has no images beside"),
        ("search.minimize=heldout_fdi", "no [[metric]] returns it; known: fid, heldout_fid"),
    ],
)
def test_what_is_refused(path, change, said):
    with pytest.raises(RecipeError) as caught:
        check_stages(load(path, [change], discover()))
    assert said in str(caught.value)


def test_a_run_measures_and_searches_beside_the_images_that_it_names(path, cmkit, tmp_path):
    from cmkit.sample import SavedImages

    code, out, err = cmkit("run", path, "--out", tmp_path / "runs", "--device", "cpu")
    assert code == 0, err
    (folder,) = (tmp_path / "runs").iterdir()
    report = json.loads((folder / "report.json").read_text())
    images = SavedImages(sorted((folder / "samples").glob("*.npz")))
    found = {}
    for prefix, dataset in (("", Digits()), ("heldout_", Digits(split="test"))):
        values = Fidelity().measure(images, dataset.reference(), CPU)
        found[f"{prefix}fid"] = pytest.approx(values["fid"], rel=1e-6)
    measured = report["stages"]["metric"]
    assert measured["values"] == found
    assert found["heldout_fid"] != found["fid"].expected
    train, held = measured["provenance"]
    assert train["reference"] != held["reference"]
    assert (held["real_images"], held["real_classes"]) == (355, "34 to 36 images each")
    assert "real_images" not in train
    assert held["features"].keys() == {"heldout_fid"}
    assert report["stages"]["search"]["minimize"] == "heldout_fid"
    other = cmkit("run", path, "--out", tmp_path / "runs", "--set", "search.minimize=fid")
    assert other[0] == 0
    (second,) = set((tmp_path / "runs").iterdir()) - {folder}
    again = json.loads((second / "report.json").read_text())
    scores = [each["stages"]["search"]["cells"][0]["score"] for each in (report, again)]
    assert scores[0] != scores[1]
    assert "heldout_fid = " in out
