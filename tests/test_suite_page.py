"""The page of a suite: what it shows, that it is inert, small and legible, and what shares a log."""

from __future__ import annotations

import dataclasses
import io
import random
import re
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cmkit.errors import CheckpointError
from cmkit.run import RunFolder
from cmkit.suite import figures
from cmkit.suite.figures import first_samples, sample_row
from cmkit.suite.intervals import Interval, mean_interval, paired_difference
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


def fake_run(path: Path, row: int, seed: int, gain: bool = False, key: str = "") -> str:
    """A finished run's folder: pictures of `digits` under noise, a log, and a report."""
    run, rng = RunFolder(path), np.random.default_rng((row, seed))
    (path / "samples").mkdir(parents=True)
    noise = rng.normal(0, 10 + 12 * row, (20, 8, 8))
    pixels = np.clip(digits()[20 * seed : 20 * seed + 20] + noise, 0, 255).astype(np.uint8)
    np.savez(path / "samples" / "0000000.npz", arr_0=pixels[..., None])
    (path / "recipe.toml").write_text("")
    run.keep_inputs({}, {"train": key or path.name})
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
    run.keep_report({"schema": 2, "stages": stages, "environment": ENVIRONMENT})
    return path.name


def a_score(values: dict[int, float]) -> Score:
    return Score(values, len(SEEDS), mean_interval([*values.values()]), 1000, MEASURED)


def suite(tmp_path: Path, rows: int = 3, nfes=(1, 2), seeds=SEEDS, gain: bool = True) -> Results:
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
                    gain and nfe == nfes[0], f"{row} {s}",
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
            lines.append(
                Line(name, {"nfe": str(nfe)}, "", runs, {}, scores, verdicts, facts)
            )
    columns = (("fid", MEASURED), ("recall", MEASURED))
    notes = ("fid: of 1,000 images, which is biased; read kid beside it.",)
    return Results("digits", "ct", tuple(lines), columns, notes, PROVENANCE)
