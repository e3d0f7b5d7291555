"""Hostile and mistaken input: every fault is one line that names place, value and cure."""

from __future__ import annotations

import pytest
from cmkit_std.backbones.adm import ADM
from safetensors.torch import save_file

from cmkit import DataSpec
from tests.test_cli import refused
from tests.test_draw import OPTIONS, RECIPE, written

ABSENT = {
    "cifar10": ('path = "none"', DataSpec(3, 32, 10)),
    "fashion_mnist": ('path = "none"', DataSpec(1, 32, 10)),
    "imagenet64": ('path = "none"', DataSpec(3, 64, 1000)),
    "lsun": ('path = "none", resolution = 16', DataSpec(3, 16)),
    "image_folder": ('path = "none", resolution = 8', DataSpec(3, 8)),
}
"""Data sets whose files are not there, and their shape, which their keys decide."""


@pytest.mark.parametrize("dataset", ABSENT)
def test_a_model_is_drawn_from_without_the_data_that_it_was_trained_on(cmkit, tmp_path, dataset):
    keys, data = ABSENT[dataset]
    conditions = frozenset({"label"} if data.num_classes else ())
    half = data.resolution // 2
    network = ADM(**{**OPTIONS, "attention_resolutions": (half,)}).build(data, conditions)
    save_file(network.state_dict(), tmp_path / "random.safetensors")
    recipe = RECIPE.format(dataset=dataset, more=f", {keys}")
    (tmp_path / "random.toml").write_text(recipe.replace("ns = [4]", f"ns = [{half}]"))
    code, _, err = cmkit("sample", "random.toml", "-n", 1, "--out", "x.png", "--device", "cpu")
    assert code == 0, err
    assert (tmp_path / "x.png").is_file()


def test_a_model_of_unknown_classes_names_the_data_that_would_tell(cmkit, tmp_path):
    written(tmp_path, DataSpec(3, 8))
    dataset = 'dataset={use="image_folder", path="none", resolution=8, labels=true}'
    refused(cmkit("sample", "random.toml", "--set", dataset), 3, "dataset.path = 'none'")
