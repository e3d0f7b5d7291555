"""One thread: on a busy machine more are slower, and bits depend on their number."""

import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from filelock import FileLock

from cmkit import device
from tests import forks, wheels

torch.set_num_threads(1)
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@pytest.fixture(autouse=True)
def _no_stray_randomness():
    """Whoever draws from the global generator must not change what others see."""
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    """What a test stores there is for this run of the tests only, and none depends on how fast this
    machine is: the times of both precisions are there, fp32 the faster."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(device, "_seconds", lambda name, _: {"fp32": 1.0, "bf16": 2.0}[name])
        device.auto_precision(torch.device("cpu"))
        yield


@pytest.fixture
def cmkit(monkeypatch, capsys, tmp_path):
    """Call the command line in a fresh folder; (exit code, stdout, stderr)."""
    from cmkit.cli import main

    monkeypatch.chdir(tmp_path)
    handlers = {number: signal.getsignal(number) for number in SIGNALS}

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["cmkit", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            main()
        out, err = capsys.readouterr()
        return caught.value.code, out, err

    yield call
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def forked_reader(monkeypatch):
    """Pickles are read in a fork, not in a new Python."""
    module = SimpleNamespace(run=forks.read_pickle, TimeoutExpired=TimeoutError)
    monkeypatch.setattr("cmkit.weights.pickles.subprocess", module)


@pytest.fixture(scope="session")
def shared(tmp_path_factory) -> Path:
    """A folder that all workers of pytest-xdist have in common."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@pytest.fixture(scope="session")
def built(shared) -> list[Path]:
    """The wheels of cmkit and of the packages beside it, built by the first worker that asks."""
    with FileLock(shared / "wheels.lock"):
        if not (shared / "wheels").exists():
            wheels.build(shared / "wheels.part")
            (shared / "wheels.part").rename(shared / "wheels")
    return sorted((shared / "wheels").glob("*.whl"))


@pytest.fixture(scope="session")
def installed(built, shared) -> wheels.Environment:
    """A clean environment in which pip has installed them."""
    with FileLock(shared / "installed.lock"):
        environment = wheels.Environment(shared / "installed")
        if not (shared / "installed.done").exists():
            environment.install(*built)
            (shared / "installed.done").touch()
    return environment


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """A test is marked for what its fixtures need."""
    for item in items:
        for fixture, mark in (("built", "wheels"), ("browser", "browser")):
            if fixture in item.fixturenames:
                item.add_marker(mark)
