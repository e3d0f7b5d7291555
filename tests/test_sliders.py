"""The sliders of the report: what they show is the stored picture at a cell and the formula between
cells, in a page that stays small."""

from __future__ import annotations

import base64
import functools
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cmkit.pictures import grid_png
from cmkit.report import write_report
from cmkit.report.sliders import tiles
from cmkit.runs import RunFolder
from tests.browser import chromium
from tests.test_report import require_quiet, store

SKIPS, EMBS = [0.7, 0.8, 0.9, 1.0, 1.2], [0.8, 1.0, 1.1, 1.4]
HEATMAP = "return document.querySelector('.heat [aria-pressed=true]').ariaLabel"
PAGE_UP = "\ue00e"


def smooth(values: dict[str, float], images: int, side: int, channels: int = 3) -> np.ndarray:
    """Images (n, C, side, side) whose pixels are cubic in each value, some of them outside of 0 to
    255."""
    rng = np.random.default_rng(0)
    total = np.zeros((images, channels, side, side))
    for k, value in enumerate(values.values()):
        for degree in range(4):
            pixels = rng.normal(128 if k == degree == 0 else 0, 60, total.shape)
            total += pixels * (value - 1) ** degree * (1 + k * degree)
    return total


def picture(folder: Path, name: str, pixels: np.ndarray) -> str:
    (folder / "search").mkdir(exist_ok=True)
    images = torch.from_numpy(np.clip(np.rint(pixels), 0, 255).astype(np.uint8))
    return RunFolder(folder).keep_picture(f"search/{name}", grid_png(images))


def run(folder: Path, axes: dict, draw, best: dict[str, float], side: int = 8, **more) -> dict:
    """A finished run with a search, its cells drawn by `draw`, in a folder."""
    names, cells = list(axes), []
    for k, values in enumerate(itertools.product(*axes.values())):
        cell = dict(zip(names, values, strict=True))
        samples = picture(folder, f"cell-{k:04d}", draw(cell))
        cells.append({**cell, "score": 5.0 + 0.01 * k, "samples": samples})
    search = {
        "seconds": 1.0,
        "minimize": "fid",
        "images": 100,
        "axes": axes,
        "labels": {"skip": "skip (s0)"},
        "cells": cells,
        "best": {**best, "score": 1.0},
        **more,
    }
    report = {
        "schema": 1,
        "name": "sliders",
        "hash": "3f9a1c07",
        "recipe": {"name": "sliders"},
        "environment": {},
        "data": {"channels": 3, "resolution": side, "num_classes": None},
        "stages": {"search": search},
        "seconds": 1.0,
        "citations": [],
        "time": "2025-11-21T04:29:00+00:00",
    }
    store(folder, report)
    return report


def grid_run(folder: Path) -> dict:
    draw = functools.partial(smooth, images=9, side=8)
    return run(folder, {"skip": SKIPS, "emb": EMBS}, draw, {"skip": 0.8, "emb": 1.1})


def surrogate(folder: Path, axes: dict, size: int, draw) -> dict:
    """The result of an interpolation with Chebyshev nodes, as a search keeps it."""
    low, high = ([end(values) for values in axes.values()] for end in (min, max))
    x = -np.cos(np.pi * np.arange(size) / (size - 1))
    nodes = list(itertools.product(x, repeat=len(axes)))
    exponents = list(itertools.product(range(size), repeat=len(axes)))
    basis = np.array([
        [np.prod(np.cos(np.array(e) * np.arccos(node))) for e in exponents]
        for node in nodes
    ])  # fmt: skip
    records = []
    for k, node in enumerate(nodes):
        place = [a + (b - a) * (v + 1) / 2 for a, b, v in zip(low, high, node, strict=True)]
        values = dict(zip(axes, map(float, place), strict=True))
        records.append({**values, "samples": picture(folder, f"node-{k:04d}", draw(values))})
    return {
        "axes": list(axes),
        "low": low,
        "high": high,
        "exponents": [list(e) for e in exponents],
        "matrix": np.linalg.inv(basis).tolist(),
        **{"passes": 9, "checks": [], "held": True, "tolerance": None, "refines": False},
        "nodes": records,
    }


def expected(folder: Path, found: dict, at: dict[str, float], side: int) -> np.ndarray:
    """The sheet at a place, by the formula of the interpolation."""
    low, high = np.array(found["low"]), np.array(found["high"])
    x = (2 * np.array([at[axis] for axis in found["axes"]]) - low - high) / (high - low)
    basis = np.cos(np.array(found["exponents"]) * np.arccos(x.clip(-1, 1))).prod(1)
    stored = [sheet(folder / node["samples"]) for node in found["nodes"]]
    images = np.stack([tiles(one, side) for one in stored]).astype(float)
    mixed = np.tensordot(basis @ np.array(found["matrix"]), images, 1)
    pixels = torch.from_numpy(np.clip(np.rint(mixed), 0, 255).astype(np.uint8))
    (folder / "expected.png").write_bytes(grid_png(pixels.movedim(-1, 1)))
    return sheet(folder / "expected.png")


def sheet(path: Path) -> np.ndarray:
    with Image.open(path) as opened:
        return np.asarray(opened.convert("RGB"))


@pytest.fixture(scope="module")
def browser():
    with chromium() as session:
        yield session


def opened(browser, folder: Path):
    """The browser at the folder's page, its sliders ready."""
    browser.requests()
    browser.log("browser")
    browser.open(write_report(RunFolder(folder)))
    wait(browser, "!document.getElementById('live').hidden")
    return browser


def wait(browser, condition: str = "true") -> None:
    """Until a condition holds, and the next frames are drawn."""
    browser.run(
        f"""return new Promise((done) => {{
            const look = () => {condition}
                ? requestAnimationFrame(() => requestAnimationFrame(done)) : setTimeout(look, 10);
            look();
        }});"""
    )


def canvas(browser) -> np.ndarray:
    width, height, values = browser.run(
        """
        const canvas = document.getElementById("live-canvas");
        const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
        const bytes = Array.from(data, (value) => String.fromCharCode(value)).join("");
        return [canvas.width, canvas.height, btoa(bytes)];
        """
    )
    pixels = np.frombuffer(base64.b64decode(values), np.uint8)
    return pixels.reshape(height, width, 4)[..., :3]


def drag(browser, slider: int, value: float) -> float:
    """Drag a slider next to a value; the value that it stops at."""
    found = browser.run(
        """
        const input = document.getElementById("live-range-" + arguments[0]);
        const values = data.sliders.models[0].axes[arguments[0]].values;
        const stops = stopsOf(values);
        input.value = closest(stops, arguments[1]);
        input.dispatchEvent(new Event("input", { bubbles: true }));
        return stops[input.value];
        """,
        slider,
        value,
    )
    wait(browser)
    return found


def text(browser, element: str) -> str:
    return browser.run(f"return document.getElementById('{element}').textContent")


def test_at_every_cell_the_canvas_is_the_picture_of_that_cell(browser, tmp_path):
    report = grid_run(tmp_path)
    opened(browser, tmp_path)
    assert text(browser, "live-near") == "skip 0.8, emb 1.1, fid 5.06"
    for cell in report["stages"]["search"]["cells"]:
        assert drag(browser, 0, cell["skip"]) == cell["skip"]
        assert drag(browser, 1, cell["emb"]) == cell["emb"]
        assert (canvas(browser) == sheet(tmp_path / cell["samples"])).all()
        assert text(browser, "live-state") == "as drawn by the model"
        assert browser.run(HEATMAP).startswith(f"skip {cell['skip']:g}, emb {cell['emb']:g}:")
    require_quiet(browser, tmp_path)


def test_between_cells_the_canvas_is_the_cubic_through_the_nearest_four(browser, tmp_path):
    report = grid_run(tmp_path)
    cells = report["stages"]["search"]["cells"]
    opened(browser, tmp_path)
    seen = [canvas(browser)]
    for skip, emb, nearest in (
        (0.75, 1.1, SKIPS[:4]),
        (0.75, 0.93, SKIPS[:4]),
        (1.13, 1.25, SKIPS[1:]),
    ):
        at = {"skip": drag(browser, 0, skip), "emb": drag(browser, 1, emb)}
        seen.append(canvas(browser))
        assert text(browser, "live-state") == "interpolated"
        near = [sheet(tmp_path / c["samples"]) for c in cells if c["skip"] in nearest]
        values = np.array(near, float).reshape(4, 4, -1)
        along = polynomial(nearest, values, at["skip"])
        exact = polynomial(EMBS, along, at["emb"]).reshape(seen[-1].shape)
        assert np.abs(seen[-1] - np.clip(np.rint(exact), 0, 255)).max() <= 1, at
    assert all((a != b).mean() > 0.1 for a, b in itertools.pairwise(seen))
    require_quiet(browser, tmp_path)


def polynomial(points, values: np.ndarray, at: float) -> np.ndarray:
    """The cubic through four values (4, ...) at a place."""
    coefficients = np.linalg.solve(np.vander(points), values.reshape(4, -1))
    return (np.vander([at], 4) @ coefficients).reshape(values.shape[1:])


def test_nodes_are_mixed_by_the_polynomial_of_the_search(browser, tmp_path):
    axes = {"skip": [0.8, 0.9, 1.0, 1.1], "emb": [0.8, 1.0, 1.4]}
    draw = functools.partial(smooth, images=4, side=12, channels=1)
    found = surrogate(tmp_path, axes, 5, draw)
    run(tmp_path, axes, draw, {"skip": 0.9, "emb": 1.0}, 12, surrogate=found)
    opened(browser, tmp_path)
    for skip, emb in ((0.83, 0.93), (1.0, 1.2), (1.07, 1.36), (0.9, 1.0)):
        at = {"skip": drag(browser, 0, skip), "emb": drag(browser, 1, emb)}
        difference = canvas(browser).astype(int) - expected(tmp_path, found, at, 12)
        assert np.abs(difference).max() <= 1, at
    for node in (found["nodes"][7], found["nodes"][24]):
        assert drag(browser, 0, node["skip"]) == node["skip"]
        assert drag(browser, 1, node["emb"]) == node["emb"]
        assert (canvas(browser) == sheet(tmp_path / node["samples"])).all()
        assert text(browser, "live-state") == "as drawn by the model"
    require_quiet(browser, tmp_path)


@pytest.mark.parametrize("numbers", [20_000, 500])
def test_other_numbers_stay_at_the_winner(browser, tmp_path, monkeypatch, numbers):
    """Also where the page holds the polynomial of few of them."""
    monkeypatch.setattr("cmkit.report.sliders.NUMBERS", numbers)
    axes = {"a": [0.8, 1.0], "b": [0.9, 1.2], "c": [0.5, 1.0]}
    draw = functools.partial(smooth, images=1, side=8, channels=1)
    found = surrogate(tmp_path, axes, 3, draw)
    best = {"a": 0.8, "b": 1.2, "c": 1.0}
    run(tmp_path, axes, draw, best, surrogate=found)
    opened(browser, tmp_path)
    hidden = browser.run("return document.getElementById('live-axis-0').hidden")
    assert hidden == (numbers == 500)
    at = {"a": drag(browser, 0, 0.87), "b": drag(browser, 1, 1.0), "c": 1.0}
    difference = canvas(browser).astype(int) - expected(tmp_path, found, at, 8)
    assert np.abs(difference).max() <= 1
    if numbers > 500:
        browser.run(
            "const one = document.getElementById('live-axis-0'); one.value = 2;"
            "one.dispatchEvent(new Event('change'))"
        )
        wait(browser)
        difference = canvas(browser) - expected(tmp_path, found, {**at, "a": 0.8}, 8).astype(int)
        assert np.abs(difference).max() <= 1
        assert text(browser, "live-place") == "a 0.8, b 1, c 1"
    require_quiet(browser, tmp_path)


def test_cells_buttons_and_keys_move_the_sliders(browser, tmp_path):
    report = grid_run(tmp_path)
    pictures = {(c["skip"], c["emb"]): c["samples"] for c in report["stages"]["search"]["cells"]}
    opened(browser, tmp_path)
    for selector, at in (
        ('[aria-label^="skip 1.2, emb 0.8:"]', (1.2, 0.8)),
        ("#live-plain", (1.0, 1.0)),
        ("#live-best", (0.8, 1.1)),
    ):
        browser.click(selector)
        wait(browser)
        assert (canvas(browser) == sheet(tmp_path / pictures[at])).all()
        outputs = (
            "return [...document.querySelectorAll('.slider output')].map((o) => o.textContent)"
        )
        assert browser.run(outputs) == [f"{value:g}" for value in at]
        told = "return [...document.querySelectorAll('.slider input')].map((o) => o.ariaValueText)"
        assert browser.run(told) == [f"{value:g}" for value in at]
    browser.run("document.getElementById('live-range-0').focus()")
    browser.press("\ue014")  # to the right
    wait(browser)
    assert text(browser, "live-place") == "skip 0.805, emb 1.1"
    browser.press(PAGE_UP)
    wait(browser)
    assert text(browser, "live-place") == "skip 0.9, emb 1.1"
    assert browser.run(HEATMAP).startswith("skip 0.9, emb 1.1:")
    require_quiet(browser, tmp_path)


def test_a_search_by_coordinates_has_a_slider_along_each_line(browser, tmp_path):
    report = grid_run(tmp_path)
    stage = report["stages"]["search"]
    stage["cells"] = [c for c in stage["cells"] if c["skip"] == 1.0 or c["emb"] == 1.1]
    skips = [k for k, c in enumerate(stage["cells"]) if c["emb"] == 1.1]
    embs = [k for k, c in enumerate(stage["cells"]) if c["skip"] == 1.0]
    stage["descent"] = [{"axis": "emb", "cells": embs}, {"axis": "skip", "cells": skips}]
    store(tmp_path, report)
    opened(browser, tmp_path)
    assert text(browser, "live-place") == "skip 0.8"
    for row, line in enumerate((embs, skips)):
        for k in line:
            browser.click(f".heat tbody tr:nth-child({row + 1}) [data-cell='{k}']")
            wait(browser)
            assert (canvas(browser) == sheet(tmp_path / stage["cells"][k]["samples"])).all()
        assert browser.run("return Number(document.getElementById('live-model').value)") == row
    require_quiet(browser, tmp_path)


def test_a_smoke_run_is_stamped_on_the_canvas(browser, tmp_path):
    grid_run(tmp_path)
    plain = canvas(opened(browser, tmp_path))
    (tmp_path / "recipe.toml").write_text("smoke = true\n")
    marked = canvas(opened(browser, tmp_path))
    assert ((marked == 255).all(-1) & (plain != 255).any(-1)).mean() > 0.02
    require_quiet(browser, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("side", "skips"), [(64, 11), (8, 40)])
def test_the_page_stays_below_3_mb(tmp_path, side, skips):
    """Noise is what compresses worst."""
    rng = np.random.default_rng(0)
    axes = {
        "skip": [round(1 + 0.02 * k, 2) for k in range(skips)],
        "emb": [round(1 + 0.02 * k, 2) for k in range(11)],
    }
    best = {"skip": 1.0, "emb": 1.0}
    report = run(tmp_path, axes, lambda _: rng.uniform(0, 255, (25, 3, side, side)), best, side)
    for name in ("before", "after"):
        pixels = torch.from_numpy(rng.integers(0, 255, (100, 3, side, side), np.uint8))
        RunFolder(tmp_path).keep_picture(f"samples_{name}", grid_png(pixels))
    pictures = {name: f"samples_{name}.png" for name in ("before", "after")}
    report["stages"]["sample"] = {"images": 100, "nfe": 1, "seconds": 1.0, **pictures}
    store(tmp_path, report)
    page = write_report(RunFolder(tmp_path)).read_text("utf-8")
    assert len(page.encode()) < 3e6
    assert 'id="live"' in page
    data = json.loads(page.split('id="data">')[1].split("</script>")[0])
    assert data["sliders"]["pictures"] == 11 * skips
    assert sum(bool(cell["src"]) for cell in data["cells"]) == 11 * skips


@pytest.mark.parametrize("absent", ["picture", "cell", "side"])
def test_no_sliders_where_something_is_missing(tmp_path, absent):
    report = grid_run(tmp_path)
    assert 'id="live"' in write_report(RunFolder(tmp_path)).read_text("utf-8")
    if absent == "picture":
        (tmp_path / "search" / "cell-0007.png").unlink()
    elif absent == "cell":
        del report["stages"]["search"]["cells"][7]
    else:
        report["data"]["resolution"] = 9
    store(tmp_path, report)
    page = write_report(RunFolder(tmp_path)).read_text("utf-8")
    assert 'id="live"' not in page
    assert "startSliders" not in page


@pytest.mark.parametrize(("images", "side", "channels"), [(1, 8, 1), (7, 16, 3), (25, 64, 3)])
def test_images_are_read_from_a_sheet(tmp_path, images, side, channels):
    shape = (images, channels, side, side)
    drawn = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    (tmp_path / "sheet.png").write_bytes(grid_png(torch.from_numpy(drawn)))
    assert (tiles(sheet(tmp_path / "sheet.png"), side) == drawn.transpose(0, 2, 3, 1)).all()
    assert tiles(sheet(tmp_path / "sheet.png"), side + 1) is None
