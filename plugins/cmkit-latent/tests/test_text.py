"""Prompt encoders keep the laws of their kind, with the features of diffusers' pipelines."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from cmkit_latent.clip import Clip
from cmkit_latent.sentence import Sentence
from cmkit_latent.words import Words
from safetensors.torch import load_file, save_file
from tiny import LENGTH, SCHEDULE, tiny_bert, tiny_sd, tiny_sdxl, tiny_tokenizer, tiny_vae

import cmkit
from cmkit import TextSpec, testing

CPU = torch.device("cpu")
PROMPTS = ["a red apple", "a green frog that is far too long", "", "Über uns"]


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def sd(tmp_path_factory):
    return tiny_sd(tmp_path_factory.mktemp("sd"))


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory):
    return tiny_sdxl(tmp_path_factory.mktemp("sdxl"))


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return tiny_bert(tmp_path_factory.mktemp("bert"))


def rewritten(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **values}))


def pipeline_of(folder):
    from diffusers import DiffusionPipeline

    return DiffusionPipeline.from_pretrained(folder)


def encoded_by(folder, prompts, **said):
    """Features of prompts by a pipeline: of the prompts, of no prompt; and the pooled ones."""
    options = {"device": CPU, "num_images_per_prompt": 1, "do_classifier_free_guidance": True}
    with torch.no_grad():
        return pipeline_of(folder).encode_prompt(prompts, **options, **said)


def test_the_encoders_keep_the_laws_of_their_kind(sd, sdxl, bert):
    testing.check_text(Clip(weights=str(sd)))
    testing.check_text(Clip(weights=str(sdxl), batch=2))
    testing.check_text(Sentence(weights=str(bert), length=8))
    testing.check_text(Sentence(weights=str(bert), length=8, mask=False, dtype="bf16"))


def test_features_of_stable_diffusion_are_those_of_its_pipeline_bit_for_bit(sd):
    prompts = Clip(weights=str(sd)).load(CPU)
    text, _ = encoded_by(sd, PROMPTS)
    _, null = encoded_by(sd, PROMPTS[:1])
    assert torch.equal(prompts(PROMPTS).text, text)
    assert torch.equal(prompts.null.text, null)
    assert prompts(PROMPTS).pooled is prompts.null.pooled is None
    assert Clip(weights=str(sd)).spec() == TextSpec(LENGTH, 16)


def test_features_of_xl_are_those_of_its_pipeline_bit_for_bit(sdxl):
    prompts = Clip(weights=str(sdxl)).load(CPU)
    text, null, pooled, null_pooled = encoded_by(sdxl, PROMPTS)
    cond = prompts(PROMPTS)
    assert torch.equal(cond.text, text)
    assert torch.equal(cond.pooled, pooled)
    for ours, theirs in ((prompts.null.text, null), (prompts.null.pooled, null_pooled)):
        assert torch.equal(ours, theirs[:1])
        assert not ours.any()
    assert Clip(weights=str(sdxl)).spec() == TextSpec(LENGTH, 16 + 24, 12, True)


def test_where_xl_wants_no_zeros_the_empty_prompt_is_encoded(sdxl, tmp_path):
    folder = shutil.copytree(sdxl, tmp_path / "sdxl")
    first = Clip(weights=str(folder)).identity()
    rewritten(folder / "model_index.json", force_zeros_for_empty_prompt=False)
    null = Clip(weights=str(folder)).load(CPU).null
    _, text, _, pooled = encoded_by(folder, PROMPTS[:1])
    for ours, theirs in ((null.text, text), (null.pooled, pooled)):
        assert torch.equal(ours, theirs)
        assert ours.any()
    assert Clip(weights=str(folder)).identity() != first


def test_words_stand_in_for_other_encoders_in_smoke_runs(sd, sdxl, bert, tmp_path):
    data = cmkit.DataSpec(3, 16)
    testing.check_text(Words())
    testing.check_text(Words(pooled=5, size=True, length=3))
    assert Words(length=2).cut(["a red apple", "a"]) == [1, 0]
    told = {"use": "words"}
    for text, wanted in (
        (Clip(weights=str(sd)), told),
        (Clip(weights=str(sdxl)), {**told, "size": True, "pooled": 12}),
        (Clip(weights=str(tmp_path / "nowhere")), told),
        (Sentence(weights=str(bert)), told),
    ):
        assert text.smallest(data) == wanted


def test_negative_prompts_are_prompts(sdxl):
    prompts = Clip(weights=str(sdxl)).load(CPU)
    _, text, _, pooled = encoded_by(sdxl, ["a"], negative_prompt=["blurry"])
    assert torch.equal(prompts(["blurry"]).text, text)
    assert torch.equal(prompts(["blurry"]).pooled, pooled)


@pytest.mark.parametrize("mask", [True, False])
def test_features_of_sentences_are_those_of_a_pipeline_with_that_encoder(mask, bert, tmp_path):
    """What is saved of the encoder and its tokenizer pads and masks in a pipeline as here."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    prompts = Sentence(weights=str(bert), length=8, mask=mask).load(CPU)
    (tower,) = prompts.towers
    unet = UNet2DConditionModel(
        block_out_channels=(8, 8),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        norm_num_groups=4,
        cross_attention_dim=16,
    )
    parts = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    StableDiffusionPipeline(
        vae=tiny_vae(),
        text_encoder=tower.encoder,
        tokenizer=tower.tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(**SCHEDULE),
        **parts,
    ).save_pretrained(tmp_path)
    given = ["a red apple", "apple"]
    text, null = encoded_by(tmp_path, given)
    assert torch.equal(prompts(given).text, text)
    assert torch.allclose(prompts.null.text, null[:1], atol=1e-5)
    assert text[:, -1].abs().min() > 0  # padding has features
    again = Sentence(weights=str(tmp_path), length=8, mask=mask)
    assert torch.equal(again.load(CPU)(given).text, text)


def test_hidden_padding_does_not_change_words(bert):
    """With the mask, a word's features do not depend on how far prompts are padded."""
    short, long = (
        Sentence(weights=str(bert), length=length).load(CPU)(["apple"]).text for length in (4, 9)
    )
    bare = Sentence(weights=str(bert), length=9, mask=False).load(CPU)(["apple"]).text
    assert torch.allclose(short[:, :3], long[:, :3], atol=1e-5)
    assert not torch.allclose(bare[:, :3], long[:, :3], atol=1e-2)


def test_too_long_prompts_are_told_by_how_many_tokens_are_cut(sd, sdxl, bert):
    letters = [sum(map(len, prompt.split())) for prompt in PROMPTS[:2]]  # a token a byte
    cuts = [max(0, n + 2 - LENGTH) for n in letters]
    assert Clip(weights=str(sd)).cut(PROMPTS[:2]) == cuts == [0, 12]
    assert Clip(weights=str(sdxl)).cut(PROMPTS[:2]) == cuts
    assert Sentence(weights=str(bert), length=4).cut(["red apple", "red apple red"]) == [0, 1]
    whole = Clip(weights=str(sd)).load(CPU)
    cut = "a green frog that is far too long"
    assert torch.equal(whole([cut]).text, whole([cut[:-10] + "another end"]).text)


def test_shapes_and_cuts_need_no_weights(sdxl, bert, tmp_path):
    folder = shutil.copytree(sdxl, tmp_path / "sdxl")
    words = shutil.copytree(bert, tmp_path / "bert")
    for file in (*folder.rglob("*.safetensors"), *words.rglob("*.safetensors")):
        file.unlink()
    assert Clip(weights=str(folder)).spec().width == 40
    assert Clip(weights=str(folder)).cut(["a"]) == [0]
    assert Sentence(weights=str(words)).spec() == TextSpec(16, 16)
    assert Sentence(weights=str(words)).cut(["a"]) == [0]


@pytest.mark.parametrize(
    ("gone", "said"),
    [
        ("text_encoder", "no subfolder text_encoder; name a whole pipeline"),
        ("tokenizer_2", "no subfolder tokenizer_2; name a whole pipeline"),
        ("text_encoder_2", "no subfolder text_encoder_2; name a whole pipeline"),
        ("text_encoder/config.json", "text_encoder/config.json: No such file"),
        ("tokenizer/tokenizer_config.json", "tokenizer_config.json: No such file"),
        ("text_encoder_2/model.safetensors", "text_encoder_2: no weights"),
        ("tokenizer/tokenizer.json", "tokenizer.*fetch or save the tokenizer again"),
    ],
)
def test_half_a_pipeline_is_told_in_one_line(gone, said, sdxl, tmp_path):
    folder = shutil.copytree(sdxl, tmp_path / "sdxl")
    place = folder / gone
    shutil.rmtree(place) if place.is_dir() else place.unlink()
    text = Clip(weights=str(folder))
    with pytest.raises(cmkit.CheckpointError, match=said) as caught:
        _ = text.spec(), text.load(CPU)
    assert "\n" not in str(caught.value)


def test_a_vocabulary_without_tokenizer_json_is_read_and_one_of_another_encoder_refused(
    sd, tmp_path
):
    folder = shutil.copytree(sd, tmp_path / "sd")
    place = folder / "tokenizer"
    said = json.loads((place / "tokenizer.json").read_text("utf-8"))["model"]
    (place / "tokenizer.json").unlink()
    (place / "vocab.json").write_text(json.dumps(said["vocab"]))
    (place / "merges.txt").write_text("#version: 0.2\n")
    ours = Clip(weights=str(folder)).load(CPU)(PROMPTS).text
    assert torch.equal(ours, Clip(weights=str(sd)).load(CPU)(PROMPTS).text)
    (place / "vocab.json").write_text(json.dumps({**said["vocab"], "word</w>": 514}))
    with pytest.raises(cmkit.CheckpointError, match="knows 515 tokens, and the encoder 514"):
        Clip(weights=str(folder)).load(CPU)


def test_spoilt_weights_are_told_in_one_line(bert, tmp_path):
    folder = shutil.copytree(bert, tmp_path / "bert")
    path = folder / "model.safetensors"
    found = load_file(path)
    name = "encoder.layer.0.output.dense.weight"
    save_file({k: v for k, v in found.items() if k != name}, path, {"format": "pt"})
    with pytest.raises(cmkit.CheckpointError, match=f"missing tensors: {name}"):
        Sentence(weights=str(folder)).load(CPU)
    save_file({**found, name: torch.zeros(3, 3)}, path, {"format": "pt"})
    with pytest.raises(cmkit.CheckpointError, match="fetch or save it again"):
        Sentence(weights=str(folder)).load(CPU)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(cmkit.CheckpointError, match="fetch or save it again"):
        Sentence(weights=str(folder)).load(CPU)


def test_more_tokens_than_an_encoder_takes_are_refused(bert):
    with pytest.raises(cmkit.RecipeError, match=r"text.length = 40: .* set text.length = 32"):
        Sentence(weights=str(bert), length=40).spec()


def test_identity_follows_from_weights_and_words(bert, tmp_path):
    folder = shutil.copytree(bert, tmp_path / "bert")
    text = Sentence(weights=str(folder))
    first = text.identity()
    assert Sentence(weights=str(bert)).identity() == first  # wherever the folder is
    file = folder / "tokenizer.json"
    file.write_text(file.read_text("utf-8").replace("apple", "appel"))
    assert text.identity() != first


def test_loading_draws_nothing_and_prints_nothing(sd, capfd):
    before = torch.get_rng_state()
    Clip(weights=str(sd)).load(CPU)
    assert torch.equal(torch.get_rng_state(), before)
    assert capfd.readouterr() == ("", "")


def test_an_encoder_of_an_installed_package_is_found_without_importing_it(
    bert, tmp_path, monkeypatch
):
    package = tmp_path / "some_words"
    shutil.copytree(bert, package / "model")
    (package / "__init__.py").write_text("raise RuntimeError('it was imported')")
    monkeypatch.syspath_prepend(tmp_path)
    assert Sentence(weights="package:some_words").spec() == TextSpec(16, 16)
    shutil.rmtree(package / "model")
    with pytest.raises(cmkit.CheckpointError, match="no folder in it has"):
        Sentence(weights="package:some_words").spec()
    with pytest.raises(cmkit.CheckpointError, match="is not installed"):
        Sentence(weights="package:no_words_at_all").spec()


def test_the_tiny_vocabulary_knows_every_byte():
    tokenizer = tiny_tokenizer(40)
    numbers = tokenizer(["Ünder, 漢字 x1!"])["input_ids"][0]
    assert numbers.count(513) == 1
    assert max(numbers) == 513
