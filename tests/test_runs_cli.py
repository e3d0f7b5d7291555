"""Runs by name: listed, shown, removed, measured again; recipes listed and copied; completion."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cmkit import discover, files
from cmkit.errors import CheckpointError, RecipeError
from cmkit.plan import build, plan
from cmkit.recipe import load, run_name, shipped, stage_keys
from cmkit.runs.folder import RunFolder
from cmkit.runs.places import find_run
from cmkit.runs.removal import removal, remove
from cmkit.sample import Batch, npz
from cmkit.suite.differing import differing
from cmkit.suite.listing import bytes_of
from cmkit.tensors import save_weights

RECIPE = """
name = "NAME"
dataset = { use = "digits" }
backbone = { use = "adm", channels = 32, channel_mult = [1, 1] }
objective = { use = "ict" }
train = { steps = 20, batch = 16, lr = LR }
sampler = { use = "multistep" }
sample = { images = 40 }
metric = [{ use = "fidelity", fid = true }]
"""


def begun(name: str, lr: str = "1e-3", at: int = 0, extra: str = "") -> RunFolder:
    """What a run leaves that has only begun; `at` is the second at which it was."""
    file = Path(f"{name}.toml")
    file.write_text(RECIPE.replace("NAME", name).replace("LR", lr) + extra)
    recipe = load(file, [], discover())
    folder = RunFolder(Path("runs") / run_name(recipe))
    folder.path.mkdir(parents=True)
    folder.keep_recipe(recipe.toml())
    folder.keep_inputs({}, stage_keys(recipe))
    file.unlink()
    os.utime(folder.recipe, (at, at))
    return folder


def finish(
    folder: RunFolder, fid: float = 2.0, reference: str = "a" * 64, samples: bytes = b""
) -> RunFolder:
    """Leave what a finished run leaves, with 40 samples."""
    recipe = load(folder.recipe, [], discover())
    if not folder.weights.exists():
        folder.weights.write_bytes(bytes(50_000))
    images = torch.randint(0, 256, (40, 1, 8, 8), dtype=torch.uint8)
    folder.keep_samples(0, 40, samples or npz([Batch(0, images, None)]))
    record = {"numbers": ["fid"], "extractor": "digits", "images": 40, "reference": reference}
    results = {
        "train": {"line": "20 steps"},
        "sample": {"images": 40, "nfe": 1, "line": "40 images"},
        "metric": {"values": {"fid": fid}, "provenance": [record]},
    }
    keys = stage_keys(recipe)
    status = {
        name: {"result": {"seconds": 1.0, **result}, "key": keys[name]}
        for name, result in results.items()
    }
    folder.keep_status({k: {**v, "files": folder.digests(k)} for k, v in status.items()})
    report = {
        "schema": 2,
        "name": recipe.name,
        "hash": folder.path.name.rpartition("-")[2],
        "recipe": dict(recipe.resolved),
        "environment": {},
        "data": {"channels": 1, "resolution": 8, "num_classes": 10},
        "stages": {name: stage["result"] for name, stage in status.items()},
    }
    folder.keep_report(report)
    return folder


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working folder, with a cache of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CMKIT_RUNS", raising=False)
    return tmp_path


def test_a_run_is_found_by_its_name_by_how_it_begins_and_as_the_latest(here):
    a, b = begun("ct", "1e-3", 100), begun("ct", "2e-3", 200)
    other = begun("ct_long", at=300)
    assert find_run(a.path.name) == str(a.path)
    assert find_run(f"{a.path.name[:7]}@500:online") == f"{a.path}@500:online"
    assert find_run("ct@latest") == str(b.path)
    assert find_run("@latest:ema-0.9") == f"{other.path}:ema-0.9"
    assert find_run("ct_l") == find_run("run:ct_l") == str(other.path)
    with pytest.raises(RecipeError, match=f"2 runs are called so: {b.path.name}, {a.path.name}"):
        find_run("ct")
    shutil.rmtree(b.path)
    assert find_run("ct") == str(a.path)  # though ct_long begins so too
    Path("ct").mkdir()
    assert find_run("ct") is None  # a path goes first
    for text in ("nothing", "ct.toml", "hub:a/b", "runs/ct", "openai:ct_bedroom256"):
        assert find_run(text) is None
    with pytest.raises(CheckpointError, match=r"did you mean 'ct_long'"):
        find_run("run:ct_lnog")


def test_every_command_that_takes_a_run_takes_its_name_and_names_the_nearest(here, cmkit):
    finish(begun("digits", "1e-3", 100))
    for words in (
        ("sample", "dgits"),
        ("edit", "dgits", "a.png", "--task", "colorize"),
        ("export", "dgits", "out", "--to", "diffusers"),
        ("compare", "dgits"),
        ("verify", "dgits"),
        ("measure", "dgits"),
        ("runs", "show", "dgits"),
        ("runs", "rm", "dgits", "--yes"),
    ):
        code, out, err = cmkit(*words)
        assert (code in (2, 4), out) == (True, ""), words
        assert "did you mean 'digits'?" in err, words
    begun("digits", "2e-3", 200)
    for words in (("sample", "digits"), ("verify", "digits"), ("compare", "digits")):
        code, _, err = cmkit(*words)
        assert code == 2
        assert "digits@latest" in err
    code, out, _ = cmkit("verify", "digits@latest")
    assert code == 0
    assert "recipe.toml" in out


def test_differences_are_those_keys_that_are_not_equal_and_a_part_is_told_by_its_name():
    ict = {"objective": {"use": "ict", "end_scales": 80}, "train": {"lr": 0.1, "batch": 8}}
    other = {"objective": {"use": "ict", "end_scales": 20}, "train": {"lr": 0.2, "batch": 8}}
    cd = {"objective": {"use": "cd", "solver": "heun"}, "train": {"lr": 0.1, "batch": 8}}
    assert differing([ict, {**ict, "name": "another"}]) == [{}, {}]
    assert differing([ict, other]) == [
        {"objective.end_scales": "80", "train.lr": "0.1"},
        {"objective.end_scales": "20", "train.lr": "0.2"},
    ]
    assert differing([ict, cd]) == [{"objective": "ict"}, {"objective": "cd"}]
    fid, kid = [{"use": "fidelity", "kid": False}], [{"use": "fidelity", "kid": True}]
    assert differing([{"metric": fid}, {"metric": kid}, {"metric": kid}]) == [
        {"metric.kid": "false"},
        {"metric.kid": "true"},
        {"metric.kid": "true"},
    ]
    assert differing([{"metric": fid}, {"metric": [*fid, {"use": "judge"}]}, {}]) == [
        {"metric": "fidelity"},
        {"metric": "fidelity + judge"},
        {},
    ]


def test_the_table_tells_state_score_difference_size_and_age(here, cmkit):
    done = finish(begun("ct", "1e-3", 100), 2.5)
    stopped, running = begun("ct", "2e-3", 200), begun("ct", "3e-3", 300)
    stopped.checkpoint(10).mkdir(parents=True)
    damaged = begun("ct", "4e-3", 400)
    (damaged.path / "status.json").write_text("{")
    with running.held():
        code, out, _ = cmkit("runs", "--json")
    assert code == 0
    found = {one["name"]: one for one in json.loads(out)["runs"]}
    assert [*found] == [f.path.name for f in (damaged, running, stopped, done)]
    states = [(one["state"], one["at"]) for one in found.values()]
    assert states[1:] == [
        ("running", "training, step 0 of 20"),
        ("stopped", "training, step 10 of 20"),
        ("finished", ""),
    ]
    assert states[0][0] == "damaged"
    assert "status.json" in states[0][1]
    assert found[done.path.name]["scores"] == {"fid": 2.5}
    assert found[done.path.name]["differs"] == {"train.lr": "0.001"}
    assert found[done.path.name]["bytes"] > 50_000 > found[stopped.path.name]["bytes"]
    _, out, _ = cmkit("runs")
    assert "fid 2.50" in out
    assert "train.lr 0.001" in out
    assert "4 runs in runs" in out
    _, out, _ = cmkit("runs", "--sort", "size")
    assert out.splitlines()[1].startswith(done.path.name)
    finish(stopped, 1.5)
    _, out, _ = cmkit("runs", "--sort", "fid")
    assert [line.split()[0] for line in out.splitlines()[1:3]] == [
        stopped.path.name,
        done.path.name,
    ]
    code, _, err = cmkit("runs", "--sort", "fdi")
    assert (code, "did you mean 'fid'?" in err) == (2, True)


def test_a_run_is_shown_with_its_parts_weights_and_who_reads_it(here, cmkit):
    done = finish(begun("ct", at=100))
    done.checkpoint(20).mkdir(parents=True)
    reader = begun("next", at=200, extra=f'denoiser = {{ weights = "{done.path}" }}\n')
    code, out, _ = cmkit("runs", "show", "ct", "--json")
    assert code == 0
    found = json.loads(out)
    assert found["parts"]["objective"] == "ict"
    assert found["read_by"] == [str(reader.path)]
    name = done.path.name
    assert found["weights"] == [name, f"{name}:ema-0.999", f"{name}:online", f"{name}@20"]
    _, out, _ = cmkit("runs", "show", "ct")
    assert "reference aaaaaaaaaaaa.. (digits train)" in out


def test_a_run_that_is_held_or_that_others_read_is_not_removed(here, cmkit):
    teacher = finish(begun("edm", at=100))
    name = teacher.path.name
    weights = f'denoiser = {{ weights = "run:{name}@500" }}\n'
    reader = begun("reads", at=200, extra=weights)
    code, _, err = cmkit("runs", "rm", name, "--yes")
    assert code == 4
    assert str(reader.path) in err
    with teacher.held():
        code, _, err = cmkit("runs", "rm", name, reader.path, "--yes")
        assert code == 7
        assert "in use by pid" in err
    assert teacher.reported
    assert reader.recipe.exists()
    finish(reader)  # its training is finished, and needs its start no more
    assert cmkit("runs", "rm", name, "--yes")[0] == 0
    assert [path.name for path in Path("runs").iterdir()] == [reader.path.name]


def test_removal_asks_and_without_an_answer_removes_nothing(here, cmkit, monkeypatch):
    done = finish(begun("ct"))
    for answer, code in (("n\n", 1), ("\n", 1), ("", 2)):
        monkeypatch.setattr(sys, "stdin", io.StringIO(answer))
        found = cmkit("runs", "rm", "ct")
        assert found[0] == code
        assert str(done.path) in found[2]
        assert done.reported
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    assert cmkit("runs", "rm", "ct")[0] == 0
    assert [*Path("runs").iterdir()] == []


def test_removal_frees_what_no_other_run_uses_and_shared_files_stay(here, cmkit):
    a, b = finish(begun("ct", "1e-3", 100)), finish(begun("ct", "2e-3", 200))
    b.weights.unlink()
    os.link(a.weights, b.weights)
    stores = [files.cache_folder("latents") / name for name in ("own-1", "both-2")]
    for store in stores:
        store.mkdir(parents=True)
        (store / "000000.safetensors").write_bytes(bytes(9000))
    for folder, names in ((a, ["own-1", "both-2"]), (b, ["both-2"])):
        cache = {"result": {"folders": names}, "files": {}}
        folder.keep_status({"cache": cache, **folder.status()})
    left = {path.name for path in a.path.iterdir()}
    size, stays = bytes_of([a.path])
    assert size > stays >= 50_000
    code, out, _ = cmkit("runs", "rm", a.path, "--yes", "--json")
    assert code == 0
    found = json.loads(out)
    assert found["freed_bytes"] < 50_000
    assert found["caches"] == [str(stores[0])]
    assert [store.exists() for store in stores] == [False, True]
    assert b.weights.stat().st_size == 50_000
    assert left <= {path.name for path in b.path.iterdir()}


def test_a_run_is_there_whole_or_not_at_all_when_its_removal_is_killed(here, cmkit, monkeypatch):
    a, b = finish(begun("ct", "1e-3", 100)), finish(begun("ct", "2e-3", 200))
    deleted = shutil.rmtree

    def killed(path, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("cmkit.runs.removal.shutil.rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        list(remove(removal([a])))
    monkeypatch.setattr("cmkit.runs.removal.shutil.rmtree", deleted)
    assert not a.path.exists()
    (rest,) = Path("runs").glob(".tmp-cmkit-removed-*")
    assert (rest / "report.json").exists()
    assert len(json.loads(cmkit("runs", "--json")[1])["runs"]) == 1
    assert cmkit("runs", "rm", b.path.name, "--yes")[0] == 0
    assert [*Path("runs").iterdir()] == []


def test_compare_tells_what_differs_and_sorts_by_it(here, cmkit):
    for lr, fid in (("3e-3", 3.0), ("1e-3", 2.0), ("2e-3", 1.0)):
        finish(begun("ct", lr), fid)
    unfinished = begun("ct", "4e-3")
    every = sorted(str(path) for path in Path("runs").iterdir())
    code, out, _ = cmkit("compare", *every, "--sort", "train.lr")
    assert code == 0
    lines = out.splitlines()
    column = lines[0].split().index("train.lr")
    assert [line.split()[column] for line in lines[1:4]] == ["0.001", "0.002", "0.003"]
    assert f"note: {unfinished.path}: not finished, left out" in lines
    _, out, _ = cmkit("compare", *every, "--sort", "fid")
    assert [line.split()[column] for line in out.splitlines()[1:4]] == ["0.002", "0.001", "0.003"]


def test_numbers_beside_other_pictures_stand_apart_and_a_line_says_which(here, cmkit):
    a = finish(begun("ct", "1e-3"))
    b = finish(begun("ct", "2e-3"), reference="b" * 64)
    _, out, _ = cmkit("compare", a.path, b.path)
    assert out.splitlines()[0].split()[-3:] == ["fid", "fid", "(2)"]
    (note,) = [line for line in out.splitlines() if "reference differs" in line]
    assert "aaaaaaaaaaaa.. (digits train), bbbbbbbbbbbb.. (digits train)" in note
    assert "cmkit measure" in note


def test_no_metric_can_hide_what_cmkit_says_of_its_numbers():
    from cmkit import Reference
    from cmkit.measure import Images, measure
    from tests.test_testing import Mean

    class Hiding(Mean):
        def provenance(self):
            return {"reference": "another", "images": 9, "own": 1}

    images = Images(torch.zeros(4, 1, 2, 2, dtype=torch.uint8))
    _, (record,) = measure([Hiding()], images, lambda _: Reference(images, "its own"), None)
    assert (record["reference"], record["images"], record["own"]) == ("its own", 4, 1)


def test_reports_without_a_reference_are_alike_where_their_data_are(here, cmkit):
    """An earlier cmkit, or another program, wrote them."""
    runs = [finish(begun("ct", lr)) for lr in ("1e-3", "2e-3", "3e-3")]
    for run, split in zip(runs, ("train", "train", "test"), strict=True):
        report = run.report()
        del report["stages"]["metric"]["provenance"][0]["reference"]
        report["recipe"]["dataset"]["split"] = split
        run.keep_report(report)
    _, out, _ = cmkit("compare", *(run.path for run in runs), "--json")
    assert len(json.loads(out)["columns"]) == 2


def pictures(folder: Path, count: int = 70) -> Path:
    folder.mkdir()
    rng = np.random.default_rng(0)
    for k in range(count):
        pixels = rng.integers(0, 256, (8, 8), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{k:03d}.png")
    return folder


def test_a_finished_run_is_measured_beside_other_pictures_and_keeps_what_came_out(here, cmkit):
    done = finish(begun("ct"))
    status = (done.path / "status.json").read_bytes()
    own = cmkit("measure", "ct", "--json")
    other = cmkit("measure", "ct", "--data", pictures(here / "mine"), "--json")
    assert (own[0], other[0]) == (0, 0), other[2]
    (a,), (b,) = (json.loads(found[1])["measured"] for found in (own, other))
    assert a["images"] == b["images"] == 40
    assert a["provenance"][0]["reference"] != b["provenance"][0]["reference"]
    assert a["values"]["fid"] != b["values"]["fid"]
    assert b["data"] == {**b["data"], "use": "image_folder", "channels": 1, "resolution": 8}
    assert [r["values"] for r in done.measured()] == [a["values"], b["values"]]
    assert (done.path / "status.json").read_bytes() == status
    _, out, _ = cmkit("runs", "show", "ct")
    assert f"40 samples beside image_folder train {here / 'mine'}" in out
    assert cmkit("verify", "ct")[0] == 0
    for text in (
        "image_folder:mine",
        '{use="image_folder", path="mine", resolution=8, channels=1}',
    ):
        _, out, err = cmkit("measure", "ct", "--data", text, "--json")
        assert json.loads(out)["measured"][0]["values"] == b["values"], err


def test_images_that_are_drawn_anew_are_those_that_the_run_drew(here, cmkit):
    run = begun("ct")
    network = build(plan(load(run.recipe, [], discover())), torch.device("cpu")).network
    save_weights(run.weights, network.state_dict())
    finish(run)
    assert cmkit("sample", "ct", "-n", 40, "--out", "drawn.npz")[0] == 0
    finish(run, samples=Path("drawn.npz").read_bytes())
    found = [
        json.loads(cmkit("measure", "ct", *words, "--json")[1])["measured"][0]
        for words in ([], ["--set", "sample.batch=9"], ["-n", 41], ["-n", 39])
    ]
    assert [one["of"] for one in found] == [
        "40 samples",
        "40 images drawn anew",
        "41 images drawn anew",
        "39 samples",
    ]
    kept, again, more, fewer = (one["values"]["fid"] for one in found)
    assert again == pytest.approx(kept, rel=1e-9)
    assert len({kept, more, fewer}) == 3
    run.sample_files()[0].write_bytes(b"damaged")
    code, _, err = cmkit("measure", "ct")
    assert (code, "0000000.npz: damaged; restore it, or draw images anew: -n 40" in err) == (
        4,
        True,
    )
    said = json.loads(cmkit("measure", "ct", "-n", 40, "--json")[1])["measured"][0]
    assert said["values"]["fid"] == pytest.approx(kept, rel=1e-9)


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (["--data", "nowhere"], 2, "no such folder, and no data set"),
        (["--data", "digts"], 2, "did you mean 'digits'?"),
        (["--data", '{use="image_folder", path="mine", resolution=16}'], 3, "draws 1x8x8"),
        (["--data", "mine", "--set", "metric=[]"], 2, "has no metric"),
        (["--set", "metric.0.extractor=nothing"], 2, "nothing"),
    ],
)
def test_what_cannot_be_measured_is_one_line(here, cmkit, words, code, told):
    finish(begun("ct"))
    pictures(here / "mine", 3)
    found = cmkit("measure", "ct", *words)
    assert found[:2] == (code, ""), found
    assert told in found[2]


def test_recipes_are_listed_and_copied_and_a_misspelt_one_gets_the_nearest(here, cmkit):
    code, out, _ = cmkit("recipes", "--json")
    found = {one["name"]: one for one in json.loads(out)["recipes"]}
    assert code == 0
    assert [*found] == [*shipped()]
    assert all(one["about"] and one["needs"] for one in found.values())
    assert "digits_rescaled_ct" in cmkit("recipes")[1]
    assert cmkit("recipes", "copy", "digits_rescaled_ct")[0] == 0
    copy = Path("digits_rescaled_ct.toml").read_bytes()
    assert copy == shipped()["digits_rescaled_ct"].read_bytes()
    code, _, err = cmkit("recipes", "copy", "digits_rescaled_ct")
    assert (code, "exists already" in err) == (2, True)
    for words in (("run",), ("check",), ("recipes", "copy"), ("sample",)):
        code, out, err = cmkit(*words, "digits_rescald_ct")
        assert (code, out) == (2, "")
        assert "did you mean 'digits_rescaled_ct'?" in err
    code, _, err = cmkit("check", "ct_cat.toml")
    assert (code, "say its bare name" in err) == (2, True)
    assert "did you mean 'digits'?" in cmkit("bench", "digts")[2]


def completed(words: str) -> list[str]:
    """What bash is told to complete the last of these words by, without torch."""
    code = (
        "import sys; sys.argv[0] = 'cmkit'\n"
        "from cmkit.cli import main\n"
        "try: main()\n"
        "finally:\n"
        " print('torch' if 'torch' in sys.modules else 'no torch', file=sys.stderr)"
    )
    told = {"_CMKIT_COMPLETE": "complete_bash", "COMP_WORDS": words}
    told["COMP_CWORD"] = str(len(words.split(" ")) - 1)
    command = [sys.executable, "-c", code]
    environment = {**os.environ, **told, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.strip() == "no torch"
    return done.stdout.split()


def test_shells_complete_recipes_runs_and_parts_without_torch(here):
    run = begun("digits")
    Path("mine.toml").touch()
    assert completed("cmkit run digits_r") == ["digits_rescaled_ct"]
    assert completed("cmkit check mi") == ["mine.toml"]
    assert completed("cmkit verify dig") == ["digits", run.path.name]
    assert completed("cmkit runs rm digits@") == ["digits@latest"]
    assert completed("cmkit plugins show objective ic") == ["ict"]


def test_listing_runs_and_recipes_imports_no_torch(here):
    finish(begun("ct"))
    code = """
import sys
from cmkit.cli import main
for command in (["runs"], ["runs", "--sort", "fid"], ["runs", "show", "ct"], ["recipes"],
                ["recipes", "copy", "ct_cat"], ["compare", "ct"], ["runs", "rm", "ct", "--yes"]):
    sys.argv = ["cmkit", *command]
    try:
        main()
    except SystemExit as end:
        assert not end.code, command
    assert "torch" not in sys.modules, command
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_module_is_the_command(here):
    done = subprocess.run(
        [sys.executable, "-m", "cmkit", "runs"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert done.stdout.startswith("no runs in runs")
