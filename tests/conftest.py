"""One thread: on a busy machine more are slower, and bits depend on their number."""

import os
import signal
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

from tests import wheels

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _no_stray_randomness():
    """Whoever draws from the global generator must not change what others see."""
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    """Features of references that a test stores are for this run of the tests only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def cmkit(monkeypatch, capsys, tmp_path):
    """Call the command line in a fresh folder; (exit code, stdout, stderr)."""
    from cmkit.cli import main

    monkeypatch.chdir(tmp_path)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["cmkit", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            main()
        out, err = capsys.readouterr()
        return caught.value.code, out, err

    yield call
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """The wheels of cmkit and of the packages beside it."""
    return wheels.build(tmp_path_factory.mktemp("wheels"))


@pytest.fixture(scope="session")
def installed(built, tmp_path_factory):
    """A clean environment in which pip has installed them."""
    environment = wheels.Environment(tmp_path_factory.mktemp("installed"))
    environment.install(*built)
    return environment
