"""`cmkit sample` and `cmkit edit`: on random weights, since their laws need no trained model."""

import json

import numpy as np
import pytest
import torch
from cmkit_std.backbones.adm import ADM
from PIL import Image, ImageOps
from safetensors.torch import save_file

from cmkit import DataSpec
from cmkit.plugins import discover
from cmkit.runs import drawn_from
from tests.test_cli import refused

OPTIONS = {"channels": 8, "channel_mult": (1, 1), "num_res_blocks": 1, "norm_groups": 4}
OPTIONS |= {"attention_resolutions": (4,), "num_heads": 1}
RECIPE = """\
name = "random"
seed = 3
dataset = {{ use = "{dataset}"{more} }}
backbone.use = "adm"
backbone.channels = 8
backbone.channel_mult = [1, 1]
backbone.num_res_blocks = 1
backbone.norm_groups = 4
backbone.attention_resolutions = [4]
backbone.num_heads = 1
denoiser = {{ weights = "random.safetensors" }}
rescaler = {{ use = "global", skip = 0.8 }}
sampler = {{ use = "multistep", sigmas = [0.8] }}
sample = {{ images = 1000, batch = 3, precision = "fp32" }}
"""


def written(folder, data, conditions=frozenset()):
    """A recipe below `folder` with random weights for `data`; its path."""
    network = ADM(**OPTIONS).build(data, conditions)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    save_file(network.state_dict(), folder / "random.safetensors")
    dataset, more = "digits", ""
    if data.channels == 3:
        dataset, more = "image_folder", ', path = "colours", resolution = 8, channels = 3'
        picture(folder / "colours" / "0.png", 3)
    (folder / "random.toml").write_text(RECIPE.format(dataset=dataset, more=more))
    return folder / "random.toml"


def picture(path, channels=1, side=8, low=70, high=180):
    """Random pixels away from black and white, in a new file."""
    path.parent.mkdir(exist_ok=True)
    shape = (side, side, 3)[: 3 if channels == 3 else 2]
    pixels = np.random.default_rng(5).integers(low, high, shape, np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image).astype(float)


@pytest.fixture
def recipe(tmp_path):
    return written(tmp_path, DataSpec(1, 8, 10), frozenset({"label"}))


@pytest.fixture
def colours(tmp_path):
    return written(tmp_path, DataSpec(3, 8))


@pytest.fixture
def run(recipe, tmp_path):
    """What a finished run leaves: its recipe, weights and the search's winner."""
    folder = tmp_path / "runs" / "random-0"
    folder.mkdir(parents=True)
    text = recipe.read_text().replace('weights = "random.safetensors"', "sigma_max = 70.0")
    text += "[train]\nsteps = 1\nbatch = 1\n[search]\nimages = 2\ngrid = {skip = [1.3, 1.0]}\n"
    text += '[objective]\nuse = "ct"\n[[metric]]\nuse = "fidelity"\n'
    (folder / "recipe.toml").write_text(text)
    recipe.with_name("random.safetensors").rename(folder / "model.safetensors")
    found = {"axes": {"skip": [1.3, 1.0]}, "best": {"skip": 1.3, "score": 2.0}}
    (folder / "status.json").write_text(json.dumps({"search": found}))
    return folder


def test_an_image_depends_on_seed_and_number_not_on_how_many_are_drawn(cmkit, recipe):
    for count, batch in ((2, 1), (5, 4)):
        change = ("--set", f"sample.batch={batch}")
        code, out, _ = cmkit("sample", recipe, "-n", count, "--out", f"{count}.npz", *change)
        assert (code, out) == (0, f"{count}.npz: {count} images, nfe 2\n")
    few, many = np.load("2.npz"), np.load("5.npz")
    assert many["arr_0"].shape == (5, 8, 8, 1)
    assert np.abs(few["arr_0"].astype(int) - many["arr_0"][:2]).max() <= 1
    assert np.array_equal(few["arr_1"], many["arr_1"][:2])
    cmkit("sample", recipe, "-n", 2, "--seed", 4, "--out", "other.npz")
    assert not np.array_equal(np.load("other.npz")["arr_0"], few["arr_0"])


def test_a_grid_a_folder_and_arrays_hold_the_same_images(cmkit, recipe, tmp_path):
    for out in ("grid.png", "folder", "arrays.npz"):
        code, text, err = cmkit("sample", recipe, "-n", 4, "--out", out, "--json")
        assert (code, err) == (0, "")
        facts = json.loads(text)
    assert facts["images"] == len(facts["labels"]) == 4
    arrays = np.load("arrays.npz")["arr_0"][..., 0]
    single = [pixels(path) for path in sorted((tmp_path / "folder").iterdir())]
    assert np.array_equal(np.stack(single), arrays)
    grid = pixels("grid.png")  # each pixel six times, with gaps of three
    assert np.array_equal(grid[:48:6, 51::6], arrays[1])
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".tmp")]


def test_labels_are_taken_in_turns(cmkit, recipe):
    cmkit("sample", recipe, "-n", 3, "--label", 7, "--label", 2, "--out", "turns.npz")
    assert np.load("turns.npz")["arr_1"].tolist() == [7, 2, 7]


@pytest.mark.slow
def test_a_label_is_a_name_or_a_number_and_the_name_goes_first(cmkit, recipe, tmp_path):
    for label, name in enumerate(("10", "2", "cat", "dog")):
        picture(tmp_path / "kinds" / f"{label}.png").rename(tmp_path / "kinds" / "one")
        (tmp_path / "kinds" / name).mkdir()
        (tmp_path / "kinds" / "one").rename(tmp_path / "kinds" / name / "one.png")
    data = 'dataset={use="image_folder", path="kinds", resolution=8, channels=1, labels=true}'
    written(tmp_path, DataSpec(1, 8, 4), frozenset({"label"}))
    said = ("sample", recipe, "-n", 5, "--set", data, "--json")
    given = [part for name in ("2", "dog", "3", "0", "10") for part in ("--label", name)]
    code, out, err = cmkit(*said, *given, "--out", "a.npz")
    assert code == 0, err
    assert np.load("a.npz")["arr_1"].tolist() == [1, 3, 3, 0, 0]
    facts = json.loads(out)
    assert facts["classes"] == ["2", "dog", "dog", "10", "10"]
    assert facts["label_rule"] == "given"
    refused(cmkit(*said, "--label", "dgo"), 2, "--label dgo", "did you mean 'dog'?")
    refused(cmkit(*said, "--label", "zzz"), 2, "0 to 3; known: 10, 2, cat, dog")
    refused(cmkit(*said, "--label", "-1"), 2, "--label -1")
    refused(cmkit(*said, "--label", "4"), 2, "--label 4")


def test_a_run_gives_its_weights_and_winner_unless_told_otherwise(run):
    """Neither the teacher nor the data of its training are asked for."""
    made = drawn_from(run, [], discover(), 4)
    assert made.denoiser.weights == str(run / "model.safetensors")
    assert (made.rescaler.skip, made.rescaler.emb) == (1.3, 1.0)
    assert made.sample.images == 4
    assert made.train is made.search is made.teacher is None
    told = drawn_from(run, ["rescaler.skip=1.0", "denoiser.weights=a.safetensors"], discover(), 4)
    assert (told.rescaler.skip, told.denoiser.weights) == (1.0, "a.safetensors")


def test_scales_change_the_images_drawn(cmkit, run):
    for name, more in (("winner", ()), ("plain", ("--set", "rescaler.skip=1.0"))):
        code, out, err = cmkit("sample", run, "-n", 2, "--out", f"{name}.npz", "--json", *more)
        assert code == 0, err
        assert json.loads(out)["scales"]["skip"] == {"winner": 1.3, "plain": 1.0}[name]
    assert not np.array_equal(np.load("winner.npz")["arr_0"], np.load("plain.npz")["arr_0"])


def test_what_cannot_be_drawn_is_refused_in_one_line(cmkit, recipe, run, tmp_path, monkeypatch):
    refused(cmkit("sample", tmp_path), 4, "no run folder", "runs/NAME-KEY")
    refused(cmkit("sample", run / "recipe.toml"), 2, "yet to be trained", "runs/random-")
    refused(cmkit("sample", recipe), 4, "random.safetensors: no such file")
    (run / "model.safetensors").rename(recipe.with_name("random.safetensors"))
    refused(cmkit("sample", run), 4, "model.safetensors: not there yet", "cmkit run")
    refused(cmkit("sample", recipe, "--label", 10), 2, "--label 10", "0 to 9")
    (tmp_path / "samples.png").touch()
    refused(cmkit("sample", recipe, "--out", "samples.png"), 2, "samples.png: exists already")
    refused(cmkit("sample", recipe, "--out", "a.gif"), 2, "FILE.png, FILE.npz or a FOLDER")
    refused(cmkit("sample", recipe, "--out", "samples.png/new"), 5, "--out")
    recipe.write_text(recipe.read_text().replace("sampler =", "expected ="))
    recipe.write_text(
        recipe.read_text().replace(
            'use = "multistep", sigmas = [0.8]', 'source = "x", scores = { fid = 1.0 }'
        )
    )
    refused(cmkit("sample", recipe, "--out", "b.png"), 2, "sampler: say how to draw")
    refused(cmkit("sample", recipe, "--set", "denoiser={}", "--out", "b.png"), 2, "no weights")
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 10})())
    more = ("--set", 'sampler={use="multistep"}', "--out", "b.png")
    refused(cmkit("sample", recipe, *more), 5, "MiB are free")


def test_a_search_without_a_winner_is_refused_unless_values_are_given(cmkit, run):
    (run / "status.json").write_text("{}")
    refused(cmkit("sample", run, "-n", 1), 4, "no winner yet", "--set rescaler.skip=1.0")
    assert cmkit("sample", run, "-n", 1, "--set", "rescaler.skip=1.0")[0] == 0


def test_a_model_without_classes_refuses_labels(cmkit, colours):
    refused(cmkit("sample", colours, "--label", 0), 2, "--label 0", "no classes")


def test_inpainting_keeps_every_pixel_under_black(cmkit, recipe, tmp_path):
    known = picture(tmp_path / "in" / "a.png")
    mask = Image.new("L", (8, 8))
    mask.paste(255, (0, 0, 3, 8))
    mask.save(tmp_path / "mask.png")
    command = ("edit", recipe, known, "--task", "inpaint", "--mask", "mask.png", "--label", 1)
    code, out, err = cmkit(*command, "--steps", 4, "--out", "edited", "--json")
    assert code == 0, err
    facts = json.loads(out)
    assert (facts["nfe"], len(facts["sigmas"])) == (3, 2)
    before, after = (pixels(f"edited/000-a-{name}.png") for name in ("before", "after"))
    assert np.array_equal(after[:, 3:], pixels(known)[:, 3:])
    assert np.array_equal(before[:, 3:], pixels(known)[:, 3:])
    assert (before[:, :3] == 128).all()  # grey: nothing is known
    assert not np.array_equal(after[:, :3], pixels(known)[:, :3])


def test_superres_keeps_the_means_of_patches_of_large_and_of_small_pictures(
    cmkit, colours, tmp_path
):
    large, small = picture(tmp_path / "in" / "l.png", 3), picture(tmp_path / "in" / "s.png", 3, 2)
    command = ("edit", colours, large, small, "--task", "superres", "--patch", 4)
    code, _, err = cmkit(*command, "--sigma", 0.01, "--out", "edited")
    assert code == 0, err

    def means(image):
        return image.reshape(2, 4, 2, 4, 3).mean((1, 3))

    for name, known in (("000-l", means(pixels(large))), ("001-s", pixels(small))):
        before, after = (pixels(f"edited/{name}-{which}.png") for which in ("before", "after"))
        inside = ((after > 0) & (after < 255)).reshape(2, 4, 2, 4, 3).all((1, 3))
        assert np.abs(means(after) - known)[inside].max() <= 0.5
        assert np.abs(means(before) - known).max() <= 0.5
        assert inside.sum() > 3
        assert np.abs(after - before).max() > 5


def test_colorize_keeps_brightness_and_adds_colour(cmkit, colours, tmp_path):
    grey = picture(tmp_path / "in" / "grey.png", 1, low=110, high=140)
    command = ("edit", colours, grey, "--task", "colorize", "--sigma", 0.01)
    code, out, err = cmkit(*command, "--out", "edited")
    assert (code, out) == (0, "edited: 1 images, nfe 2\n"), err
    before, after = (pixels(f"edited/000-grey-{name}.png") for name in ("before", "after"))
    weights = np.array([0.2989, 0.5870, 0.1140])
    inside = ((after > 0) & (after < 255)).all(-1)
    assert inside.sum() > 10
    assert np.abs(after @ weights - pixels(grey))[inside].max() <= 0.6
    assert np.abs(before - pixels(grey)[..., None]).max() <= 1
    assert np.ptp(after, axis=-1).max() > 5


def test_a_picture_of_another_size_is_turned_cropped_and_resized_with_its_mask(
    cmkit, colours, tmp_path
):
    """--fit gives what the picture gives that Pillow has turned and fitted; small ones of the right
    size are as they are."""
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    with Image.open(picture(tmp_path / "in" / "a.png", 3, side=24)) as image:
        wide = image.crop((0, 0, 24, 16))
        wide.save(tmp_path / "wide.png", exif=exif)
        turned = ImageOps.exif_transpose(Image.open(tmp_path / "wide.png"))
        ImageOps.fit(turned, (8, 8), Image.Resampling.LANCZOS).save(tmp_path / "fitted.png")
    hidden = np.zeros((24, 16), np.uint8)
    hidden[12:] = 255
    Image.fromarray(hidden).save(tmp_path / "mask.png")
    small = np.zeros((8, 8), np.uint8)
    small[4:] = 255
    Image.fromarray(small).save(tmp_path / "small.png")
    edits = {"wide.png": ("mask.png", "--fit"), "fitted.png": ("small.png",)}
    for name, (mask, *fit) in edits.items():
        code, _, err = cmkit("edit", colours, name, "--task", "inpaint", "--mask", mask, *fit)
        assert code == 0, err
    assert (pixels("edited.png") == pixels("edited-2.png")).all()
    refused(cmkit("edit", colours, "wide.png", "--task", "superres"), 3, "24x16", "--fit")


def test_names_that_nobody_gave_are_free_ones(cmkit, recipe):
    for name in ("samples.png", "samples-2.png", "samples-3.png"):
        assert cmkit("sample", recipe, "-n", 1)[1].startswith(f"{name}: 1 images")


@pytest.mark.slow
def test_edits_that_cannot_be_are_refused_before_the_model_is_built(
    cmkit, recipe, tmp_path, monkeypatch
):
    monkeypatch.setattr(
        "cmkit.runs.drawing.for_sampling", lambda *_: pytest.fail("built the model")
    )
    good = picture(tmp_path / "in" / "a.png")

    def edit(*arguments, label=("--label", 1), task="superres"):
        return cmkit("edit", recipe, *arguments, "--task", task, *label)

    refused(edit(tmp_path / "none.png"), 3, "none.png: cannot be read")
    (tmp_path / "text.png").write_text("%!PS-Adobe-3.0 EPSF-3.0")
    refused(edit(tmp_path / "text.png"), 3, "text.png: no picture", "PNG, JPEG")
    refused(edit(picture(tmp_path / "nine.png", side=9)), 3, "9x9 pixels, and 8x8 or 1x1")
    refused(edit(picture(tmp_path / "rgb.png", 3)), 3, "rgb.png: in colour", "grey")
    Image.new("LA", (8, 8)).save(tmp_path / "clear.png")
    refused(edit(tmp_path / "clear.png"), 3, "clear.png: has transparency")
    refused(edit(good, "--patch", 3), 3, "8x8 images do not divide into 3x3")
    refused(edit(good, task="colorize"), 3, "3 channels, not 1")
    refused(edit(good, task="inpaint"), 2, "--mask FILE")
    refused(edit(good, "--mask", good), 2, "only --task inpaint")
    refused(edit(good, label=()), 2, "--label, 0 to 9")
    refused(edit(good, "--set", 'denoiser.precond="edm"'), 2, "only a consistency model")
    refused(edit(good, "--sigma", 90), 2, "[90.0] must fall between")
    refused(edit(good, "--out", "a.npz"), 2, "FILE.png or a FOLDER")
    refused(edit(good, task="paint"), 2, "paint")
