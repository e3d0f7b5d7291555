"""The recipes of text to image and of latents, and what they say without weights and a network."""

from __future__ import annotations

import importlib.metadata
import json
import re
import shutil
import socket
import tomllib
from pathlib import Path

import pytest
from tiny import tiny_sd

from cmkit import discover
from cmkit.plan.checks import check_stages
from cmkit.recipe import load, run_name
from tests.conftest import cmkit  # noqa: F401 - a fixture
from tests.shipped import LATENT as RECIPES

SD15, SEARCH = (next(p for p in RECIPES if p.stem == n) for n in ("lcm_sd15", "search_lcm_sd15"))


@pytest.fixture(scope="module", autouse=True)
def registry(tmp_path_factory):
    """Known to cmkit also where it is not installed, as when only `src` is on the path."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        if "latent" not in importlib.metadata.entry_points(group="cmkit").names:
            site = tmp_path_factory.mktemp("site")
            info = site / "cmkit_latent-0.1.0.dist-info"
            info.mkdir()
            (info / "METADATA").write_text(
                "Metadata-Version: 2.1\nName: cmkit-latent\nVersion: 0.1.0\n"
            )
            (info / "entry_points.txt").write_text("[cmkit]\nlatent = cmkit_latent.manifest\n")
            patch.syspath_prepend(str(site))
        discover.cache_clear()
        yield discover()
    discover.cache_clear()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return tiny_sd(tmp_path_factory.mktemp("sd"))


@pytest.fixture
def offline(monkeypatch):
    """No question to the network comes through, whatever asks it."""

    def refuse(*_):
        raise AssertionError("a run asked for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_opens_with_its_command_needs_cost_and_what_is_expected(path, registry):
    head, _, _ = path.read_text("utf-8").partition("\nname = ")
    recipe = load(path, [], registry)
    check_stages(recipe)
    assert recipe.name == path.stem
    assert head.splitlines()[:2] == [f"# cmkit run recipes/{path.name}", "#"]
    assert re.findall("^# (Needs|Cost|Expected): ", head, re.M) == ["Needs", "Cost", "Expected"]
    said = " ".join(head.replace("#", " ").split())
    assert re.search("[Nn]ot run here", said)
    if recipe.expected:
        assert f"FID {recipe.expected.scores['fid']:g}" in said
    if recipe.train:
        images = recipe.train.steps * recipe.train.batch
        assert re.findall(r"Cost: ([\d,]+) training images", said) == [f"{images:,}"]
        if recipe.adapter:  # the target is the network itself, and so is the teacher
            assert "target" not in recipe.objective.needed()
        else:
            assert recipe.train.ema == (recipe.objective.target_ema,)
            assert not recipe.train.ema_warmup
            assert recipe.teacher.table.dtype == "bf16"


def test_the_search_is_of_the_shipped_distillation(registry):
    student, search = (load(path, [], registry) for path in (SD15, SEARCH))
    assert search.denoiser.weights == f"run:{run_name(student)}"
    for key in ("dataset", "codec", "text"):
        assert search.resolved[key] == student.resolved[key]
    assert [metric.keys()[0] for metric in search.metric] == ["fid", "clip_score"]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_runs_smoked_without_data_weights_and_network(path, cmkit, offline, monkeypatch):  # noqa: F811
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    code, out, err = cmkit("run", path, "--smoke", "--json")
    assert code == 0, err
    report = json.loads(out)
    assert report["smoke"] is True
    assert list(report["stages"]) == [
        s for s in ("cache", "train", "search", "sample", "metric") if s in report["recipe"]
    ]
    wanted = [metric["use"] for metric in tomllib.loads(path.read_text("utf-8"))["metric"]]
    assert [metric["use"] for metric in report["recipe"]["metric"]] == wanted


def test_a_check_without_weights_and_network_names_the_folder_to_fill(cmkit, offline, tmp_path):  # noqa: F811
    """With exit code 8, whichever table comes first."""
    from PIL import Image

    Path("data/captions").mkdir(parents=True)
    Image.new("RGB", (64, 64)).save("data/captions/a.png")
    Path("data/captions/a.txt").write_text("a picture")
    code, out, err = cmkit("check", SD15)
    assert (code, out) == (8, "")
    (line,) = err.splitlines()
    assert "codec.weights = hub:stable-diffusion-v1-5/stable-diffusion-v1-5" in line
    assert "models--stable-diffusion-v1-5--stable-diffusion-v1-5" in line
    assert "--set codec.weights=FOLDER" in line


def test_a_smoke_run_reads_what_is_here_of_a_pipeline(cmkit, whole):  # noqa: F811
    """Widths that do not fit are found although the run itself is of other parts."""
    sets = [f"--set={key}.weights={whole}" for key in ("codec", "text", "teacher")]
    code, _, err = cmkit("run", SD15, "--smoke", *sets, "--set=dataset.resolution=16")
    assert code == 2
    assert "reads 768 numbers a token, [text] gives 16" in err


def test_the_suite_of_steps_trains_once(cmkit):  # noqa: F811
    suite = Path(__file__).parents[3] / "benchmarks" / "suites" / "lcm_steps.toml"
    code, out, err = cmkit("bench", suite, "--smoke", "--check", "--json")
    assert code == 0, err
    cells = json.loads(out)["cells"]
    assert len(cells) == 4


@pytest.mark.parametrize(
    ("part", "key", "said"),
    [
        ("vae", "codec", "no subfolder vae; name a whole pipeline"),
        ("unet", "teacher", "no subfolder unet; name a whole pipeline"),
        ("tokenizer", "text", "no subfolder tokenizer; name a whole pipeline"),
        ("", "metric.1", "model of type 'pipeline or none'; name a whole CLIP"),
    ],
)
def test_half_a_pipeline_is_named_by_what_it_lacks(part, key, said, whole, cmkit, tmp_path):  # noqa: F811
    half = shutil.copytree(whole, tmp_path / "half")
    if part:
        shutil.rmtree(half / part)
    folders = dict.fromkeys(("codec", "text", "teacher"), whole) | {"metric.1": "random", key: half}
    code, _, err = cmkit(
        "check",
        SD15,
        '--set=dataset={use="invented",resolution=16,texts=3}',
        f'--set=backbone={{use="sd_unet",folder="{whole}"}}',
        '--set=metric.0.extractor="cmkit-random"',
        *(f"--set={name}.weights={folder}" for name, folder in folders.items()),
    )
    assert code == 4, err
    assert said in err
    assert len(err.splitlines()) == 1
