"""A run goes to the hub with its card and comes back as the same model; the hub itself is a folder
in the place of three of huggingface_hub's functions."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import errors
from safetensors import safe_open

from cmkit import discover, hub
from cmkit.recipe import load
from cmkit.runs.folder import RunFolder
from cmkit.weights import find, identity

RECIPE = """
name = "tiny"
dataset = { use = "invented", resolution = 8, images = 16, classes = 2 }
backbone = { use = "dit", width = 16, depth = 1, num_heads = 2 }
objective = { use = "ict" }
train = { steps = 2, batch = 4, show = 0 }
sampler = { use = "multistep" }
sample = { images = 4 }
"""
NUMBERS = {
    "values": {"fid": 12.345678, "kid_mean": 0.5},
    "provenance": [
        {
            "numbers": ["fid"],
            "images": 60,
            "extractor": "cmkit-emoji",
            "compared_with": "359 images",
        }
    ],
}


class Hub:
    """Repositories as folders below `home`."""

    def __init__(self, home: Path):
        self.home, self.asked = home, 0

    def create_repo(self, _, repo_id, exist_ok=False):
        assert exist_ok
        (self.home / repo_id).mkdir(parents=True, exist_ok=True)
        return f"https://hub/{repo_id}"

    def upload_folder(self, _, *, repo_id, folder_path, commit_message):
        shutil.copytree(folder_path, self.home / repo_id, dirs_exist_ok=True)

    def snapshot_download(self, repo_id, revision, allow_patterns, local_files_only=False):
        self.asked += not local_files_only
        cached = self.home / "cache" / repo_id
        if local_files_only and not cached.is_dir():
            raise errors.LocalEntryNotFoundError("nothing is cached")
        if not (self.home / repo_id).is_dir():
            raise errors.LocalEntryNotFoundError("the hub does not answer")
        if not local_files_only:
            cached.mkdir(parents=True, exist_ok=True)
            files = [file.name for file in (self.home / repo_id).iterdir()]
            for name in huggingface_hub.utils.filter_repo_objects(
                files, allow_patterns=allow_patterns
            ):
                shutil.copy(self.home / repo_id / name, cached / name)
        return str(cached)


@pytest.fixture
def server(tmp_path_factory, monkeypatch):
    found = Hub(tmp_path_factory.mktemp("hub"))
    for name in ("create_repo", "upload_folder"):
        method = getattr(found, name)
        monkeypatch.setattr(
            huggingface_hub.HfApi, name, lambda self, *a, _m=method, **k: _m(self, *a, **k)
        )
    monkeypatch.setattr(huggingface_hub, "snapshot_download", found.snapshot_download)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "given")
    return found


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run, with numbers of a metric in its report."""
    import torch

    from cmkit.plan import plan
    from cmkit.runs import run
    from cmkit.stop import StopSignal

    home = tmp_path_factory.mktemp("trained")
    (home / "tiny.toml").write_text(RECIPE)
    registry = discover()
    recipe = load(home / "tiny.toml", [], registry)
    *_, last = run(plan(recipe), registry, home / "runs", torch.device("cpu"), StopSignal())
    folder = RunFolder(last.folder)
    report = {key: value for key, value in folder.report().items() if key != "sha256"}
    report["stages"]["metric"] = NUMBERS
    folder.keep_report(report)
    return folder.path


def refused(result, code, *words):
    """One line with these words and this exit code."""
    assert result[0] == code, result
    (line,) = [line for line in result[2].splitlines() if line.startswith("error: ")]
    for word in words:
        assert word in line


def test_a_pushed_run_is_drawn_from_by_its_name(trained, server, cmkit):
    code, out, err = cmkit(
        "export", trained, "out", "--to", "cmkit", "--push", "me/tiny", "--license", "mit"
    )
    assert code == 0, err
    assert "pushed to https://hub/me/tiny" in out
    pushed = {path.name for path in (server.home / "me/tiny").iterdir()}
    assert pushed == {
        "README.md", "recipe.toml", "model.safetensors", "status.json", "report.json",
    }  # fmt: skip
    for place in (str(trained), "hub:me/tiny"):
        out = f"{Path(place).name}.npz"
        code, _, err = cmkit("sample", place, "-n", 2, "--out", out, "--device", "cpu")
        assert code == 0, err
    assert Path("tiny.npz").read_bytes() == Path(f"{trained.name}.npz").read_bytes()
    assert server.asked == 1  # then it is in the cache
    backbone = load(trained / "recipe.toml", [], discover()).backbone
    assert identity("hub:me/tiny", backbone) == identity(str(trained), backbone)
    assert find("hub:me/tiny", backbone).path.name == "tiny"
    card = (server.home / "me/tiny/README.md").read_text()
    header = card.split("---\n")[1]
    assert 'license: "mit"' in header
    assert "library_name: cmkit" in header
    assert '- "dit"' in header
    assert "| fid | 12.346 | 60 | cmkit-emoji | 359 images |" in card
    assert "kid_mean" not in card  # nothing says what measured it
    assert 'cmkit.load("hub:me/tiny")' in card
    assert "arXiv:2310.14189" in card  # of the objective
    assert "[objective]" in card
    assert str(Path.home()) not in card


def test_a_card_without_a_licence_names_none(trained, cmkit):
    code, _, err = cmkit("export", trained, "out", "--to", "cmkit")
    assert code == 0, err
    assert "license" not in Path("out/README.md").read_text()


@pytest.mark.parametrize(
    "more", [("--set", "sampler.sigmas=[0.5]"), ("--rescaler", "off"), ("--drop-scales",)]
)
def test_a_changed_run_is_not_pushed_as_the_run(more, trained, cmkit):
    result = cmkit("export", trained, "out", "--to", "cmkit", *more)
    refused(result, 2, "writes a finished run as it is")


def test_nothing_is_begun_without_a_token_or_a_name(trained, server, cmkit, monkeypatch):
    push = ("export", trained, "out", "--to", "cmkit", "--push")
    refused(cmkit(*push, "tiny"), 2, "--push tiny: write OWNER/NAME")
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    refused(cmkit(*push, "me/tiny"), 5, "no token of the hub", "hf auth login")
    assert not Path("out").exists()
    assert not (server.home / "me").exists()


def test_a_push_that_fails_says_what_is_written(trained, server, cmkit, monkeypatch):
    def broken(*_, **__):
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", broken)
    result = cmkit("export", trained, "out", "--to", "cmkit", "--push", "me/tiny")
    refused(result, 8, "no route", "out is written, push it by `hf upload me/tiny out`")
    assert Path("out/model.safetensors").is_file()


def test_a_name_that_is_not_there_or_no_run_is_one_line(server, cmkit):
    refused(cmkit("sample", "hub:me/none"), 8, "hub:me/none: not all of it is in", "go online")
    (server.home / "me/other").mkdir(parents=True)
    with pytest.raises(hub.CheckpointError, match="no run of cmkit"):
        hub.run_folder("hub:me/other")
    refused(cmkit("export", "hub:me/none", "out", "--to", "cmkit"), 8, "hub:me/none")


def test_weights_say_what_they_are_and_nothing_of_the_machine(trained):
    with safe_open(trained / "model.safetensors", "pt") as file:
        about = file.metadata()
    assert about["format"] == "pt"
    assert about["cmkit.training"] == RunFolder(trained).inputs()["keys"]["train"]
    assert (about["cmkit.recipe"], about["cmkit.backbone"]) == ("tiny", "dit")
    assert (about["cmkit.shape"], about["cmkit.classes"]) == ("3x8x8", "2")
    assert "/" not in json.dumps(about)
