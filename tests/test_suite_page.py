"""The page of a suite: what it shows, and that it is inert, small and legible."""

from __future__ import annotations

import base64
import dataclasses
import io
import itertools
import random
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cmkit.errors import CheckpointError
from cmkit.runs import RunFolder
from cmkit.suite import figures
from cmkit.suite.figures import first_samples
from cmkit.suite.intervals import mean_interval, paired_difference
from cmkit.suite.page import page, write_page
from cmkit.suite.results import Line, Results, Score, Verdict
from cmkit.suite.work import SuiteFolder
from tests.browser import chromium
from tests.test_report import ENVIRONMENT, PAYLOADS, Page, digits, interval

SEEDS = (0, 1, 2)
MEASURED = {"extractor": "inception-v3-compat", "images": "1000", "reference": "7a07920f56df.."}
SUITE = 'name = "digits"\nbase = "digits_ct.toml"\nseeds = [0, 1, 2]\n[row.ct]\n'
PROVENANCE = {
    "cmkit": "0.1.0",
    "command": "cmkit bench digits.toml --jobs 2",
    "suite": SUITE,
    "sha256": "3f9a1c07" * 8,
    "date": "2026-11-28 21:57 UTC",
}


def fake_run(path: Path, row: int, seed: int, gain: bool, key: str, side: int = 8) -> str:
    """A finished run's folder: pictures of `digits` under noise, a log, and a report."""
    run, rng = RunFolder(path), np.random.default_rng((row, seed))
    (path / "samples").mkdir(parents=True)
    noise = rng.normal(0, 10 + 12 * row, (20, 8, 8))
    pixels = np.clip(digits()[20 * seed : 20 * seed + 20] + noise, 0, 255).astype(np.uint8)
    images = pixels[..., None] if side == 8 else rng.integers(0, 255, (20, side, side, 3), np.uint8)
    np.savez(path / "samples" / "0000000.npz", arr_0=images)
    (path / "recipe.toml").write_text("")
    run.keep_inputs({}, {"train": key})
    for k in range(1, 61):
        loss = (0.9 * k**-0.45 + 0.02) * (1 + row / 3) * (1 + 0.1 * random.Random(k).gauss(0, 1))
        run.append_log({"step": 50 * k, "loss": loss, "num_sigmas": 11})
    stages = {"train": {}, "sample": {"labels": list(range(10)) * 2}}
    if gain:
        plain = [20.0 - row + k for k in (-0.4, 0.1, 0.5)]
        rescaled = [value - 3 + 0.8 * row + 0.2 * k * (seed + 1) for k, value in enumerate(plain)]
        pairs = zip(rescaled, plain, strict=True)
        stages["search"] = {
            "minimize": "fid",
            "axes": {"skip": [1], "emb": [1]},
            "best": {"skip": 0.82, "emb": 0.95, "score": 1.0},
            "confirm": {
                "images": 500,
                "plain": interval(plain),
                "rescaled": interval(rescaled),
                "difference": interval([a - b for a, b in pairs]),
            },
        }
    run.keep_page("")
    run.keep_report({"schema": 2, "stages": stages, "environment": ENVIRONMENT})
    return path.name


def a_score(values: dict[int, float]) -> Score:
    return Score(values, len(SEEDS), mean_interval([*values.values()]), 1000, MEASURED)


def suite(tmp_path: Path, rows: int = 3, nfes=(1, 2), seeds=SEEDS, side: int = 8) -> Results:
    """Lines of `rows` rows at each NFE, their runs below `tmp_path`; a row's NFEs share a
    training."""
    base = {seed: 20.0 + 0.3 * seed for seed in seeds}
    lines = []
    for row in range(rows):
        for nfe in nfes:
            rng = random.Random(row * 100 + nfe)
            values = {s: (base[s] + 2 * row + rng.gauss(0, 0.3)) / nfe**0.4 for s in seeds}
            recall = {s: 0.5 + 0.02 * row + 0.01 * rng.gauss(0, 1) for s in seeds}
            difference = paired_difference(values, base)
            word = "better" if row == 1 else "worse" if row == 2 else "cannot tell"
            verdict = Verdict(word, difference, 0.012, rows - 1)
            name = f"row{row}" if row else "ct"
            runs = {
                s: fake_run(
                    tmp_path / f"{name}-{nfe}-s{s}-0123abcd", row, s,
                    nfe == nfes[0], f"{row} {s}", side,
                )
                for s in seeds
            }  # fmt: skip
            facts = {
                "nfe": nfe,
                "parameters": 2_134_529,
                "images_per_second": 6221.4,
                "peak_memory_mib": 1184.5,
                "training": {
                    "steps": 3000 - 200 * row,
                    "images": 384_000,
                    "evaluations": 1.2e6 * (1 + 0.3 * row),
                    "seconds": 411.2 + 60 * row,
                },
            }
            scores = {"fid": a_score(values), "recall": a_score(recall)}
            verdicts = {"fid": verdict} if row else {}
            lines.append(Line(name, {"nfe": str(nfe)}, "", runs, {}, scores, verdicts, facts))
    columns = (("fid", MEASURED), ("recall", MEASURED))
    notes = ("fid: of 1,000 images, which is biased; read kid beside it.",)
    return Results("digits", "ct", tuple(lines), columns, notes, PROVENANCE)


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> tuple[Results, SuiteFolder]:
    """Three rows at two NFEs: of one line a seed has failed, of another all; one number was
    measured in another way; the last line's runs are gone."""
    path = tmp_path_factory.mktemp("suite")
    made = suite(path)
    lines = list(made.lines)
    (path / "logs").mkdir()
    (path / "logs" / "row1.log").write_text("error: out of memory")
    why = "ResourceError: out of memory at step 120; see logs/row1.log"
    two = {key: a_score({s: one.values[s] for s in (0, 1)}) for key, one in lines[2].scores.items()}
    some = {seed: lines[2].runs[seed] for seed in (0, 1)}
    lines[2] = dataclasses.replace(lines[2], runs=some, failures={2: why}, scores=two)
    none = dict.fromkeys(SEEDS, "not finished")
    lines[3] = dataclasses.replace(lines[3], runs={}, failures=none, scores={}, verdicts={})
    other = dataclasses.replace(lines[4].scores["fid"], measured={**MEASURED, "extractor": "clip"})
    facts = {**lines[4].facts, "skip": 0.82}
    scores = {**lines[4].scores, "fid": other}
    lines[4] = dataclasses.replace(lines[4], scores=scores, facts=facts, note="as in the paper")
    lines[5] = dataclasses.replace(lines[5], runs={seed: f"gone-{seed}" for seed in SEEDS})
    return dataclasses.replace(made, lines=tuple(lines)), SuiteFolder(path)


@pytest.fixture(scope="module")
def shown(results) -> Page:
    return Page(write_page(*results).read_text("utf-8"))


def words(shown: Page) -> str:
    return " ".join(shown.text.split())


def test_a_baseline_of_an_axis_is_told_and_marked_in_each_row(results):
    made, folder = results
    text = words(Page(page(dataclasses.replace(made, baseline={"nfe": "1"}), folder)))
    assert "differences against nfe 1 in the same row, at p" in text
    assert "better than nfe 1" in text
    for row in ("ct", "row1", "row2"):
        assert f"{row} baseline nfe 1" in text
        assert f"{row} baseline nfe 2" not in text


def test_the_page_says_what_was_found(results, shown):
    text = words(shown)
    first = results[0].lines[0].scores["fid"].mean
    difference = results[0].lines[2].verdicts["fid"].difference
    for said in (
        f"{first.value:.4g} {first.low:.4g} to {first.high:.4g}",
        "ct baseline nfe 1",
        f"better +{difference.value:.3g} +{difference.low:.2g}",
        "p 0.012",
        "fid n = 1,000 2 comparisons",
        "Holm's correction",
        "fid: 1 better than ct, 1 worse than ct.",
        "2 of 3 seeds",
        "seed 2: ResourceError: out of memory at step 120; see logs/row1.log ( log)",
        "seeds 0, 1, 2: not finished",
        "– other extractor clip",  # noqa: RUF001
        "14 of 18 seeds 0, 1, 2",
        "fid: of 1,000 images, which is biased; read kid beside it.",
        "Intervals of the means, 95 %: of the method, over 3 training seeds (8 numbers)",
        "Differences, 95 %: of the two methods, paired over 3 training seeds.",
        "as in the paper",
        "skip 0.82",
        "2.13 M 3 k 384 k 1.2 M 6 min 51 s 6,221 1,184 MiB",
        "cmkit bench digits.toml --jobs 2",
        'base = "digits_ct.toml"',
        "NVIDIA H200",
        "extractor inception-v3-compat",
    ):
        assert said in text, said


def test_links_lead_to_reports_and_logs(results, shown):
    found = [attrs["href"] for tag, attrs in shown.elements if tag == "a"]
    there = [path for line in results[0].lines[:5] for _, path in sorted(line.runs.items())]
    assert found == ["./logs/row1.log", *(f"./{path}/report.html" for path in there)]


def test_rescaling_shows_each_seed_and_their_mean(shown):
    text = words(shown)
    mean = "ct, nfe 1 20.1 → 17.5 −2.60 −3.10 to −2.10"  # noqa: RUF001
    one = "seed 2: −2.40, −3.14 to −1.66 skip 0.82, emb 0.95; 3 x 500"  # noqa: RUF001
    assert mean in text
    assert one in text
    circles = [float(attrs["cx"][:-1]) for tag, attrs in shown.elements if tag == "circle"]
    assert len(circles) == 8
    assert circles == sorted(circles)


def sample_rows(shown: Page) -> list[np.ndarray]:
    """The pictures (H, W) or (H, W, 3) of the rows of samples."""
    uris = [
        attrs["src"]
        for tag, attrs in shown.elements
        if tag == "img" and attrs["alt"].startswith("samples of")
    ]
    data = (base64.b64decode(uri.partition(",")[2]) for uri in uris)
    return [np.asarray(Image.open(io.BytesIO(one))) for one in data]


def test_rows_of_samples_are_the_same_images_of_one_seed(results, shown):
    made, folder = results
    rows = sample_rows(shown)
    with_seed_0 = [made.lines[k] for k in (0, 1, 2, 4)]
    assert len(rows) == len(with_seed_0)
    for row, line in zip(rows, with_seed_0, strict=True):
        with np.load(folder.path / line.runs[0] / "samples" / "0000000.npz") as arrays:
            images = arrays["arr_0"][: figures.SHOWN, ..., 0]
        factor = row.shape[0] // 8
        pitch = (row.shape[1] + max(3, row.shape[0] // 12)) // len(images)
        for k, image in enumerate(images):
            assert (row[::factor, k * pitch : k * pitch + row.shape[0] : factor] == image).all()
    assert "0 1 2 3 4 5 6 7 8 9 0 1 2 3 4 5" in words(shown)
    assert words(shown).count("No samples of seed 0.") == 2


def test_damaged_samples_are_said_in_the_row_of_their_line(results):
    made, folder = results
    paths = [folder.path / line.runs[0] / "samples" / "0000000.npz" for line in made.lines[:3]]
    kept = paths[1].read_bytes()
    paths[1].write_bytes(kept[:50])
    shown = Page(page(made, folder))
    paths[1].write_bytes(kept)
    assert len(sample_rows(shown)) == 3
    assert f"{paths[1]}: damaged" in words(shown)


def test_a_training_is_drawn_once_however_many_lines_share_it(results, shown, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "quality_png", lambda *_: b"")
    monkeypatch.setattr(figures, "losses_png", lambda curves: drawn.extend(curves) or b"")
    page(*results)
    assert [(name, len(seeds)) for name, _, seeds in drawn] == [
        ("ct", 3), ("row1, nfe 1", 2), ("row2, nfe 1", 3),
    ]  # fmt: skip
    assert [style.colour for _, style, _ in drawn] == [figures.BLACK, *figures.COLOURS[:2]]
    assert "Losses of 8 trainings" in words(shown)


def test_points_of_a_row_at_more_evaluations_are_one_curve(results, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "quality_png", lambda *given: drawn.append(given) or b"")
    page(*results)
    curves, label, number, _ = drawn[0]
    assert (label, number) == ("network evaluations a sample", "fid")
    places = {curve.title: [point.x for point in curve.points] for curve in curves}
    assert places == {"ct": [1, 2], "row1": [1], "row2": [2]}  # not measured in other ways
    assert [given[1:3] for given in drawn[1:]] == [
        ("network evaluations of training", "fid"),
        ("network evaluations a sample", "recall"),
        ("network evaluations of training", "recall"),
    ]
    assert [point.x for point in drawn[1][0][0].points] == [1.2e6, 1.2e6]


def test_names_beside_a_figure_keep_their_order_and_distance():
    rng = random.Random(0)
    for count in (1, 2, 7, 20):
        places = [rng.choice([rng.random(), 0.5, 1.0]) for _ in range(count)]
        found = figures._spread(places, 0.05)
        assert all(-1e-9 <= place <= 1 + 1e-9 for place in found)
        for low, high in itertools.pairwise(sorted(found)):
            assert high - low >= 0.05 - 1e-9
        by_place = [place for _, place in sorted(zip(places, found, strict=True))]
        assert by_place == sorted(by_place)
    assert figures._spread([0.1, 0.9, 0.5], 0.05) == pytest.approx([0.1, 0.9, 0.5])


def test_no_more_samples_are_read_than_shown(tmp_path):
    images = np.arange(10 * 4 * 4, dtype=np.uint8).reshape(10, 4, 4, 1)
    paths = [tmp_path / f"{first:07d}.npz" for first in (0, 10, 20)]
    for path in paths[:2]:
        np.savez(path, arr_0=images)
    paths[2].write_bytes(b"not read")
    found = first_samples(paths, 16)
    assert (found == np.concatenate([images, images[:6]])).all()
    with pytest.raises(CheckpointError, match=r"0000020\.npz: damaged"):
        first_samples(paths, 21)
    np.savez(paths[0], arr_0=images.astype(float))
    with pytest.raises(CheckpointError, match="not images"):
        first_samples(paths, 1)


@pytest.mark.slow
def test_a_suite_of_thirty_lines_is_small_and_soon_drawn(tmp_path):
    """Noise of 64 pixels, which no format can make small."""
    made = suite(tmp_path, rows=10, nfes=(1, 2, 4), seeds=(0,), side=64)
    began = time.process_time()
    size = write_page(made, SuiteFolder(tmp_path)).stat().st_size
    assert time.process_time() - began < 10
    assert size < 5e6
    assert len(sample_rows(Page((tmp_path / "suite.html").read_text("utf-8")))) == 30


def test_nothing_finished_is_a_page_of_failures(tmp_path):
    line = Line("ct", {}, "", {}, {0: "not finished"}, {}, {}, {})
    empty = Results("empty", None, (line,), (), (), {})
    shown = Page(page(empty, SuiteFolder(tmp_path)))
    assert "seed 0: not finished" in words(shown)
    assert "img" not in [tag for tag, _ in shown.elements]


def test_a_damaged_report_is_named(tmp_path):
    (tmp_path / "ct").mkdir()
    (tmp_path / "ct" / "report.json").write_text("{")
    line = Line("ct", {}, "", {0: "ct"}, {}, {}, {}, {})
    with pytest.raises(CheckpointError, match=r"ct/report\.json: "):
        page(Results("damaged", None, (line,), (), (), {}), SuiteFolder(tmp_path))


@pytest.fixture(scope="module")
def browser():
    with chromium() as session:
        yield session


def opened(browser, folder: SuiteFolder) -> None:
    """The browser at the page, which has asked for nothing else and has no complaint."""
    browser.requests()
    browser.log("browser")
    browser.open(folder.page)
    assert not browser.has_dialog()
    assert browser.log("browser") == []
    assert browser.requests() == [folder.page.as_uri()]


CUT = """
const wide = document.documentElement.clientWidth;
return [...document.querySelectorAll("body *")].filter((one) => {
  const box = one.getBoundingClientRect();
  return box.width && box.right > wide + 1 && !one.closest("svg, pre, .unseen");
}).map((one) => one.outerHTML.slice(0, 80));
"""


@pytest.mark.parametrize("width", [1400, 700])
def test_page_is_quiet_and_nothing_is_cut_off(browser, results, shown, tmp_path, width):
    opened(browser, results[1])
    browser.screenshot(tmp_path / "shot.png", width)
    wide = browser.run("return document.documentElement.scrollWidth")
    cut = browser.run(CUT)
    text = browser.run("return document.body.innerText")
    browser.devtools("Emulation.clearDeviceMetricsOverride")
    assert wide <= width
    assert cut == []
    for line in results[0].lines:
        assert line.title in text
    assert "out of memory at step 120" in text


def test_figures_of_one_number_are_shown_at_a_time(browser, results, shown):
    opened(browser, results[1])
    seen = "return [...document.querySelectorAll('.figures')].map((one) => one.offsetHeight > 0)"
    assert browser.run(seen) == [True, False]
    browser.click('#numbers [value="1"] + span')
    assert browser.run(seen) == [False, True]


def hostile(value, payload: str):
    """The same records with every word in them followed by `payload`; paths of runs stay."""
    if dataclasses.is_dataclass(value):
        kept = ("runs",)
        return dataclasses.replace(
            value,
            **{
                f.name: hostile(getattr(value, f.name), payload)
                for f in dataclasses.fields(value)
                if f.name not in kept
            },
        )
    if isinstance(value, dict):
        facts = {*figures.__dict__, "nfe", "training", "parameters", "images_per_second"}
        return {
            key if key in facts or not isinstance(key, str) else key + payload: (
                item if key in facts else hostile(item, payload)
            )
            for key, item in value.items()
        }
    if isinstance(value, tuple):
        return tuple(hostile(item, payload) for item in value)
    return value + payload if isinstance(value, str) else value


def test_no_name_can_act_in_the_page(browser, results):
    payload = "".join(PAYLOADS)
    made = hostile(results[0], payload)
    folder = SuiteFolder(results[1].path)
    folder.page = folder.path / "hostile.html"
    shown = Page(write_page(made, folder).read_text("utf-8"))
    assert [attrs for tag, attrs in shown.elements if tag == "script"] == [{}]
    assert not {"iframe", "object", "embed", "link", "base"} & {tag for tag, _ in shown.elements}
    for tag, attrs in shown.elements:
        assert not [name for name in attrs if name.startswith("on") or name == "style"]
        assert (attrs.get("src") or "data:").startswith("data:"), (tag, attrs)
        assert (attrs.get("href") or "./").startswith("./"), (tag, attrs)
    assert shown.text.count(payload) > 20
    opened(browser, folder)
