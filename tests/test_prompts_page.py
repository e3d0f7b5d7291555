"""The page of a run with prompts: pictures over theirs, other numbers of steps, and a slider
through the training."""

import base64
import io
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cmkit.pictures import grid_png
from cmkit.report import write_report
from cmkit.report.figures import SHOWN_BYTES
from cmkit.runs import RunFolder
from tests.browser import chromium
from tests.test_report import PAYLOADS, Page, report, require_inert, store

__all__ = ["report"]  # a fixture

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
    alone = [a for a in samples if a["alt"] == "sample 2" or a["alt"].startswith("sample: ")]
    cut = [read(a["src"]) for a in alone]
    images = colours(100, 16).permute(0, 2, 3, 1).numpy()
    assert np.array_equal(np.stack(cut), images[:24])
    assert [a["class"] for a in samples] == ["tiny"] * len(samples)
    assert "all samples, row by row" in {a.get("alt") for _, a in page.elements}
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


@pytest.mark.slow
@pytest.mark.parametrize("searched", [True, False])
def test_many_steps_are_thinned_evenly_and_the_page_stays_small(tmp_path, report, searched):
    """Pictures of noise, the largest page that there may be."""
    if not searched:
        report["stages"].pop("search")
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
    sources = [source for step in data["shown"] for source in step["sources"]]
    most = SHOWN_BYTES if searched else 2 * SHOWN_BYTES
    assert sum(len(source) * 3 / 4 for source in sources) < 1.1 * most
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
