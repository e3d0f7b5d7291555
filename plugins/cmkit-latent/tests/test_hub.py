"""Folders of the Hugging Face Hub: what is fetched, and what is said where it cannot be."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
from cmkit_latent import hub
from huggingface_hub import errors

import cmkit

NAME = "hub:owner/model"
INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "vae": ["diffusers", "AutoencoderKL"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "safety_checker": [None, None],
}


class Hub:
    """In the place of `snapshot_download`: a repository of `files`, fetched into a folder."""

    def __init__(self, folder: Path, files: tuple[str, ...], error: Exception | None = None):
        self.folder, self.files, self.error = folder, files, error
        self.calls: list[dict] = []

    def __call__(self, repo_id, revision, allow_patterns, ignore_patterns, local_files_only=False):
        self.calls.append({"name": repo_id, "revision": revision, "local": local_files_only})
        if local_files_only:
            if not self.folder.exists():
                raise errors.LocalEntryNotFoundError("nothing is cached")
            return str(self.folder)
        if self.error:
            raise self.error
        wanted = huggingface_hub.utils.filter_repo_objects(
            self.files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
        )
        for name in wanted:
            path = self.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(INDEX) if name == "model_index.json" else "{}")
        return str(self.folder)

    @property
    def fetched(self):
        found = (path for path in self.folder.rglob("*") if path.is_file())
        return {str(path.relative_to(self.folder)) for path in found}


PIPELINE = (
    "model_index.json",
    "README.md",
    "v1-5-pruned.safetensors",
    "v1-5-pruned.ckpt",
    "vae/config.json",
    "vae/diffusion_pytorch_model.bin",
    "vae/diffusion_pytorch_model.safetensors",
    "vae/diffusion_pytorch_model.fp16.safetensors",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "text_encoder/pytorch_model.bin",
    "tokenizer/tokenizer_config.json",
    "tokenizer/vocab.json",
    "tokenizer/merges.txt",
    "unet/config.json",
    "unet/diffusion_pytorch_model.non_ema.safetensors",
    "unet/diffusion_pytorch_model.safetensors",
)


@pytest.fixture
def stub(tmp_path, monkeypatch):
    def make(files=PIPELINE, error=None):
        made = Hub(tmp_path / "snapshot", files, error)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", made)
        return made

    return make


def test_only_the_safetensors_of_the_parts_are_fetched_and_once(stub):
    fake = stub()
    folder = hub.folder_of(NAME, "codec.weights", ("vae",))
    assert folder == fake.folder
    safe = {"vae/config.json", "vae/diffusion_pytorch_model.safetensors"}
    assert fake.fetched == {"model_index.json", *safe}
    hub.folder_of(NAME, "codec.weights", ("vae",))
    assert [call["local"] for call in fake.calls] == [True, False, True]
    assert {(call["name"], call["revision"]) for call in fake.calls} == {("owner/model", None)}


def test_a_shape_costs_small_files_alone_and_weights_are_fetched_when_they_are_needed(stub):
    fake = stub()
    parts = ("text_encoder", "tokenizer", "text_encoder_2")
    hub.folder_of(NAME, "text.weights", parts, config_only=True)
    assert not [name for name in fake.fetched if name.endswith("safetensors")]
    assert {"tokenizer/vocab.json", "tokenizer/merges.txt"} <= fake.fetched
    hub.folder_of(NAME, "text.weights", parts)
    assert "text_encoder/model.safetensors" in fake.fetched
    assert "vae/config.json" not in fake.fetched


def test_all_parts_are_fetched_where_none_are_named(stub):
    fake = stub()
    hub.folder_of(NAME, "teacher.weights")
    assert "unet/diffusion_pytorch_model.safetensors" in fake.fetched
    assert not {name for name in fake.fetched if "non_ema" in name or "pruned" in name}


def test_a_model_alone_lies_at_the_root(stub):
    files = ("config.json", "model.safetensors", "pytorch_model.bin", "tokenizer.json", "vocab.txt")
    fake = stub(files)
    hub.folder_of(NAME, "text.weights", ("text_encoder", "tokenizer"))
    assert fake.fetched == set(files) - {"pytorch_model.bin"}


def test_a_revision_is_passed_on(stub):
    fake = stub()
    hub.folder_of(f"{NAME}@fp32/main", "codec.weights", ("vae",))
    assert {call["revision"] for call in fake.calls} == {"fp32/main"}


def test_a_repository_of_pickles_is_refused(stub):
    stub(("config.json", "pytorch_model.bin"))
    with pytest.raises(cmkit.CheckpointError, match="the repository has no safetensors"):
        hub.folder_of(NAME, "text.weights")


def answer(status):
    import httpx2

    return httpx2.Response(status, request=httpx2.Request("GET", "https://hub.invalid"))


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (lambda: errors.LocalEntryNotFoundError("x"), "is in .*models--owner--model, and .*FOLDER"),
        (
            lambda: errors.OfflineModeIsEnabled("x"),
            "owner--model.*set codec.weights=FOLDER",
        ),
        (lambda: errors.GatedRepoError("x", response=answer(403)), "gated.*hf auth login"),
        (lambda: errors.RepositoryNotFoundError("x", response=answer(401)), "no such repository"),
        (lambda: errors.RevisionNotFoundError("x", response=answer(404)), "no such revision"),
        (lambda: errors.HfHubHTTPError("50\n3", response=answer(503)), "HfHubHTTPError: 50 3"),
    ],
)
def test_what_cannot_be_had_is_told_in_one_line_with_its_cure(error, said, stub):
    stub(error=error())
    with pytest.raises(cmkit.DownloadError, match=said) as caught:
        hub.folder_of(NAME, "codec.weights", ("vae",))
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("codec.weights = hub:owner/model")


def test_a_full_disk_is_no_fault_of_the_network(stub):
    stub(error=OSError(28, os.strerror(28)))
    with pytest.raises(cmkit.ResourceError, match="No space left"):
        hub.folder_of(NAME, "codec.weights", ("vae",))


@pytest.mark.parametrize("name", ["hub:model", "hub:a/b/c", "hub:", "hub:a/b@", "hub:a b/c"])
def test_a_name_that_none_can_have_is_refused(name, stub):
    stub()
    with pytest.raises(cmkit.RecipeError, match="write hub:OWNER/NAME"):
        hub.folder_of(name, "codec.weights")


def test_a_folder_that_is_not_there_is_told(tmp_path):
    with pytest.raises(cmkit.CheckpointError, match=r"codec.weights = .*nowhere: no such folder"):
        hub.folder_of(str(tmp_path / "nowhere"), "codec.weights")
    assert hub.folder_of(str(tmp_path), "codec.weights") == tmp_path


@pytest.mark.parametrize("offline", ["0", "1"])
def test_without_a_network_the_folder_to_fill_is_named_soon(offline, tmp_path):
    """By the real library: offline as the environment says, or at a closed port."""
    code = (
        "from cmkit_latent import hub; import cmkit, time; start = time.monotonic()\n"
        "try: hub.folder_of('hub:owner/model', 'codec.weights', ('vae',))\n"
        "except cmkit.DownloadError as error: print(error)\n"
        "print(time.monotonic() - start < 20)"
    )
    env = {**os.environ, "HF_HUB_OFFLINE": offline, "HF_ENDPOINT": "http://127.0.0.1:9"}
    env |= {"HF_HOME": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    env = {name: value for name, value in env.items() if "proxy" not in name.lower()}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    message, quick = done.stdout.splitlines()
    assert str(tmp_path / "hub" / "models--owner--model") in message
    assert ("HF_HUB_OFFLINE is set" in message) == (offline == "1")
    assert quick == "True"
