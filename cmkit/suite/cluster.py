"""Workers of a suite as jobs of a cluster, by submitit (extra `slurm`)."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cmkit.errors import PluginError, RecipeError, ResourceError
from cmkit.runs.places import make_out


class Job:
    """A worker as submitit carries it out: the command `words`, in the folder `home`."""

    def __init__(self, words: Sequence[str], home: Path):
        self.words = list(words)
        self.home = home
        self.process: subprocess.Popen[bytes] | None = None

    def __call__(self) -> int:
        """Carry the command out; its exit code."""
        self.process = subprocess.Popen(self.words, cwd=self.home)
        return self.process.wait()

    def checkpoint(self) -> Any:
        """What submitit calls before a preemption: cells save what they have, and the job is
        submitted again."""
        import submitit

        if self.process:
            self.process.send_signal(signal.SIGTERM)
            self.process.wait()
        return submitit.helpers.DelayedSubmission(Job(self.words, self.home))


def submit(
    words: Sequence[str], folder: Path, workers: int, cluster: str, options: Mapping[str, str]
) -> list[Any]:
    """submitit's jobs of as many workers, one array job on Slurm; each is `cmkit bench` with the
    arguments `words`.

    `options` are those of submitit's AutoExecutor, such as timeout_min, gpus_per_node and
    slurm_partition. PluginError where submitit is not installed, RecipeError for an option that it
    does not know, ResourceError where it finds no such cluster.
    """
    try:
        import submitit
    except ImportError as error:
        raise PluginError(
            "--submit needs the package submitit; pip install 'cmkit[slurm]'"
        ) from error
    make_out(folder)
    try:
        executor = submitit.AutoExecutor(folder=folder / "jobs", cluster=cluster)
    except RuntimeError as error:
        raise ResourceError(
            f"--cluster {cluster}: {error}; submit from a machine of the cluster, or say --cluster"
            " local"
        ) from error
    values = {key: int(said) if said.isdecimal() else said for key, said in options.items()}
    try:
        executor.update_parameters(name="cmkit-bench", **values)
    except (NameError, TypeError, ValueError) as error:
        text = " ".join(str(error).split())
        raise RecipeError(f"--job: {text[:300]}") from error
    command = [sys.executable, "-m", "cmkit", "bench", *words]
    with executor.batch():
        jobs = [executor.submit(Job(command, Path.cwd())) for _ in range(workers)]
    return jobs
