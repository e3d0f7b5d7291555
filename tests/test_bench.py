"""Workers carry the cells of a suite out, each once, whatever becomes of workers and cells."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

from cmkit import BusyError, RecipeError, ResourceError, discover, files
from cmkit.errors import CheckpointError, Interrupted
from cmkit.stop import StopSignal
from cmkit.suite import work
from cmkit.suite.cells import cells
from cmkit.suite.pace import Pace
from cmkit.suite.suite import load_suite
from cmkit.suite.work import SuiteFolder, Worker, check_locks

BASE = """
name = "base"
dataset = { use = "digits" }
objective = { use = "ct", end_scales = 5, distance = "l2" }
sampler = { use = "multistep" }
sample = { images = 40, batch = 40, precision = "fp32", labels = "uniform" }
metric = [{ use = "digits_judge" }]
backbone = { use = "adm", channels = 8, channel_mult = [1], num_res_blocks = 1, norm_groups = 4 }
train = { steps = 4, batch = 8, precision = "fp32" }
"""
SUITE = """
name = "tiny"
base = "base.toml"
seeds = [0, 1]
[budget]
steps = 6
[axis.nfe]
1 = { sampler = { use = "multistep" } }
2 = { sampler = { use = "multistep", sigmas = [0.821] } }
[row.edm]
objective = { use = "edm" }
denoiser.precond = "edm"
axis.nfe = { 5 = { sampler = { use = "heun", steps = 3 } } }
[row.cd]
teacher = { row = "edm" }
objective = { use = "cd", num_sigmas = 8, distance = "l2" }
denoiser = { init = "teacher" }
[row.ct]
"""
STAND_IN = """
import os, pathlib, signal, sys, time
from cmkit.runs.folder import RunFolder
_, _, recipe, _, out, *_ = sys.argv
name = pathlib.Path(recipe).stem
said = dict(word.split("=") for word in os.environ.get("FATE", "").split())
fate = next((said[key] for key in said if name.startswith(key)), "")
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
folder = RunFolder(pathlib.Path(out) / name)
with folder.held():
    with open(pathlib.Path(out) / "begun", "a") as log:
        log.write(name + "\\n")
    time.sleep(0.05)
    if fate == "fails":
        print("error: sample.images = 3: too few", file=sys.stderr)
        sys.exit(2)
    if fate == "killed" or fate == "once" and not (folder.path / "again").exists():
        (folder.path / "again").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(30 if fate == "long" else 0)
    folder.keep_recipe(pathlib.Path(recipe).read_text())
    folder.keep_status({"train": {"result": {}}})
    folder.keep_report({"schema": 2, "stages": {}})
"""
"""Stands for `cmkit run`: it holds its folder, and ends as FATE says, without importing torch."""


@pytest.fixture
def suite(tmp_path, monkeypatch):
    """Worker(..) of a suite whose processes are stand-ins."""
    (tmp_path / "base.toml").write_text(BASE)
    (tmp_path / "tiny.toml").write_text(SUITE)
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    monkeypatch.setattr(work, "COMMAND", (sys.executable, str(tmp_path / "stand_in.py")))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    monkeypatch.setattr(work, "POLL", 0.02)
    monkeypatch.setattr(work, "LOOK", 0.1)
    found = cells(load_suite(tmp_path / "tiny.toml"), discover(), 100)
    folder = SuiteFolder(tmp_path / "runs")

    def worker(jobs=1):
        return Worker(found, folder, "cpu", StopSignal(), jobs)

    return worker


def begun(worker: Worker) -> list[str]:
    """The cells in the order in which processes were begun for them."""
    return (worker.folder.path / "begun").read_text().split()


def test_two_workers_at_once_do_each_cell_once_and_teachers_first(suite):
    workers = [suite(jobs=2), suite(jobs=2)]
    events = [[], []]
    threads = [
        threading.Thread(target=lambda i=i: events[i].extend(workers[i].work())) for i in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    order = begun(workers[0])
    assert Counter(order) == Counter([*workers[0].cells])
    for name, cell in workers[0].cells.items():
        assert all(order.index(need) < order.index(name) for need in cell.needs)
    for seen in events:
        assert [event.done for event in seen][-1] == len(order) == len(seen)
        assert not any(event.failed for event in seen)
    before = len(order)
    assert all("is finished" in event.text for event in suite().work())
    assert len(begun(workers[0])) == before


def test_a_cell_that_fails_is_a_line_and_the_rest_goes_on(suite, monkeypatch):
    monkeypatch.setenv("FATE", "edm-train-s0=fails")
    worker = suite(jobs=2)
    seen = list(worker.work())
    (failed,) = [event for event in seen if event.failed]
    assert "edm-train-s0: failed: sample.images = 3: too few; see " in failed.text
    assert failed.text.endswith("; with it edm-5-s0, cd-1-s0, cd-2-s0")
    lost = {cell.recipe.name for name, cell in worker.cells.items() if worker.ended[name]}
    assert lost == {"edm-train-s0", "edm-5-s0", "cd-1-s0", "cd-2-s0"}
    assert worker.folder.failure(failed.cell)["reason"] == "sample.images = 3: too few"
    monkeypatch.delenv("FATE")
    again = suite()
    assert not any(event.failed for event in again.work())
    assert Counter(begun(worker))[failed.cell.name] == 2
    assert again.folder.failure(failed.cell) is None


def test_a_cell_whose_report_is_damaged_is_a_line_and_the_rest_goes_on(suite):
    worker = suite(jobs=2)
    damaged = next(cell for cell in worker.cells.values() if cell.recipe.name == "ct-1-s0")
    folder = worker.folder.run(damaged)
    folder.path.mkdir(parents=True)
    folder.keep_status({"train": {"result": {}}})
    (folder.path / "report.json").write_text("{")
    (failed,) = [event for event in worker.work() if event.failed]
    assert "ct-1-s0: failed: " in failed.text
    assert "report.json: damaged" in failed.text
    assert worker.folder.failure(damaged)["code"] == CheckpointError.exit_code
    assert [name for name, why in worker.ended.items() if why] == [damaged.name]


@pytest.mark.slow
def test_a_cell_that_a_signal_ends_is_begun_once_more(suite, monkeypatch):
    monkeypatch.setenv("FATE", "ct-1-s0=once ct-1-s1=killed")
    worker = suite()
    seen = list(worker.work())
    count = Counter(begun(worker))
    by_name = {cell.recipe.name: name for name, cell in worker.cells.items()}
    assert count[by_name["ct-1-s0"]] == count[by_name["ct-1-s1"]] == 2
    (failed,) = [event.text for event in seen if event.failed]
    assert "ct-1-s1: failed: killed by SIGKILL, 2 times" in failed


@pytest.mark.slow
def test_a_worker_that_is_stopped_lets_its_cells_save_and_goes_on(suite, monkeypatch):
    monkeypatch.setenv("FATE", "cd-1-s0=long")
    worker = suite()
    working = worker.work()
    next(event for event in working if event.cell.recipe.name == "edm-5-s1")
    threading.Timer(0.5, worker.stop._received, (signal.SIGTERM, None)).start()
    with pytest.raises(Interrupted, match=r"SIGTERM: \d of 12 cells are finished") as caught:
        list(working)
    assert caught.value.exit_code == 143
    assert not worker.running
    monkeypatch.delenv("FATE")
    seen = list(suite().work())
    assert [event.done for event in seen] == list(range(1, 13))
    assert not any(event.failed for event in seen)


def test_the_cell_of_a_worker_that_was_killed_is_not_begun_again(suite, monkeypatch):
    """Its process holds the lock that the worker took for it."""
    worker = suite()
    cell = worker.cells[next(iter(worker.cells))]
    monkeypatch.setenv("FATE", f"{cell.name}=long")
    worker._begin(cell)
    (running,) = worker.running
    try:
        with pytest.raises(BusyError), worker.folder.run(cell).held():
            pass
        deadline = time.monotonic() + 30
        while not (worker.folder.path / "begun").exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        other = suite()
        other._begin(cell)
        assert not other.running
    finally:
        running.process.kill()
        running.process.wait()
    with worker.folder.run(cell).held():
        pass


def test_file_systems_without_locks_are_refused(tmp_path, monkeypatch):
    check_locks(tmp_path)
    with files.lock(tmp_path / ".locks"):
        check_locks(tmp_path)  # another worker holds it
    monkeypatch.setattr(work, "TRY", "pass")
    with pytest.raises(ResourceError, match="locks do not hold on this file system"):
        check_locks(tmp_path)


OWN = """
import os, sys
from pathlib import Path
from cmkit import files
folder = Path(sys.argv[1])
with files.lock(folder) as handle:
    print(os.path.samestat(os.fstat(handle), (folder / ".lock").stat()))
"""


def test_an_inherited_lock_is_of_its_own_folder_only(tmp_path, monkeypatch):
    with files.lock(tmp_path / "a") as handle:
        for name in "ab":
            done = subprocess.run(
                [sys.executable, "-c", OWN, tmp_path / name],
                pass_fds=[handle],
                env={**os.environ, files.INHERITED: str(handle)},
                capture_output=True,
                text=True,
            )
            assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr
        for odd in ("", "x", "-1", "999999"):
            monkeypatch.setenv(files.INHERITED, odd)
            with pytest.raises(BusyError), files.lock(tmp_path / "a"):
                pass


@pytest.mark.slow
def test_a_step_is_timed_once_for_all_workers_and_all_starts(suite, tmp_path, monkeypatch):
    """With weights that are drawn, as the teacher is yet to be trained."""
    (cell, *_) = (c for c in suite().cells.values() if c.row == "cd")
    place = tmp_path / "seconds.json"
    found = Pace(place, discover(), torch.device("cpu"), 1)(cell.recipe)
    assert 0 < found < 10
    monkeypatch.setattr(Pace, "_measured", lambda *_: 1 / 0)
    assert Pace(place, discover(), torch.device("cpu"), 1)(cell.recipe) == found
    with pytest.raises(RecipeError, match="one cell at a time on a device"):
        Pace(place, discover(), torch.device("cpu"), 2)


def test_gpus_and_cores_are_shared_out(suite, monkeypatch):
    worker = suite(jobs=2)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8))
    assert worker._environment(1) == {"OMP_NUM_THREADS": "4"}
    worker.device = "cuda"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    assert [worker._environment(k)["CUDA_VISIBLE_DEVICES"] for k in range(2)] == ["4", "7"]
    assert suite()._environment(0) == {}


@pytest.mark.slow
def test_a_suite_is_run_told_and_done_once(cmkit, tmp_path, monkeypatch):
    """By processes of `cmkit run`, in the suite's own folder."""
    (tmp_path / "base.toml").write_text(BASE.replace("digits_judge", "fidelity"))
    text = SUITE.replace("seeds = [0, 1]", 'seeds = [0]\nbaseline = "edm"').replace(
        "[row.ct]\n", ""
    )
    (tmp_path / "tiny.toml").write_text(text)
    code, out, err = cmkit("bench", "tiny.toml", "--jobs", 2, "--device", "cpu", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert [line["row"] for line in found["lines"]] == ["edm", "cd", "cd"]
    assert found["lines"][1]["facts"]["training"]["evaluations"] == 6 * 8 * 6
    assert "fid" in found["lines"][1]["verdicts"]
    home = tmp_path / "runs" / "tiny"
    one, two = (home / Path(line["runs"]["0"]).name for line in found["lines"][1:])
    assert (one / "model.safetensors").samefile(two / "model.safetensors")
    assert (home / "suite.html").is_file()
    monkeypatch.setattr(work, "COMMAND", ("false",))  # no process is begun for what is finished
    assert cmkit("bench", "tiny.toml", "--device", "cpu")[0] == 0
    code, out, err = cmkit("compare", "runs/tiny", "--sort", "fid", "--format", "csv")
    assert code == 0, err
    assert len(out.splitlines()) > 3
