"""A fork server that crashes a toy training loop at every call that changes its run folder.

Run with the shim preloaded: torch is imported once, and each point costs two forks, one that is
spoiled at call N and one that resumes. Reads requests {"mutant", "mode", "first", "every"} from
stdin, a JSON line each, and answers with a JSON line.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import torch
from safetensors.torch import save

from cmkit import checkpoint, files, tensors
from cmkit.errors import CmkitError

STEPS, EVERY, KEEP = 6, 2, 1


def train(run: Path, acked: Path) -> tuple[int, str]:
    """(step resumed from, hash of the final weights): what a trainer does, on 24 numbers."""
    with files.lock(run):
        found = checkpoint.latest_checkpoint(run / "checkpoints", warn=lambda message: None)
        start = found.step if found else 0
        weights, momentum = torch.linspace(-1, 1, 24).view(4, 6), torch.zeros(4, 6)
        if found:
            weights = found.tensors("online")["weights"].clone()
            momentum = found.tensors("optimizer")["momentum"].clone()
        files.truncate_jsonl(run / "log.jsonl", lambda record: record["step"] <= start)
        for step in range(start + 1, STEPS + 1):
            momentum.mul_(0.9).add_(torch.sin(weights * step))
            weights.sub_(0.1 * momentum)
            save = step % EVERY == 0
            record = {"step": step, "loss": weights.square().mean().item()}
            files.append_jsonl(run / "log.jsonl", record, durable=save)
            if save:
                tensors = {"online": {"weights": weights}, "optimizer": {"momentum": momentum}}
                checkpoint.save_checkpoint(run / "checkpoints", step, tensors, {}, keep=KEEP)
                acked.write_text(str(step))
        digest = hashlib.sha256(weights.numpy().tobytes()).hexdigest()
        files.atomic_write(run / "result.txt", digest)
        return start, digest


def no_fsync() -> None:
    os.fsync = lambda handle: None


def files_not_fsynced() -> None:
    real = os.fsync
    os.fsync = lambda handle: real(handle) if Path(f"/proc/self/fd/{handle}").is_dir() else None


def folders_not_fsynced() -> None:
    files.sync_folder = lambda folder: None


def overwrite_in_place() -> None:
    def overwrite(root: Path, step: int, tensors: dict, state: dict, keep: int) -> None:
        final = root / f"step-{step:08d}"
        for _, older in checkpoint._steps(root):
            os.rename(older, final)
        final.mkdir(parents=True, exist_ok=True)
        digests = {}
        for name, group in tensors.items():
            digests[f"{name}.safetensors"] = put(final / f"{name}.safetensors", save(group))
        state = json.dumps({"step": step, "state": state}).encode()
        digests["state.json"] = put(final / "state.json", state)
        manifest = "".join(f"{digest}  {name}\n" for name, digest in digests.items())
        put(final / "SHA256SUMS", manifest.encode())
        files.sync_folder(final)
        files.sync_folder(root)

    def put(path: Path, data: bytes) -> str:
        with path.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        return hashlib.sha256(data).hexdigest()

    checkpoint.save_checkpoint = overwrite


def prune_before_write() -> None:
    real = checkpoint._stage_and_publish

    def publish(final: Path, *rest: object) -> None:
        for _, older in checkpoint._steps(final.parent):
            shutil.rmtree(older)
        real(final, *rest)

    checkpoint._stage_and_publish = publish


def manifest_first() -> None:
    """The manifest is a mere marker: written first, in place, and its hashes are not checked."""

    def publish(final: Path, groups: dict, text: bytes) -> None:
        final.mkdir()
        names = [*(f"{name}.safetensors" for name in groups), "state.json"]
        manifest = "".join(f"{0:064x}  {name}\n" for name in names)
        files.write_file(final / "SHA256SUMS", manifest.encode())
        files.write_file(final / "state.json", text)
        for name, group in groups.items():
            tensors.write_tensors(final / f"{name}.safetensors", group)
        files.sync_folder(final)

    checkpoint._stage_and_publish = publish
    files.sha256_of = lambda path: f"{0:064x}"


def no_staging() -> None:
    """atomic_write and save write straight to their final names; a torn one is not noticed."""
    checkpoint._stage_and_publish = lambda final, groups, text: (
        final.mkdir(exist_ok=True),
        checkpoint._stage(final, groups, text),
    )
    checkpoint.verify = lambda folder: None


def said_saved_too_early() -> None:
    real = checkpoint.save_checkpoint

    def save(root: Path, step: int, *rest: object, **keywords: object) -> None:
        (root.parent.parent / "acked").write_text(str(step))
        real(root, step, *rest, **keywords)

    checkpoint.save_checkpoint = save


def log_not_truncated() -> None:
    files.truncate_jsonl = lambda path, keep: None


MUTANTS = {
    mutant.__name__: mutant
    for mutant in (
        no_fsync,
        files_not_fsynced,
        folders_not_fsynced,
        overwrite_in_place,
        prune_before_write,
        manifest_first,
        no_staging,
        said_saved_too_early,
        log_not_truncated,
    )
}


class Judge:
    """Runs points below `base`, one at a time."""

    def __init__(self, base: Path):
        self.run, self.grave = base / "run", base / "grave"
        self.acked, self.report = base / "acked", base / "report"

    def reset(self) -> None:
        shutil.rmtree(self.run, ignore_errors=True)
        self.acked.write_text("0")

    def attempt(self, mutant: str | None, at: int, mode: str) -> tuple[int | str, dict]:
        """(exit code or "killed", report) of a training in a child, spoiled at call `at`."""
        shutil.rmtree(self.grave, ignore_errors=True)
        self.grave.mkdir()
        self.report.write_text("{}")
        child = os.fork()
        if child == 0:
            self._child(mutant, at, mode)
        status = os.waitpid(child, 0)[1]
        killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        ended = "killed" if killed else os.waitstatus_to_exitcode(status)
        return ended, json.loads(self.report.read_text())

    def _child(self, mutant: str | None, at: int, mode: str) -> None:
        code, report = 70, {}
        try:
            os.environ.update(
                CRASH_DIR=str(self.run),
                CRASH_GRAVE=str(self.grave),
                CRASH_AT=str(at),
                CRASH_MODE=mode,
            )
            if mutant:
                MUTANTS[mutant]()
            start, digest = train(self.run, self.acked)
            code, report = 0, {"start": start, "digest": digest}
        except CmkitError as error:
            code, report = error.exit_code, {"error": str(error)}
        except BaseException as error:
            report = {"error": repr(error)}
        finally:
            report["calls"] = ctypes.CDLL(None).crash_calls()
            self.report.write_text(json.dumps(report))
            os._exit(code)

    def temporaries(self) -> list[str]:
        return [str(path) for path in self.run.rglob(f"{files.TEMPORARY}*")]

    def matrix(self, mutant: str | None, mode: str, first: bool, every: int) -> dict:
        """Every point, or every second one, of a mode; its failures, or the first one alone."""
        self.reset()
        ended, whole = self.attempt(mutant, 0, "none")
        log = (self.run / "log.jsonl").read_bytes()
        counts: dict[str, int] = {}
        failures = []
        points = range(1, whole["calls"] + 1, every)
        for at in points:
            self.reset()
            ended, spoiled = self.attempt(mutant, at, mode)
            left = self.temporaries() if mode == "enospc" else []
            acked = int(self.acked.read_text())
            again, resumed = self.attempt(mutant, 0, "none")
            counts[str(ended)] = counts.get(str(ended), 0) + 1
            fit = [5] if mode in ("eio", "enospc") else ["killed"]
            verdicts = {"ended as it should": ended in fit, "resumes unaided": again == 0}
            if again == 0:
                verdicts |= {
                    "loses nothing acknowledged": resumed["start"] >= acked,
                    "same bits": resumed["digest"] == whole["digest"],
                    "same log": (self.run / "log.jsonl").read_bytes() == log,
                    "leaves no temporary": not (left or self.temporaries()),
                }
            broken = [name for name, held in verdicts.items() if not held]
            if broken:
                failures.append([at, broken, spoiled.get("error"), resumed.get("error")])
                if first:
                    break
        return {"points": len(points), "ended": counts, "failures": failures}


def main() -> None:
    torch.set_num_threads(1)
    judge = Judge(Path(sys.argv[1]))
    judge.reset()
    train(judge.run, judge.acked)  # imports and allocates whatever a first save does
    assert len(os.listdir("/proc/self/task")) == 1, "fork wants a single thread"
    for line in sys.stdin:
        print(json.dumps(judge.matrix(**json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
