"""Text part emoji_words, and the networks of pixels that read prompts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from cmkit_std.backbones.adm import ADM
from cmkit_std.backbones.dit import DiT
from cmkit_std.datasets.emoji import Emoji
from cmkit_std.texts.emoji_words import EmojiWords, vector

from cmkit import Cond, DataSpec, RecipeError, TextSpec
from cmkit.plan import plan
from cmkit.plugins import discover
from cmkit.recipe import load, run_name
from cmkit.testing import check_text

CPU = torch.device("cpu")
RECIPES = Path(__file__).parent.parent / "recipes"
SMALL = {"channels": 16, "channel_mult": (1,), "num_res_blocks": 1, "norm_groups": 8}
READING = {
    "adm": ADM(**SMALL),
    "adm-patches": ADM(**SMALL, patch_size=4, attention_resolutions=()),
    "dit": DiT(width=16, depth=1, num_heads=2, patch_size=4),
}
DATA = DataSpec(3, 16, text=TextSpec(12, 256))


def cosine(one: str, other: str) -> float:
    a, b = vector(one), vector(other)
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def test_it_keeps_the_laws_of_a_prompt_encoder():
    check_text(EmojiWords())


def test_words_of_the_same_pictures_are_alike_in_every_language():
    for other in ("frosch", "rana", "grenouille"):
        assert cosine("frog", other) > 0.4
    assert abs(cosine("frog", "car")) < 0.25
    assert abs(cosine("red", "blue")) < 0.25


def test_a_vector_is_what_its_formula_says():
    """Half of the square is the word's own signs, half the sum of those of its pictures."""
    from cmkit_std.texts import emoji_words

    own = emoji_words._signs("word frog")
    pictures = emoji_words._pictures()[emoji_words._places()["frog"]].sum(0)
    expected = (own + pictures * 16 / np.linalg.norm(pictures)) / np.sqrt(2)
    np.testing.assert_allclose(vector("frog"), expected, rtol=1e-6)
    assert set(np.abs(own)) == {1.0}


def test_a_prompt_is_its_words_without_articles_in_any_case_and_number():
    prompts = EmojiWords().load(CPU)
    one, two, other = prompts(["A red apple", "red, apples!", "apple"]).text
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    assert not prompts.null.text.any()


def test_every_caption_says_something_and_is_short_enough():
    """But for a few that are signs alone."""
    words, captions = EmojiWords(), Emoji(split="all", captions_each=8).captions()
    silent = [text for text in captions if not words.load(CPU)([text]).text.any()]
    assert len(silent) < 10
    assert not any(any(c.isalpha() for c in text) for text in silent)
    assert max(words.cut(captions)) == 0


def test_unknown_words_are_named_and_prompts_of_no_others_refused():
    words = EmojiWords()
    assert words.unknown(["a frog", "a wugful frog", ""]) == [(), ("wugful",), ()]
    assert words.cut(["frog " * 20, "frog"]) == [8, 0]
    with pytest.raises(RecipeError, match=r"'frrog': none of its words .* did you mean 'frog'"):
        words.unknown(["frrog"])


RECIPE = """\
name = "words"
dataset = { use = "emoji", labels = false, captions_each = 1 }
text = { use = "emoji_words" }
backbone = { use = "dit", patch_size = 8, width = 16, depth = 1, num_heads = 2 }
denoiser = { precond = "edm" }
objective = { use = "edm" }
train = { steps = 1, batch = 2, show = ["a wugful frog"] }
sampler = { use = "euler", steps = 2 }
sample = { images = 2 }
"""


def test_a_plan_names_unknown_words_and_refuses_a_prompt_of_nothing_else(tmp_path):
    file = tmp_path / "words.toml"
    file.write_text(RECIPE)
    notes = plan(load(file, [], discover())).notes
    assert "not known, and left out: 'wugful' in 'a wugful frog'" in notes
    said = r"train.show: prompt 'wugful': none of its words"
    with pytest.raises(RecipeError, match=said):
        plan(load(file, ['train.show=["wugful"]'], discover()))
    with pytest.raises(RecipeError, match=r"sample.prompts: prompt 'gwug'"):
        plan(load(file, ['sample.prompts=["gwug"]'], discover()))


def built(name: str, **changed: int | None):
    data = DataSpec(3, 16, **{"num_classes": None, **changed}, text=DATA.text)
    conditions = frozenset({"text", "guidance"} | ({"label"} if data.num_classes else set()))
    network = READING[name].build(data, conditions)
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    return network.eval()


@torch.no_grad()
@pytest.mark.parametrize("name", READING)
def test_networks_of_pixels_read_prompts_beside_labels(name):
    network = built(name, num_classes=3)
    assert network.prompted
    x, t, w = torch.randn(2, 3, 16, 16), torch.tensor([0.1, 0.5]), torch.tensor([1.0, 2.0])
    text = EmojiWords().load(CPU)(["frog", "apple"]).text
    label = torch.tensor([0, 1])
    out = network(x, t, Cond(label=label, text=text, guidance=w), {})
    for other in (Cond(label, w, text=text.flip(0)), Cond(label.flip(0), w, text=text)):
        assert not torch.allclose(network(x, t, other, {}), out, atol=1e-4)
    with pytest.raises(ValueError, match="embeds prompts"):
        network(x, t, Cond(label=label, guidance=w), {})


@torch.no_grad()
@pytest.mark.parametrize("name", READING)
def test_the_scale_of_an_embedding_with_a_prompt_folds_into_weights(name):
    network = built(name)
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([0.1, 0.5])
    cond = Cond(text=EmojiWords().load(CPU)(["frog", "apple"]).text, guidance=torch.ones(2))
    emb = [site for site in network.sites if site.startswith("emb.")]
    factors, left = network.factors(dict.fromkeys(emb, 1.3))
    assert not left
    assert "text.out.weight" in factors
    scaled = network(x, t, cond, dict.fromkeys(emb, torch.tensor(1.3)))
    for key, factor in factors.items():
        network.get_parameter(key).mul_(factor)
    torch.testing.assert_close(network(x, t, cond, {}), scaled, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_squares_of_pixels_are_a_network_between_two_rearrangements():
    """adm with patch_size computes on squares what a plain one does on their channels."""
    network = ADM(**SMALL, patch_size=4, attention_resolutions=()).build(
        DataSpec(3, 16), frozenset()
    )
    plain = ADM(**SMALL, attention_resolutions=()).build(DataSpec(48, 4), frozenset())
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    plain.load_state_dict(network.state_dict())
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([0.1, 0.5])
    inside = plain(torch.nn.functional.pixel_unshuffle(x, 4), t, Cond(), {})
    out = torch.nn.functional.pixel_shuffle(inside, 4)
    torch.testing.assert_close(network(x, t, Cond(), {}), out, rtol=1e-5, atol=1e-6)
    assert ADM(**SMALL, patch_size=4).layouts(DataSpec(3, 16)) == ()
    with pytest.raises(RecipeError, match="patch_size = 5: does not divide pictures of 16"):
        ADM(**SMALL, patch_size=5).build(DataSpec(3, 16), frozenset())


@pytest.mark.parametrize(
    "pair", [("emoji_teacher", "emoji_lcm"), ("emoji_full_teacher", "emoji_full")]
)
def test_teacher_and_student_of_a_pair_of_recipes_fit_together(pair):
    teacher, student = (load(RECIPES / f"{name}.toml", [], discover()) for name in pair)
    assert student.teacher.table.weights == f"run:{run_name(teacher)}"
    assert student.teacher.backbone == student.backbone == teacher.backbone
    assert student.text == teacher.text
    assert student.dataset == teacher.dataset.model_copy(update={"empty": 0.0})
    assert student.objective.num_sigmas - 1 == student.sampler.grid
    assert teacher.denoiser.guidance == student.denoiser.guidance <= student.objective.w_max
    assert teacher.sample.images == student.sample.images
    for recipe in (teacher, student):
        assert recipe.text.unknown(recipe.train.show) == [()] * len(recipe.train.show)
