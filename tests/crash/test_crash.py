"""A run that is spoiled at any call that changes its folder goes on as if nothing had happened."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow
HERE = Path(__file__).parent
MODES = ("die", "torn", "eio", "enospc", "lost", "zeroed", "undone", "mixed")
MUTANTS = {
    "no_fsync": ("lost", "resumes unaided"),
    "files_not_fsynced": ("zeroed", "resumes unaided"),
    "folders_not_fsynced": ("undone", "loses nothing acknowledged"),
    "overwrite_in_place": ("die", "resumes unaided"),
    "prune_before_write": ("die", "resumes unaided"),
    "manifest_first": ("torn", "resumes unaided"),
    "no_staging": ("die", "resumes unaided"),
    "said_saved_too_early": ("die", "loses nothing acknowledged"),
    "log_not_truncated": ("die", "same log"),
}


@pytest.fixture(scope="module")
def matrix(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., dict[str, Any]]]:
    base = tmp_path_factory.mktemp("crash")
    compiler = shutil.which("gcc")
    if compiler is None:
        pytest.fail("tests/crash needs gcc to compile shim.c: install gcc")
    shim = base / "shim.so"
    command = [compiler, "-O1", "-Wall", "-Werror", "-shared", "-fPIC", "-o", shim, HERE / "shim.c"]
    subprocess.run([*command, "-ldl"], check=True)
    server = subprocess.Popen(
        [sys.executable, HERE / "matrix.py", base],
        env={**os.environ, "LD_PRELOAD": str(shim), "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )

    def ask(mode: str, mutant: str | None = None, every: int = 1) -> dict[str, Any]:
        request = {"mutant": mutant, "mode": mode, "first": mutant is not None, "every": every}
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        return json.loads(server.stdout.readline())

    with server:
        yield ask
        server.stdin.close()


@pytest.mark.parametrize("mode", MODES)
def test_run_survives_a_fault_at_every_call(matrix: Callable[..., Any], mode: str) -> None:
    """Death at every call; the other faults at every second one."""
    found = matrix(mode, every=1 if mode == "die" else 2)
    assert found["failures"] == []
    assert found["points"] > 40
    assert found["ended"] == {"5" if mode in ("eio", "enospc") else "killed": found["points"]}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_matrix_catches_a_planted_bug(matrix: Callable[..., Any], mutant: str) -> None:
    mode, verdict = MUTANTS[mutant]
    [(_, broken, _, _)] = matrix(mode, mutant)["failures"]
    assert verdict in broken
