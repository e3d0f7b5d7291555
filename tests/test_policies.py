"""Policies travel: found scales in a file, read by other recipes and commands, folded into
weights."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from cmkit_std.backbones.adm import ADM
from cmkit_std.backbones.dit import DiT
from cmkit_std.backbones.edm2 import EDM2
from cmkit_std.backbones.songunet import SongUNet
from cmkit_std.rescalers.global_ import Global
from cmkit_std.rescalers.per_layer import PerLayer
from cmkit_std.rescalers.per_timestep import PerTimestep
from cmkit_std.rescalers.saved import Saved
from PIL import Image

from cmkit import CheckpointError, Cond, DataSpec, RecipeError, discover
from cmkit.convert import convert
from cmkit.files import sealed
from cmkit.plan import build, plan
from cmkit.plan.networks import model_digest
from cmkit.recipe import load, stage_keys
from cmkit.rescaling import Policy, read_policy
from cmkit.runs import RunFolder, Step, inputs_of, run, verify
from cmkit.smoke import smoke_recipe
from cmkit.stop import StopSignal
from cmkit.testing import check_rescaler
from cmkit.testing.subjects import close
from tests.test_cli import refused

TRAIN = """\
name = "tiny"
dataset = { use = "digits" }
objective = { use = "ct", end_scales = 5, distance = "pseudo_huber" }
train = { steps = 1, batch = 8, precision = "fp32" }
sampler = { use = "multistep" }
metric = [{ use = "fidelity" }]
sample = { images = 12, precision = "fp32" }

[backbone]
use = "adm"
channels = 16
channel_mult = [1, 1]
num_res_blocks = 1
attention_resolutions = []
norm_groups = 8
"""
SEARCH = """
[rescaler]
use = "global"
[search]
images = 12
rerank = 0
confirm_seeds = 2
precision = "fp32"
grid = { skip = [0.8, 1.2], emb = [0.7] }
"""
CPU = torch.device("cpu")


def finished(recipe, out, *overrides):
    """The folder of the run of a recipe, and its report."""
    loaded = load(recipe, overrides, discover())
    *_, last = run(plan(loaded), discover(), out, CPU, StopSignal())
    return last.folder, last.report


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """A run with a search, which the tests only read."""
    home = tmp_path_factory.mktemp("found")
    (home / "search.toml").write_text(TRAIN + SEARCH)
    return finished(home / "search.toml", home / "runs")[0]


@pytest.fixture
def home(tmp_path, monkeypatch, found):
    """The current folder, with a copy of the found policy, and a recipe that draws with it."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(found / "rescaling.json", "rescaling.json")
    drawing = TRAIN.replace("train = {", "# train = {").replace("objective", "# objective")
    weights = f'denoiser = {{ weights = "{found / "model.safetensors"}" }}\n'
    saved = 'rescaler = { use = "saved", path = "rescaling.json" }\n'
    (tmp_path / "draw.toml").write_text(weights + saved + drawing)
    (tmp_path / "train.toml").write_text(saved + TRAIN)
    return tmp_path


def rewritten(**changes) -> None:
    """rescaling.json with other content, and the digest of that."""
    path = Path("rescaling.json")
    content = json.loads(path.read_text())
    content.pop("sha256")
    path.write_text(sealed({**content, **changes}))


def test_a_search_leaves_what_it_found_and_on_what(found):
    policy = read_policy(str(found))
    best = json.loads((found / "search.json").read_text())["best"]
    numbers = {"skip": best["skip"], "emb": 0.7, "attn": 1, "mlp": 1}
    assert policy.rescaler == {"use": "global", **numbers}
    assert policy.scales == {site: numbers[site.split(".")[0]] for site in policy.sites}
    assert {site.split(".")[0] for site in policy.sites} == {"skip", "emb"}
    keys = RunFolder(found).inputs()["keys"]
    assert policy.model["training"] == keys["train"]
    assert policy.model["backbone"] == "adm"
    assert policy.found["axes"] == {"skip": [0.8, 1.2], "emb": [0.7]}
    assert policy.found["minimize"] == "fid"
    assert policy.confirmed["verdict"]


def test_verify_covers_the_policy(found, tmp_path):
    copy = tmp_path / found.name
    shutil.copytree(found, copy)
    assert ("rescaling.json", "") in verify(RunFolder(copy))
    text = (copy / "rescaling.json").read_text()
    (copy / "rescaling.json").write_text(text.replace("0.7", "0.6"))
    assert ("rescaling.json", "damaged") in verify(RunFolder(copy))


def test_a_run_that_shares_the_search_has_the_policy_too(found, tmp_path):
    recipe = tmp_path / "search.toml"
    recipe.write_text(TRAIN + SEARCH)
    other, _ = finished(recipe, found.parent, "sample.images=13")
    assert other != found
    same = [(folder / "rescaling.json").read_bytes() for folder in (found, other)]
    assert same[0] == same[1]


def test_a_saved_policy_draws_the_images_of_the_run_that_found_it(home, found):
    folder, report = finished("draw.toml", home / "runs")
    arrays = [np.load(next((path / "samples").glob("*.npz")))["arr_0"] for path in (found, folder)]
    assert np.array_equal(*arrays)
    best = json.loads((found / "search.json").read_text())["best"]
    scales = report["stages"]["sample"]["scales"]
    assert (scales["skip"], scales["emb"]) == (best["skip"], 0.7)


def test_the_content_of_a_policy_decides_the_keys_and_its_path_does_not(home, found):
    def keys(*overrides):
        recipe = load("draw.toml", overrides, discover())
        return stage_keys(recipe, inputs_of(recipe, recipe.dataset.spec(), CPU))

    first = keys()
    assert keys(f'rescaler.path="{found}"') == keys("rescaler.any_model=true") == first
    rewritten(rescaler={"use": "global", "emb": 0.5})
    assert keys()["sample"] != first["sample"]


def test_the_model_is_known_in_another_layout(home, found):
    recipe = load(found / "recipe.toml", [], discover())
    list(convert(str(found), home / "theirs", "openai", discover(), recipe, drop_scales=True))
    drawn = load("draw.toml", ['denoiser.weights="theirs"'], discover())
    made = plan(drawn)
    assert (home / "theirs").read_bytes() != (found / "model.safetensors").read_bytes()
    assert model_digest(drawn, made.data, made.conditions) == read_policy(".").model["weights"]


def test_a_training_is_known_before_its_first_step(home, found):
    """The same training may draw with the policy; another is refused before any step."""
    folder, _ = finished("train.toml", home / "runs")
    assert not (folder / "search.json").exists()
    other = load("train.toml", ["seed=1"], discover())
    begun = run(plan(other), discover(), home / "runs", CPU, StopSignal())
    steps = (event for event in begun if isinstance(event, Step))
    with pytest.raises(CheckpointError, match=r"train\.toml:1: rescaler: .*another model"):
        next(steps)
    finished("train.toml", home / "runs", "seed=1", "rescaler.any_model=true")


def other_weights() -> None:
    network = build(plan(load("draw.toml", ["rescaler.any_model=true"], discover())), CPU).network
    with torch.no_grad():
        next(network.parameters()).add_(1)
    from cmkit.tensors import save_weights

    save_weights(Path("other.safetensors"), network.state_dict())


@pytest.mark.parametrize(
    ("spoil", "overrides", "error", "words"),
    [
        (None, ['rescaler.path="none.json"'], CheckpointError, "none.json: no such file"),
        (None, ['rescaler.path="empty"'], CheckpointError, "holds no rescaling.json"),
        ({"schema": 9}, [], CheckpointError, "schema 9, but this cmkit reads 1"),
        ({"rescaler": {"use": "saved"}}, [], CheckpointError, "names a policy in another file"),
        ({"rescaler": {"use": "global", "skip": 1e9}}, [], CheckpointError, "global.skip: Input"),
        ({"rescaler": {"use": "global", "skpi": 1}}, [], CheckpointError, "global.skpi: Extra"),
        ({"sites": ["skip.0", "skip.9", "emb.0"]}, [], CheckpointError, "damaged"),
        ({"scales": {"emb.0": 1e9}}, [], CheckpointError, "damaged"),
        ({"scales": None, "sites": ["skip.9"]}, [], RecipeError, "differ in skip.9"),
        ({"scales": None, "sites": ["skip.0"]}, [], RecipeError, "this one has skip.0 to"),
        (None, ['denoiser.weights="other.safetensors"'], CheckpointError, "found on other weights"),
        (None, ["search={images=2, grid={skip=[1.0]}}"], RecipeError, "no numbers to search"),
    ],
    ids=str,
)
def test_what_is_no_policy_of_this_model_is_refused_in_one_line(
    home, spoil, overrides, error, words
):
    (home / "empty").mkdir()
    other_weights()
    if spoil:
        rewritten(**spoil)
    with pytest.raises(error) as caught:
        plan(load("draw.toml", overrides, discover()))
    assert words in str(caught.value)
    assert str(caught.value).startswith(("draw.toml:", "--set "))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda text: text.replace("0.7", "0.6"),
        lambda text: text[:-20],
        lambda text: "[]",
        lambda text: text.replace("0.7", "NaN"),
        lambda text: text.replace("0.7", "1e999"),
    ],
)
def test_a_damaged_policy_is_refused_in_one_line(home, spoil):
    path = home / "rescaling.json"
    path.write_text(spoil(path.read_text()))
    with pytest.raises(CheckpointError, match=r"draw\.toml:2: rescaler: rescaling\.json: .*"):
        plan(load("draw.toml", [], discover()))


def test_other_weights_may_be_meant(home):
    other_weights()
    said = ['denoiser.weights="other.safetensors"', "rescaler.any_model=true"]
    plan(load("draw.toml", said, discover()))


def test_a_saved_policy_keeps_the_laws_of_its_kind(home):
    check_rescaler(Saved(path="rescaling.json"), read_policy(".").sites)


def test_smoke_needs_neither_the_policy_nor_its_model(home):
    (home / "rescaling.json").unlink()
    recipe = load("draw.toml", ['denoiser.weights="none"'], discover())
    shrunk, _ = smoke_recipe(recipe, home / "runs", discover())
    plan(shrunk)


def test_commands_draw_with_the_scales_of_a_file_a_run_or_none(cmkit, home, found):
    def drawn(*options):
        out = f"{len(list(home.glob('*.npz')))}.npz"
        code, _, err = cmkit("sample", found, "-n", 3, "--out", out, *options)
        assert code == 0, err
        return np.load(out)["arr_0"]

    plain = drawn("--set", "rescaler.skip=1.0", "--set", "rescaler.emb=1.0")
    own = drawn()
    assert not np.array_equal(own, plain)
    assert np.array_equal(drawn("--rescaler", "off"), plain)
    both = ("--rescaler", "off", "--set", "rescaler.skip=1.0")
    refused(cmkit("sample", found, *both), 2, "--set rescaler changes what is off")
    assert np.array_equal(drawn("--rescaler", found), own)
    rewritten(rescaler={"use": "global", "skip": 1.0, "emb": 0.5})
    other = drawn("--rescaler", "rescaling.json")
    assert np.array_equal(other, drawn("--set", "rescaler.skip=1.0", "--set", "rescaler.emb=0.5"))
    assert not np.array_equal(other, own)
    refused(cmkit("sample", found, "--rescaler", "none.json"), 4, "none.json: no such file")
    edit = ("edit", found, "a.png", "--task", "inpaint", "--rescaler", "none.json")
    Image.fromarray(np.full((8, 8), 128, np.uint8)).save("a.png")
    Image.fromarray(np.full((8, 8), 255, np.uint8)).save("mask.png")
    edit = (*edit, "--mask", "mask.png", "--label", 1)
    refused(cmkit(*edit), 4, "none.json: no such file")


def test_knots_beyond_the_noise_levels_are_refused(home):
    for sigmas in ("[0.001, 1.0]", "[1.0, 81.0]"):
        table = f'rescaler={{use="per_timestep", sigmas={sigmas}, skip=0.9}}'
        with pytest.raises(
            RecipeError, match=r"no noise level of the model's, which has 0\.002 to"
        ):
            plan(load("draw.toml", [table], discover()))
    table = 'rescaler={use="per_timestep", sigmas=[0.002, 80.0], skip=0.9}'
    plan(load("draw.toml", [table], discover()))


def test_a_search_without_sites_is_refused(found, monkeypatch, tmp_path):
    from cmkit_std.backbones.adm.network import UNet

    monkeypatch.setattr(UNet, "_name_sites", lambda self, skips: None)
    (tmp_path / "search.toml").write_text(TRAIN + SEARCH)
    with pytest.raises(RecipeError, match=r"search: the backbone has no sites to rescale"):
        plan(
            load(
                tmp_path / "search.toml",
                ["rescaler.skip=1.0", "search.grid={skip=[1.0]}"],
                discover(),
            )
        )


DATA = DataSpec(3, 8, 5)
SMALL = {"channels": 8, "channel_mult": (1, 2), "num_res_blocks": 1, "attention_resolutions": ()}
BACKBONES = {
    "adm": ADM(**SMALL, norm_groups=4),
    "adm of ctm": ADM(**SMALL, norm_groups=4, label_sigma_to=True, null_class=True),
    "songunet": SongUNet(**SMALL, embedding_type="fourier"),
    "edm2": EDM2(**SMALL, num_head_channels=8),
    "dit": DiT(patch_size=2, width=16, depth=2, num_heads=2, null_class=True, time_scale=1.0),
}
SUBSETS = [(), ("label",), ("label", "guidance"), ("label", "guidance", "sigma_to"), ("sigma_to",)]
FOLDS = {
    "adm": lambda _: {"emb"},
    # The embedding of the target level reads the same table of labels.
    "adm of ctm": lambda given: set() if {"label", "sigma_to"} <= given else {"emb"},
    "songunet": lambda _: {"emb"},
    "edm2": lambda _: set(),
    "dit": lambda _: {"emb", "attn", "mlp"},
}
"""Families that weights hold exactly, where one number serves a family."""


def random_network(name, conditions):
    """In float64, and no layer blind."""
    network = BACKBONES[name].build(DATA, frozenset(conditions)).double().eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=max(parameter[:1].numel(), 1) ** -0.5) if (
            parameter.ndim
        ) else torch.nn.init.constant_(parameter, 0.7)
    x = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    given = {
        "label": torch.tensor([0, 3, 4]),
        "guidance": torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64),
        "sigma_to": torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64),
    }
    cond = Cond(**{key: value for key, value in given.items() if key in conditions})
    return network, (x, torch.linspace(-1, 1, 3, dtype=torch.float64), cond)


def folded(network, factors):
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    for name, factor in factors.items():
        state[name] = state[name] * factor
    network.load_state_dict(state)
    return network


@pytest.mark.parametrize("conditions", SUBSETS, ids=" ".join)
@pytest.mark.parametrize("name", BACKBONES)
@torch.no_grad()
def test_scales_that_fold_do_so_to_rounding_and_the_others_are_named(name, conditions):
    torch.manual_seed(0)
    network, given = random_network(name, conditions)
    families = {"skip": 0.8, "emb": 1.3, "attn": 0.6, "mlp": 1.7}
    uniform = {site: families[site.split(".")[0]] for site in network.sites}
    single = {site: 0.71 + 0.05 * k for k, site in enumerate(network.sites)}
    for scales, folds in (
        (uniform, FOLDS[name](set(conditions))),
        (single, FOLDS[name](set(conditions)) - {"emb"}),
    ):
        factors, left = network.factors(scales)
        assert {site for site in scales if site.split(".")[0] not in folds} == left.keys()
        tensors = {s: torch.tensor(v, dtype=torch.float64) for s, v in scales.items()}
        expected = network(*given, tensors)
        rest = {s: tensors[s] for s in left}
        before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
        actual = folded(network, factors)(*given, rest)
        network.load_state_dict(before)
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)
        if factors:
            assert not close(network(*given, rest), expected, 1e-3)
    assert network.factors(dict.fromkeys(network.sites, 1.0)) == ({}, {})


def test_a_network_that_says_nothing_folds_nothing():
    from cmkit import Network

    class Odd(Network):
        sites = ("skip.0", "emb.0")

    factors, left = Odd().factors({"skip.0": 1.0, "emb.0": 0.9})
    assert not factors
    assert left.keys() == {"emb.0"}


def write_policy(path, recipe, scales):
    """A policy of one number a site for the weights of `recipe`."""
    made = plan(recipe)
    model = {"weights": model_digest(recipe, made.data, made.conditions), "backbone": "adm"}
    table = {"use": "per_layer", "sites": scales}
    every = {site: scales.get(site, 1.0) for site in made.sites}
    path.write_text(Policy(table, made.sites, every, model).text())


@pytest.fixture
def plain(home):
    """The recipe of the weights alone, its denoiser, and an input."""
    recipe = load("draw.toml", ['rescaler={use="global"}'], discover())
    model = build(plan(recipe), CPU).eval()
    with torch.no_grad():
        for parameter in model.network.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    from cmkit.tensors import save_weights

    save_weights(home / "random.safetensors", model.network.state_dict())
    recipe = load(
        "draw.toml",
        ['rescaler={use="global"}', 'denoiser.weights="random.safetensors"'],
        discover(),
    )
    return recipe, model, (80 * torch.randn(2, 1, 8, 8), torch.full((2,), 80.0))


@torch.no_grad()
@pytest.mark.parametrize("layout", ["cmkit", "openai", "diffusers"])
def test_folded_weights_draw_what_the_scales_draw_in_every_layout(cmkit, home, plain, layout):
    recipe, model, (x, sigma) = plain
    cond = Cond(label=torch.tensor([1, 7]))
    sites = [site for site in model.network.sites if site.startswith("emb")]
    write_policy(home / "emb.json", recipe, dict.fromkeys(sites, 0.7))
    code, _, err = cmkit(
        "convert", "random.safetensors", "folded", "--to", layout, "--recipe", "draw.toml",
        "--set", 'rescaler={use="global"}', "--fold-rescaling", "emb.json",
    )  # fmt: skip
    assert code == 0, err
    assert "folded: emb.0 = 0.7, emb.1 = 0.7" in err
    assert "not folded: none" in err
    other = load("draw.toml", ['rescaler={use="global"}', 'denoiser.weights="folded"'], discover())
    again = build(plan(other), CPU).eval()
    expected = model.rescaled(Global(emb=0.7))(x, sigma, cond)
    assert close(again(x, sigma, cond), expected, 1e-6)
    assert not close(model(x, sigma, cond), expected, 1e-4)
    assert not list(home.glob("folded.*"))


@torch.no_grad()
def test_what_does_not_fold_is_refused_by_name_or_goes_into_a_policy_of_the_new_weights(
    cmkit, home, plain
):
    recipe, model, (x, sigma) = plain
    cond = Cond(label=torch.tensor([1, 7]))
    sites = model.network.sites
    scales = {site: 0.7 for site in sites if site.startswith("emb")} | {"skip.1": 1.2}
    write_policy(home / "both.json", recipe, scales)
    command = (
        "convert", "random.safetensors", "folded", "--to", "openai", "--recipe", "draw.toml",
        "--set", 'rescaler={use="global"}', "--fold-rescaling", "both.json",
    )  # fmt: skip
    refused(cmkit(*command), 2, "no weights hold exactly the scales of skip.1 (a norm follows it")
    assert not (home / "folded").exists()
    (home / "folded.rescaling.json").write_text("another's")
    refused(cmkit(*command, "--partial"), 2, "folded.rescaling.json: exists already")
    (home / "folded.rescaling.json").unlink()
    code, _, err = cmkit(*command, "--partial")
    assert code == 0, err
    assert "not folded: skip.1 = 1.2" in err
    assert "folded: draws as the rescaled model only with folded.rescaling.json" in err
    said = ['denoiser.weights="folded"', 'rescaler.path="folded.rescaling.json"']
    other = load("draw.toml", said, discover())
    made = plan(other)
    again = build(made, CPU).eval().rescaled(other.rescaler)
    expected = model.rescaled(PerLayer(sites=scales))(x, sigma, cond)
    assert close(again(x, sigma, cond), expected, 1e-6)
    refused(cmkit("convert", "folded", "a", "--to", "openai", "--partial"), 2, "--fold-rescaling")


def test_scales_of_another_model_or_of_no_one_number_are_not_folded(cmkit, home, plain, found):
    command = (
        "convert", "random.safetensors", "folded", "--to", "openai", "--recipe", "draw.toml",
        "--set", 'rescaler={use="global"}', "--fold-rescaling",
    )  # fmt: skip
    refused(cmkit(*command, found), 4, "were found on other weights than random.safetensors")
    rewritten(scales=None)
    refused(cmkit(*command, "rescaling.json"), 2, "depend on the noise level")
    assert not (home / "folded").exists()


def test_only_constant_numbers_are_written_out_by_site(plain):
    from cmkit.runs.policies import constant_scales

    recipe, model, _ = plain
    sites = model.network.sites
    levels = PerTimestep(sigmas=(1.0, 80.0), skip=(0.9, 1.1), emb=1.2)
    assert constant_scales(levels, recipe, sites) is None
    same = PerTimestep(sigmas=(1.0, 80.0), skip=0.9, emb=(1.2, 1.2))
    found = constant_scales(same, recipe, sites)
    assert found == {site: 0.9 if site.startswith("skip") else 1.2 for site in sites}
    assert all(math.isfinite(value) for value in found.values())
