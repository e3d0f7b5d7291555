"""What cells and runs came to: lines, columns, intervals, verdicts, and their printed forms."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from cmkit import discover, files
from cmkit.errors import CheckpointError, RecipeError
from cmkit.report import figures
from cmkit.runs.folder import RunFolder
from cmkit.suite import collect as collecting
from cmkit.suite import noise, tables, work
from cmkit.suite.cells import cells
from cmkit.suite.collect import collect, gather, keep, of_runs, results
from cmkit.suite.cost import costs
from cmkit.suite.intervals import holm, mean_interval, paired_difference, welch_difference
from cmkit.suite.noise import SameNoise
from cmkit.suite.suite import load_suite
from cmkit.suite.work import SuiteFolder
from tests.test_bench import BASE, STAND_IN

SUITE = """
name = "small"
base = "base.toml"
seeds = [0, 1, 2]
baseline = "ct"
[budget]
steps = 6
[axis.nfe]
1 = { sampler = { use = "multistep" } }
2 = { sampler = { use = "multistep", sigmas = [0.821] } }
[row.ct]
note = "consistency training"
[row.ict]
objective = { use = "ict" }
[row.batch]
train.batch = 16
"""
SCORES = {
    ("ct", "1"): (20.0, 21.0, 22.5),
    ("ct", "2"): (15.0, 16.5, 17.0),
    ("ict", "1"): (10.0, 11.1, 12.4),
    ("ict", "2"): (15.1, 16.4, 17.2),
    ("batch", "1"): (30.0, 31.0, 32.5),
    ("batch", "2"): (15.0, 16.5, 17.1),
}
HOW = {
    "extractor": "inception",
    "weights_sha256": "a" * 64,
    "images": 500,
    "reference": "b" * 64,
    "resize": "inside",
    "torch_fidelity": "0.4.0",
    "labels": "data",
    "threshold": 0.8,
}
OTHERS = {
    "extractor": "cmkit-digits",
    "weights_sha256": None,
    "images": 5000,
    "reference": "c" * 64,
    "resize": "area",
    "torch_fidelity": "0.3.0",
    "labels": "uniform",
    "protocol": "ADM",
    "threshold": 0.7,
    "precision": "bf16",
    "tf32": True,
}


def finish(folder: RunFolder, recipe, fid: float, extra=None, **how) -> None:
    """Leave what a run of the resolved `recipe` leaves, with an FID and a precision."""
    name, key = folder.path.name.rsplit("-", 1)
    precision, tf32 = how.pop("precision", "fp32"), how.pop("tf32", False)
    folder.path.mkdir(parents=True, exist_ok=True)
    folder.keep_recipe(f"name = {name!r}\n")
    folder.keep_status({"train": {"result": {}}})
    numbers = ["fid", "precision"]
    train = {"steps": 6, "seconds": 2.0, "parameters": 13_145, "peak_memory_mib": 700.0}
    report = {
        "schema": 2,
        "name": name,
        "hash": key,
        "recipe": {**recipe, "metric": [{"use": "fidelity"}]},
        "environment": {"cmkit": "0.1.0", "torch": "2.15", "device": "cpu", "tf32": tf32},
        "inputs": {"sample": {"precision": precision}, "dataset": {"contents": "d" * 64}},
        "data": {"num_classes": 10},
        "stages": {
            **({"train": train} if "train" in recipe else {}),
            "sample": {"images": 500, "nfe": 1, "seconds": 5.0, "scales": {}, "label_rule": "data"},
            "metric": {
                "values": {"fid": fid, "precision": 1 / fid},
                "provenance": [{"numbers": numbers, **HOW, **how}],
            },
        },
        **(extra or {}),
    }
    folder.keep_report(report)


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A folder with base.toml and small.toml; work goes on in it."""
    (tmp_path / "base.toml").write_text(BASE)
    (tmp_path / "small.toml").write_text(SUITE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def made(scores=SCORES, but=(), **how):
    """(suite, cells, folder) of small.toml, of which all cells are finished `but` some (row, axis
    value, seed)."""
    suite = load_suite("small.toml")
    found, folder = cells(suite, discover()), SuiteFolder(Path("runs/small"))
    for cell in found:
        at = (cell.row, cell.axis["nfe"])
        if (*at, cell.seed) not in but:
            own = how if cell.row == "ict" else {}
            finish(folder.run(cell), cell.recipe.resolved, scores[at][cell.seed], **own)
    return suite, found, folder


def same_noise():
    return SameNoise(discover())


def by_title(found):
    return {line.title: line for line in found.lines}


def printed(found) -> list[list[str]]:
    """The cells of the printed table, whose first may hold blanks."""
    heads, rows = tables.table(found)
    return [heads, *rows]


def test_lines_are_rows_at_values_of_axes_with_intervals_over_seeds(home):
    found = collect(*made(), same_noise())
    assert [*by_title(found)] == [f"{row}, nfe {n}" for row in ("ct", "ict", "batch") for n in "12"]
    line = by_title(found)["ct, nfe 1"]
    assert line.scores["fid"].mean == mean_interval(SCORES["ct", "1"])
    assert (line.scores["fid"].images, line.note) == (500, "consistency training")
    assert line.facts["training"] == {"steps": 6, "images": 48, "seconds": 2.0}
    assert (line.facts["images_per_second"], line.facts["parameters"]) == (100.0, 13_145)
    assert line.runs.keys() == {0, 1, 2}
    assert found.better == {"fid": "lower", "precision": "higher"}
    heads, first, *_ = printed(found)
    assert heads[:3] == ["row", "nfe", "seeds"]
    assert first[:3] == ["ct", "1", "3"]
    assert "21.2 ±3.1" in first
    assert found.measured()[0].startswith(
        "fid, precision: extractor inception, weights sha256 aaaa"
    )
    assert found.provenance["suite_sha256"] == files.sha256_of(home / "small.toml")


@pytest.mark.parametrize("fact", OTHERS)
def test_numbers_that_were_measured_unlike_never_stand_in_one_column(home, fact):
    found = collect(*made(**{fact: OTHERS[fact]}), same_noise())
    assert [name for name, _ in found.columns] == ["fid", "fid", "precision", "precision"]
    for line in found.lines:
        fits = [cell is not None for cell in found.cells(line)]
        assert fits == ([False, True] if line.row == "ict" else [True, False]) * 2
        assert not (line.row == "ict" and line.verdicts)
    said = [note for note in found.notes if f"not comparable, {fact} differs" in note]
    assert [note.partition(":")[0] for note in said] == ["fid", "precision"]
    heads, *rows = printed(found)
    place = heads.index("fid (2)")
    assert all((row[place] == "–") == (row[0] != "ict") for row in rows)  # noqa: RUF001


def test_seeds_that_were_measured_unlike_are_not_averaged(home):
    suite, every, folder = made()
    cell = next(cell for cell in every if (cell.row, cell.seed) == ("ct", 1))
    finish(folder.run(cell), cell.recipe.resolved, 21.0, images=50_000)
    found = collect(suite, every, folder, same_noise())
    score = by_title(found)["ct, nfe 1"].scores["fid"]
    assert (dict(score.values), score.seeds, score.mean.low) == ({0: 20.0, 2: 22.5}, 3, None)
    assert "ct, nfe 1: fid of seed 1 was measured in another way" in found.notes
    assert any("(2 of 3 seeds)" in text for row in printed(found) for text in row)


def test_no_seed_is_dropped_silently(home):
    suite, every, folder = made(but={("ict", "1", 1), ("ict", "2", 0)})
    first, second = (
        next(c for c in every if (c.row, c.axis["nfe"], c.seed) == at)
        for at in (("ict", "1", 1), ("ict", "2", 0))
    )
    folder.keep_failure(first, 2, "sample.images = 3: too few")
    found = collect(suite, every, folder, same_noise())
    line = by_title(found)["ict, nfe 1"]
    assert (line.seeds, line.scores["fid"].seeds) == ("2 of 3", 3)
    assert line.failures == {1: f"sample.images = 3: too few; see {folder.log(first)}"}
    assert by_title(found)["ict, nfe 2"].failures == {0: "not finished"}
    assert any(note.startswith("ict, nfe 1: 2 of 3 seeds; seed 1: sample") for note in found.notes)
    assert line.verdicts["fid"].word == "cannot tell"
    assert "no interval" in line.verdicts["fid"].difference.of
    (folder.run(second).path).mkdir()
    (folder.run(second).path / "status.json").write_text("{}")
    (folder.run(second).path / "report.json").write_text("{")
    damaged = collect(suite, every, folder, same_noise())
    assert "report.json: damaged" in by_title(damaged)["ict, nfe 2"].failures[0]


def test_seeds_are_paired_where_start_and_order_of_the_data_are_shared_else_welch(home):
    found = by_title(collect(*made(), same_noise()))
    seeds = {key: dict(enumerate(values)) for key, values in SCORES.items()}
    for n in "12":
        paired = paired_difference(seeds["ict", n], seeds["ct", n])
        assert found[f"ict, nfe {n}"].verdicts["fid"].difference == paired
        apart = welch_difference(SCORES["batch", n], SCORES["ct", n])
        assert found[f"batch, nfe {n}"].verdicts["fid"].difference == apart
        assert not found[f"ct, nfe {n}"].verdicts
    assert "paired over 3 training seeds" in paired.of


@pytest.mark.parametrize(
    ("change", "shares"),
    [
        ({"objective": {"use": "icm"}}, True),
        ({"dataset": {"use": "digits", "split": "all"}}, False),
        ({"train": {"batch": 8, "accumulate": 2}}, False),
        ({"teacher": {"weights": "a.pt"}}, False),
        ({"denoiser": {"weights": "a.pt"}}, False),
        ({"seed": 1}, False),
    ],
)
def test_what_runs_share(tmp_path, change, shares):
    recipe = {"name": "a", "seed": 0, "dataset": {"use": "digits"}, "train": {"batch": 8}}
    for name, own in (("a-1", recipe), ("b-1", {**recipe, **change})):
        finish(RunFolder(tmp_path / name), own, 1.0)
    a, b = (collecting.read_run(tmp_path / name) for name in ("a-1", "b-1"))
    assert a.shares(b) is b.shares(a) is shares
    assert replace(a, recipe=b.recipe, seed=b.seed).shares(b)


def test_a_teacher_is_the_same_as_the_weights_that_the_network_begins_with(tmp_path):
    recipe = {"name": "a", "seed": 0, "train": {"batch": 8}}
    for name, table in (("a-1", "teacher"), ("b-1", "denoiser")):
        finish(RunFolder(tmp_path / name), {**recipe, table: {"weights": "edm.pt"}}, 1.0)
    a, b = (collecting.read_run(tmp_path / name) for name in ("a-1", "b-1"))
    assert a.shares(b)


def test_better_is_said_after_holm_for_the_comparisons_of_the_number(home):
    found = by_title(collect(*made(), same_noise()))
    others = [line for line in found.values() if line.row != "ct"]
    for number in ("fid", "precision"):
        said = [line.verdicts[number] for line in others]
        assert [each.p for each in said] == holm(each.difference.p for each in said)
        assert {each.comparisons for each in said} == {4}
    words = {title: line.verdicts["fid"].word for title, line in found.items() if line.verdicts}
    assert words == {
        "ict, nfe 1": "better",
        "ict, nfe 2": "cannot tell",
        "batch, nfe 1": "worse",
        "batch, nfe 2": "cannot tell",
    }
    precision = found["ict, nfe 1"].verdicts["precision"]
    assert (precision.word, precision.difference.value > 0) == ("better", True)  # more is better


def test_a_line_is_compared_with_the_baseline_at_its_values_or_with_its_only_line(home):
    text = SUITE.replace("[row.ict]\n", "[row.ict]\naxis.nfe = [2]\n")
    (home / "small.toml").write_text(text)
    suite, every, folder = made()
    found = by_title(collect(suite, every, folder, same_noise()))
    assert found["ict, nfe 2"].verdicts["fid"].difference.value == pytest.approx(0.067, abs=0.01)
    other = gather([Path("small.toml")], discover())
    other.baseline = "ict"
    found = by_title(results(other, same_noise()))["ct, nfe 1"].verdicts["fid"].difference
    assert found.value == pytest.approx(21.167 - 16.233, abs=0.01)
    text = SUITE.replace("[row.ict]\n", "[row.ict]\naxis = { nfe = { 3 = {} } }\n")
    (home / "small.toml").write_text(text)
    suite, every, folder = made({**SCORES, ("ict", "3"): (1.0, 2.0, 3.0)})
    odd = collect(suite, every, folder, same_noise())
    assert "ict, nfe 3: ct has no line to compare it with" in odd.notes


def test_lines_are_compared_with_their_own_rows_at_a_value_of_an_axis(home, cmkit):
    text = SUITE.replace("[row.batch]\n", "[row.batch]\naxis.nfe = [2]\n")
    (home / "small.toml").write_text(text.replace('"ct"', "{ nfe = 1 }"))
    scores = {key: value for key, value in SCORES.items() if key != ("batch", "1")}
    suite, every, folder = made(scores, precision="bf16")
    found = collect(suite, every, folder, same_noise())
    assert found.baseline == {"nfe": "1"}
    for row in ("ct", "ict"):  # unlike rows are not compared, and each has its own precision
        verdict = by_title(found)[f"{row}, nfe 2"].verdicts["fid"]
        pair = (dict(enumerate(SCORES[row, n])) for n in "21")
        assert verdict.difference == paired_difference(*pair)
        assert verdict.comparisons == 2
        assert not by_title(found)[f"{row}, nfe 1"].verdicts
    assert "batch, nfe 2: nfe 1 has no line to compare it with" in found.notes
    family = [by_title(found)[f"{row}, nfe 2"].verdicts["fid"] for row in ("ct", "ict")]
    assert [each.p for each in family] == holm(each.difference.p for each in family)
    assert any("than the same row at nfe 1 where p" in note for note in found.notes)
    keep(found, folder)
    assert results(gather([folder.path], discover()), same_noise()).baseline == {"nfe": "1"}
    for words in ([], ["--format", "latex"], ["--format", "markdown"]):
        assert "fid beside nfe 1" in cmkit("compare", "runs/small", *words)[1]
    _, out, _ = cmkit("compare", "runs/small", "--baseline", "nfe=2", "--format", "csv")
    rows = list(csv.DictReader(io.StringIO(out)))
    beside = {(row["row"], row["nfe"]): (row["beside"], row["fid_verdict"]) for row in rows}
    assert beside["ct", "1"] == ("nfe 2", "worse")
    assert beside["ct", "2"] == beside["batch", "2"] == ("", "")
    for said, told in (
        ("nef=1", "baseline nef=1: no such axis; did you mean 'nfe'?"),
        ("nfe=3", "baseline nfe=3: no such value; known: 1, 2"),
    ):
        code, out, err = cmkit("compare", "runs/small", "--baseline", said)
        assert (code, out, err) == (2, "", f"error: {told}\n")


def test_a_number_of_held_out_images_is_as_good_in_the_direction_of_its_own(tmp_path):
    for seed in range(3):
        for row, value in (("a", 0.5), ("b", 0.7)):
            folder = RunFolder(tmp_path / f"{row}-{seed}")
            recipe = {"name": row, "seed": seed, "train": {"steps": 9}, "row": row}
            finish(folder, recipe, 3.0 + seed, features={"heldout_fid": 64})
            report = files.unsealed(folder.path / "report.json")
            (record,) = report["stages"]["metric"]["provenance"]
            values = {"heldout_fid": 3.0 + seed, "heldout_precision": value * (1 + seed / 50)}
            report["stages"]["metric"]["values"] = values
            record["numbers"] = [*values]
            folder.keep_report(report)
    gathered = of_runs(sorted(tmp_path.iterdir()))
    gathered.baseline = gathered.groups[0].row
    found = results(gathered, same_noise())
    assert found.better == {"heldout_fid": "lower", "heldout_precision": "higher"}
    assert found.lines[1].verdicts["heldout_precision"].word == "better"


def test_scales_of_layers_and_steps_are_told_in_a_line(tmp_path):
    for seed in range(2):
        folder = RunFolder(tmp_path / f"a-{seed}")
        finish(folder, {"name": "a", "seed": seed, "train": {"steps": 9}}, 3.0)
        report = files.unsealed(folder.path / "report.json")
        sites = {"skip.3": 0.9, "emb.1": 1.25}
        scales = {"sigmas": [0.8, 20.0], "skip": [0.9, 1.0], "emb": [1.0, 1.0], "sites": sites}
        report["stages"]["sample"]["scales"] = scales
        folder.keep_report(report)
    found = results(of_runs(sorted(tmp_path.iterdir())), same_noise())
    (line,) = found.lines
    assert line.facts["skip"] == "0.9/1"
    assert line.facts["sites"] == "skip.3 0.9, emb.1 1.25"
    assert "emb" not in line.facts
    heads, row = printed(found)
    assert row[heads.index("skip")] == "0.9/1"
    assert not {"sites", "sigmas"} & {*heads}


def test_scales_of_a_line_without_runs_are_not_known(home):
    suite, every, folder = made(but={("batch", "2", seed) for seed in range(3)})
    for cell in every:
        if cell.row == "ict":
            report = files.unsealed(folder.run(cell).path / "report.json")
            report["stages"]["sample"]["scales"] = {"skip": 0.9}
            folder.run(cell).keep_report(report)
    heads, *rows = printed(collect(suite, every, folder, same_noise()))
    skip = heads.index("skip")
    assert [row[skip] for row in rows] == ["1", "1", "0.9", "0.9", "1", figures.number(None)]


def test_seeds_of_one_checkpoint_are_seeds_of_sampling(tmp_path):
    recipe = {"denoiser": {"weights": "published.pt"}}
    for seed, fid in enumerate((5.0, 5.1, 5.3)):
        finish(RunFolder(tmp_path / f"a-{seed}"), {"name": "a", "seed": seed, **recipe}, fid)
        own = {"name": "b", "seed": seed, **recipe, "sampler": {"use": "heun"}}
        finish(RunFolder(tmp_path / f"b-{seed}"), own, fid + 1 + seed**2 / 10)
    gathered = of_runs([tmp_path / f"{name}-{seed}" for name in "ab" for seed in range(3)])
    gathered.baseline = "a"
    found = by_title(results(gathered, same_noise()))
    assert found["a"].scores["fid"].mean.of == "of one checkpoint, over 3 sampling seeds"
    of = found["b"].verdicts["fid"].difference.of
    assert of == "of these two checkpoints, paired over 3 sampling seeds"


def test_runs_whose_recipes_differ_in_the_seed_alone_are_one_line(tmp_path):
    folders = []
    for seed in (0, 1):
        teacher = f"edm-s{seed}-{seed}"
        finish(RunFolder(tmp_path / teacher), {"name": f"edm-s{seed}", "seed": seed}, 3.0)
        for name, steps in (("cd", 6), ("cd", 7)):
            own = {"name": f"{name}-s{seed}", "seed": seed, "train": {"steps": steps}}
            own["teacher"] = {"weights": f"run:{teacher}"}
            folders.append(tmp_path / f"{own['name']}-{steps}{seed}")
            finish(RunFolder(folders[-1]), own, 2.0 + seed)
    found = of_runs([*folders, folders[0]])
    assert [[*group.runs] for group in found.groups] == [[0, 1], [0, 1]]
    assert [group.row for group in found.groups] == [str(folder) for folder in folders[:2]]
    (group,) = of_runs(folders[::2]).groups
    assert group.row == "cd"


def test_the_gain_by_rescaling_is_of_the_method_over_seeds_and_of_one_checkpoint_else(tmp_path):
    gains = (-1.0, -1.5, -1.2)
    for seed, gain in enumerate(gains):
        confirm = {
            "seeds": ["confirm-0", "confirm-1"],
            "plain": {"mean": 9.0 + seed},
            "rescaled": {"mean": 9.0 + seed + gain},
            "difference": {"mean": gain, "low": gain - 0.1, "high": gain + 0.1},
        }
        place = RunFolder(tmp_path / f"a-{seed}")
        finish(place, {"name": "a", "seed": seed, "train": {"batch": 8}}, 3.0)
        report = place.report()
        report["stages"]["search"] = {"minimize": "fid", "confirm": confirm}
        place.keep_report({k: v for k, v in report.items() if k != "sha256"})
    folders = [tmp_path / f"a-{seed}" for seed in range(3)]
    (several,) = results(of_runs(folders), same_noise()).lines
    over = mean_interval(gains)
    assert several.facts["gain"] == {"number": "fid", "plain": 10.0, **asdict(over),
                                     "rescaled": pytest.approx(10 - 3.7 / 3)}  # fmt: skip
    (one,) = results(of_runs(folders[:1]), same_noise()).lines
    assert (one.facts["gain"]["low"], one.facts["gain"]["high"]) == (-1.1, -0.9)
    assert one.facts["gain"]["of"] == "of this checkpoint, over 2 noise seeds"


def picture_run(path: Path, images: torch.Tensor, key: str, labels=(0, 1)) -> Path:
    """A finished run of one seed whose kept samples are `images`, uint8 (N, 1, 8, 8)."""
    from cmkit.sample import Batch, npz

    text = BASE.replace("digits_judge", "fidelity").replace('"base"', f'"{path.name[:-2]}"')
    path.mkdir()
    folder = RunFolder(path)
    (path / "recipe.toml").write_text(text)
    folder.keep_samples(0, len(images), npz([Batch(0, images, None)]))
    from cmkit.recipe import load

    recipe = load(path / "recipe.toml", [], discover())
    reference = recipe.dataset.reference()
    values = recipe.metric[0].measure(noise_images(images), reference, torch.device("cpu"))
    finish(folder, dict(recipe.resolved), values["fid"], reference=reference.fingerprint,
           images=len(images))  # fmt: skip
    digests = folder.digests("sample")
    folder.keep_status(
        {
            "sample": {"result": {}, "files": digests},
            "metric": {"result": {}, "files": {}, "key": key * 64},
        }
    )
    return path


def noise_images(images):
    from cmkit.measure import Images

    return Images(images)


@pytest.fixture
def pictures(tmp_path):
    """Two runs of one seed, the second of whose samples are noisier digits."""
    from cmkit.recipe import load

    (tmp_path / "base.toml").write_text(BASE)
    recipe = load(tmp_path / "base.toml", [], discover())
    real = recipe.dataset.reference().images
    digits = torch.stack([real[k] for k in range(120)]).float()
    shared = torch.randn(digits.shape)
    drawn = [(digits + width * shared).clamp(0, 255).byte() for width in (20, 60)]
    return [
        picture_run(tmp_path / f"{name}-1", images, key)
        for name, images, key in zip("ab", drawn, "ef", strict=True)
    ]


def test_single_seeds_are_compared_on_the_same_noise(pictures, monkeypatch):
    a, b = map(collecting.read_run, pictures)
    found = same_noise().difference(b, a, "fid")
    assert found.value == pytest.approx(b.scores["fid"] - a.scores["fid"], rel=1e-3)
    assert 0 < found.low < found.value < found.high
    assert found.of == "of these two checkpoints, not of the two methods"
    itself = same_noise().difference(a, a, "fid")
    assert (itself.value, itself.low) == (0, None)
    (place,) = files.cache_folder("influences").glob("e*.json")
    place.write_text("{")  # is computed anew
    assert same_noise().difference(b, a, "fid") == found
    monkeypatch.setattr(noise, "_computed", None)  # what is known is kept for the next process
    assert same_noise().difference(b, a, "fid") == found
    odd = same_noise().difference(a, b, "precision")
    assert odd.of.endswith("no interval, it is no distance of features")
    gathered = of_runs(pictures)
    gathered.baseline = "a-1"
    (_, line) = results(gathered, same_noise()).lines
    assert line.verdicts["fid"].word == "worse"
    assert line.verdicts["precision"].word == "cannot tell"


def test_images_of_other_noise_or_damaged_ones_have_no_interval(pictures):
    a, b = map(collecting.read_run, pictures)
    changes = {
        "seeds 0 and 1": replace(b, seed=1),
        "their labels differ": replace(b, stages={"sample": {**b.stages["sample"], "labels": [1]}}),
        "their images differ": replace(b, stages={"sample": {**b.stages["sample"], "images": 9}}),
    }
    for why, other in changes.items():
        assert same_noise().difference(a, other, "fid").of.endswith(f"no interval, {why}")
    (file,) = b.folder.sample_files()
    file.write_bytes(b"")
    assert "0000000.npz: damaged" in same_noise().difference(a, b, "fid").of
    file.unlink()
    assert "0000000.npz: missing" in same_noise().difference(a, b, "fid").of


def test_features_are_those_that_the_numbers_follow_from(pictures):
    from cmkit_std.metrics.fidelity import Fidelity

    from cmkit.recipe import load
    from cmkit.sample import SavedImages
    from cmkit.suite.intervals import frechet_influence, kid_influence

    run = RunFolder(pictures[0])
    reference = load(run.recipe, [], discover()).dataset.reference()
    images, cpu = SavedImages(run.sample_files()), torch.device("cpu")
    metric = Fidelity(kid=True, kid_subset_size=100, isc=True)
    values, sets = (f(images, reference, cpu) for f in (metric.measure, metric.features))
    assert sets.keys() == {"fid", "kid_mean"}
    assert metric.provenance()["features"] == {"fid": sets["fid"]["rows"].shape[1]}
    fid, kid = sets["fid"], sets["kid_mean"]
    found = frechet_influence(fid["rows"], fid["mu"], fid["sigma"]).value
    assert found == pytest.approx(values["fid"], rel=1e-4)
    real = kid["real"].double()
    kernel = (real @ real.T / real.shape[1] + 1) ** 3
    n = len(reference.images)
    term = (kernel.sum() - kernel.trace()).item() / (n * (n - 1))
    found = kid_influence(kid["rows"], kid["real"]).value + term
    assert found == pytest.approx(values["kid_mean"], rel=0.1)


def test_a_distance_of_few_images_is_said_to_be_biased_and_decides_nothing(tmp_path):
    for seed in range(3):
        for row, fid in (("a", 9.0), ("b", 3.0)):
            for width in (100, 101):
                recipe = {"name": row, "seed": seed, "train": {"steps": 9}, "row": row}
                folder = RunFolder(tmp_path / f"{width}" / f"{row}-{seed}")
                finish(folder, recipe, fid + seed / 10, features={"fid": width})
    for width, word in ((100, "better"), (101, "cannot tell")):
        gathered = of_runs(sorted((tmp_path / f"{width}").iterdir()))
        gathered.baseline = gathered.groups[0].row
        found = results(gathered, same_noise())
        assert [line.verdicts["fid"].word for line in found.lines if line.verdicts] == [word]
        assert [note for note in found.notes if "KID" in note] == [
            "fid of 500 images is biased, as 101 features want at least 505: it decides nothing"
            " here, trust KID"
        ] * (width == 101)


def test_a_suites_folder_tells_what_its_file_tells_wherever_it_is(home):
    suite, every, folder = made(but={("ict", "1", 1)})
    found = collect(suite, every, folder, same_noise())
    keep(found, folder)
    moved = home / "elsewhere"
    shutil.move(folder.path, moved)
    again = results(gather([moved], discover()), same_noise())
    assert again.notes == found.notes
    assert again.columns == found.columns
    for line, then in zip(again.lines, found.lines, strict=True):
        there = {seed: str(moved / Path(run).name) for seed, run in then.runs.items()}
        assert line == replace(then, runs=there)
    kept = (moved / "results.json").read_text()
    assert json.loads(kept)["lines"][0]["runs"]["0"].startswith("ct-1")
    (moved / "results.json").write_text(kept.replace("21", "22"))
    with pytest.raises(CheckpointError, match=r"results\.json: damaged"):
        gather([moved], discover())


def test_csv_holds_every_number_in_full(home):
    found = collect(*made(but={("ict", "1", 1)}), same_noise())
    rows = list(csv.DictReader(io.StringIO(tables.to_csv(found))))
    assert len(rows) == len(found.lines)
    for row, line in zip(rows, found.lines, strict=True):
        mean = line.scores["fid"].mean
        assert (row["row"], row["nfe"], int(row["seeds_of"])) == (line.row, line.axis["nfe"], 3)
        assert float(row["fid"]) == mean.value
        assert row["fid_low"] == ("" if mean.low is None else str(mean.low))
        assert (row["fid_images"], row["fid_seeds"]) == ("500", str(len(line.runs)))
        assert row["fid_verdict"] == (line.verdicts["fid"].word if line.verdicts else "")


def test_markdown_and_latex_hold_the_table(home):
    found = collect(*made(but={("ict", "1", 1)}), same_noise())
    found = replace(found, lines=tuple(replace(line, row=f"{line.row}_|&") for line in found.lines))
    heads, rows = tables.table(found)
    markdown = "\n".join(tables.to_markdown(found)).partition("\n\n")[0].splitlines()
    split = [re.split(r"(?<!\\)\|", line)[1:-1] for line in markdown]
    assert {len(row) for row in split} == {len(heads)}
    assert len(split) == len(rows) + 2
    assert [re.sub(r"\\(.)", r"\1", row[0].strip()) for row in split[2:]] == [r[0] for r in rows]
    latex = list(tables.to_latex(found))
    for word in (r"\toprule", r"\midrule", r"\bottomrule", r"\end{tabular}"):
        assert latex.count(word) == 1
    body = [line for line in latex if line.endswith(r"\\")]
    assert len(body) == len(rows) + 1
    assert all(len(re.findall(r"(?<!\\)&", line)) == len(heads) - 1 for line in body)
    assert not re.search(r"(?<!\\)[_%#]|±|–", "".join(body))  # noqa: RUF001
    assert body[1].startswith(r"ct\_|\& & 1 & 3 & 500")


def test_lines_are_sorted_by_a_number_the_best_first(home):
    found = collect(*made(), same_noise())
    fid = tables.sort(found, "fid").lines
    assert [line.title for line in fid][:2] == ["ict, nfe 1", "ct, nfe 2"]
    assert tables.sort(found, "precision").lines[0].title == "ict, nfe 1"
    with pytest.raises(RecipeError, match="--sort fdi: no such number; did you mean 'fid'"):
        tables.sort(found, "fdi")


def test_lines_are_chosen_by_keys_of_their_recipes(home):
    made()
    gathered = gather([Path("small.toml")], discover())
    every = by_title(results(gathered, same_noise()))

    def titles(**where):
        keys = {key.replace("__", "."): value for key, value in where.items()}
        chosen = results(gathered, same_noise(), keys)
        assert all(line == every[line.title] or "seed" in where for line in chosen.lines)
        return [line.title for line in chosen.lines]

    assert titles(objective="ict") == ["ict, nfe 1", "ict, nfe 2"]
    assert titles(row="ct", nfe="2") == ["ct, nfe 2"]
    assert titles(train__batch="16", nfe="1") == ["batch, nfe 1"]
    assert titles(metric="digits_judge", nfe="1") == ["ct, nfe 1", "ict, nfe 1", "batch, nfe 1"]
    (line, *_) = results(gathered, same_noise(), {"seed": "1"}).lines
    assert dict(line.scores["fid"].values) == {1: 21.0}
    for key in ("objectiv", "backbone.chanels"):
        with pytest.raises(RecipeError, match=f"--where {key}: no such key; did you mean"):
            titles(**{key: "ict"})
    with pytest.raises(RecipeError, match="--where objective=edm: no line is so"):
        titles(objective="edm")


def test_the_command_prints_every_format_and_its_errors_are_one_line(home, cmkit):
    made()
    for form in ("table", "csv", "markdown", "latex"):
        code, out, err = cmkit("compare", "small.toml", "--format", form, "--sort", "fid")
        assert (code, err) == (0, "")
        assert "ict" in out
    code, out, _ = cmkit("compare", "small.toml", "--json", "--where", "objective=ict")
    found = json.loads(out)
    assert (code, found["schema"], found["baseline"], len(found["lines"])) == (0, 1, "ct", 2)
    assert len(found["runs"]) == 18
    finish(RunFolder(home / "x-1"), {"name": "x"}, 2.0, {"smoke": True})
    finish(RunFolder(home / "z-1"), {"name": "z"}, 2.0, {"schema": 3})
    finish(RunFolder(home / "y-1"), {"name": "y"}, 2.0, numbers=["precision"])
    for words, code, told in (
        (["small.toml", "--baseline", "itc"], 2, "baseline itc: no such row; did you mean 'ict'?"),
        (["small.toml", "--where", "objective"], 2, "expected KEY=VALUE"),
        (["small.toml", "--sort", "fdi"], 2, "did you mean 'fid'?"),
        (["small.toml", "x-1"], 2, "x-1: a smoke run, whose numbers mean nothing; leave it out"),
        (["y-1"], 4, "y-1/report.json: does not say how fid was measured"),
        (["z-1"], 4, "z-1/report.json: schema 3, but this cmkit reads 2 and 1"),
        (["small.toml", "--out", "none"], 4, "small.toml: not finished; cmkit bench small.toml"),
        (["nothing"], 4, "no such file"),
    ):
        found = cmkit("compare", *words)
        assert (found[0], found[1]) == (code, ""), words
        assert told in found[2]
        assert found[2].count("\n") == 1
    code, out, _ = cmkit("compare", "x-1")
    assert (code, "smoke runs, shrunk" in out) == (0, True)


def test_damage_beside_an_intact_report_is_said(home, cmkit):
    finish(RunFolder(home / "a-1"), {"name": "a"}, 2.0)
    (home / "a-1" / "status.json").write_text("{")
    code, out, _ = cmkit("compare", "a-1")
    assert code == 0
    assert "note: a-1/status.json: damaged" in out
    assert "report.json, which is intact" in out


def test_two_suites_and_a_run_stand_in_one_table(home, cmkit):
    made()
    (home / "other.toml").write_text(SUITE.replace("small", "other"))
    shutil.copytree("runs/small", "runs/other")
    finish(RunFolder(home / "x-1"), {"name": "x"}, 2.0)
    gathered = gather([Path("small.toml"), Path("x-1"), Path("other.toml")], discover())
    found = results(gathered, same_noise())
    assert found.baseline == "small/ct"
    rows = list(dict.fromkeys(line.row for line in found.lines))
    names = [f"{suite}/{row}" for suite in ("small", "other") for row in ("ct", "ict", "batch")]
    assert rows == [*names, "x-1"]


def test_evaluations_of_another_budget_or_a_damaged_file_are_not_shown(home, cmkit):
    suite, every, folder = made()
    keep(collect(suite, every, folder, same_noise(), costs(every)), folder)

    def known():
        gathered = gather([Path("small.toml")], discover())
        lines = results(gathered, same_noise()).lines
        return [line.facts["training"].get("evaluations") for line in lines], gathered.notes

    assert known()[0] == [6 * 8 * 4] * 4 + [6 * 16 * 4] * 2
    (home / "small.toml").write_text(SUITE.replace("steps = 6", "steps = 7"))
    made()
    assert known() == ([None] * 6, [])
    folder.results.write_text("{")
    (note,) = known()[1]
    assert "results.json: damaged; name the suite's file, or run cmkit bench again" in note
    code, _, err = cmkit("compare", "runs/small")
    assert (code, "results.json: damaged; name the suite's file" in err) == (4, True)


def test_a_suite_that_is_named_twice_is_one_and_two_of_one_name_go_by_their_folders(home, cmkit):
    keep(collect(*made(), same_noise()), SuiteFolder(Path("runs/small")))
    (run,) = Path("runs/small").glob("ct-1-s0-*")
    twice = gather([Path("small.toml"), Path("runs/small"), run, run.resolve()], discover())
    assert [group.row for group in twice.groups].count("ct") == 2
    assert len(twice.groups) == 7
    shutil.copytree("runs", "old")
    found = results(gather([Path("runs/small"), Path("old/small")], discover()), same_noise())
    assert found.baseline == "runs/small/ct"
    assert {line.row for line in found.lines} == {
        f"{folder}/small/{row}" for folder in ("runs", "old") for row in ("ct", "ict", "batch")
    }
    assert "fid" in by_title(found)["runs/small/ict, nfe 1"].verdicts
    code, _, err = cmkit("compare", "runs/small", "--where", "seed=7")
    assert (code, err) == (2, "error: --where seed=7: no run has that seed\n")


def test_bench_refuses_a_row_that_cannot_be_built_before_any_cell_is_begun(home, cmkit):
    text = SUITE + "[row.odd]\nbackbone = { use = 'adm', channels = 8 }\n"
    (home / "small.toml").write_text(text)
    code, _, err = cmkit("bench", "small.toml", "--device", "cpu")
    assert code == 2
    assert "does not divide into norm_groups" in err.splitlines()[-1]
    assert not Path("runs/small/recipes").exists()


def test_bench_ends_with_the_table_and_the_code_of_the_first_failure(home, cmkit, monkeypatch):
    text = SUITE.partition("[row.ict]")[0].replace("[0, 1, 2]", "[0]")
    (home / "small.toml").write_text(re.sub(r"(?m)^(\[axis.nfe\]|[12] = .*)\n", "", text))
    (home / "stand_in.py").write_text(STAND_IN)
    monkeypatch.setattr(work, "COMMAND", (sys.executable, str(home / "stand_in.py")))
    monkeypatch.setenv("PYTHONPATH", ":".join(sys.path))
    monkeypatch.setattr(work, "POLL", 0.02)
    monkeypatch.setattr(work, "LOOK", 0.1)
    monkeypatch.setenv("FATE", "ct-s0=fails")
    code, out, err = cmkit("bench", "small.toml", "--device", "cpu", "--jobs", "2")
    assert code == 2
    said = "ct-s0 failed: sample.images = 3: too few; the rest is done"
    assert err.splitlines()[-1] == f"error: {said}"
    assert "note: ct: 0 of 1 seeds; seed 0: sample.images = 3: too few" in out
    kept = files.unsealed(home / "runs" / "small" / "results.json")
    assert (kept["name"], len(kept["lines"])) == ("small", 1)
    monkeypatch.delenv("FATE")
    code, out, _ = cmkit("bench", "small.toml", "--device", "cpu", "--json")
    assert (code, json.loads(out)["schema"]) == (0, 1)
