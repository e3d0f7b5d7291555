"""Weights keep every bit on their way through other projects' layouts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from cmkit_std.backbones.adm import ADM
from safetensors.torch import load_file

from cmkit import CheckpointError, DataSpec, RecipeError, discover
from cmkit.convert import convert
from cmkit.recipe import load
from cmkit.tensors import save_weights

RECIPE = """
name = "small"
dataset = { use = "digits" }
objective = { use = "ict" }
[backbone]
use = "adm"
channels = 32
channel_mult = [1, 2]
num_res_blocks = 1
attention_resolutions = [4]
num_head_channels = 16
resblock_updown = true
[train]
steps = 1
batch = 8
lr = 1e-3
"""


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """A folder with a recipe and weights of its network, in our own names."""
    monkeypatch.chdir(tmp_path)
    Path("small.toml").write_text(RECIPE)
    recipe = load("small.toml", [], discover())
    network = recipe.backbone.build(DataSpec(1, 8, 10), frozenset({"label"}))
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        parameter.data.normal_(generator=generator)
    save_weights(Path("own.safetensors"), network.state_dict())
    return tmp_path


def converted(
    source: str, target: str, to: str, *, known: bool = True, scaled: bool = False
) -> None:
    sets = ["backbone.time_scale=1.0"] if scaled else []
    recipe = load("small.toml", sets, discover()) if known else None
    list(convert(source, Path(target), to, discover(), recipe))


@pytest.mark.parametrize("layout", ["openai", "guided-diffusion", "diffusers"])
def test_a_round_trip_through_a_layout_changes_no_byte(home, layout):
    steps = layout == "guided-diffusion"  # its networks take them as they are
    converted("own.safetensors", "theirs", layout, scaled=steps)
    names = load_file(
        next(Path("theirs").glob("*.safetensors")) if layout == "diffusers" else "theirs"
    )
    assert names.keys() != load_file("own.safetensors").keys()
    converted("theirs", "back.safetensors", "cmkit", scaled=steps)
    assert Path("back.safetensors").read_bytes() == Path("own.safetensors").read_bytes()


def test_every_layout_of_equal_steps_leads_to_every_other(home):
    converted("own.safetensors", "a", "openai")
    converted("a", "b", "diffusers")
    converted("b", "c.safetensors", "openai")
    assert Path("c.safetensors").read_bytes() == Path("a").read_bytes()
    with pytest.raises(RecipeError, match=r"time_scale = 1000\.0: guided-diffusion"):
        converted("b", "d", "guided-diffusion")


def test_a_pickle_of_theirs_is_recognized(home, forked_reader):
    converted("own.safetensors", "theirs", "openai")
    torch.save(load_file("theirs"), "theirs.pt")
    converted("theirs.pt", "back.safetensors", "cmkit")
    assert Path("back.safetensors").read_bytes() == Path("own.safetensors").read_bytes()


def test_a_diffusers_folder_says_what_it_is(home):
    converted("own.safetensors", "theirs", "diffusers")
    config = json.loads(Path("theirs/config.json").read_text())
    assert config["_class_name"] == "UNet2DModel"
    assert (config["sample_size"], config["in_channels"]) == (8, 1)
    assert config["num_class_embeds"] == 10


def test_a_run_folder_knows_its_own_network(home):
    Path("runs/x").mkdir(parents=True)
    shutil.copy("small.toml", "runs/x/recipe.toml")
    shutil.copy("own.safetensors", "runs/x/model.safetensors")
    converted("runs/x", "theirs", "openai", known=False)
    assert "input_blocks.0.0.weight" in load_file("theirs")


def test_a_run_that_draws_from_the_weights_of_another_file_says_so(home):
    Path("runs/x").mkdir(parents=True)
    shutil.copy("small.toml", "runs/x/recipe.toml")
    with pytest.raises(CheckpointError, match=r"no weights of its own; .* denoiser\.weights"):
        converted("runs/x", "theirs", "openai", known=False)


def test_scales_are_never_dropped_without_a_word(home):
    Path("runs/x").mkdir(parents=True)
    shutil.copy("own.safetensors", "runs/x/model.safetensors")
    text = RECIPE.replace("[backbone]", 'rescaler = { use = "global", skip = 1.2 }\n[backbone]')
    Path("runs/x/recipe.toml").write_text(text)
    for source in ("runs/x", "runs/x/model.safetensors"):
        with pytest.raises(RecipeError, match=r"it samples with skip = 1.2, .* --drop-scales"):
            list(convert(source, Path("theirs"), "openai", discover()))
    list(convert("runs/x", Path("theirs"), "openai", discover(), drop_scales=True))
    assert Path("theirs").exists()


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ('{ use = "per_layer", sites = { "emb.0" = 1.2 } }', "sites = "),
        ('{ use = "per_timestep", sigmas = [1.0, 80.0], emb = [1.0, 1.2] }', r"emb = \[1"),
    ],
)
def test_scales_in_lists_are_not_dropped_either(home, table, said):
    Path("runs/x").mkdir(parents=True)
    shutil.copy("own.safetensors", "runs/x/model.safetensors")
    Path("runs/x/recipe.toml").write_text(f"rescaler = {table}\n{RECIPE}")
    with pytest.raises(RecipeError, match=f"it samples with .*{said}.* --drop-scales"):
        list(convert("runs/x", Path("theirs"), "openai", discover()))
    text = table.replace("1.2", "1.0")
    Path("runs/x/recipe.toml").write_text(f"rescaler = {text}\n{RECIPE}")
    list(convert("runs/x", Path("theirs"), "openai", discover()))


def test_published_networks_are_recognized_by_their_tensors(home, monkeypatch):
    """Without a recipe; small networks stand for the published ones here."""
    small = load("small.toml", [], discover()).backbone
    monkeypatch.setattr(
        ADM, "known", classmethod(lambda cls: iter([(small, DataSpec(1, 8, 10), {"label"})]))
    )
    converted("own.safetensors", "theirs", "openai", known=False)
    assert "out.2.bias" in load_file("theirs")


def test_tensors_that_fit_no_published_network_ask_for_a_recipe(home):
    with pytest.raises(CheckpointError, match="fit no published network; name the recipe"):
        converted("own.safetensors", "new", "openai", known=False)


@pytest.mark.parametrize(
    ("source", "target", "to", "error", "said"),
    [
        ("own.safetensors", "own.safetensors", "openai", RecipeError, "exists already"),
        ("own.safetensors", "new", "opnai", RecipeError, "did you mean 'openai'"),
        ("other.safetensors", "new", "openai", CheckpointError, "time.0.weight is absent"),
        ("none.safetensors", "new", "openai", CheckpointError, "no such file"),
        ("own.safetensors", "new", "edm", RecipeError, "--to edm"),
    ],
)
def test_what_cannot_be_converted_is_one_line_and_leaves_nothing(
    home, source, target, to, error, said
):
    save_weights(Path("other.safetensors"), {"a": torch.ones(2)})
    before = sorted(Path().rglob("*"))
    with pytest.raises(error) as caught:
        converted(source, target, to)
    assert said in str(caught.value)
    assert sorted(Path().rglob("*")) == before
