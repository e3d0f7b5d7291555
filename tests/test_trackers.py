"""Trackers are told a run's events, and decide, break and hold up nothing."""

import csv
import time

import pytest
import torch

from cmkit import Interrupted, Plugin, PluginError, Tracker, hookimpl, testing
from cmkit.plan import plan
from cmkit.plugins import register
from cmkit.recipe import load, run_name, schema, stage_keys
from cmkit.runs import Note, RunFinished, Saved, run, telling
from cmkit.stop import StopSignal
from cmkit.train import Step

CPU = torch.device("cpu")
RECIPE = """\
name = "told"
dataset = { use = "invented", channels = 1, resolution = 8, images = 20 }
backbone = { use = "adm", channels = 8, channel_mult = [1], num_res_blocks = 1, norm_groups = 4 }
objective = { use = "ct", end_scales = 5, distance = "l2" }

[train]
steps = 6
batch = 4
save_every = 4
log_every = 1
precision = "fp32"
"""


class Toy(Tracker):
    """Does what a test wants."""

    fault: str = ""
    """What goes wrong."""

    def start(self, run):
        if self.fault == "start":
            raise OSError("no server")
        return ToyListener(run, self.fault)


class ToyListener:
    seen: list = []

    def __init__(self, run, fault):
        self.fault = fault
        self.seen.append(run)

    def on(self, event):
        if isinstance(event, Step):
            if self.fault == "on":
                raise SystemExit(3)
            if self.fault == "hang":
                time.sleep(60)
            if self.fault == "random":
                torch.rand(1)
        self.seen.append(event)

    def close(self):
        self.seen.append("closed")
        if self.fault == "close":
            raise OSError("it is gone")


@hookimpl
def cmkit_register():
    return [Plugin("tracker", "toy", "tests.test_trackers:Toy", "toy")]


@pytest.fixture
def registry(monkeypatch):
    from importlib.metadata import EntryPoint, entry_points

    entries = [*entry_points(group="cmkit"), EntryPoint("toy", "tests.test_trackers", "cmkit")]
    monkeypatch.setattr(ToyListener, "seen", [])
    return register(entries)


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "toy.toml"
    path.write_text(RECIPE)
    return path


def events(recipe, registry, *said, out="runs"):
    made = plan(load(recipe, said, registry))
    return run(made, registry, recipe.parent / out, CPU, StopSignal())


def finish(recipe, registry, *said, out="runs"):
    *seen, last = events(recipe, registry, *said, out=out)
    assert isinstance(last, RunFinished)
    return last.folder, [event.text for event in seen if isinstance(event, Note)]


def toy(fault=""):
    return f'tracker=[{{use="toy", fault="{fault}"}}]'


def test_a_tracker_is_told_the_run_and_what_happens_and_is_no_part_of_the_key(recipe, registry):
    folder, _ = finish(recipe, registry, toy())
    info, *told, last = ToyListener.seen
    assert (info.name, info.folder) == (folder.name, folder / "trackers" / "toy")
    assert info.folder.is_dir()
    assert info.recipe["train"]["steps"] == 6
    assert "tracker" not in info.recipe
    assert [event.step for event in told if isinstance(event, Step)] == [1, 2, 3, 4, 5, 6]
    assert last == "closed"
    plain, tracked = (load(recipe, said, registry) for said in ([], [toy()]))
    assert stage_keys(plain) == stage_keys(tracked)
    assert run_name(plain) == run_name(tracked)
    assert "tracker" in schema(registry)["properties"]


@pytest.mark.parametrize("fault", ["on", "close", "hang"])
def test_a_tracker_that_fails_is_left_with_one_note_and_changes_no_bit(
    recipe, registry, fault, monkeypatch
):
    monkeypatch.setattr(telling, "PATIENCE", 0.05 if fault == "hang" else 20)
    whole, _ = finish(recipe, registry, out="plain")
    folder, notes = finish(recipe, registry, toy(fault))
    (said,) = [note for note in notes if note.startswith("tracker ")]
    wanted = {"on": "SystemExit: 3", "close": "OSError: it is gone", "hang": "TimeoutError: no"}
    assert said.startswith(f"tracker toy: {wanted[fault]}")
    assert said.endswith("; the run goes on without it")
    weights = [path / "model.safetensors" for path in (whole, folder)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_a_run_that_is_stopped_ends_its_trackers_and_says_which_fail(recipe, registry):
    made, stop = plan(load(recipe, [toy("close")], registry)), StopSignal()
    going, seen = run(made, registry, recipe.parent / "runs", CPU, stop), []
    while not (seen and isinstance(seen[-1], Saved)):
        seen.append(next(going))
        stop.signum = 2 if isinstance(seen[-1], Step) else 0
    stop.signum = 2
    assert next(going) == Note("tracker toy: OSError: it is gone; the run goes on without it")
    assert ToyListener.seen[-1] == "closed"
    with pytest.raises(Interrupted):
        next(going)


def test_a_tracker_that_cannot_start_stops_the_run_before_it_trains(recipe, registry):
    with pytest.raises(PluginError, match=r"toy cannot be started: no server; mend it, or drop"):
        finish(recipe, registry, toy("start"))
    assert not list(recipe.parent.glob("runs/*/checkpoints"))


@pytest.mark.parametrize(("step", "kind"), [(3, Step), (4, Saved), (5, Step)])
def test_a_killed_run_leaves_each_step_once_in_a_csv_file(recipe, registry, step, kind):
    said = 'tracker=[{use="csv"}]'
    whole, _ = finish(recipe, registry, said)
    for event in (going := events(recipe, registry, said, out="killed")):
        if isinstance(event, kind) and event.step == step:
            going.close()
            break
    again, _ = finish(recipe, registry, said, out="killed")
    files = [folder / "trackers" / "csv" / "log.csv" for folder in (whole, again)]
    rows = [list(csv.DictReader(file.read_text().splitlines())) for file in files]
    timeless = [
        [row for row in table if row["name"] not in ("rate", "images_per_second")] for table in rows
    ]
    assert timeless[0] == timeless[1]
    losses = [row["step"] for row in rows[1] if row["name"] == "loss"]
    assert losses == ["1", "2", "3", "4", "5", "6"]
    assert {row["run"] for row in rows[1]} == {again.name}


def test_runs_share_a_csv_file_and_drop_their_own_rows_alone(tmp_path):
    from cmkit_std.trackers.csv import Rows

    from cmkit import Scored, StageStarted

    path = tmp_path / "all.csv"
    for run_ in ("one", "two"):
        rows = Rows(path, run_)
        for step in (1, 2, 3):
            rows.on(Step(step, 3, {"loss": step / 2}))
        rows.on(Scored(3, "fid", 1.5, best=True))
    with path.open("a") as file:
        file.write("two,4,lo")
    Rows(path, "two").on(StageStarted("train", 1, 3))
    left = [line.split(",")[:3] for line in path.read_text().splitlines()]
    one = [["one", str(step), "loss"] for step in (1, 2, 3)]
    assert left == [["run", "step", "name"], *one, ["one", "3", "fid"], ["two", "1", "loss"]]


def test_a_csv_file_that_is_another_table_is_left_alone(recipe, registry, tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(PluginError, match=r"mine\.csv is no table of run, step, name, value"):
        finish(recipe, registry, f'tracker=[{{use="csv", path="{path}"}}]')
    assert path.read_text() == "a,b\n1,2\n"


def test_the_check_finds_what_a_tracker_must_not_do(registry):
    testing.check_tracker(Toy())
    testing.check_tracker(registry.load("tracker", "csv")())
    with pytest.raises(testing.ProtocolError, match="global generators alone"):
        testing.check_tracker(Toy(fault="random"))
    with pytest.raises(testing.ProtocolError, match="it is closed; seen: OSError: it is gone"):
        testing.check_tracker(Toy(fault="close"))
    with pytest.raises(testing.ProtocolError, match="it starts, again in the same folder"):
        testing.check_tracker(Toy(fault="start"))
