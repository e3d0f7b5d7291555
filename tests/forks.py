"""Processes that need not import torch anew: forks of one Python that has done so."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
from multiprocessing import forkserver
from pathlib import Path

import pytest

PRELOAD = (
    "torch._dynamo",  # which the first optimizer imports
    "torch_fidelity",
    "matplotlib.pyplot",
    "cmkit.cli.display",
    "cmkit.report",
    "cmkit.runs",
    "cmkit.weights.pickles",
    "tests.forks",
)
CMKIT = "from cmkit.cli import main; main()"
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(list(PRELOAD))


class Fork:
    """A running `python -c code arguments`; its `process` can be signalled and killed.

    It imports nothing of PRELOAD anew, and PYTHONIOENCODING is the only variable of Python itself
    that counts.
    """

    def __init__(self, code: str, *arguments: object, cwd: Path, **environment: str):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
            forkserver.ensure_running()
        self._home = Path(tempfile.mkdtemp())
        self._files = [self._home / name for name in ("stdout", "stderr")]
        words = ["-c", *map(str, arguments)]
        call = code, words, cwd, {**os.environ, **environment}, self._files
        self.process = _FORKS.Process(target=_carry_out, args=call, daemon=True)
        self.process.start()

    def wait(self, seconds: float = 300) -> subprocess.CompletedProcess[str]:
        """What it left behind; killed and TimeoutError if it does not end."""
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.process.kill()
            raise TimeoutError(f"not done within {seconds} s")
        written = [file.read_text("utf-8") for file in self._files]
        shutil.rmtree(self._home)
        return subprocess.CompletedProcess(self.process.name, self.process.exitcode, *written)


def _carry_out(code, words, cwd, environment, files):
    missing = set(PRELOAD) - sys.modules.keys()
    assert not missing, f"the fork server could not import {missing}"
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    for number, file in enumerate(files, 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), number)
    encoding = environment.get("PYTHONIOENCODING", "utf-8")
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding=encoding, line_buffering=True)
    sys.argv = words
    exec(code, {"__name__": "__main__"})


def read_pickle(command, env, timeout, **_):
    """Stands for subprocess.run in cmkit.weights.pickles: a fork carries out its `main`."""
    assert command[:4] == [sys.executable, "-P", "-m", "cmkit.weights.pickles"]
    code = "import os; from cmkit.weights.pickles import main; code = main(*sys.argv[1:])"
    code = f"import sys; {code}; sys.stdout.flush(); os._exit(code)"
    done = Fork(code, *command[4:], cwd=Path.cwd(), **env).wait(timeout)
    done.stdout, done.stderr = done.stdout.encode(), done.stderr.encode()
    return done
