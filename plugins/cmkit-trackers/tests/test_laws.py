"""Every tracker keeps the laws of its kind, and tells each step once, whatever was killed."""

from __future__ import annotations

import os
import socket
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from cmkit_trackers.manifest import TRACKERS, cmkit_register
from cmkit_trackers.telling import Telling, flat

import cmkit
from cmkit import testing
from cmkit.pictures import grid_png

pytestmark = pytest.mark.filterwarnings("ignore")  # of the libraries
RECIPE = {"name": "toy", "train": {"lr": 1e-3, "ema": [0.999]}}
LOG = {"rate": 2.0, "images_per_second": 16.0, "lr": 1e-3}


@pytest.fixture(autouse=True)
def _alone(tmp_path, monkeypatch):
    """No network, in no thread, no key, and a home of its own."""
    tried = []

    def watched(self, address):
        away = self.family in (socket.AF_INET, socket.AF_INET6)
        if away and address[0] not in ("127.0.0.1", "::1", "localhost"):
            tried.append(address)
            raise OSError("no network")
        return connect(self, address)

    connect = socket.socket.connect
    monkeypatch.setattr(socket.socket, "connect", watched)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    for name in ("WANDB_API_KEY", "WANDB_MODE", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    for name in ("MLFLOW_DISABLE_TELEMETRY", "WANDB_ERROR_REPORTING"):
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    yield
    assert tried == []


def tracker(name, **options):
    module = import_module(f"cmkit_trackers.{name}_tracker")
    return getattr(module, TRACKERS[name][0])(**options)


def killed(started, picture):
    """Two starts of a run, the first killed at step 3, behind the checkpoint of step 2."""
    for first, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        listener = started()
        listener.on(cmkit.StageStarted("train", first, 4))
        for step in steps:
            listener.on(cmkit.Step(step, 4, {**LOG, "loss": 1 / step}))
            listener.on(cmkit.Scored(step, "kid_mean", 0.1 / step, best=True))
            if step % 2 == 0:
                listener.on(cmkit.Shown(step, picture))
        if first:
            listener.on(cmkit.StageFinished("metric", {"values": {"fid": 3.0}}))
        listener.close()


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run" / "trackers" / "own"
    folder.mkdir(parents=True)
    return cmkit.RunInfo("own-00000000", RECIPE, folder)  # no name of `check_tracker`


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "step-2.png"
    path.write_bytes(grid_png(torch.zeros(4, 1, 8, 8, dtype=torch.uint8), 2))
    return path


def test_a_kill_tells_no_step_twice_and_none_too_few(run, picture):
    told = []

    class Plain(Telling):
        def numbers(self, step, values):
            told.extend((step, name) for name in values if name != "train/rate")

        def picture(self, step, name, path):
            told.append((step, path.name))

        def close(self):
            told.append("closed")

    killed(lambda: Plain(run), picture)
    assert told.count("closed") == 2
    steps = [each for each in told if each != "closed"]
    assert len(steps) == len(set(steps))
    assert [step for step, name in steps if name == "train/loss"] == [1, 2, 3, 4]
    assert [step for step, name in steps if name == "score/kid_mean"] == [1, 2, 3, 4]
    assert [step for step, name in steps if name == picture.name] == [2, 4]
    assert (4, "metric/fid") in steps


def test_a_recipe_becomes_one_table():
    assert flat(RECIPE) == {"name": "toy", "train.lr": 1e-3, "train.ema": "[0.999]"}


def test_the_manifest_keeps_the_laws():
    testing.check_manifest(cmkit_register())


@pytest.mark.parametrize("name", TRACKERS)
def test_a_library_that_is_not_here_is_said_before_the_run_starts(name, monkeypatch):
    monkeypatch.setattr("cmkit_trackers.telling.find_spec", lambda library: None)
    cure = rf'tracker {name}: .* not installed; pip install "cmkit-trackers\[{name}\]"'
    with pytest.raises(cmkit.PluginError, match=cure):
        tracker(name).check()


@pytest.mark.parametrize("name", TRACKERS)
def test_it_keeps_the_laws_of_its_kind(name):
    if find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    testing.check_tracker(tracker(name))


def test_tensorboard_shows_each_step_once(run, picture):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    killed(lambda: tracker("tensorboard").start(run), picture)
    found = EventAccumulator(str(run.folder)).Reload()
    assert [event.step for event in found.Scalars("train/loss")] == [1, 2, 3, 4]
    assert [event.step for event in found.Scalars("score/kid_mean")] == [1, 2, 3, 4]
    assert [event.step for event in found.Images("shown")] == [2, 4]
    assert found.Scalars("metric/fid")[0].value == 3


def test_mlflow_has_one_run_with_each_step_once(run, picture):
    pytest.importorskip("mlflow")
    from mlflow import MlflowClient

    killed(lambda: tracker("mlflow").start(run), picture)
    client = MlflowClient(tracking_uri=f"sqlite:///{run.folder / 'mlflow.db'}")
    (experiment,) = client.search_experiments(filter_string="name = 'cmkit'")
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.status == "FINISHED"
    assert found.data.params["train.lr"] == "0.001"
    history = client.get_metric_history(found.info.run_id, "train/loss")
    assert [metric.step for metric in history] == [1, 2, 3, 4]
    assert [file.path for file in client.list_artifacts(found.info.run_id, "shown")]
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"


def test_wandb_writes_offline_runs_of_one_name(run, picture):
    pytest.importorskip("wandb")
    killed(lambda: tracker("wandb").start(run), picture)
    files = list((run.folder / "wandb").glob("offline-run-*/*.wandb"))
    assert {file.stem for file in files} == {f"run-{run.name}"}
    assert os.environ["WANDB_ERROR_REPORTING"] == "false"


def test_wandb_online_without_a_key_is_refused_and_asks_nobody(run):
    pytest.importorskip("wandb")
    with pytest.raises(cmkit.PluginError, match='no key; run `wandb login`, or say mode = "off'):
        tracker("wandb", mode="online").start(run)


def test_trackio_has_one_run_with_each_step_once(run, picture, capsys):
    pytest.importorskip("trackio")
    killed(lambda: tracker("trackio").start(run), picture)
    assert capsys.readouterr().out == ""
    from trackio.sqlite_storage import SQLiteStorage

    logs = SQLiteStorage.get_logs("cmkit", run.name)
    assert [log["step"] for log in logs if "train/loss" in log] == [1, 2, 3, 4]
    assert Path(run.folder).exists()
