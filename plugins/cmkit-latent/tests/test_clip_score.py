"""CLIPScore keeps the laws of metrics, and is what transformers' own CLIP gives."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from cmkit_latent.clip_score import ClipScore
from tiny import whole_clip

import cmkit
from cmkit import DataError, DataSpec, Reference, testing
from cmkit.measure import Images

CPU = torch.device("cpu")
RGB = DataSpec(3, 40)
CAPTIONS = ["a red apple", "a green frog that is far too long for this model", "", "Über uns", "x"]


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return whole_clip(tmp_path_factory.mktemp("clip"))


def pictures(count=12, channels=3, side=40):
    own = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (count, channels, side, side), dtype=torch.uint8, generator=own)


def reference(captions=CAPTIONS):
    return Reference(Images(pictures(2)), "test", captions=captions)


def test_it_keeps_the_laws_of_metrics(clip):
    options = {"data": RGB, "captions": CAPTIONS}
    testing.check_metric(ClipScore(weights=str(clip), batch=7), **options)
    testing.check_metric(ClipScore(weights=str(clip), dtype="bf16"), **options)
    testing.check_metric(ClipScore(weights="random"), captions=CAPTIONS)


def test_it_is_the_cosine_of_transformers_own_model_and_processor(clip):
    """logits_per_image are exp(logit_scale) times cosines; samples take the captions in turns."""
    from transformers import CLIPModel, CLIPProcessor

    model, processor = (kind.from_pretrained(clip) for kind in (CLIPModel, CLIPProcessor))
    images = pictures()
    said = processor(
        text=CAPTIONS, images=list(images), return_tensors="pt", padding=True, truncation=True
    )
    with torch.no_grad():
        cosines = model(**said).logits_per_image / model.logit_scale.exp()
    own = torch.tensor([cosines[k, k % len(CAPTIONS)] for k in range(len(images))])
    assert own.min() < 0 < own.max()
    assert own.std() > 0.1
    found = ClipScore(weights=str(clip), batch=5).measure(Images(images), reference(), CPU)
    assert found == {"clip_score": pytest.approx(100 * own.clamp(min=0).mean().item(), rel=1e-5)}


def test_it_is_torchmetrics_figure_where_no_cosine_is_negative(clip):
    """torchmetrics (functional/multimodal/clip_score.py) means 100 times the sum of products of
    normalized features, and takes the larger of that mean and 0."""
    metric, images = ClipScore(weights=str(clip)), pictures(40)
    each = [
        metric.measure(Images(images[k : k + 1]), reference([CAPTIONS[k % 5]]), CPU)["clip_score"]
        for k in range(len(images))
    ]
    agreeing = [k for k, score in enumerate(each) if score > 0]
    assert 5 < len(agreeing) < len(images)
    mean = sum(each[k] for k in agreeing) / len(agreeing)
    found = metric.measure(
        Images(images[agreeing]), reference([CAPTIONS[k % 5] for k in agreeing]), CPU
    )
    assert found["clip_score"] == pytest.approx(mean, rel=1e-5)


def test_grey_pictures_are_seen_as_rgb(clip):
    metric, grey = ClipScore(weights=str(clip)), pictures(channels=1)
    both = [
        metric.measure(Images(one), reference(), CPU) for one in (grey, grey.repeat(1, 3, 1, 1))
    ]
    assert both[0] == both[1]


def test_more_agreement_is_better_and_the_report_says_by_which_model(clip, tmp_path):
    metric = ClipScore(weights=str(clip))
    assert metric.higher == metric.keys() == ("clip_score",)
    about = metric.provenance()
    assert about["clip"] == str(clip)
    assert about["clip_sha256"] == metric.identity()["clip"]
    other = shutil.copytree(clip, tmp_path / "other")
    config = other / "preprocessor_config.json"
    config.write_text(config.read_text("utf-8").replace("0.48145466", "0.5"))
    assert ClipScore(weights=str(other)).identity() != metric.identity()


def test_without_prompts_weights_or_a_whole_model_it_refuses_in_one_line(clip, tmp_path):
    with pytest.raises(DataError, match="samples have no prompts; drop this metric"):
        ClipScore(weights=str(clip)).check_reference(RGB, reference(None), CPU)
    with pytest.raises(ValueError, match=r"(?s)weights.*Field required"):
        ClipScore()
    with pytest.raises(DataError, match="pictures of 2 channels"):
        ClipScore(weights=str(clip)).check(DataSpec(2, 8), 9)
    with pytest.raises(cmkit.CheckpointError, match=r"metric\.weights = none: no such folder"):
        ClipScore(weights="none").check(RGB, 9)
    half = shutil.copytree(clip, tmp_path / "half")
    (half / "preprocessor_config.json").unlink()
    with pytest.raises(cmkit.CheckpointError, match=r"no preprocessor_config\.json"):
        ClipScore(weights=str(half)).check_reference(RGB, reference(), CPU)
    config = json.loads((half / "config.json").read_text("utf-8"))
    (half / "config.json").write_text(json.dumps({**config, "model_type": "clip_text_model"}))
    with pytest.raises(cmkit.CheckpointError, match="'clip_text_model'; name a whole CLIP"):
        ClipScore(weights=str(half)).check(RGB, 9)


def test_a_check_of_a_hub_name_offline_names_the_folder_to_fill(monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(cmkit.DownloadError, match=r"models--openai--clip.* --set metric\.weights="):
        ClipScore(weights="hub:openai/clip").check(RGB, 9)
