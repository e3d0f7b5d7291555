"""Prompts under pictures, other numbers of steps, and pictures drawn while training."""

import base64
import hashlib
import io
import itertools
import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from cmkit import RecipeError
from cmkit.pictures import grid_png
from cmkit.plan import coding_of, plan
from cmkit.recipe import load, run_name, stage_keys
from cmkit.report import write_report
from cmkit.run import Note, RunFinished, RunFolder, Saved, run
from cmkit.run.showing import Showing
from cmkit.sample import Draws
from cmkit.stop import StopSignal
from cmkit.train import Step, start
from tests.browser import chromium
from tests.test_report import PAYLOADS, Page, report, require_inert, store
from tests.toys import HearingNetwork, toy_registry

__all__ = ["report"]  # a fixture
CPU = torch.device("cpu")
RECIPE = """\
name = "toy"
seed = 3
dataset = { use = "captioned", channels = 1, resolution = 8, images = 50, texts = 7 }
codec = { use = "blocks" }
text = { use = "words" }
cache = false
backbone = { use = "hearing" }
denoiser = { guidance = 1.0 }
objective = { use = "ct", end_scales = 5, distance = "pseudo_huber" }
sampler = { use = "lcm", steps = 2 }

[train]
steps = 6
batch = 8
save_every = 4
log_every = 2
precision = "fp32"
lr = 1e-2
show = ["a red apple", "a frog", ""]
show_every = 2

[sample]
images = 30
precision = "fp32"
show_steps = [1, 2, 8]
"""
PLAIN = ["train.show=0", "sample.show_steps=[]"]


@pytest.fixture(autouse=True)
def _registry(monkeypatch):
    registry = toy_registry()
    monkeypatch.setattr("cmkit.plugins.discover", lambda: registry)


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "toy.toml"
    path.write_text(RECIPE)
    return path


def events(recipe, *overrides, out="runs"):
    made = plan(load(recipe, overrides, toy_registry()))
    return run(made, toy_registry(), recipe.parent / out, CPU, StopSignal())


def finish(recipe, *overrides, out="runs"):
    *seen, last = events(recipe, *overrides, out=out)
    assert isinstance(last, RunFinished)
    notes = "\n".join(event.text for event in seen if isinstance(event, Note))
    return last.folder, last.report["stages"], notes


def stopped_at(recipe, step, *overrides, out, kind=Step):
    """The run's folder once it was killed when this step had been trained, or saved."""
    for event in (going := events(recipe, *overrides, out=out)):
        if isinstance(event, kind) and event.step == step:
            going.close()
            break
    return RunFolder(recipe.parent / out / run_name(load(recipe, overrides, toy_registry())))


def digests(folder: Path, *patterns) -> dict[str, str]:
    files = sorted(path for pattern in patterns for path in folder.glob(pattern))
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture)


TRAINED = ("model.safetensors", "checkpoints/*/*.safetensors", "samples/*", "samples_after.png")


def test_what_is_shown_changes_no_bit_of_a_run_and_no_key(recipe):
    whole, stages, _ = finish(recipe, *PLAIN, out="plain")
    shown, more, _ = finish(recipe)
    assert digests(shown, *TRAINED) == digests(whole, *TRAINED)
    assert len(digests(whole, *TRAINED)) > 6
    assert shown.name == whole.name
    assert more["train"]["final_loss"] == stages["train"]["final_loss"]
    assert "shown" not in stages["train"]
    assert not {*stages["sample"]} & {"steps"}
    keys = [stage_keys(load(recipe, said, toy_registry())) for said in ([], PLAIN)]
    assert keys[0] == keys[1]


def test_pictures_are_of_each_step_that_is_due_and_of_other_numbers_of_steps(recipe):
    folder, stages, _ = finish(recipe)
    shown = stages["train"]["shown"]
    assert shown["prompts"] == ["a red apple", "a frog", ""]
    assert (shown["images"], shown["side"]) == (3, 8)
    assert [*shown["steps"]] == ["2", "4", "6"]
    assert len({*digests(folder, "shown/*").values()}) == 3
    files = RunFolder(folder).status()
    assert {"shown.jsonl", *shown["steps"].values()} <= {*files["train"]["files"]}
    steps = stages["sample"]["steps"]
    assert {*steps.values()} <= {*files["sample"]["files"]}
    arrays = np.load(folder / "samples" / "0000000.npz")["arr_0"][:8, ..., 0]
    own = grid_png(torch.from_numpy(arrays)[:, None], 8)
    assert (folder / steps["2"]).read_bytes() == own
    assert len({(folder / name).read_bytes() for name in steps.values()}) == 3
    _, stages, _ = finish(recipe, "train.show_every=99", "train.show=2", out="other")
    shown = stages["train"]["shown"]
    assert [*shown["steps"]] == ["6"]
    assert shown["prompts"] == stages["sample"]["prompts"][:2] != []


def test_a_number_of_pictures_needs_no_prompts(recipe):
    text = RECIPE.replace('text = { use = "words" }\n', "").replace(", texts = 7", "")
    text = text.replace('"hearing"', '"adm", channels = 16, channel_mult = [1], norm_groups = 8')
    recipe.write_text(text.replace("denoiser =", "#"))
    _, stages, _ = finish(recipe, "train.show=5")
    assert stages["train"]["shown"] == {
        "steps": {str(step): f"shown/step-0000000{step}.png" for step in (2, 4, 6)},
        "prompts": [], "images": 5, "side": 8,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("step", "kind"), [(1, Step), (3, Step), (4, Step), (4, Saved), (5, Step), (6, Saved)]
)
def test_a_killed_run_goes_on_to_the_same_pictures_and_draws_none_twice(
    recipe, step, kind, monkeypatch
):
    whole, stages, _ = finish(recipe)
    drawn, inner = [], Showing.draw

    def draw(self, training):
        drawn.append(training.step)
        return inner(self, training)

    monkeypatch.setattr(Showing, "draw", draw)
    stopped_at(recipe, step, out="killed", kind=kind)
    again, more, _ = finish(recipe, out="killed")
    assert drawn == [2, 4, 6]
    assert digests(again, "shown/*", *TRAINED) == digests(whole, "shown/*", *TRAINED)
    assert more["train"]["shown"] == stages["train"]["shown"]


def test_a_picture_cut_short_is_drawn_again_and_other_prompts_are_not_mixed_with_these(recipe):
    folder = stopped_at(recipe, 5, "train.save_every=2", out="cut")
    (folder.path / "shown" / "step-00000004.png").write_bytes(b"half")
    _, stages, _ = finish(recipe, "train.save_every=2", out="cut")
    assert [*stages["train"]["shown"]["steps"]] == ["2", "6"]  # step 4 is trained already
    stopped_at(recipe, 5, out="changed")
    folder, stages, _ = finish(recipe, 'train.show=["a dog"]', out="changed")
    assert [*stages["train"]["shown"]["steps"]] == ["6"]
    assert stages["train"]["shown"]["prompts"] == ["a dog"]
    assert pixels(folder / "shown" / "step-00000006.png").shape == (48, 48)


def test_a_training_that_is_shared_brings_its_pictures(recipe):
    whole, stages, _ = finish(recipe)
    folder, more, _ = finish(recipe, "sample.images=12")
    assert folder != whole
    assert more["train"]["shown"] == stages["train"]["shown"]
    assert digests(folder, "shown/*") == digests(whole, "shown/*")
    stopped_at(recipe, 5, out="begun")
    folder, more, notes = finish(recipe, "sample.images=13", out="begun")
    assert "goes on from" in notes
    assert digests(folder, "shown/*") == digests(whole, "shown/*")


def test_numbers_of_steps_that_are_said_later_draw_no_image_again(recipe):
    folder, _, _ = finish(recipe, "sample.show_steps=[2]")
    before = {p: p.stat().st_mtime_ns for p in (folder / "samples").iterdir()}
    _, stages, notes = finish(recipe)
    assert "no pictures in steps 1, 8; remove" in notes
    assert [*stages["sample"]["steps"]] == ["2"]
    (folder / "report.json").unlink()
    _, stages, notes = finish(recipe)
    assert "sample: no pictures in steps 1, 8; the stage is done again" in notes
    assert [*stages["sample"]["steps"]] == ["1", "2", "8"]
    assert {p: p.stat().st_mtime_ns for p in (folder / "samples").iterdir()} == before
    _, stages, notes = finish(recipe, "sample.show_steps=[]")
    assert "no pictures" not in notes


def test_drawing_leaves_modes_and_generators_as_they_were(recipe, monkeypatch):
    """Where the average is the target network as well, training evaluates it with dropout."""
    made = plan(load(recipe, [], toy_registry()))
    job = SimpleNamespace(
        plan=made, device=CPU, folder=RunFolder(recipe.parent), coding=coding_of(made, CPU)
    )
    showing, training = Showing(job), start(made, CPU, job.coding.null)
    network = training.models.ema[0.999].network.train()
    network.dropout.eval()
    inner = HearingNetwork.forward

    def forward(self, *args):
        torch.rand(1)
        assert not self.training
        return inner(self, *args)

    monkeypatch.setattr(HearingNetwork, "forward", forward)
    state = torch.get_rng_state()
    assert list(showing.draw(training)) == []
    assert torch.equal(torch.get_rng_state(), state)
    assert [network.training, network.dropout.training, network.first.training] == [1, 0, 1]
    monkeypatch.setattr("cmkit.run.showing.SIDE", 3)
    list(showing.draw(training))
    assert showing.result()["side"] == 2
    assert pixels(recipe.parent / "shown" / "step-00000000.png").shape[0] == 48


def test_pictures_that_are_not_finite_do_not_end_the_training(recipe, monkeypatch):
    inner, plain = Showing.draw, Draws.pictures

    def draw(self, training):
        bad = training.step == 4
        monkeypatch.setattr(Draws, "pictures", lambda s, x: plain(s, x) / (0 if bad else 1))
        yield from inner(self, training)
        monkeypatch.setattr(Draws, "pictures", plain)

    monkeypatch.setattr(Showing, "draw", draw)
    _, stages, notes = finish(recipe)
    assert "train.show: nothing drawn at step 4: sample: images 0 to 2 hold NaN" in notes
    assert [*stages["train"]["shown"]["steps"]] == ["2", "6"]


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ("train.show=apple", "say a number of pictures, or prompts such as"),
        ("train.show=true", "say a number of pictures, or prompts such as"),
        ("train.show=[1]", "say a number of pictures, or prompts such as"),
        ("train.show=17", "say at most 16 pictures or prompts"),
        ("train.show=-1", "say at most 16 pictures or prompts"),
        (f"train.show={['a'] * 17}", "say at most 16 pictures or prompts"),
        ("train.show_every=0", "greater than or equal to 1"),
        ("sample.show_steps=[0]", "greater than or equal to 1"),
        ("sample.show_steps=[51]", "cannot take steps = 51: steps 51 must not be above grid 50"),
        ("sampler.use=multistep", "sampler multistep has no key `steps`; drop show_steps"),
        ("sampler={use='gamma', sigmas=[1.0]}", "cannot take steps = 1: steps and sigmas both say"),
    ],
)
def test_what_cannot_be_drawn_is_refused_in_one_line(recipe, said, message):
    if said.startswith("sampler.use"):
        recipe.write_text(RECIPE.replace('"lcm", steps = 2', '"multistep"'))
        said = "seed=3"
    with pytest.raises(RecipeError, match=re.escape(message)) as caught:
        plan(load(recipe, [said], toy_registry()))
    assert "\n" not in str(caught.value)
    assert re.search(r"toy\.toml:\d+|--set", str(caught.value))


def test_pictures_while_training_need_a_sampler_and_prompts_an_encoder(recipe):
    text = RECIPE.partition("[sample]")[0]
    recipe.write_text(text.replace("sampler =", "#"))
    with pytest.raises(RecipeError, match=r"train\.show: pictures need a \[sampler\] table"):
        plan(load(recipe, [], toy_registry()))
    without = text.replace('text = { use = "words" }', "")
    recipe.write_text(without.replace('"hearing"', '"adm", channels = 16, norm_groups = 8'))
    with pytest.raises(RecipeError, match=r"prompts need a \[text\] table; without one say a num"):
        plan(load(recipe, [], toy_registry()))


PROMPTS = [f"prompt {k} with \x1b[31m\u202e words" for k in range(100)]
PROMPTS[:4] = ["a red apple", "", "a long one " * 60, " two\n\tlines "]


def colours(count: int, side: int, seed: int = 0) -> torch.Tensor:
    """Images (n, 3, side, side) of one colour and one of its own each."""
    found = np.random.default_rng(seed).integers(0, 256, (count, 3, 1, 1), np.uint8)
    return torch.from_numpy(found.repeat(side, 2).repeat(side, 3))


def told(folder: Path, content: dict, side: int = 16, steps: int = 3, shown: int = 3) -> None:
    """Give a finished run prompts and pictures of them, all of them of `side` pixels."""
    (folder / "shown").mkdir(exist_ok=True)
    names = {}
    for step in range(steps):
        name = names[str(1000 * step + 500)] = f"shown/step-{step:08d}.png"
        (folder / name).write_bytes(grid_png(colours(shown, side, step), 4))
    content["data"] = {"channels": 3, "resolution": side}
    stages = content["stages"]
    train = {"prompts": PROMPTS[:shown], "images": shown, "side": side, "steps": names}
    stages["train"]["shown"] = train
    for name in ("before", "after"):
        (folder / f"samples_{name}.png").write_bytes(grid_png(colours(100, side)))
    for count in (1, 2, 4, 8):
        (folder / f"samples_steps_{count}.png").write_bytes(grid_png(colours(8, side), 8))
    stages["sample"]["steps"] = {str(k): f"samples_steps_{k}.png" for k in (1, 2, 4, 8)}
    stages["sample"]["prompts"] = PROMPTS
    store(folder, content)


@pytest.fixture
def prompted(tmp_path, report):
    """A finished run with prompts, without a search and a rescaler."""
    report["stages"].pop("search")
    report["stages"]["sample"].pop("before")
    told(tmp_path, report)
    return report


def read(source: str) -> np.ndarray:
    data = base64.b64decode(source.partition(",")[2])
    with Image.open(io.BytesIO(data)) as picture:
        return np.asarray(picture.convert("RGB"))


def page_of(folder: Path) -> tuple[Page, str]:
    text = write_report(RunFolder(folder)).read_text("utf-8")
    return Page(text), text


def test_each_picture_stands_over_its_prompt_and_the_others_are_listed(tmp_path, prompted):
    page, text = page_of(tmp_path)
    titles = [a["title"] for _, a in page.elements if a.get("class") == "prompt"]
    lines = [" ".join(prompt.replace("\x1b", "\ufffd").split()) for prompt in PROMPTS]
    lines = [line.replace("\u202e", "\ufffd") for line in lines]
    assert titles == lines[:24] + lines[:8] + lines[:3]
    assert lines[2] not in page.text
    assert lines[2][:299] + "…" in page.text
    assert page.text.count("no prompt") == 3
    assert f"24 · {lines[23]}" not in page.text
    assert all(f"{k} · {lines[k - 1]}" in page.text for k in range(25, 101))
    assert not {"\x1b", "\u202e"} & {*text}
    samples = [a for tag, a in page.elements if a.get("alt", "").startswith("sample")]
    cut = [
        read(a["src"]) for a in samples if a["alt"].startswith("sample: ") or a["alt"] == "sample 2"
    ]
    images = colours(100, 16).permute(0, 2, 3, 1).numpy()
    assert np.array_equal(np.stack(cut), images[:24])
    assert [a["class"] for a in samples] == ["tiny"] * len(samples)
    assert "row by row" in next(
        a["alt"] for _, a in page.elements if "all samples" in a.get("alt", "")
    )
    for label in ("1 step", "2 steps", "4 steps", "8 steps", "step 2,500"):
        assert label in page.text


def test_sides_before_and_after_rescaling_stay_beside_the_prompts(tmp_path, report):
    told(tmp_path, report)
    page, text = page_of(tmp_path)
    assert [a["id"] for tag, a in page.elements if tag == "form"] == ["pair", "shown"]
    assert len([a for _, a in page.elements if a.get("alt", "").startswith("sample: ")]) == 23
    assert "all samples, row by row" not in text


def test_a_page_without_prompts_is_as_it_was(tmp_path, report):
    page, text = page_of(tmp_path)
    assert not [a for _, a in page.elements if a.get("class") in {"alone", "prompt", "others"}]
    assert '"shown": []' in text


def test_few_samples_have_no_fold_and_gone_pictures_are_left_out(tmp_path, prompted):
    stages = prompted["stages"]
    stages["sample"]["prompts"] = PROMPTS[:9]
    (tmp_path / "samples_after.png").write_bytes(grid_png(colours(9, 16)))
    (tmp_path / "shown" / "step-00000001.png").unlink()
    store(tmp_path, prompted)
    page, text = page_of(tmp_path)
    assert "<details" not in text
    assert len([a for _, a in page.elements if a.get("class") == "tiny"]) == 9 + 4 + 3
    data = json.loads(page.raw["script"][0])
    assert [step["label"] for step in data["shown"]] == ["step 500", "step 2,500"]
    (tmp_path / "samples_after.png").unlink()
    page, _ = page_of(tmp_path)
    assert "samples_after.png is not there any more" in page.text
    assert "9 · prompt 8" in page.text


def test_many_steps_are_thinned_evenly_and_the_page_stays_small(tmp_path, report):
    """Noise of 512 pixels, the largest page that there may be."""
    told(tmp_path, report, side=32, steps=100, shown=16)
    noise = np.random.default_rng(0).integers(0, 256, (100, 3, 64, 64), np.uint8)
    sheet = grid_png(torch.from_numpy(noise))
    report["data"]["resolution"] = report["stages"]["train"]["shown"]["side"] = 64
    for path in (*tmp_path.glob("shown/*.png"), *tmp_path.glob("samples_*.png")):
        path.write_bytes(sheet)
    for path in tmp_path.glob("search/*.png"):
        path.write_bytes(grid_png(torch.from_numpy(noise[:25])))
    store(tmp_path, report)
    page, text = page_of(tmp_path)
    data = json.loads(page.raw["script"][0])
    assert len(text) < 3e6
    assert len(data["shown"]) == 24
    steps = [int(step["label"].removeprefix("step ").replace(",", "")) for step in data["shown"]]
    assert (steps[0], steps[-1]) == (500, 99_500)
    assert {b - a for a, b in itertools.pairwise(steps)} == {4000, 5000}
    assert {len(step["sources"]) for step in data["shown"]} == {16}


@pytest.mark.parametrize("payload", PAYLOADS)
def test_no_prompt_can_act(tmp_path, prompted, payload):
    prompted["stages"]["sample"]["prompts"] = [payload] * 30
    prompted["stages"]["train"]["shown"]["prompts"] = [payload] * 3
    store(tmp_path, prompted)
    page, text = page_of(tmp_path)
    require_inert(page, " ".join(payload.split()))
    assert "<" not in payload or payload not in text


@pytest.fixture(scope="module")
def browser():
    with chromium() as session:
        yield session


def opened(browser, folder: Path):
    browser.requests()
    browser.log("browser")
    browser.open(write_report(RunFolder(folder)))
    return browser


def test_the_slider_goes_through_the_steps_of_the_training(browser, tmp_path, prompted):
    opened(browser, tmp_path)
    now = """
        const form = document.getElementById("shown");
        return [document.getElementById("shown-step").textContent,
                form.querySelector("input").getAttribute("aria-valuetext"), form.innerText,
                ...[...form.querySelectorAll("img")].map((image) => image.src)];
    """
    seen = [browser.run(now)]
    browser.click("#shown-at")
    seen.append(browser.run(now))
    browser.press("\ue012")  # the left arrow
    seen.append(browser.run(now))
    assert [each[:2] for each in seen] == [[f"step {k}"] * 2 for k in ("2,500", "1,500", "500")]
    for each, step in zip(seen, (2, 1, 0), strict=True):
        images = colours(3, 16, step).permute(0, 2, 3, 1).numpy()
        assert np.array_equal(np.stack([read(source) for source in each[3:]]), images)
        assert "a red apple" in each[2]
    assert browser.log("browser") == []
    assert browser.requests() == [(tmp_path / "report.html").as_uri()]


@pytest.mark.parametrize("width", [1400, 700, 390])
@pytest.mark.parametrize("sides", [False, True])
def test_nothing_is_cut_off_at_any_width(browser, tmp_path, report, width, sides):
    if not sides:
        report["stages"]["sample"].pop("before")
    report["stages"].pop("search")
    told(tmp_path, report, shown=16)
    report["stages"]["sample"]["prompts"] = ["w" * 500, *PROMPTS[1:]]
    store(tmp_path, report)
    opened(browser, tmp_path)
    browser.screenshot(tmp_path / "shot.png", width)
    out = browser.run("""
        document.querySelectorAll("details").forEach((each) => { each.open = true; });
        const wide = document.documentElement.clientWidth;
        const found = [...document.querySelectorAll(".alone *, .steps *, .others li, .shown *")];
        return [wide, document.documentElement.scrollWidth, found.length, found.filter((each) => {
          const box = each.getBoundingClientRect();
          return box.right > wide + 0.5 || box.left < 0 || box.width < 8 || box.height < 8;
        }).map((each) => each.outerHTML.slice(0, 90))];
    """)
    lines = browser.run("""
        return Math.max(...[...document.querySelectorAll(".prompt")].map((each) =>
          each.clientHeight / parseFloat(getComputedStyle(each).lineHeight)));
    """)
    browser.devtools("Emulation.clearDeviceMetricsOverride")
    assert out[0] == out[1]
    assert out[2] > 150
    assert out[3] == []
    assert 2.9 < lines < 3.1
    assert browser.log("browser") == []
