"""Exported models of pixels are what diffusers draws from, and its pipelines are read back."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from cmkit_std.samplers.multistep import Multistep
from PIL import Image
from safetensors.torch import load_file, save_file

from cmkit import CheckpointError, DataSpec, Noise, discover
from cmkit.plan.networks import load_into
from cmkit.recipe import load
from cmkit.runs.finished import drawn_from
from cmkit.tensors import save_weights
from cmkit.weights import find, identity, read, shapes

pytest.importorskip("diffusers")

BACKBONE = """
[backbone]
use = "adm"
channels = 32
channel_mult = [1, 2]
num_res_blocks = 1
attention_resolutions = [8]
num_head_channels = 16
resblock_updown = true
"""
RECIPE = """
name = "small"
dataset = { use = "invented", resolution = 16, classes = 3 }
denoiser = { weights = "own.safetensors", sigma_max = 60.0, sigma_data = 0.6 }
sampler = { use = "multistep", sigmas = [9.0, 0.821] }
"""


@pytest.fixture
def source(cmkit) -> str:
    """A recipe in the folder of the command line, beside weights that all act."""
    Path("r.toml").write_text(RECIPE + BACKBONE)
    write_weights("r.toml")
    return "r.toml"


def write_weights(path, *sets):
    recipe = load(path, sets, discover())
    data = recipe.dataset.spec()
    conditions = frozenset({"label"} if data.num_classes else ())
    network = recipe.backbone.build(data, conditions)
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        parameter.data.normal_(std=0.1, generator=generator)
    save_weights(Path("own.safetensors"), network.state_dict())


def exported(cmkit, *arguments):
    arguments = ("export", *arguments, "--to", "diffusers", "--device", "cpu", "--json")
    code, out, err = cmkit(*arguments)
    assert code == 0, err
    return json.loads(out)


def refused(result, code, *words):
    """One line with these words and this exit code."""
    assert result[0] == code, result
    lines = [line for line in result[2].splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    for word in words:
        assert word in lines[0]


def pixels(name):
    with Image.open(name) as picture:
        return np.array(picture).astype(int)


@pytest.mark.parametrize(
    ("sets", "scales"),
    [
        ([], ""),
        (["sampler.sigmas=[]"], ""),
        (["sampler.clamp=false", "denoiser.rho=5.0", "denoiser.sigma_min=0.01"], ""),
        (["dataset.classes=1", "dataset.channels=1"], ""),
        (['rescaler={use="global", emb=1.3}'], "emb.0 = 1.3"),
    ],
)
def test_a_pipeline_draws_the_same_picture(sets, scales, source, cmkit):
    write_weights(source, *sets)
    options = [word for one in sets for word in ("--set", one)]
    code, out, err = cmkit("export", source, "out", "--to", "diffusers", *options)
    assert code == 0, err
    assert "ConsistencyModelPipeline with CMStochasticIterativeScheduler" in out
    said = out.splitlines()[-1]
    assert float(said.split("differs by ")[1].split()[0]) < 0.05
    assert ("folded into the weights: " + scales in err) if scales else "folded" not in err


def test_its_folder_is_read_back_as_the_same_model(source, cmkit):
    exported(cmkit, source, "out")
    index = json.loads(Path("out/model_index.json").read_text())
    assert index["_class_name"] == "ConsistencyModelPipeline"
    assert index["unet"] == ["diffusers", "UNet2DModel"]
    assert "pipeline(num_inference_steps=None, timesteps=" in Path("out/README.md").read_text()
    again = drawn_from("out", [], discover(), 1)
    before = drawn_from(source, [], discover(), 1)
    for name in ("sigma_min", "sigma_max", "sigma_data", "rho"):
        assert getattr(again.denoiser, name) == getattr(before.denoiser, name)
    assert (again.data.num_classes, again.data.resolution) == (3, 16)
    said = ["-n", 2, "--label", 1, "--seed", 4, "--set", "sampler.sigmas=[9.0, 0.821]"]
    for place in (source, "out"):
        code, _, err = cmkit("sample", place, *said, "--out", f"{Path(place).stem}.png")
        assert code == 0, err
    assert (pixels("r.png") == pixels("out.png")).all()
    assert pixels("r.png").std() > 5


def test_a_grid_has_every_noise_level():
    noise = Noise(0.002, 80.0, 7.0)
    for sigmas in ((), (0.821,), (9.0, 0.821), (24.4, 5.84, 0.9, 0.661)):
        from cmkit_std.preconds.consistency import Consistency
        from diffusers import CMStochasticIterativeScheduler

        found = Multistep(sigmas=sigmas).scheduler(Consistency(), noise, 0.5)
        scheduler = CMStochasticIterativeScheduler.from_config(dict(found.config))
        scheduler.set_timesteps(**found.call)
        expected = torch.tensor([80.0, *sigmas, 0.002])
        assert torch.allclose(scheduler.sigmas, expected, rtol=1e-3)
    # Two steps of the published models are the points 22 and 0 of 40.
    sigma = noise.sigmas(40, dtype=torch.float64).flip(0)[22].item()
    found = Multistep(sigmas=(sigma,)).scheduler(Consistency(), noise, 0.5)
    assert found.config["num_train_timesteps"] == 40
    assert found.call["timesteps"] == [22, 0]


@pytest.mark.parametrize("config", [{"sigma_data": 0.5}, {"rho": 3.0}, {"sigma_max": 50.0}])
def test_a_wrong_scheduler_is_seen_and_nothing_is_kept(config, source, cmkit, monkeypatch):
    true = Multistep.scheduler

    def said(self, *given):
        found = true(self, *given)
        return replace(found, config={**found.config, **config})

    monkeypatch.setattr(Multistep, "scheduler", said)
    result = cmkit("export", source, "out", "--to", "diffusers")
    refused(result, 4, "out: not kept, diffusers draws another picture", "of 255")
    assert sorted(path.name for path in Path().iterdir()) == ["own.safetensors", "r.toml"]


def test_a_dropped_scale_is_seen(source, cmkit, monkeypatch):
    monkeypatch.setattr(
        "cmkit.export.diffusers._folded", lambda _, network: (network.state_dict(), [])
    )
    scaled = ["--set", 'rescaler={use="global", emb=1.3}']
    result = cmkit("export", source, "out", "--to", "diffusers", *scaled)
    refused(result, 4, "another picture")
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("sets", "words"),
    [
        (['sampler={use="heun"}', 'denoiser.precond="edm"'], ("sampler", "diffusion model")),
        (['denoiser.precond="edm"'], ("sampler", "denoiser.precond", "consistency")),
        (["backbone.null_class=true", "denoiser.guidance=1.0"], ("guidance = 1.0", "drop it")),
        (['rescaler={use="global", skip=0.9}'], ("skip.0 = 0.9", "--drop-scales")),
        (["backbone.time_scale=1.0"], ("time_scale", "1000")),
        (["sampler.sigmas=[70.0]"], ("sampler", "must lie between")),
    ],
)
def test_what_diffusers_has_no_like_of_is_refused_with_the_cure(sets, words, source, cmkit):
    write_weights(source, *(one for one in sets if one.startswith("backbone")))
    before = sorted(Path().rglob("*"))
    options = [word for one in sets for word in ("--set", one)]
    refused(cmkit("export", source, "out", "--to", "diffusers", *options), 2, *words)
    assert sorted(Path().rglob("*")) == before


def test_another_backbone_is_refused(cmkit):
    text = RECIPE + '[backbone]\nuse = "songunet"\nchannels = 16\nchannel_mult = [1, 2]\n'
    Path("r.toml").write_text(text)
    write_weights("r.toml")
    result = cmkit("export", "r.toml", "out", "--to", "diffusers")
    refused(result, 2, "r.toml:6: backbone", "no pipeline of diffusers", "cmkit sample")


def test_a_codec_has_no_place_beside_a_network_of_pixels(source, cmkit):
    refused(cmkit("export", source, "own.safetensors", "--to", "diffusers"), 2, "exists already")


@pytest.mark.parametrize(
    ("file", "change", "code", "words"),
    [
        ("unet/config.json", {"freq_shift": 1}, 2, ("freq_shift = 1", "draw with diffusers")),
        ("unet/config.json", {"norm_eps": 1e-6}, 2, ("norm_eps",)),
        ("unet/config.json", {"layers_per_block": "x"}, 2, ("no network of backbone adm",)),
        ("scheduler/scheduler_config.json", {"s_noise": 1.01}, 2, ("s_noise = 1.01",)),
        ("model_index.json", {"_class_name": "DDPMPipeline"}, 4, ("a DDPMPipeline",)),
        ("unet/config.json", None, 4, ("half a pipeline, without unet",)),
        ("unet/diffusion_pytorch_model.safetensors", None, 4, ("unet: no weights",)),
    ],
)
def test_a_pipeline_that_is_not_known_is_one_line(file, change, code, words, source, cmkit):
    exported(cmkit, source, "out", "--set", "sampler.sigmas=[]")
    path = Path("out", file)
    if change is None:
        path.unlink()
    else:
        path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    refused(cmkit("sample", "out", "--out", "a.png"), code, "out", *words)


@pytest.fixture
def sharded(source, cmkit):
    """The pipeline `out`, and `two` with its network in several files, as diffusers writes them."""
    from diffusers import UNet2DModel

    exported(cmkit, source, "out", "--set", "sampler.sigmas=[]")
    shutil.copytree("out", "two")
    Path("two/unet/diffusion_pytorch_model.safetensors").unlink()
    UNet2DModel.from_pretrained("out/unet").save_pretrained("two/unet", max_shard_size="200KB")
    return Path("two/unet")


def index_of(folder):
    return folder / "diffusion_pytorch_model.safetensors.index.json"


def test_weights_in_several_files_are_those_of_one(sharded):
    backbone = load("r.toml", [], discover()).backbone
    assert len(list(sharded.glob("*-of-*.safetensors"))) > 2
    one, several = (find(name, backbone) for name in ("out", "two"))
    for how in (read, shapes):
        assert how(one).keys() == how(several).keys()
    assert all(torch.equal(tensor, read(one)[name]) for name, tensor in read(several).items())
    data = DataSpec(3, 16, 3)
    network = backbone.build(data, frozenset({"label"}))
    load_into(network, "two/unet", backbone, data)
    first = identity("two", backbone)
    part = sorted(sharded.glob("*-of-*.safetensors"))[0]
    tensors = load_file(part)
    next(iter(tensors.values())).add_(1)
    save_file(tensors, part)
    assert identity("two", backbone) != first


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda unet: next(unet.glob("*-00002-of-*")).unlink(), "No such file"),
        (lambda unet: map_to(unet, "../../own.safetensors"), "not a .safetensors file beside it"),
        (lambda unet: map_to(unet, "/etc/passwd"), "not a .safetensors file beside it"),
        (lambda unet: map_to(unet, "x.bin"), "not a .safetensors file beside it"),
        (lambda unet: map_to(unet, 3), "not a .safetensors file beside it"),
        (lambda unet: index_of(unet).write_text('{"weight_map": {}}'), "lists no files"),
        (lambda unet: index_of(unet).write_text("{}"), "lists no files"),
        (lambda unet: index_of(unet).write_text("["), "damaged"),
        (lambda unet: forget(unet), "holds other tensors than"),
    ],
)
def test_a_spoilt_index_is_one_line(sharded, spoil, said):
    spoil(sharded)
    backbone = load("r.toml", [], discover()).backbone
    for how in (read, shapes):
        with pytest.raises(CheckpointError, match=said) as caught:
            how(find("two", backbone))
        assert "\n" not in str(caught.value)


def map_to(unet, file):
    content = json.loads(index_of(unet).read_text())
    content["weight_map"]["conv_in.bias"] = file
    index_of(unet).write_text(json.dumps(content))


def forget(unet):
    content = json.loads(index_of(unet).read_text())
    del content["weight_map"]["conv_in.bias"]
    index_of(unet).write_text(json.dumps(content))
