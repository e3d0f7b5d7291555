"""Every shipped recipe says what it is, and its parts fit, without its data or weights."""

import re

import pytest
import torch

from cmkit import discover
from cmkit.denoiser import NO_COND
from cmkit.recipe import load
from tests.shipped import BUILT_IN as RECIPES
from tests.toys import TinyNetwork


@pytest.fixture(scope="module")
def registry():
    return discover()


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_is_valid_and_opens_with_its_own_command(path, registry):
    head, _, _ = path.read_text("utf-8").partition("\nname = ")
    recipe = load(path, [], registry)
    assert recipe.name == path.stem
    assert head.splitlines()[:2] == [f"# cmkit run recipes/{path.name}", "#"]
    assert not [line for line in head.splitlines() if line and not line.startswith("#")]
    if recipe.train and recipe.expected:
        assert f"FID {recipe.expected.scores['fid']}" in head


@pytest.mark.parametrize(
    "path",
    [p for p in RECIPES if "digits" in p.stem or "imagenet64" in p.stem],
    ids=lambda p: p.stem,
)
def test_recipes_whose_figures_are_of_uniform_labels_draw_them(path, registry):
    """Ours of the digits, and ImageNet's, whose official code draws classes uniformly."""
    recipe = load(path, [], registry)
    if getattr(recipe.dataset, "path", "digits"):  # a reference file alone has no proportions
        assert recipe.sample.labels == "uniform"


@pytest.mark.parametrize(
    "path",
    [p for p in RECIPES if not p.stem.startswith(("adm", "digits", "re", "sea"))],
    ids=lambda p: p.stem,
)
def test_training_recipe_is_whole_and_counts_its_images(path, registry):
    from cmkit.plan.checks import check_stages

    recipe = load(path, [], registry)
    check_stages(recipe)
    images = recipe.train.steps * recipe.train.batch
    (said,) = re.findall(r"^# Cost: ([\d,]+) training images", path.read_text("utf-8"), re.M)
    assert int(said.replace(",", "")) == images


@pytest.mark.parametrize(
    ("stem", "batch", "lr", "steps", "ema"),
    [
        ("edm_imagenet64", 4096, 1e-4, None, 0.999),
        ("edm_bedroom", 256, 1e-4, None, 0.999),
        ("cd_imagenet64_l2", 2048, 8e-6, 600_000, 0.999),
        ("cd_cat_lpips", 256, 1e-5, 600_000, 0.9999),
        ("ct_imagenet64", 2048, 1e-4, 800_000, 0.999),
        ("ct_bedroom", 256, 5e-5, 1_000_000, 0.9999),
        ("cd_cifar10_l1", 512, 2e-4, 800_000, 0.9999),
        ("ct_cifar10", 512, 4e-4, 800_000, 0.9999),
        ("ict_cifar10", 1024, 1e-4, 400_000, 0.99993),
        ("ctm_imagenet64", 1440, 4e-4, None, 0.999),
        ("ctm_imagenet64_gan", 4224, 8e-6, None, 0.999),
        ("ctm_cifar10", 256, 4e-4, None, 0.999),
        ("ctm_cifar10_gan", 528, 4e-4, None, 0.999),
    ],
)
def test_settings_are_those_that_were_published(stem, batch, lr, steps, ema, registry):
    (path,) = [p for p in RECIPES if p.stem == stem]
    train = load(path, [], registry).train
    assert (train.batch, train.lr, train.ema[0]) == (batch, lr, ema)
    assert steps in (None, train.steps)
    assert train.optimizer == "radam"
    assert not train.ema_warmup


def test_a_sampler_of_many_steps_is_tried_on_two_evaluations_of_the_network():
    from cmkit.plan.trial import _quick

    network, calls, x = TinyNetwork(), [], torch.ones(2, 1, 4, 4)
    network.first.register_forward_hook(lambda *_: calls.append(1))
    with _quick(network):
        shapes = {network(x, x[:, 0, 0, 0], NO_COND, {}).shape for _ in range(500)}
    assert (shapes, len(calls)) == ({x.shape}, 2)
    network(x, x[:, 0, 0, 0], NO_COND, {})
    assert len(calls) == 3
