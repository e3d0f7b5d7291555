"""The report: what it says, that it is inert whatever the strings in it, and how it behaves."""

from __future__ import annotations

import base64
import copy
import functools
import hashlib
import itertools
import json
import random
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cmkit.errors import CheckpointError, DataError
from cmkit.pictures import grid_png
from cmkit.report import write_report
from cmkit.report.figures import CELLS_BYTES, picture_of
from cmkit.runs import RunFolder
from tests.browser import chromium

SKIPS = [0.7, 0.76, 0.82, 0.88, 0.94, 1.0, 1.06]
EMBS = [0.8, 0.85, 0.9, 0.95, 1.0, 1.05, 1.1]
WINNER, PLAIN = (0.82, 0.95), (1.0, 1.0)
PAYLOADS = (
    "</script><script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "'><svg onload=alert(1)>",
    "<!--<script>alert(1)</script>",
    "</style><style>@import 'http://evil.test/x.css'</style>",
    "{{ 7 * 7 }}{% raw %}",
    "javascript:alert(1)//\u2028</title>",
)
ARROW_LEFT, ARROW_UP, HOME = "\ue012", "\ue013", "\ue011"


@functools.cache
def digits() -> np.ndarray:
    from sklearn.datasets import load_digits

    return (load_digits().images[:100] * (255 / 16)).astype(np.uint8)


@functools.cache
def sheet(count: int, blur: float) -> bytes:
    """A PNG of digits under noise of strength `blur`."""
    noise = np.random.default_rng(0).normal(0, 60 * blur, (count, 8, 8))
    noisy = np.clip(digits()[:count] + noise, 0, 255).astype(np.uint8)
    return grid_png(torch.from_numpy(noisy)[:, None])


def interval(values: list[float]) -> dict:
    mean, half = float(np.mean(values)), float(1.24 * np.std(values, ddof=1))
    return {"values": values, "mean": mean, "low": mean - half, "high": mean + half}


def fid(skip: float, emb: float) -> float:
    return 9.13 + 900 * (skip - 0.83) ** 2 + 420 * (emb - 0.96) ** 2 + 300 * (skip - emb) ** 4


def train_stage() -> dict:
    return {
        "steps": 20000,
        "seconds": 411.2,
        "parameters": 2_134_529,
        "final_loss": 0.0312,
        "images_per_second": 6221.4,
        "peak_memory_mib": 1184.5,
    }


def search_stage(folder: Path) -> dict:
    cells = []
    (folder / "search").mkdir(exist_ok=True)
    for index, (skip, emb) in enumerate((s, e) for s in SKIPS for e in EMBS):
        score = None if (skip, emb) == (0.7, 1.1) else fid(skip, emb)
        name = f"search/cell-{index:03d}.png"
        (folder / name).write_bytes(sheet(25, (fid(skip, emb) - 8) / 20))
        cells.append({"skip": skip, "emb": emb, "score": score, "samples": name})
    best = min((c for c in cells if c["score"]), key=lambda c: c["score"])
    plain, rescaled = [24.31, 23.87, 24.9, 24.02, 24.55], [9.9, 10.21, 9.64, 10.05, 9.87]
    difference = interval([b - a for a, b in zip(plain, rescaled, strict=True)])
    del difference["values"]
    return {
        "seconds": 96.4,
        "peak_memory_mib": 890.25,
        "minimize": "fid",
        "images": 300,
        "axes": {"skip": SKIPS, "emb": EMBS},
        "labels": {"skip": "skip (s0)", "emb": "emb (s1)"},
        "cells": cells,
        "best": {key: best[key] for key in ("skip", "emb", "score")},
        "confirm": {
            "images": 500,
            "seeds": [f"confirm-{k}" for k in range(5)],
            "plain": interval(plain),
            "rescaled": interval(rescaled),
            "difference": difference,
            "verdict": "Rescaling helps: fid 24.33 -> 9.934, difference -14.4 [-15, -13.8] over 5"
            " noise seeds.",
        },
    }


def sample_stage(folder: Path) -> dict:
    (folder / "samples_before.png").write_bytes(sheet(100, 1.1))
    (folder / "samples_after.png").write_bytes(sheet(100, 0.25))
    return {
        "images": 1000,
        "nfe": 1,
        "seconds": 3.9,
        "peak_memory_mib": 702.0,
        "scales": {"skip": 0.82, "emb": 0.95},
        "before": "samples_before.png",
        "after": "samples_after.png",
    }


def metric_stage() -> dict:
    source = {"images": 1000, "extractor": "inception-v3-compat", "sha256": "6726825d0af5f729" * 4}
    return {
        "seconds": 21.5,
        "peak_memory_mib": 1312.0,
        "values": {"fid": 9.874, "precision": 0.7214, "recall": 0.5532, "digits_fid": 3.071},
        "provenance": [
            {"numbers": ["fid", "precision", "recall"], **source},
            {"numbers": ["digits_fid"], "images": 1000, "extractor": "digits-net v1"},
        ],
    }


RECIPE = {
    "name": "digits_rescaled_ct",
    "seed": 0,
    "dataset": {"use": "digits"},
    "backbone": {"use": "unet", "channels": 64, "mults": [1, 2, 2], "dropout": 0.1},
    "objective": {"use": "ict", "s0": 10, "s1": 1280},
    "denoiser": {"precond": "consistency", "sigma_data": 0.5, "sigma_max": 80.0},
    "train": {"steps": 20000, "batch": 128, "lr": 0.0001, "betas": [0.9, 0.999]},
    "search": {"images": 300, "minimize": "fid", "grid": {"skip": SKIPS, "emb": EMBS}},
    "sample": {"images": 1000, "batch": 64},
    "metric": [{"use": "fidelity", "fid": True}, {"use": "digits_net"}],
}
ENVIRONMENT = {
    "cmkit": "0.1.0",
    "python": "3.11.7",
    "platform": "Linux x86_64",
    "device": "NVIDIA H200",
    "threads": 1,
    "torch": "2.13.0",
    "packages": {"numpy": "2.4.6", "safetensors": "0.5.3", "torch-fidelity": "0.4.0"},
}


def write_log(folder: Path) -> None:
    """1000 log lines of an iCT training: N doubles from 10 to 1280, the last line is torn."""
    rng = random.Random(0)
    lines = []
    for k in range(1, 1001):
        sigmas = 10 * 2 ** min(k * 8 // 1001, 7)
        loss = (0.9 * k**-0.45 + 0.01) * (1 + 0.08 * rng.gauss(0, 1))
        record = {"step": 20 * k, "loss": loss, "rate": 48.6, "num_sigmas": sigmas + 1}
        lines.append(json.dumps(record) + "\n")
    (folder / "log.jsonl").write_text("".join(lines) + '{"step": 20020, "lo', "utf-8")


def store(folder: Path, report: dict) -> None:
    (folder / "report.json").write_text(json.dumps(report), "utf-8")


@pytest.fixture
def report(tmp_path) -> dict:
    """A finished run in `tmp_path`: the content of its report.json."""
    stages = {
        "train": train_stage(),
        "search": search_stage(tmp_path),
        "sample": sample_stage(tmp_path),
        "metric": metric_stage(),
    }
    content = {
        "schema": 1,
        "name": "digits_rescaled_ct",
        "hash": "3f9a1c07",
        "recipe": RECIPE,
        "environment": ENVIRONMENT,
        "stages": stages,
        "seconds": sum(stage["seconds"] for stage in stages.values()),
        "citations": ["song2023improved", "zhu2024rescaling", "obukhov2020torchfidelity"],
        "time": "2025-11-21T04:29:00+00:00",
    }
    write_log(tmp_path)
    store(tmp_path, content)
    return copy.deepcopy(content)


class Page(HTMLParser):
    """The elements, attributes and visible text of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.text, self.raw = "", {"script": [], "style": []}
        self._inside = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self._inside = tag
        self.text += " "
        if tag in self.raw:
            self.raw[tag].append("")

    def handle_endtag(self, tag):
        self._inside = ""

    def handle_data(self, data):
        if self._inside in self.raw:
            self.raw[self._inside][-1] += data
        else:
            self.text += data


def render(folder: Path) -> Page:
    return Page(write_report(RunFolder(folder)).read_text("utf-8"))


def poisoned(value, payload: str):
    """The same structure with every string that is free text turned into `payload`."""
    names = ("samples", "before", "after")
    if isinstance(value, dict):
        return {
            poisoned_key(key, payload): item if key in names else poisoned(item, payload)
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [poisoned(item, payload) for item in value]
    return payload if isinstance(value, str) else value


def poisoned_key(key: str, payload: str) -> str:
    free = {"fid", "digits_fid", "extractor", "numpy", "dropout", "python", "skip"}
    return f"{key} {payload}" if key in free else key


def require_inert(page: Page, payload: str) -> None:
    """Nothing can act or load: only our own two scripts, no handler, no address but data:."""
    assert [attrs for tag, attrs in page.elements if tag == "script"] == [
        {"type": "application/json", "id": "data"},
        {},
    ]
    assert len(page.raw["style"]) == 1
    assert not {"iframe", "object", "embed", "link", "base"} & {tag for tag, _ in page.elements}
    for tag, attrs in page.elements:
        assert not [name for name in attrs if name.startswith("on") or name == "style"]
        for name in ("src", "href", "action", "data", "srcset"):
            assert (attrs.get(name) or "data:").startswith("data:"), (tag, attrs)
    assert not re.search("[<>&]", page.raw["script"][0])
    assert "alert(1)" not in page.raw["script"][1] + page.raw["style"][0]
    assert payload in page.text


@pytest.fixture
def small(tmp_path, report) -> dict:
    """The same run with a grid of four cells: drawn faster."""
    stage, corners = report["stages"]["search"], (*WINNER, *PLAIN)
    stage["axes"] = {"skip": [WINNER[0], PLAIN[0]], "emb": [WINNER[1], PLAIN[1]]}
    stage["cells"] = [c for c in stage["cells"] if c["skip"] in corners and c["emb"] in corners]
    store(tmp_path, report)
    return report


@pytest.mark.slow
@pytest.mark.parametrize("payload", PAYLOADS)
def test_no_string_of_a_run_can_act_in_its_report(tmp_path, small, payload):
    content = poisoned(small, payload)
    stage = content["stages"]["metric"]
    stage["provenance"][0]["numbers"] = [next(iter(stage["values"]))]
    content["stages"]["sample"]["after"] = f"gone {payload}".replace("/", "")
    store(tmp_path, content)
    text = write_report(RunFolder(tmp_path)).read_text("utf-8")
    require_inert(Page(text), payload)
    assert "<" not in payload or payload not in text


def test_policy_allows_exactly_the_style_and_the_script_of_the_page(tmp_path, report):
    page = render(tmp_path)
    policy = next(
        attrs["content"] for tag, attrs in page.elements if tag == "meta" and "http-equiv" in attrs
    )

    def digest(text: str) -> str:
        return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()

    assert policy.startswith("default-src 'none'; img-src data:; ")
    assert f"style-src 'sha256-{digest(page.raw['style'][0])}'" in policy
    assert f"script-src 'sha256-{digest(page.raw['script'][1])}'" in policy
    assert "unsafe" not in policy


def test_report_says_what_was_measured(tmp_path, report):
    text = " ".join(render(tmp_path).text.split())
    for words in (
        report["stages"]["search"]["confirm"]["verdict"],
        "24.3 → 9.93",
        "0.82 · 0.95",
        "9.874",
        "inception-v3-compat",
        "sha256 6726825d0af5… fid 9.874 precision 0.7214 recall 0.5532",
        "digits-net v1 digits_fid 3.071",
        "song2023improved",
        "NVIDIA H200",
        "8 min 53 s in all",
        "2.13 M",
        'use = "ict"',
    ):
        assert words in text


@pytest.mark.parametrize(
    ("plain", "rescaled", "outcome"), [(9, 5, "better"), (5, 9, "worse"), (5, 5, "open")]
)
def test_verdict_is_shown_whichever_way_it_falls(tmp_path, small, plain, rescaled, outcome):
    confirm = small["stages"]["search"]["confirm"]
    before, after = ([mean - 1.0, mean, mean + 1.0] for mean in (plain, rescaled))
    confirm |= {"plain": interval(before), "rescaled": interval(after), "verdict": "So it is."}
    confirm["difference"] = interval([rescaled - plain + d for d in (-0.5, 0.0, 0.5)])
    store(tmp_path, small)
    page = render(tmp_path)
    assert ("p", {"class": f"verdict {outcome}"}) in page.elements
    assert "So it is." in page.text


@pytest.mark.slow
@pytest.mark.parametrize("absent", ["train", "search", "sample", "metric", "all", "log", "before"])
def test_what_is_absent_is_left_out(tmp_path, small, absent):
    stages = small["stages"]
    if absent == "all":
        stages.clear()
    elif absent == "log":
        (tmp_path / "log.jsonl").unlink()
    elif absent == "before":
        del stages["sample"]["before"]
    else:
        del stages[absent]
    store(tmp_path, small)
    titles = [attrs["id"] for tag, attrs in render(tmp_path).elements if tag == "h2"]
    shown = {"samples": "sample", "search": "search", "metrics": "metric", "train": "train"}
    for title, stage in shown.items():
        assert (f"{title}-title" in titles) == (stage in stages)
    assert (tmp_path / "loss.png").exists() == ("train" in stages and absent != "log")
    assert (tmp_path / "heatmap.png").exists() == ("search" in stages)


def test_classes_are_listed_and_named_under_the_pictures(tmp_path, small):
    assert "Classes" not in render(tmp_path).text
    names = [f"kind {k} <b>" for k in range(300)]
    data = {"channels": 1, "resolution": 8, "num_classes": 300}
    small["data"] = {**data, "classes": names, "counts": list(range(300))}
    small["stages"]["sample"] |= {"labels": [7, 1, 2, 3, 290], "label_rule": "data"}
    store(tmp_path, small)
    text = " ".join(render(tmp_path).text.split())
    assert "Classes in the proportions of the data." in text
    assert "row by row kind 7 <b> · kind 1 <b> · kind 2 <b> kind 3 <b> · kind 290 <b>" in text
    assert "And 100 more, in report.json" in text
    assert "199 kind 199 <b> 199" in text
    assert "200 kind 200" not in text
    small["data"] = {**data, "classes": [], "counts": []}
    store(tmp_path, small)
    assert "row by row 7 · 1 · 2 3 · 290" in " ".join(render(tmp_path).text.split())


@pytest.mark.slow
@pytest.mark.parametrize("axes", [{"skip": SKIPS}, {"emb": EMBS}, {"skip": [0.5], "emb": [1.0]}])
def test_grid_of_any_shape_has_a_cell_for_each_combination(tmp_path, report, axes):
    stage = report["stages"]["search"]
    name = stage["cells"][0]["samples"]
    values = [dict(zip(axes, v, strict=True)) for v in itertools.product(*axes.values())]
    stage["axes"] = axes
    stage["cells"] = [{**v, "score": 9.0 + k, "samples": name} for k, v in enumerate(values)]
    stage["best"] = {**values[0], "score": 9.0}
    store(tmp_path, report)
    buttons = [attrs for tag, attrs in render(tmp_path).elements if "data-cell" in attrs]
    assert len(buttons) == len(values)
    assert [b["aria-label"] for b in buttons if "winner" in b["class"].split()] == [
        ", ".join(f"{k} {v:g}" for k, v in values[0].items()) + ": fid 9.00, the best cell"
    ]
    with Image.open(tmp_path / "heatmap.png") as drawn:
        assert drawn.width > 200


def test_a_search_by_coordinates_is_a_line_for_each_number(tmp_path, report):
    """Values rise, whatever came first; what a line kept and the best cell are marked."""
    stage = report["stages"]["search"]
    name = stage["cells"][0]["samples"]
    stage["axes"] = {"emb": [1.4], "skip.3": [0.8, 0.9]}
    tried = [(1.0, 1.0, 5.0), (1.4, 1.0, 3.0), (1.4, 0.8, None), (1.4, 0.9, 3.5)]
    stage["cells"] = [
        {"emb": emb, "skip.3": skip, "score": score, "samples": name} for emb, skip, score in tried
    ]
    stage["descent"] = [{"axis": "emb", "cells": [0, 1]}, {"axis": "skip.3", "cells": [1, 2, 3]}]
    stage["best"] = {"emb": 1.4, "skip.3": 0.9, "score": 2.9}  # scored again on more images
    store(tmp_path, report)
    page = render(tmp_path)
    buttons = [attrs for tag, attrs in page.elements if "data-cell" in attrs]
    assert [(b["aria-label"], b["data-cell"]) for b in buttons] == [
        ("emb 1: fid 5.00, unscaled", "0"),
        ("emb 1.4: fid 3.00, kept", "1"),
        ("skip.3 0.8: fid not a number", "2"),
        ("skip.3 0.9: fid 3.50, the best cell", "3"),
        ("skip.3 1: fid 3.00, kept", "1"),
    ]
    assert len([b for b in buttons if b["tabindex"] == "0"]) == 1
    assert "One number\nafter the other" in page.text
    with Image.open(tmp_path / "heatmap.png") as drawn:
        assert drawn.width > 200


def test_a_search_by_trials_is_a_strip_in_their_order(tmp_path, report):
    """Those that were the best so far are framed; a cut cell says of how many images its score is,
    and neither its colour nor its words compare it with another."""
    stage = report["stages"]["search"]
    name, stage["method"] = stage["cells"][0]["samples"], "tpe"
    stage |= {"axes": {f"skip.{k}": [0.5, 1.5] for k in range(20)}, "rungs": [75, 300]}
    scores = [5.0, *(9.0 - k / 100 for k in range(10)), None, 4.0]
    stage["cells"] = [
        {
            **dict.fromkeys(stage["axes"], 1 + index / 100),
            "score": score,
            "samples": name,
            "images": 75 if index in (3, 4) else 300,
        }
        for index, score in enumerate(scores)
    ]
    stage["cells"][3]["score"] = 1.0
    stage["best"] = {**dict.fromkeys(stage["axes"], 1.12), "score": 3.9}
    store(tmp_path, report)
    page = render(tmp_path)
    buttons = [attrs for tag, attrs in page.elements if "data-cell" in attrs]
    assert [int(b["data-cell"]) for b in buttons] == list(range(13))
    assert [k for k, b in enumerate(buttons) if " kept" in b["class"]] == [0, 12]
    assert [k for k, b in enumerate(buttons) if "none" in b["class"]] == [3, 4, 11]
    assert buttons[3]["aria-label"].endswith("fid 1.00, cut with 75 images")
    assert "the best cell" in buttons[12]["aria-label"]
    assert "and 8 more" in buttons[12]["aria-label"]
    assert "1 to 10" in page.text
    assert "11 to 13" in page.text
    assert "order of their" in page.text
    assert "Cells began with 75" in page.text
    with Image.open(tmp_path / "heatmap.png") as drawn:
        assert drawn.width > 200


def test_many_numbers_are_told_by_those_that_moved(tmp_path, report):
    stage = report["stages"]["search"]
    name = stage["cells"][0]["samples"]
    axes = {f"skip.{k}": [1.0, 1.5] for k in range(9)}
    ones = dict.fromkeys(axes, 1.0)
    moved = {**ones, "skip.7": 1.5}
    stage["axes"] = axes
    stage["cells"] = [{**v, "score": k, "samples": name} for k, v in enumerate((moved, ones))]
    stage["descent"] = [{"axis": "skip.7", "cells": [1, 0]}]
    stage["best"] = {**moved, "score": 0}
    report["stages"]["sample"]["scales"] = {"skip": [1.0, 0.5], "emb": 1.0, "sites": {"emb.3": 2.0}}
    store(tmp_path, report)
    text = render(tmp_path).text
    for words in ("1 of 9", "other than 1, of 2 cells", "skip.7 1.5", "unscaled all 1"):
        assert words in text, words
    assert "skip [1, 0.5], emb 1, emb.3 2" in text


@pytest.mark.slow
@pytest.mark.parametrize(("best", "edges"), [((0.7, 0.95), "skip"), ((1.06, 0.8), "skip and emb")])
def test_best_cell_on_the_edge_asks_for_a_wider_grid(tmp_path, report, best, edges):
    assert "wider grid" not in render(tmp_path).text
    report["stages"]["search"]["best"] |= dict(zip(("skip", "emb"), best, strict=True))
    store(tmp_path, report)
    assert f"on the edge of {edges}: a wider grid" in render(tmp_path).text


def test_three_axes_and_unmeasured_cells_are_drawn(tmp_path, report):
    stage = report["stages"]["search"]
    name = stage["cells"][0]["samples"]
    stage["axes"] = {"skip": [0.9, 1.0], "emb": [1.0], "other": [1.0, 2.0]}
    stage["cells"] = [
        {"skip": s, "emb": 1.0, "other": o, "score": None if o == 2 else s, "samples": name}
        for s in (0.9, 1.0)
        for o in (1.0, 2.0)
    ][:-1]
    stage["best"] = {"skip": 0.9, "emb": 1.0, "other": 1.0, "score": 0.9}
    store(tmp_path, report)
    labels = [a["aria-label"] for t, a in render(tmp_path).elements if "data-cell" in a]
    assert labels == [
        "skip 0.9, emb 1, other 2: fid not a number",
        "skip 0.9, emb 1, other 1: fid 0.900, the best cell",
        "skip 1, emb 1, other 1: fid 1.00, unscaled",
    ]


def test_same_run_gives_the_same_bytes(tmp_path, report):
    def artifacts() -> dict[str, bytes]:
        write_report(RunFolder(tmp_path))
        return {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()}

    first = artifacts()
    assert artifacts() == first
    assert {"report.html", "heatmap.png", "loss.png"} <= set(first)
    assert not [name for name in first if "tmp" in name]


@pytest.mark.parametrize("name", ["../secret.png", "/etc/passwd", "search/../../secret.png", "ln"])
def test_picture_outside_the_folder_is_refused(tmp_path, report, name):
    folder = tmp_path / "run"
    folder.mkdir()
    (tmp_path / "secret.png").write_bytes(sheet(1, 0))
    (folder / "ln").symlink_to(tmp_path / "secret.png")
    report["stages"] = {"sample": {**report["stages"]["sample"], "before": name}}
    store(folder, report)
    with pytest.raises(DataError, match="outside the run's folder"):
        write_report(RunFolder(folder))
    assert not (folder / "report.html").exists()


def test_picture_that_is_no_picture_is_refused(tmp_path, small):
    (tmp_path / "samples_after.png").write_text("<script>alert(1)</script>")
    with pytest.raises(DataError, match=r"samples_after\.png: not a PNG"):
        write_report(RunFolder(tmp_path))


def test_pictures_of_many_cells_fit_the_page(tmp_path):
    """400 sheets of 320 pixels of noise, 300 KiB each, in about 3 MiB."""
    pixels = np.random.default_rng(0).integers(0, 255, (320, 320, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "cell.png")
    assert (tmp_path / "cell.png").stat().st_size > 3e5
    found = picture_of(RunFolder(tmp_path), "cell.png", 640, CELLS_BYTES // 400)
    assert len(found["src"]) * 400 < 5e6
    assert found["width"] == 320  # it takes the same place
    assert picture_of(RunFolder(tmp_path), "cell.png", 640)["src"].startswith("data:image/png")


@pytest.mark.slow
def test_large_sheets_are_made_smaller_in_the_page_only(tmp_path, small):
    noise = np.random.default_rng(0).integers(0, 256, (700, 2600, 3), dtype=np.uint8)
    path = tmp_path / "samples_after.png"
    Image.fromarray(noise).save(path)
    before = path.read_bytes()
    images = [attrs for tag, attrs in render(tmp_path).elements if tag == "img"]
    shrunk = next(attrs for attrs in images if attrs["src"].startswith("data:image/webp"))
    assert (shrunk["width"], shrunk["height"]) == ("1280", "344")
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no such file"),
        ("{", "damaged"),
        ("[]", "not a JSON object"),
        ('{"schema": 3}', "schema 3"),
        ('{"schema": 2}', "its digest is not that of its content"),
        ('{"schema": 1}', "KeyError: 'stages'"),
        ('{"schema": 1, "stages": {"search": {"axes": 3}}}', "not a report that cmkit wrote"),
    ],
)
def test_bad_report_is_one_line_that_names_the_file(tmp_path, text, message):
    if text is not None:
        (tmp_path / "report.json").write_text(text)
    with pytest.raises(CheckpointError, match=message) as caught:
        write_report(RunFolder(tmp_path))
    assert str(tmp_path / "report.json") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_odd_lines_of_the_log_are_left_out(tmp_path, small):
    lines = ['{"step": 9, "loss": NaN}', '{"step": "x", "loss": 1}', "[1]", "\0", '{"loss": 1}']
    (tmp_path / "log.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    assert not [tag for tag, _ in render(tmp_path).elements if tag == "polyline"]
    lines += ['{"step": 1, "loss": 0}', '{"step": 2, "loss": 0, "num_sigmas": "<b>"}']
    (tmp_path / "log.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    assert [tag for tag, _ in render(tmp_path).elements if tag == "polyline"]


def test_home_folder_and_credentials_stay_out_of_the_page(tmp_path, report):
    secret = "https://user:hunter2@host/a.zip?token=hunter3"
    report["recipe"]["dataset"] = {"use": "lsun", "path": f"{Path.home()}/lsun", "url": secret}
    store(tmp_path, report)
    text = write_report(RunFolder(tmp_path)).read_text("utf-8")
    assert "~/lsun" in text
    assert "hunter" not in text


def test_report_module_imports_neither_torch_nor_matplotlib():
    code = "import cmkit.report, sys; print({'torch', 'matplotlib', 'jinja2'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


@pytest.fixture(scope="module")
def browser():
    with chromium() as session:
        yield session


def opened(browser, folder: Path):
    """The browser at the folder's report, its logs empty."""
    browser.requests()
    browser.log("browser")
    browser.open(write_report(RunFolder(folder)))
    return browser


def require_quiet(browser, folder: Path) -> None:
    """No dialog, no console message, no request but for the page itself."""
    assert not browser.has_dialog()
    assert browser.log("browser") == []
    assert browser.requests() == [(folder / "report.html").as_uri()]


def chosen(browser) -> dict:
    """What the page shows of the chosen cell."""
    return browser.run(
        """
        const cell = document.querySelector(".heat [aria-pressed=true]");
        const text = (id) => document.getElementById(id).textContent;
        return {count: document.querySelectorAll(".heat [aria-pressed=true]").length,
                stop: document.querySelectorAll(".heat [tabindex='0']").length,
                aria: cell.ariaLabel, focus: document.activeElement === cell,
                label: text("cell-label"), score: text("cell-score"), note: text("cell-note"),
                image: document.getElementById("cell-image").src};
        """
    )


def picture(folder: Path, skip: float, emb: float) -> str:
    index = SKIPS.index(skip) * len(EMBS) + EMBS.index(emb)
    data = (folder / f"search/cell-{index:03d}.png").read_bytes()
    return "data:image/png;base64," + base64.b64encode(data).decode()


def test_page_opens_at_the_winner_beside_the_unscaled_cell(browser, tmp_path, report):
    opened(browser, tmp_path)
    shown = chosen(browser)
    assert shown["aria"] == f"skip 0.82, emb 0.95: fid {fid(*WINNER):.3g}, the best cell"
    assert shown["image"] == picture(tmp_path, *WINNER)
    marks = browser.run(
        "return ['.winner', '.plain'].map((mark) => document.querySelector(mark).innerText)"
    )
    assert [mark.split() for mark in marks] == [
        [f"{fid(*WINNER):.3g}", "best"],
        [f"{fid(*PLAIN):.3g}", "(1,", "1)"],
    ]
    beside = "return document.querySelectorAll('.inspect img')[1].src"
    assert browser.run(beside) == picture(tmp_path, *PLAIN)
    require_quiet(browser, tmp_path)


def test_clicking_a_cell_shows_its_picture_and_score(browser, tmp_path, report):
    opened(browser, tmp_path)
    browser.click('[aria-label^="skip 0.76, emb 0.85:"]')
    shown = chosen(browser)
    assert (shown["count"], shown["stop"]) == (1, 1)
    assert (shown["label"], shown["score"]) == ("skip 0.76, emb 0.85", f"{fid(0.76, 0.85):.3g}")
    assert shown["image"] == picture(tmp_path, 0.76, 0.85)
    assert shown["note"].endswith("below the unscaled one")
    browser.click('[aria-label^="skip 0.7, emb 1.1:"]')
    assert (chosen(browser)["score"], chosen(browser)["note"]) == ("–", "not a number")  # noqa: RUF001
    require_quiet(browser, tmp_path)


def test_arrow_keys_move_the_choice_and_stop_at_the_edge(browser, tmp_path, report):
    opened(browser, tmp_path)
    browser.click(".winner")
    places = []
    for key in (ARROW_LEFT, ARROW_UP, ARROW_UP, ARROW_UP, ARROW_UP, HOME, ARROW_LEFT):
        browser.press(key)
        assert chosen(browser)["focus"]
        places.append(chosen(browser)["label"])
    assert places == [
        "skip 0.76, emb 0.95",
        "skip 0.76, emb 1",
        "skip 0.76, emb 1.05",
        "skip 0.76, emb 1.1",
        "skip 0.76, emb 1.1",
        "skip 0.7, emb 1.1",
        "skip 0.7, emb 1.1",
    ]
    require_quiet(browser, tmp_path)


def test_overlay_copying_and_the_curve_work_under_the_policy(browser, tmp_path, report):
    opened(browser, tmp_path)
    browser.click("#view-over + span")
    clip = "return getComputedStyle(document.querySelector('.after img')).clipPath"
    assert browser.run(clip) == "inset(0px 0px 0px 50%)"
    browser.run(
        "const cut = document.getElementById('cut'); cut.value = 20;"
        "cut.dispatchEvent(new Event('input', {bubbles: true}))"
    )
    assert browser.run(clip) == "inset(0px 0px 0px 20%)"
    browser.click("#copy")
    browser.click("#loss")
    told = browser.run("return document.getElementById('loss-here').textContent")
    assert re.fullmatch(r"step 10,[01]\d0 · loss 0\.0\d+ · N = 161", told)
    words = browser.run("return document.getElementById('copy').textContent")
    assert words in ("Copied", "Selected: press Ctrl+C")
    require_quiet(browser, tmp_path)


@pytest.mark.parametrize("width", [390, 1280])
def test_page_never_scrolls_sideways(browser, tmp_path, report, width):
    report["name"] = "a_very_long_name_" * 4
    store(tmp_path, report)
    opened(browser, tmp_path)
    browser.screenshot(tmp_path / "shot.png", width)
    wide = browser.run("return document.documentElement.scrollWidth")
    browser.devtools("Emulation.clearDeviceMetricsOverride")
    assert wide <= width


@pytest.mark.parametrize("payload", PAYLOADS)
def test_no_payload_runs_in_a_real_browser(browser, tmp_path, small, payload):
    store(tmp_path, poisoned(small, payload))
    opened(browser, tmp_path)
    browser.click(".plain")
    assert chosen(browser)["count"] == 1
    require_quiet(browser, tmp_path)


@pytest.mark.slow
def test_the_page_says_when_a_second_scoring_chose_the_winner(tmp_path, report):
    def told() -> str:
        store(tmp_path, report)
        return " ".join(write_report(RunFolder(tmp_path)).read_text("utf-8").split())

    assert "scored again" not in told()
    stage = report["stages"]["search"]
    stage["rerank"] = {"images": 2000, "cells": stage["cells"][:3]}
    assert "The best 3 were scored again on 2,000 images" in told()


def test_levels_below_zero_are_labelled():
    """A loss that holds the logarithm of a learned weight falls below 0."""
    from cmkit.report.curve import curve_of, curve_svg

    records = [{"step": k, "loss": 0.5 - 0.3 * k, "num_sigmas": 0} for k in range(1, 6)]
    labels = [label for _, label in curve_svg(curve_of(records))["levels"]]
    assert labels == ["-1", "-0.5", "0"]
