"""Exported graphs are the denoiser, scales and guidance included, and open without cmkit."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cmkit import discover
from cmkit.export import drawing, graph
from cmkit.recipe import load
from cmkit.tensors import save_weights

RECIPE = """
name = "small"
dataset = { use = "invented", resolution = 8, classes = 3 }
denoiser = { weights = "own.safetensors", sigma_max = 60.0, sigma_data = 0.6 }
sampler = { use = "multistep", sigmas = [9.0, 0.821] }
"""
SMALL = {
    "adm": "channels = 8\nchannel_mult = [1]\nnum_res_blocks = 1\nnorm_groups = 4\n",
    "songunet": "channels = 8\nchannel_mult = [1]\nnum_res_blocks = 1\n",
    "edm2": "channels = 8\nchannel_mult = [1]\nnum_res_blocks = 1\nnum_head_channels = 8\n",
    "dit": "width = 16\ndepth = 1\nnum_heads = 2\n",
}


@pytest.fixture
def source(cmkit):
    """Writes r.toml, in the folder of the command line, beside weights that all act."""

    def write(backbone: str = "dit", *lines: str, conditions=("label",)) -> str:
        text = f'{RECIPE}\n[backbone]\nuse = "{backbone}"\n{SMALL[backbone]}' + "\n".join(lines)
        Path("r.toml").write_text(text)
        recipe = load("r.toml", [], discover())
        network = recipe.backbone.build(recipe.dataset.spec(), frozenset(conditions))
        generator = torch.Generator().manual_seed(0)
        for parameter in network.parameters():
            parameter.data.normal_(std=0.2, generator=generator)
        save_weights(Path("own.safetensors"), network.state_dict())
        return "r.toml"

    return write


def exported(cmkit, to, *arguments):
    code, out, err = cmkit("export", "r.toml", "out", "--to", to, "--json", *arguments)
    assert code == 0, err
    return json.loads(out), json.loads(Path("out/model.json").read_text())


def refused(result, code, *words):
    """One line with these words and this exit code, and nothing written."""
    assert result[0] == code, result
    (line,) = [line for line in result[2].splitlines() if line.startswith("error: ")]
    for word in words:
        assert word in line
    assert not Path("out").exists()
    assert not list(Path().glob(".*out*"))


def as_a_stranger(folder: Path) -> str:
    """Run the card's own lines where there is no cmkit; what is imported of it then."""
    code = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)[1]
    code += "\nimport sys\nprint([name for name in sys.modules if name.startswith('cmkit')])\n"
    hidden = "import sys\nsys.modules['cmkit'] = sys.modules['cmkit_std'] = None\n"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", hidden + code],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_onnx_draws_as_the_card_says_without_cmkit(source, cmkit):
    pytest.importorskip("onnxruntime")
    source("adm")
    result, about = exported(cmkit, "onnx", "--set", 'rescaler={use="global", emb=1.7}')
    assert result["difference"] < 1e-4
    assert about["inputs"]["x"]["shape"] == ["batch", 3, 8, 8]
    levels = [(step["sigma"], step["noise"]) for step in about["steps"]]
    assert levels[0] == (60.0, 60.0)
    assert levels[2] == (0.821, pytest.approx((0.821**2 - 0.002**2) ** 0.5))
    assert about["rescaling"]["baked into the graph"]["emb"] == 1.7
    assert as_a_stranger(Path("out")) == "['cmkit', 'cmkit_std']"
    with Image.open("out/picture.png") as picture:
        assert picture.size == (8, 8)
        assert np.array(picture).std() > 1
    assert str(Path(graph.__file__).parent).encode() not in Path("out/model.onnx").read_bytes()
    opened = graph.open_onnx(Path("out/model.onnx"))
    given = {"x": torch.ones(1, 3, 8, 8), "sigma": torch.ones(1), "label": torch.zeros(1).long()}
    assert (opened(given) - opened({**given, "label": given["label"] + 1})).abs().max() > 1e-3


@pytest.mark.parametrize("backbone", ["songunet", "edm2", "dit"])
def test_torch_draws_as_the_card_says_without_cmkit(backbone, source, cmkit):
    source(backbone)
    result, about = exported(cmkit, "torch", "--set", "sampler.sigmas=[]", "--license", "mit")
    assert result["difference"] < 1e-4
    assert [step["sigma"] for step in about["steps"]] == [60.0]
    card = Path("out/README.md").read_text()
    assert card.startswith("---\nlibrary_name: pytorch\n")
    assert 'license: "mit"' in card
    assert f"- backbone `{backbone}`: " in card
    if backbone == "dit":
        assert as_a_stranger(Path("out")) == "['cmkit', 'cmkit_std']"
        with Image.open("out/picture.png") as picture:
            assert np.array(picture).std() > 1
        assert str(Path(graph.__file__).parents[1]).encode() not in b"".join(
            path.read_bytes() for path in Path("out").iterdir()
        )


def test_scales_of_each_level_and_guidance_are_in_the_graph(source, cmkit):
    source("dit", "null_class = true")
    scales = 'rescaler={use="per_timestep", sigmas=[0.5, 20.0], emb=[0.5, 2.0]}'
    _, about = exported(cmkit, "torch", "--set", scales, "--set", "denoiser.guidance=1.5")
    assert about["guidance"] == 1.5
    with_scales = graph.open_torch(Path("out/model.pt2"))
    Path("out").rename("with")
    exported(cmkit, "torch", "--rescaler", "off", "--set", "denoiser.guidance=1.5")
    without = graph.open_torch(Path("out/model.pt2"))
    given = {"x": torch.ones(4, 3, 8, 8), "sigma": torch.full((4,), 20.0)}
    given["label"] = torch.tensor([0, 1, 2, 0])
    assert (with_scales(given) - without(given)).abs().max() > 1e-3


def test_a_graph_that_gives_something_else_is_not_kept(source, cmkit, monkeypatch):
    source()
    opened = graph.open_torch

    def wrong(file):
        true = opened(file)
        return lambda given: true(given) + (0.01 if len(given["x"]) == 3 else 0)

    monkeypatch.setattr(graph, "open_torch", wrong)
    result = cmkit("export", "r.toml", "out", "--to", "torch")
    refused(result, 4, "out: not kept, x0_hat of the graph differs by 0.0", "0.001 is allowed")


def test_steps_that_draw_something_else_are_not_kept(source, cmkit, monkeypatch):
    source()
    true = drawing.steps_of

    def wrong(plan, denoiser):
        found = true(plan, denoiser)
        levels = tuple(drawing.Level(level.sigma, 1.1 * level.noise) for level in found.levels)
        return drawing.Steps(levels, found.clamp)

    monkeypatch.setattr(graph, "steps_of", wrong)
    refused(cmkit("export", "r.toml", "out", "--to", "torch"), 4, "what is drawn of the graph")


def test_a_network_that_cannot_be_followed_is_one_line(source, cmkit, monkeypatch):
    source()
    forward = graph.Exported.forward

    def branching(self, x, sigma, label=None):
        return forward(self, x, sigma, label) * (2 if sigma[0].item() > 1 else 1)

    monkeypatch.setattr(graph.Exported, "forward", branching)
    result = cmkit("export", "r.toml", "out", "--to", "torch")
    refused(result, 9, "out: not written, torch.export cannot follow the network", "'dit'")


def test_a_sampler_of_other_steps_has_none_in_the_file(source, cmkit):
    source()
    edm = ("--set", 'sampler={use="heun", steps=4}', "--set", 'denoiser.precond="edm"')
    _, about = exported(cmkit, "torch", *edm)
    assert "steps" not in about
    assert "sampler 'heun' does more than draw fresh noise" in Path("out/README.md").read_text()
