"""Runs: the whole job small, killed and resumed, stopped by signals, in bad surroundings."""

import dataclasses
import hashlib
import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from cmkit_std.datasets.digits import Digits
from cmkit_std.metrics.fidelity import Fidelity
from cmkit_std.metrics.fidelity_meter import FidelityMeter

from cmkit import (
    BusyError,
    CheckpointError,
    DataError,
    Interrupted,
    NonFiniteError,
    discover,
)
from cmkit.checkpoint import latest_checkpoint, read_weights
from cmkit.files import lock, read_jsonl
from cmkit.plan import build, plan
from cmkit.recipe import load, with_values
from cmkit.runs import (
    RunFinished,
    RunFolder,
    Sampled,
    Saved,
    StageStarted,
    draw,
    drawn_from,
    run,
)
from cmkit.sample import Draws, SavedImages, sample, to_uint8
from cmkit.search import Cell, CellsDrawn, Scoring, best, interval, search, verdict
from cmkit.stop import StopSignal
from cmkit.tensors import load_weights
from cmkit.train import Step
from tests.forks import CMKIT, Fork

RECIPE = """\
name = "tiny"
seed = 3
dataset = { use = "digits" }
objective = { use = "ct", end_scales = 5, distance = "pseudo_huber" }
rescaler = { use = "global" }
sampler = { use = "multistep" }
sample = { images = 70, batch = 35, precision = "fp32" }
metric = [{ use = "fidelity" }, { use = "digits_judge" }]

[backbone]
use = "adm"
channels = 16
channel_mult = [1]
num_res_blocks = 1
attention_resolutions = [8]
num_head_channels = 8
norm_groups = 8
dropout = 0.1

[train]
steps = 6
batch = 8
lr = 1e-3
save_every = 2
log_every = 4
ema = [0.9, 0.5]
precision = "fp32"

[search]
images = 70
batch = 35
rerank = 2
rerank_images = 80
confirm_seeds = 2
precision = "fp32"
grid = { skip = [1.0, 1.5], emb = [0.5, 1.0] }
"""
CPU = torch.device("cpu")


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "tiny.toml"
    path.write_text(RECIPE)
    return path


def events(recipe, out, *overrides, stop=None):
    registry = discover()
    made = plan(load(recipe, overrides, registry))
    return run(made, registry, out, CPU, stop or StopSignal())


def finish(recipe, out, *overrides) -> tuple[Path, dict]:
    *_, last = events(recipe, out, *overrides)
    assert isinstance(last, RunFinished)
    return last.folder, last.report


def fingerprint(folder: Path) -> dict[str, str]:
    """SHA-256 of what a run is for: weights, optimizer, samples, cells, pictures."""
    wanted = [
        "model.safetensors",
        "checkpoints/*/*.safetensors",
        "samples/*",
        "search/*",
        "samples*.png",
    ]
    files = sorted(path for pattern in wanted for path in folder.glob(pattern))
    assert len(files) > 10
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def losses(folder: Path) -> dict[int, float]:
    return {record["step"]: record["loss"] for record in read_jsonl(folder / "log.jsonl")}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run, shared by the tests that only read it."""
    home = tmp_path_factory.mktemp("whole")
    (home / "tiny.toml").write_text(RECIPE)
    return finish(home / "tiny.toml", home / "runs")


def test_a_run_leaves_everything_that_it_promises(whole):
    folder, report = whole
    names = {path.name for path in folder.iterdir()}
    promised = "recipe.toml inputs.json starts.jsonl log.jsonl status.json report.json report.html"
    promised += " model.safetensors checkpoints search samples samples_before.png samples_after.png"
    assert {*promised.split(), "heatmap.png", "loss.png"} <= names
    assert RunFolder(folder).report() == report
    assert [r["step"] for r in read_jsonl(folder / "log.jsonl")] == [4, 6]
    confirm = report["stages"]["search"]["confirm"]
    assert len(confirm["plain"]["values"]) == len(confirm["rescaled"]["values"]) == 2
    assert len(report["stages"]["search"]["cells"]) == 4
    assert {"fid", "confident"} <= set(report["stages"]["metric"]["values"])
    assert any("Consistency Models" in reference for reference in report["citations"])
    assert len(SavedImages(sorted((folder / "samples").glob("*.npz")))) == 70


def test_a_finished_run_does_nothing_again(whole):
    folder, _ = whole
    before = {p: p.stat().st_mtime_ns for p in (folder / "samples").iterdir()}
    seen = list(events(folder / "recipe.toml", folder.parent))
    assert not any(isinstance(event, Step | Saved) for event in seen)
    assert seen[-1].folder == folder
    assert {p: p.stat().st_mtime_ns for p in (folder / "samples").iterdir()} == before


def test_a_run_that_was_killed_before_its_page_was_written_gets_it(whole, tmp_path):
    folder = tmp_path / whole[0].name
    shutil.copytree(whole[0], folder)
    (folder / "heatmap.png").unlink()
    (folder / "report.html").unlink()
    *_, note, last = events(folder / "recipe.toml", tmp_path)
    assert note.text == f"{folder / 'report.html'}: was missing, written now"
    assert last.folder == folder
    for name in ("heatmap.png", "report.html"):
        assert (folder / name).read_bytes() == (whole[0] / name).read_bytes()


CUTS = {
    "training, samples": """
        StageStarted:train Step:2 Step:3 Saved:4 Step:6 StageFinished:train StageStarted:search
        Sampled:35 Sampled:70 StageFinished:sample StageStarted:metric StageFinished:metric
    """,
    "search": """
        CellsDrawn:70 Cell:0 Cell:2 CellsDrawn:0 CellsDrawn:70 Cell:1 Cell:3
        StageStarted:rerank CellsDrawn:35 Cell:0 CellsDrawn:70 Cell:1
        StageStarted:confirm CellsDrawn:70 Comparison:0 Comparison:1 StageFinished:search
    """,
}
"""Where a run is cut, one place after another: kinds of events, and what each says first."""


@pytest.mark.slow
@pytest.mark.parametrize(
    "cuts",
    [pytest.param(CUTS[name], marks=pytest.mark.slow if name == "search" else ()) for name in CUTS],
    ids=CUTS,
)
def test_a_run_cut_again_and_again_ends_in_the_same_bits(whole, recipe, tmp_path, cuts):
    """The generator is dropped where a kill would end it; the file-level kills are in crash/."""
    for cut in cuts.split():
        running = events(recipe, tmp_path / "runs")
        places = (f"{type(e).__name__}:{next(iter(vars(e).values()))}" for e in running)
        assert cut in places, f"the resumed run has no {cut}"
        running.close()
    folder, _ = finish(recipe, tmp_path / "runs")
    assert fingerprint(folder) == fingerprint(whole[0])
    assert losses(folder) == losses(whole[0])


def test_the_weights_to_keep_are_the_first_average(whole):
    folder, _ = whole
    newest = latest_checkpoint(folder / "checkpoints", print)
    kept = read_weights(folder / "model.safetensors")
    for name, tensor in newest.tensors("ema-0.9").items():
        assert torch.equal(kept[name], tensor)
    assert any(not torch.equal(kept[n], t) for n, t in newest.tensors("online").items())


def test_the_samples_are_of_the_winner(whole):
    folder, report = whole
    made = plan(load(folder / "recipe.toml", [], discover()))
    denoiser = build(made, CPU).eval()
    load_weights(denoiser.network, read_weights(folder / "model.safetensors"), "model")
    best = {axis: report["stages"]["search"]["best"][axis] for axis in ("skip", "emb")}
    assert best != {"skip": 1.0, "emb": 1.0}  # else this test could not fail
    winner = denoiser.rescaled(with_values(made.recipe, best))
    options = (made.recipe.sampler, Draws(made.data, 3), range(70), 35, CPU, "fp32")
    expected = torch.cat([batch.images for batch in sample(winner, *options)])
    saved = SavedImages(sorted((folder / "samples").glob("*.npz")))
    assert torch.equal(torch.stack([saved[i] for i in range(70)]), expected)
    assert (folder / "samples_before.png").read_bytes() != (
        folder / "samples_after.png"
    ).read_bytes()


def test_a_search_hands_images_to_the_metric_as_they_are_drawn(recipe, monkeypatch):
    """35 at a time, as search.batch says; never all 70 of a cell at once."""
    sizes = set()
    add = FidelityMeter.add
    monkeypatch.setattr(FidelityMeter, "add", lambda self, x: sizes.add(len(x)) or add(self, x))
    monkeypatch.setattr(Fidelity, "measure", None)
    made = plan(load(recipe, [], discover()))
    reference = made.recipe.dataset.reference()
    scoring = Scoring(made, made.recipe.search, build(made, CPU), reference, CPU)
    found = list(search(scoring))
    assert len([event for event in found if isinstance(event, Cell)]) == 4
    assert sizes == {35}


@pytest.mark.parametrize("how", [pytest.param("kill", marks=pytest.mark.slow), "signal"])
def test_cells_that_were_being_drawn_go_on_from_there(whole, recipe, tmp_path, monkeypatch, how):
    """35 of 70 images of each cell of a row are drawn, and never again."""
    monkeypatch.setattr("cmkit.runs.job.SAVE_SECONDS", 0.0 if how == "kill" else 1e9)
    stop = StopSignal()
    for event in (running := events(recipe, tmp_path / "runs", stop=stop)):
        if isinstance(event, CellsDrawn) and how == "signal":
            stop.signum = signal.SIGTERM
            with pytest.raises(Interrupted, match="what is drawn so far is kept"):
                next(running)
            break
        if isinstance(event, CellsDrawn) and event.done:
            running.close()
            break
    monkeypatch.setattr("cmkit.runs.job.SAVE_SECONDS", 1e9)
    drawn = []
    add = FidelityMeter.add
    monkeypatch.setattr(FidelityMeter, "add", lambda self, x: drawn.append(len(x)) or add(self, x))
    seen = list(events(recipe, tmp_path / "runs"))
    halves = [event for event in seen if isinstance(event, CellsDrawn)]
    assert halves[0].done == halves[0].total // 2
    row = halves[0].total // 70
    batches = 4 * 2 + 2 * 3 + 2 * 2 * 2 + 2  # cells, finalists, comparisons, the last metric
    assert len(drawn) == batches - row
    assert fingerprint(seen[-1].folder) == fingerprint(whole[0])


@pytest.mark.slow
def test_a_search_that_is_stopped_again_as_it_goes_on_loses_nothing(whole, recipe, tmp_path):
    """The second stop comes before any image was added to what the first one left."""
    for seen in (lambda e: isinstance(e, CellsDrawn), lambda e: e == StageStarted("search", 0, 4)):
        stop = StopSignal()
        running = events(recipe, tmp_path / "runs", stop=stop)
        next(event for event in running if seen(event))
        stop.signum = signal.SIGTERM
        with pytest.raises(Interrupted):
            next(running)
    folder, _ = finish(recipe, tmp_path / "runs")
    assert fingerprint(folder) == fingerprint(whole[0])


@pytest.mark.parametrize("how", [pytest.param("kill", marks=pytest.mark.slow), "signal"])
def test_samples_that_are_drawn_are_never_drawn_again(whole, recipe, tmp_path, monkeypatch, how):
    monkeypatch.setattr("cmkit.runs.job.SAVE_SECONDS", 0.0 if how == "kill" else 1e9)
    stop, out = StopSignal(), tmp_path / "runs"
    running = events(recipe, out, stop=stop)
    next(event for event in running if isinstance(event, Sampled))
    if how == "signal":
        stop.signum = signal.SIGTERM
        with pytest.raises(Interrupted, match="35 of 70 samples are kept"):
            next(running)
    else:
        next(running)
        running.close()
    monkeypatch.setattr("cmkit.runs.job.SAVE_SECONDS", 1e9)
    (folder,) = out.iterdir()
    assert [path.name for path in (folder / "samples").iterdir()] == ["0000000.npz"]
    drawn = [event.done for event in events(recipe, out) if isinstance(event, Sampled)]
    assert drawn == [70]
    parts = [SavedImages(sorted((each / "samples").iterdir())) for each in (folder, whole[0])]
    assert torch.equal(*(torch.stack([saved[i] for i in range(70)]) for saved in parts))
    (folder / "status.json").unlink()
    (folder / "samples" / "0000000.npz").unlink()
    assert [e.done for e in events(recipe, out) if isinstance(e, Sampled)] == [35, 70]
    assert [path.name for path in (folder / "samples").iterdir()] == ["0000000.npz"]


def test_images_drawn_from_a_run_are_its_samples_and_it_stays_untouched(whole, tmp_path):
    folder, _ = whole
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    recipe = drawn_from(folder, [], discover(), 5)
    *_, last = draw(recipe, recipe.seed, [], tmp_path / "five.npz", CPU)
    saved = SavedImages(sorted((folder / "samples").glob("*.npz")))
    drawn = SavedImages([tmp_path / "five.npz"])
    assert torch.equal(torch.stack(list(drawn)), torch.stack([saved[i] for i in range(5)]))
    assert last.result["scales"] == whole[1]["stages"]["sample"]["scales"]
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_a_finished_run_draws_without_its_data(whole, tmp_path, monkeypatch):
    def gone(self):
        raise DataError("the data are gone")

    monkeypatch.setattr(Digits, "spec", gone)
    recipe = drawn_from(whole[0], [], discover(), 2)
    *_, last = draw(recipe, 0, [], tmp_path / "two.npz", CPU)
    assert last.result["images"] == 2


def test_the_winner_is_judged_on_noise_that_the_search_never_saw(whole):
    """As many images as in the search: on the same noise the unscaled score would come again."""
    search = whole[1]["stages"]["search"]
    (searched,) = [c["score"] for c in search["cells"] if (c["skip"], c["emb"]) == (1.0, 1.0)]
    fresh = search["confirm"]["plain"]["values"]
    assert len({searched, *fresh}) == 3


def test_data_survive_the_round_trip_through_floats():
    u = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(u.float() / 127.5 - 1), u)
    between = torch.tensor([0.4, 0.6, 99.6]) / 127.5 - 1
    assert to_uint8(between).tolist() == [0, 1, 100]  # rounded, not cut
    assert to_uint8(torch.tensor([-9.0, 9.0])).tolist() == [0, 255]


@pytest.mark.slow
def test_the_global_generator_changes_nothing(whole, recipe, tmp_path):
    torch.manual_seed(999)
    seen = []
    for event in events(recipe, tmp_path / "runs"):
        torch.rand(3)
        seen.append(event)
    assert fingerprint(seen[-1].folder) == fingerprint(whole[0])


@pytest.mark.slow
def test_accumulated_parts_see_the_same_images_as_one_batch(recipe, tmp_path):
    """Half a step's images in each part: the same data in the same order."""
    dataset = load(recipe, [], discover()).dataset
    whole_batches, parts = dataset.batches(8, 3, CPU), dataset.batches(4, 3, CPU, start=2)
    next(whole_batches)
    x0, cond = next(whole_batches)
    halves = [next(parts), next(parts)]
    assert torch.equal(x0, torch.cat([half[0] for half in halves]))
    assert torch.equal(cond.label, torch.cat([half[1].label for half in halves]))
    folder, _ = finish(recipe, tmp_path / "runs", "train.accumulate=2")
    assert (folder / "model.safetensors").exists()


def test_samples_do_not_depend_on_the_batch_size(recipe):
    made = plan(load(recipe, [], discover()))
    denoiser, draws = build(made, CPU).eval(), Draws(made.data, 5)
    drawn = [
        torch.cat(
            [
                b.images
                for b in sample(denoiser, made.recipe.sampler, draws, range(24), n, CPU, "fp32")
            ]
        )
        for n in (1, 7, 24)
    ]
    for other in drawn[1:]:
        assert (drawn[0].int() - other.int()).abs().max() <= 1


def test_a_stop_signal_saves_the_step_and_says_how_to_go_on(whole, recipe, tmp_path):
    stop = StopSignal()

    def stopped_at_step_3():
        for event in events(recipe, tmp_path / "runs", stop=stop):
            if isinstance(event, Step) and event.step == 3:
                stop.signum = signal.SIGTERM

    with pytest.raises(Interrupted, match="step 3 is saved") as caught:
        stopped_at_step_3()
    assert "run the same command again" in str(caught.value)
    assert caught.value.exit_code == 143
    resumed = list(events(recipe, tmp_path / "runs"))
    assert next(e.step for e in resumed if isinstance(e, Step)) == 4
    got, expected = fingerprint(resumed[-1].folder), fingerprint(whole[0])
    shared = {name for name in expected if "step-00000003" not in name and name in got}
    assert {n: got[n] for n in shared} == {n: expected[n] for n in shared}
    assert "model.safetensors" in shared


def test_a_held_folder_is_refused(recipe, tmp_path):
    next(running := events(recipe, tmp_path))
    running.close()
    (folder,) = tmp_path.glob("tiny-*")
    with lock(folder), pytest.raises(BusyError, match="in use by pid"):
        list(events(recipe, tmp_path))


def test_an_edited_recipe_in_the_folder_is_refused(recipe, tmp_path):
    running = events(recipe, tmp_path / "runs")
    next(running)
    running.close()
    (kept,) = (tmp_path / "runs").glob("*/recipe.toml")
    kept.write_text(kept.read_text().replace("seed = 3", "seed = 4"))
    with pytest.raises(CheckpointError, match="not the recipe that this folder is named after"):
        next(events(recipe, tmp_path / "runs"))


def test_a_loss_that_is_not_finite_stops_the_run_and_leaves_no_bad_checkpoint(
    recipe, tmp_path, monkeypatch
):
    from cmkit_std.objectives.ct import CT

    honest = CT.loss

    def poisoned(self, models, x0, cond, phase, rng):
        loss = honest(self, models, x0, cond, phase, rng)
        return loss * float("nan") if phase.step >= 3 else loss

    monkeypatch.setattr(CT, "loss", poisoned)
    with pytest.raises(NonFiniteError):
        finish(recipe, tmp_path / "runs")
    (root,) = (tmp_path / "runs").glob("*/checkpoints")
    assert [path.name for path in root.glob("step-*")] == ["step-00000002"]


@pytest.mark.slow
def test_samples_that_are_no_numbers_stop_a_run_but_only_blank_a_cell(
    recipe, tmp_path, monkeypatch
):
    from cmkit_std.rescalers.global_ import Global

    honest = Global.bind

    def poisoned(self, sites):
        scales = honest(self, sites)
        return lambda sigma: {
            k: v * (float("nan") if self.skip == 1.5 else 1) for k, v in scales(sigma).items()
        }

    monkeypatch.setattr(Global, "bind", poisoned)
    _, report = finish(recipe, tmp_path / "runs")
    scores = {(c["skip"], c["emb"]): c["score"] for c in report["stages"]["search"]["cells"]}
    assert scores[1.5, 1.0] is None
    assert scores[1.0, 1.0] is not None
    assert report["stages"]["search"]["best"]["skip"] == 1.0
    with pytest.raises(NonFiniteError, match="no cell has a finite score"):
        finish(recipe, tmp_path / "runs", "search.grid.skip=[1.5]")
    made = plan(load(recipe, ["rescaler.skip=1.5"], discover()))
    broken = build(made, CPU).eval().rescaled(made.recipe.rescaler)
    drawn = sample(broken, made.recipe.sampler, Draws(made.data, 5), range(9), 4, CPU, "fp32")
    with pytest.raises(NonFiniteError, match="images 0 to 3 hold NaN"):
        next(drawn)


def test_a_score_that_is_no_number_never_wins():
    cells = [{"score": None}, {"score": 3.0}, {"score": 2.0}]
    assert [cell["score"] for cell in best(cells, 2)] == [2.0, 3.0]
    with pytest.raises(NonFiniteError, match="no cell has a finite score"):
        best(cells[:1], 1)


def test_the_interval_is_students():
    found = interval([1.0, 2.0, 3.0, 4.0, 5.0])
    half = 2.7764451051977987 * (2.5**0.5) / 5**0.5
    assert found["mean"] == 3
    assert found["high"] - 3 == pytest.approx(half)
    assert 3 - found["low"] == pytest.approx(half)


def test_the_verdict_falls_whichever_way_it_must():
    base = [10.0, 10.1, 9.9]
    assert verdict("fid", base, [v - 2 for v in (10.0, 10.2, 9.9)]).startswith("Rescaling helps")
    assert verdict("fid", base, [v + 2 for v in (10.0, 10.2, 9.9)]).startswith("Rescaling harms")
    assert verdict("fid", base, [11.0, 9.0, 10.2]).startswith("No difference")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_a_signal_from_outside_ends_with_everything_saved(recipe, tmp_path, signum, code):
    endless = ["--set", "train.steps=100000", "--set", "train.log_every=1"]
    fork = Fork(CMKIT, "run", recipe, *endless, cwd=tmp_path)
    log = wait_for(tmp_path, "runs/*/log.jsonl", fork)
    os.kill(fork.process.pid, signum)
    done = fork.wait()
    assert done.returncode == code
    assert done.stdout == ""
    last = done.stderr.splitlines()[-1]
    assert "is saved in" in last
    assert "run the same command again" in last
    steps = [record["step"] for record in read_jsonl(log)]
    (newest,) = sorted(log.parent.glob("checkpoints/step-*"))[-1:]
    assert int(newest.name[5:]) == steps[-1]
    assert subprocess.run(["sha256sum", "-c", "--quiet", "SHA256SUMS"], cwd=newest).returncode == 0


@pytest.mark.slow
def test_kill_9_loses_at_most_the_steps_since_the_last_checkpoint(whole, recipe, tmp_path):
    fork = Fork(CMKIT, "run", recipe, cwd=tmp_path)
    wait_for(tmp_path, "runs/*/checkpoints/step-00000002", fork)
    fork.process.kill()
    assert fork.wait().returncode == -signal.SIGKILL
    again = Fork(CMKIT, "run", recipe, "--json", cwd=tmp_path).wait()
    assert again.returncode == 0, again.stderr
    report = json.loads(again.stdout)
    assert fingerprint(tmp_path / report["folder"]) == fingerprint(whole[0])


def wait_for(home: Path, pattern: str, fork: Fork) -> Path:
    """A folder, or a file that is not empty; where none appears the fork is killed."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and fork.process.is_alive():
        if found := [p for p in home.glob(pattern) if p.is_dir() or p.stat().st_size]:
            return found[0]
        time.sleep(0.02)
    fork.process.kill()
    raise AssertionError(f"{pattern} did not appear: {fork.wait()}")


def test_a_reference_that_metrics_cannot_use_stops_the_run_before_training(recipe, tmp_path):
    statistics = {"mu": np.zeros(7), "sigma": np.eye(7)}
    registry = discover()
    made = plan(load(recipe, [], registry))
    real = made.recipe.dataset.reference()
    other = dataclasses.replace(real, statistics=statistics)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(made.recipe.dataset), "reference", lambda self: other)
        with pytest.raises(DataError, match="7 features"):
            list(run(made, registry, tmp_path / "runs", CPU, StopSignal()))
    assert not list(tmp_path.glob("runs/*/checkpoints"))
