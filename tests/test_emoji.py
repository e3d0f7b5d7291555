"""Data set `emoji`, and the networks that know it."""

import hashlib
import io
import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from cmkit_std.datasets import emoji
from cmkit_std.datasets.emoji import GROUPS, LANGUAGES, Emoji, glyphs, groups_of, pixels
from cmkit_std.metrics import emoji_net
from cmkit_std.metrics.emoji_judge import EmojiJudge
from cmkit_std.metrics.fidelity import Fidelity
from PIL import Image

from benchmarks import make_emoji as make
from cmkit import CheckpointError, DataError, DataSpec, RecipeError, Reference, testing

CPU = torch.device("cpu")


def test_the_shipped_files_are_what_they_were():
    shown = pixels()
    assert shown.shape == (1579, 3, 32, 32)
    assert shown.dtype == np.uint8
    assert Counter(glyph.group for glyph in glyphs()) == {
        **{0: 168, 1: 335, 2: 158, 3: 130, 4: 218, 5: 85, 6: 262, 7: 223},
    }
    for name, sha256 in emoji.SHA256.items():
        data = (emoji.FOLDER / name).read_bytes()
        assert hashlib.sha256(data).hexdigest() == sha256
        assert len(data) < 1.5e6
    texts = {file.name: file.read_text("utf-8") for file in emoji.FOLDER.glob("[CLN]*")}
    assert "SIL OPEN FONT LICENSE Version 1.1" in texts["COPYRIGHT.noto-emoji.txt"]
    assert "Google" in texts["COPYRIGHT.noto-emoji.txt"]
    assert "UNICODE LICENSE V3" in texts["LICENSE.cldr-core.txt"]
    assert "Miles Johnson" in texts["LICENSE.emojibase-data.txt"]
    assert all(
        name in texts["NOTICE.md"] for name in (*emoji.SHA256, *texts) if name != "NOTICE.md"
    )


def test_no_two_pictures_are_one():
    rows = pixels().reshape(len(pixels()), -1).astype(np.float32)
    squares = (rows**2).sum(1)
    apart = squares[:, None] + squares - 2 * rows @ rows.T
    np.fill_diagonal(apart, np.inf)
    assert np.sqrt(apart.min() / 3072) > 5


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_emoji_has_a_name_of_its_own_and_nearly_all_have_keywords(language):
    said = [glyph.said[language] for glyph in glyphs()]
    names = [name for name, *_ in said]
    assert len(set(names)) == len(said)
    assert sum(len(of) > 1 for of in said) >= 0.98 * len(said)
    assert all(text == " ".join(text.split()) != "" for of in said for text in of)
    captions = Emoji(language=language, split="all").captions()
    assert len(captions) == len(set(captions)) > 5400
    assert set(names) <= set(captions)


def test_captions_say_the_name_keywords_or_both():
    made = Emoji(split="all", groups=("food & drink",), captions_each=5)
    shown, texts = made.pictures(), made.captions()
    apple = next(glyph for glyph in glyphs() if glyph.code == "1F34E")
    rows = [n for n in range(len(shown)) if np.array_equal(shown.row(n), pixels()[apple.number])]
    assert len(rows) == 5
    first, *later = [texts[shown.captions[n]] for n in rows]
    name, *keywords = apple.said["en"]
    assert first == name == "red apple"
    assert {"apple", "fruit", "food"} <= set(keywords)
    for turn, text in enumerate(later, 1):
        words = text.split(", ")
        assert (words[0] == name) == (turn % 2 == 0)
        assert set(words) <= {name, *keywords}
    assert len(set(later)) == 4


def test_families_are_held_out_whole():
    train, test = Emoji(), Emoji().heldout()
    assert test.heldout() is None
    kept, out = ({glyph.family for glyph in part._chosen()[0]} for part in (train, test))
    assert not kept & out
    seen, held = (len(part.reference().images) for part in (train, test))
    assert (seen, held) == (1406, 173)
    cooks = {glyph.family for glyph in glyphs() if glyph.said["en"][0].split()[-1] == "cook"}
    assert len(cooks) == 1


def test_metrics_compare_with_each_picture_once_mixed_and_named():
    found = Emoji(captions_each=3).reference()
    assert len(found.images) == len(set(found.captions)) == 1406
    first = {min(groups_of(caption)) for caption in found.captions[:100]}
    assert len(first) == len(GROUPS)
    assert found.fingerprint == Emoji(captions_each=1).reference().fingerprint


def test_groups_become_the_classes():
    made = Emoji(groups=("symbols", "food & drink"))
    assert made.spec().classes == ("symbols", "food & drink")
    assert made.spec().counts == (203, 114)
    assert Emoji(labels=False).spec() == DataSpec(3, 32)
    x0, cond = next(made.batches(64, 0, CPU))
    assert x0.shape == (64, 3, 32, 32)
    assert set(cond.label.tolist()) == {0, 1}
    with pytest.raises(ValueError, match="no group 'food'; there are smileys & emotion"):
        Emoji(groups=("food",))
    with pytest.raises(ValueError, match="a group twice"):
        Emoji(groups=("symbols", "symbols"))


def test_identity_tells_what_batches_are_drawn_from():
    found = [
        made.identity()
        for made in (Emoji(), Emoji(language="fr"), Emoji(captions_each=2), Emoji(split="all"))
    ]
    assert len({json.dumps(one) for one in found}) == 4
    assert found[0]["images"] == 4 * 1406


@pytest.mark.parametrize("options", [{}, {"groups": ("activities",), "empty": 0.2, "flip": True}])
def test_it_keeps_the_laws_of_data_sets(options):
    testing.check_dataset(Emoji(**options))


def test_a_damaged_file_is_named(monkeypatch, tmp_path):
    (tmp_path / emoji.TABLE).write_bytes(b"{}\n")
    monkeypatch.setattr(emoji, "FOLDER", tmp_path)
    for name, fault in ((emoji.TABLE, "SHA-256"), (emoji.SHEET, "No such file")):
        with pytest.raises(DataError, match=rf"{name}: .*{fault}.*reinstall cmkit"):
            emoji._file(name)


def test_prompts_name_groups():
    assert groups_of("Red  Apple") == groups_of("fruit, red") == {GROUPS.index("food & drink")}
    assert groups_of("roter Apfel") == groups_of("红苹果") == {GROUPS.index("food & drink")}
    assert groups_of("family: adult, child") == {GROUPS.index("people & body")}
    assert len(groups_of("red")) > 2
    assert groups_of("a photograph of nothing") == groups_of("") == groups_of(",") == frozenset()


def held_out():
    found = Emoji(split="test").reference()
    labels = torch.from_numpy(found.images.labels)
    shown = torch.stack([found.images[n] for n in range(len(labels))])
    return found, shown, labels


def test_both_nets_know_held_out_emoji():
    _, shown, labels = held_out()
    x = emoji_net.to_net(shown)
    _, logits = emoji_net.feature_net()(x)
    assert (logits.argmax(1) == labels).float().mean() >= 0.65
    assert (emoji_net.judge_net(CPU)(x).argmax(1) == labels).float().mean() >= 0.65


class Few(torch.utils.data.Dataset):
    def __init__(self, shown):
        self.shown = shown

    def __len__(self):
        return len(self.shown)

    def __getitem__(self, n):
        return self.shown[n]


def test_the_judge_recognizes_what_prompts_name():
    reference, shown, _ = held_out()
    judge = EmojiJudge(prompts=True)
    found = judge.measure(Few(shown), reference, CPU)
    assert list(found) == list(judge.keys())
    assert found["confident"] == found["real_confident"] >= 0.3
    assert found["unrecognized"] <= 0.35
    turned = [*reference.captions[1:], reference.captions[0]]
    wrong = judge.measure(Few(shown), replace(reference, captions=turned), CPU)
    assert wrong["unrecognized"] >= 0.65
    noise = Few(torch.randint(0, 256, (200, 3, 32, 32), dtype=torch.uint8))
    nothing = EmojiJudge().measure(noise, reference, CPU)
    assert "unrecognized" not in nothing
    assert nothing["confident"] <= 0.02


def test_the_judge_names_what_it_cannot_judge():
    reference = held_out()[0]
    judge = EmojiJudge(prompts=True)
    with pytest.raises(DataError, match="2 channels; it judges RGB"):
        judge.check(DataSpec(2, 8), 10)
    with pytest.raises(DataError, match=r"no prompts; set metric\.prompts = false"):
        judge.check_reference(DataSpec(3, 32), replace(reference, captions=None), CPU)
    with pytest.raises(DataError, match="none of the 1 prompts names an emoji, such as 'xyzzy'"):
        judge.check_reference(DataSpec(3, 32), replace(reference, captions=["xyzzy"]), CPU)
    one = replace(reference, captions=["xyzzy", "red apple"])
    with pytest.raises(DataError, match="no prompt of the 1 samples"):
        judge.measure(Few(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)), one, CPU)


def test_fidelity_in_the_features_of_the_emoji_net(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    reference, shown, _ = held_out()
    metric = Fidelity(extractor="cmkit-emoji", kid=True, kid_subset_size=100)
    metric.check(DataSpec(3, 32), 173)
    same = metric.measure(Few(shown), reference, CPU)
    assert abs(same["fid"]) < 1e-3
    shuffled = shown.flatten(2)[:, :, torch.randperm(1024)].view_as(shown)
    other = metric.measure(Few(shuffled), reference, CPU)
    assert other["fid"] > 20
    noisy = (shown.float() + 40 * torch.randn(shown.shape)).clamp(0, 255).byte()
    assert metric.measure(Few(noisy), reference, CPU)["fid"] > 0.8
    assert other["kid_mean"] > same["kid_mean"]
    provenance = metric.provenance()
    assert provenance["extractor"] == "cmkit-emoji"
    assert provenance["weights_sha256"] == emoji_net.SHA256["emoji_features"]
    assert provenance["resize"] == "area to 32x32, none if 32x32"
    with pytest.raises(DataError, match="knows emoji in RGB"):
        metric.check(DataSpec(1, 32), 173)
    with pytest.raises(RecipeError, match="ships its own weights"):
        metric.model_copy(update={"weights": "x"}).check(DataSpec(3, 32), 173)
    assert Fidelity().smallest(DataSpec(3, 32))["extractor"] == "cmkit-random"


@pytest.mark.parametrize("name", ["emoji_features", "emoji_judge"])
def test_shipped_weights_are_verified(name, monkeypatch):
    monkeypatch.setitem(emoji_net.SHA256, name, "0" * 64)
    emoji_net.judge_net.cache_clear()
    load = emoji_net.feature_net if "features" in name else lambda: emoji_net.judge_net(CPU)
    with pytest.raises(CheckpointError, match=name):
        load()


def test_extra_sizes_are_averaged():
    big = torch.arange(64.0).expand(1, 3, 64, 64).byte()
    assert emoji_net.to_net(big).shape == (1, 3, 32, 32)
    assert emoji_net.to_net(big)[0, 0, 0, 0] == pytest.approx(0.5 / 127.5 - 1)


def test_its_features_order_damage_of_pictures_that_are_no_emoji_and_say_so():
    """Discs of any colour at 48x48: the more noise or blur, and the fewer kinds, the further."""
    draws = np.random.default_rng(0)
    y, x = np.mgrid[:48, :48]
    inside = (x - 24) ** 2 + (y - 24) ** 2 < draws.uniform(6, 20, (160, 1, 1, 1)) ** 2
    colours = draws.integers(0, 256, (2, 160, 3, 1, 1))
    real, ours = torch.from_numpy(np.where(inside, *colours).astype(np.uint8)).split(80)
    noise = torch.from_numpy(draws.normal(size=ours.shape))
    metric = Fidelity(extractor="cmkit-emoji", kid=True, kid_subset_size=40)
    reference = Reference(Few(real), "discs")
    for damaged in (
        [(ours + level * noise).clamp(0, 255).byte() for level in (0, 60, 150)],
        [torch.nn.functional.avg_pool2d(ours.float(), k, 1, k // 2).byte() for k in (1, 15, 31)],
        [torch.cat([ours[:1].expand(n, -1, -1, -1), ours[n:]]) for n in (0, 30, 60)],
    ):
        found = [metric.measure(Few(images), reference, CPU) for images in damaged]
        for number in ("fid", "kid_mean"):
            assert sorted(values[number] for values in found) == [v[number] for v in found]
    (said,) = metric.caveats(DataSpec(3, 48))
    assert "compare models of the same pictures, roughly, and are no FID" in said
    assert not metric.caveats(Emoji().spec())
    assert not Fidelity().caveats(DataSpec(3, 48))


def test_the_maker_averages_on_white():
    red = Image.new("RGBA", (136, 128), (255, 0, 0, 0))
    red.paste((255, 0, 0, 128), (4, 0, 8, 128))
    found = make.small(red)
    assert found.shape == (32, 32, 3)
    assert found[:, 1:].min() == 255
    assert found[0, 0].tolist() == [255, 127, 127]
    assert make.family("1F469-200D-1F373") == make.family("1F9D1-200D-1F373") == "1F373"
    assert make.family("1F468") == "person"
    assert make.family("2640-FE0F") == "2640-FE0F"
    assert make.distinct(["roter Apfel", "obst", "roter  apfel"]) == ["roter Apfel", "obst"]
    data = io.BytesIO()
    make.sheet(np.moveaxis(pixels()[:50], 1, -1), emoji.COLUMNS).save(data, "WEBP", lossless=True)
    assert Image.open(data).size == (emoji.COLUMNS * 32, 64)
