"""Hostile and mistaken input: every fault is one line that names place, value and cure."""

from __future__ import annotations

import io
import json
import os
import pty
import random
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from cmkit_std.backbones.adm import ADM
from cmkit_std.datasets.image_folder import ImageFolder
from cmkit_std.metrics import stored
from safetensors.torch import load_file, save_file

import cmkit
from cmkit import CheckpointError, CmkitError, DataSpec, ResourceError, discover, files
from cmkit.checkpoint import verify as verify_checkpoint
from cmkit.cli import commands, entry
from cmkit.cli.display import Display
from cmkit.errors import printable
from cmkit.plan import plan
from cmkit.plugins import Plugin, Registry, Row
from cmkit.recipe import load
from cmkit.report.figures import picture_of
from cmkit.runs import Note, RunFolder, Sampled, StageStarted, draw, drawn_from, run
from cmkit.sample import Batch, SavedImages, npz
from cmkit.stop import StopSignal
from tests.forks import CMKIT, Fork
from tests.test_cli import refused
from tests.test_draw import OPTIONS, RECIPE, picture, written
from tests.test_run import RECIPE as RUN_RECIPE

ABSENT = {
    "cifar10": ('path = "none"', DataSpec(3, 32, 10)),
    "fashion_mnist": ('path = "none"', DataSpec(1, 32, 10)),
    "imagenet64": ('path = "none"', DataSpec(3, 64, 1000)),
    "lsun": ('path = "none", resolution = 16', DataSpec(3, 16)),
    "image_folder": ('path = "none", resolution = 8', DataSpec(3, 8)),
}
"""Data sets whose files are not there, and their shape, which their keys decide."""


@pytest.mark.parametrize(
    "dataset",
    ["image_folder", *(pytest.param(n, marks=pytest.mark.slow) for n in [*ABSENT][:-1])],
)
def test_a_model_is_drawn_from_without_the_data_that_it_was_trained_on(cmkit, tmp_path, dataset):
    keys, data = ABSENT[dataset]
    conditions = frozenset({"label"} if data.num_classes else ())
    half = data.resolution // 2
    network = ADM(**{**OPTIONS, "attention_resolutions": (half,)}).build(data, conditions)
    save_file(network.state_dict(), tmp_path / "random.safetensors")
    recipe = RECIPE.format(dataset=dataset, more=f", {keys}")
    (tmp_path / "random.toml").write_text(recipe.replace("ns = [4]", f"ns = [{half}]"))
    code, _, err = cmkit("sample", "random.toml", "-n", 1, "--out", "x.png", "--device", "cpu")
    assert code == 0, err
    assert (tmp_path / "x.png").is_file()


def test_a_model_of_unknown_classes_names_the_data_that_would_tell(cmkit, tmp_path):
    written(tmp_path, DataSpec(3, 8))
    dataset = 'dataset={use="image_folder", path="none", resolution=8, labels=true}'
    refused(cmkit("sample", "random.toml", "--set", dataset), 3, "dataset.path = 'none'")


@pytest.fixture
def promptly():
    """Fails a test that waits for a FIFO, or reads a device for ever."""

    def late(*_):
        raise AssertionError("still reading")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def no_file(path: Path, what: str) -> Path:
    """A `path` that is no regular file."""
    if what == "fifo":
        os.mkfifo(path)
    elif what == "folder":
        path.mkdir()
    else:
        path.symlink_to(what)
    return path


ODD = ("fifo", "folder", "/dev/zero", "/dev/full")


@pytest.mark.usefixtures("promptly")
@pytest.mark.parametrize(
    "what", [ODD[0], *(pytest.param(what, marks=pytest.mark.slow) for what in ODD[1:])]
)
def test_pictures_masks_and_references_that_are_no_files_are_refused(cmkit, tmp_path, what):
    recipe, odd = written(tmp_path, DataSpec(1, 8, 10), frozenset({"label"})), tmp_path / "odd"
    good = picture(tmp_path / "good" / "0.png")
    no_file(odd, what)
    edit = ("edit", recipe, "--label", 1, "--set", "sampler.use=multistep")
    refused(cmkit(*edit, odd, "--task", "superres"), 3, "odd", "not a regular file")
    inpaint = (*edit, good, "--task", "inpaint", "--mask", odd)
    refused(cmkit(*inpaint), 3, "odd", "not a regular file")
    for dataset in (
        'use="image_folder", path="good", resolution=8, channels=1, reference_npz="odd"',
        'use="lsun", resolution=8, reference_npz="odd"',
        'use="imagenet64", reference_npz="odd"',
    ):
        told = refused_text(cmkit("check", recipe, "--set", f"dataset={{{dataset}}}"), 3)
        assert "odd: not a regular file" in told
    if what != "folder":
        no_file(tmp_path / "good" / "1.png", what)
        dataset = 'dataset={use="image_folder", path="good", resolution=8, channels=1}'
        refused(cmkit("check", recipe, "--set", dataset), 3, "1.png", "no regular file")


def refused_text(result, code) -> str:
    refused(result, code)
    return result[2]


READERS = {
    "report.json": RunFolder.report,
    "status.json": RunFolder.status,
    "inputs.json": RunFolder.inputs,
    "starts.jsonl": RunFolder.starts,
    "log.jsonl": RunFolder.log,
    "search/cells.jsonl": lambda folder: folder.scores("cells"),
    "samples.jsonl": RunFolder.intact_samples,
    "samples/0000000.npz": lambda folder: SavedImages(folder.sample_files()),
    "cell.png": lambda folder: picture_of(folder, "cell.png", 100),
    "checkpoints/step-00000001/SHA256SUMS": lambda f: verify_checkpoint(f.checkpoint(1)),
}


@pytest.mark.usefixtures("promptly")
@pytest.mark.parametrize("what", ODD)
@pytest.mark.parametrize("name", READERS)
def test_files_of_a_run_that_are_no_files_are_refused(tmp_path, name, what):
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    no_file(path, what)
    if name == "cell.png" and not path.is_symlink():
        assert READERS[name](RunFolder(tmp_path))["src"] is None  # the page says that it is gone
        return
    with pytest.raises(CmkitError, match=re.escape(path.name)):
        READERS[name](RunFolder(tmp_path))


@pytest.mark.usefixtures("promptly")
def test_a_debug_log_that_nobody_reads_keeps_no_error_waiting(tmp_path):
    os.mkfifo(tmp_path / "debug.log")
    try:
        raise ValueError
    except ValueError:
        assert not entry._write_debug_log(tmp_path / "debug.log")


LINKS = {
    "itself": ("pictures/a/loop", "loop"),
    "its folder": ("pictures/a/loop", "."),
    "the folder above": ("pictures/a/loop", ".."),
    "each other": ("pictures/a/loop", "../b"),
    "nothing": ("pictures/a/loop", "none"),
}


@pytest.mark.parametrize("labels", ["true", "false"])
@pytest.mark.parametrize("link", LINKS)
def test_links_that_lead_nowhere_or_in_circles_are_one_line(cmkit, tmp_path, link, labels):
    recipe = written(tmp_path, DataSpec(1, 8, 10), frozenset({"label"}))
    for name in "ab":
        (tmp_path / "pictures" / name).mkdir(parents=True)
        picture(tmp_path / "pictures" / name / "0.png")
    path, target = LINKS[link]
    (tmp_path / path).symlink_to(target)
    if link == "each other":
        (tmp_path / "pictures/b/loop").symlink_to("../a")
    keys = f'path="pictures", resolution=8, channels=1, labels={labels}'
    dataset = f'dataset={{use="image_folder", {keys}}}'
    refused(cmkit("check", recipe, "--set", dataset), 3, "loop", "remove it")


def test_a_class_may_be_a_link_to_a_folder_elsewhere(tmp_path):
    picture(tmp_path / "elsewhere" / "0.png")
    (tmp_path / "pictures").mkdir()
    for name in "ab":
        (tmp_path / "pictures" / name).symlink_to("../elsewhere")
    data = ImageFolder(path=str(tmp_path / "pictures"), resolution=8, channels=1, labels=True)
    assert data.spec() == DataSpec(1, 8, 2, ("a", "b"), (1, 1))


def damaged(data: bytes, seed: int) -> bytes:
    """A file cut, overwritten, or with flipped bits."""
    rng = random.Random(seed)
    start = rng.randrange(len(data))
    match seed % 4:
        case 0:
            return data[:start]
        case 1:
            return data[:start] + rng.randbytes(rng.randrange(1, 64)) + data[start:]
        case 2:
            return data[:start] + bytes(min(64, len(data) - start)) + data[start + 64 :]
    return data[:start] + bytes([data[start] ^ (1 << rng.randrange(8))]) + data[start + 1 :]


def test_damaged_samples_are_refused_or_read_as_they_were(tmp_path):
    """A zip has bytes on which nothing depends: what is read at all is what was written."""
    images = torch.arange(5 * 64, dtype=torch.uint8).view(5, 1, 8, 8)
    whole = npz([Batch(0, images, torch.arange(5))])
    file, refusals = tmp_path / "0000000.npz", 0
    for seed in range(400):
        file.write_bytes(damaged(whole, seed))
        try:
            found = SavedImages([file])
            read = torch.stack([found[k] for k in range(len(found))])
        except CheckpointError:
            refusals += 1
        else:
            assert torch.equal(read, images)
    assert refusals > 200


ODD_ARRAYS = {
    "grey": np.zeros((2, 8, 8), np.uint8),
    "floats": np.zeros((2, 8, 8, 1)),
    "objects": np.array([{}] * 2, object),
    "a number": np.uint8(3),
    "none": np.zeros((0, 8, 8, 1), np.uint8),
}


@pytest.mark.parametrize("array", ODD_ARRAYS)
def test_samples_that_are_no_images_are_refused(tmp_path, array):
    np.savez(tmp_path / "0000000.npz", ODD_ARRAYS[array])
    with pytest.raises(CheckpointError, match="arr_0"):
        SavedImages([tmp_path / "0000000.npz"])


EVIL = {
    "escape": "\x1b[2J\x1b]0;owned\x07",
    "right to left": "a\u202egnp.exe",
    "return": "good\rbad",
    "line": "good\nerror: bad",
    "C1": "\x9b31m",
    "separator": "a\u2028b",
    "not UTF-8": "caf\udce9",
    "delete": "a\x7fb",
}
"""Names that would steer a terminal, or that it could not be given."""


def harmless(text: str) -> bool:
    return all(c.isprintable() or c == "\n" for c in text)


FEW = ("escape", "not UTF-8")


@pytest.mark.parametrize(
    "name",
    [pytest.param(v, id=k, marks=[pytest.mark.slow] * (k not in FEW)) for k, v in EVIL.items()],
)
def test_foreign_names_cannot_steer_the_terminal(cmkit, tmp_path, name):
    """In errors, in results, in tables and in notes; a JSON document keeps what it says."""
    recipe = written(tmp_path, DataSpec(1, 8, 10), frozenset({"label"}))
    (tmp_path / f"{name}.toml").write_text("x = [")
    code, out, err = cmkit("check", f"{name}.toml")
    assert (code, out) == (2, "")
    assert harmless(err)
    assert err.count("\n") == 1
    where = ("--out", f"{name}.png", "--device", "cpu")
    code, out, err = cmkit("sample", recipe, "-n", 1, *where)
    assert code == 0
    assert harmless(out + err)
    assert out.count("\n") == 1
    code, out, err = cmkit("sample", recipe, "-n", 1, *where[:1], f"b{name}.png", "--json")
    assert harmless(out + err)
    assert json.loads(out)["out"] == f"b{name}.png"


@pytest.mark.parametrize("name", EVIL.values(), ids=list(EVIL))
def test_what_plugins_and_runs_say_cannot_steer_the_terminal(capsys, monkeypatch, name):
    row = Row("objective", name, name, "1", Plugin("objective", name, "a:B", name))
    monkeypatch.setattr("cmkit.plugins.discover", lambda: Registry([row]))
    commands.app(["plugins"], standalone_mode=False)
    with Display(None) as display:
        display.show(Note(name))
        display.show(StageStarted(name, 0, 1))
        display.show(Sampled(1, 1))
    out, err = capsys.readouterr()
    assert harmless(out + err)
    assert out.count("\n") == 2
    assert err.count("\n") == 2


def test_text_beyond_the_encoding_of_the_terminal_is_escaped():
    assert printable("ünï ✓", "ascii") == "\\xfcn\\xef \\u2713"
    assert printable("ünï ✓", "utf-8") == "ünï ✓"


LONG = {
    "recipe": ("check", "x" * 5000),
    "recipe.toml": ("check", "x" * 5000 + ".toml"),
    "out": ("run", "RECIPE", "--out", "x" * 5000),
    "folders": ("run", "RECIPE", "--out", "x/" * 5000),
    "picture": ("sample", "RECIPE", "--out", "x" * 5000 + ".png"),
    "run": ("sample", "x" * 5000),
    "run by name": ("sample", "run:" + "x" * 5000),
    "step": ("sample", "x@" + "1" * 5000),
    "weights": ("check", "RECIPE", "--set", "denoiser.weights=" + "x" * 5000),
    "data": ("check", "RECIPE", "--set", f'dataset={{use="cifar10", path="{"x" * 5000}"}}'),
    "compared": ("compare", "x" * 5000),
    "verified": ("verify", "x" * 5000),
    "converted": ("convert", "x" * 5000, "y", "--to", "cmkit"),
    "edited": ("edit", "RECIPE", "x" * 5000, "--task", "superres", "--label", "1"),
    "package": ("new", "sampler", "a", "--out", "x" * 5000),
    "from": ("run", "RECIPE", "--from", "x" * 5000),
    "index": ("check", "RECIPE", "--set", "metric." + "1" * 5000 + ".fid=true"),
    "label": ("sample", "RECIPE", "--label", "1" * 5000),
    "seed": ("sample", "RECIPE", "--seed", "1" * 5000),
    "steps": ("check", "RECIPE", "--set", "train.steps=" + "1" * 5000),
    "device": ("check", "RECIPE", "--device", "x" * 5000),
    "kind": ("plugins", "show", "x" * 5000, "y"),
    "null": ("check", "RECIPE", "--set", 'denoiser.weights="a\\u0000b"'),
    "null out": ("check", "RECIPE", "--set", 'dataset={use="lsun", resolution=8, path="\\u0000"}'),
}


@pytest.mark.parametrize("words", LONG.values(), ids=list(LONG))
def test_names_and_numbers_of_thousands_of_letters_are_one_line(cmkit, tmp_path, words):
    recipe = written(tmp_path, DataSpec(1, 8, 10), frozenset({"label"}))
    recipe.write_text(recipe.read_text() + 'metric = [{ use = "fidelity", fid = true }]\n')
    words = [recipe if word == "RECIPE" else word for word in words]
    code, out, err = cmkit(*words, *(("--device", "cpu") if words[0] in ("run", "sample") else ()))
    assert (code, out) != (0, "")
    assert code in (2, 3, 4, 5), err
    assert err.count("\n") == 1
    assert err.startswith("error: ")


@pytest.mark.parametrize("metrics", [1, 2])
def test_a_metric_is_named_without_its_index_where_there_is_one(cmkit, tmp_path, metrics):
    recipe = written(tmp_path, DataSpec(1, 8, 10), frozenset({"label"}))
    listed = ", ".join(['{ use = "fidelity", fid = true }', '{ use = "digits_judge" }'][:metrics])
    recipe.write_text(recipe.read_text() + f"metric = [{listed}]\n")
    said = cmkit("check", recipe, "--set", "metric.downlaod=true", "--device", "cpu")
    if metrics == 1:
        refused(said, 2, "--set metric.0.downlaod: unknown key; did you mean 'download'")
        change = ("--set", "metric.download=true", "--device", "cpu")
        assert cmkit("check", recipe, *change)[0] == 0
    else:
        refused(said, 2, "not an index from 0 to 1", "metric.0.downlaod")
        assert cmkit("check", recipe, "--set", "metric.0.download=true")[0] == 0


def test_one_more_metric_is_added_by_the_next_index(tmp_path):
    (tmp_path / "tiny.toml").write_text(RUN_RECIPE)
    count = len(load(tmp_path / "tiny.toml", [], discover()).metric)
    said = f'metric.{count}={{use="digits_judge"}}'
    assert len(load(tmp_path / "tiny.toml", [said], discover()).metric) == count + 1
    for odd in (f"metric.{count}=3", f'metric.{count + 1}={{use="digits_judge"}}'):
        with pytest.raises(CmkitError, match=f"not an index from 0 to {count - 1}; say which"):
            load(tmp_path / "tiny.toml", [odd], discover())


EARLY = "from cmkit.cli import main; print('ready', flush=True); main()"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("signum", "delay"), [(signal.SIGINT, 0.05), (signal.SIGHUP, 0.5), (signal.SIGTERM, 2.0)]
)
def test_a_signal_in_the_first_seconds_is_one_line(tmp_path, signum, delay):
    """While modules are imported, while the plan is made, and when the run has begun."""
    (tmp_path / "tiny.toml").write_text(RUN_RECIPE.replace("steps = 6", "steps = 100000"))
    process = subprocess.Popen(
        [sys.executable, "-c", EARLY, "run", "tiny.toml"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    time.sleep(delay)
    process.send_signal(signum)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signum
    assert out == ""
    assert "Traceback" not in err
    last = err.splitlines()[-1]
    assert re.fullmatch(
        rf"(error: )?{signum.name}: (nothing was being written|.* saved in .*)", last
    )
    assert err.count("\n") == 1 or "saved in" in last


def test_nohup_keeps_a_run_from_hearing_of_the_terminals_end():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    others = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        StopSignal().listen()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
        for number, handler in others.items():
            signal.signal(number, handler)


@pytest.mark.slow
@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-", ">/dev/full"])
def test_a_closed_stream_is_silent(tmp_path, closed):
    """Whichever of the three streams is closed, and whatever there is to say."""
    told = {"plugins": 5 if "full" in closed else 0, "check none.toml": 2}
    for words, code in told.items():
        command = f'"{sys.executable}" -c "from cmkit.cli import main; main()" {words} {closed}'
        done = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == code, done.stderr
        assert "Traceback" not in done.stderr
        assert "Exception ignored" not in done.stderr
        if code and "2>" not in closed:
            assert done.stderr.startswith("error: ")
            assert done.stderr.count("\n") == 1


@pytest.mark.slow
def test_a_run_outlives_the_reader_of_its_log(tmp_path):
    (tmp_path / "tiny.toml").write_text(RUN_RECIPE)
    broken = "import os; r, w = os.pipe(); os.close(r); os.dup2(w, 2)\n"
    done = Fork(broken + CMKIT, "run", "tiny.toml", cwd=tmp_path).wait()
    assert done.returncode == 0
    assert "fid = " in done.stdout


ON_TERMINAL = """
import fcntl, os, termios
os.setsid()
terminal = os.open({!r}, os.O_RDWR)
fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)
for number in range(3):
    os.dup2(terminal, number)
"""


@pytest.mark.slow
def test_a_run_whose_terminal_is_closed_saves_what_it_has(tmp_path):
    """Every step so far, though the terminal takes no more lines."""
    (tmp_path / "tiny.toml").write_text(RUN_RECIPE.replace("steps = 6", "steps = 100000"))
    words = ["run", "tiny.toml", "--set", "train.log_every=1", "--set", "train.save_every=90000"]
    terminal, inner = pty.openpty()
    code = ON_TERMINAL.format(os.ttyname(inner)) + CMKIT
    running = Fork(code, *words, cwd=tmp_path, TERM="xterm")
    seen, deadline = b"", time.monotonic() + 120
    while not [log for log in tmp_path.glob("runs/*/log.jsonl") if log.stat().st_size]:
        assert time.monotonic() < deadline, seen
        if select.select([terminal], [], [], 0.1)[0]:
            seen += os.read(terminal, 65536)
    os.close(inner)
    os.close(terminal)
    assert running.wait().returncode == 128 + signal.SIGHUP
    (log,) = tmp_path.glob("runs/*/log.jsonl")
    (kept,) = log.parent.glob("checkpoints/step-*")
    assert int(kept.name[5:]) == json.loads(log.read_text().splitlines()[-1])["step"]
    assert b"\x1b[?25l" in seen  # a live display, as on any terminal


class Typo(cmkit.Objective):
    """An objective of another package, with a chosen fault in its loss."""

    fault: str = "none"

    def phase(self, step, total):
        return cmkit.Phase(step, num_sigmas=5)

    def loss(self, models, x0, cond, phase, rng):
        match self.fault:
            case "attribute":
                return models.onlnie(x0, phase)
            case "shape":
                return models.online(x0, torch.ones(3, 3), cond)
            case "library":
                return torch.linalg.cholesky(-torch.eye(2)) + x0
            case "exit":
                raise SystemExit(3)
            case "key":
                return {}["x0"]
            case "own":
                raise type("TheirError", (Exception,), {})("of theirs")
        return x0.mean((1, 2, 3))


FAULTS = {
    "attribute": "onlnie",
    "shape": "",
    "library": "cholesky",
    "exit": "SystemExit: 3",
    "key": "KeyError: 'x0'",
    "own": "TheirError: of theirs",
}


@pytest.fixture
def typo(monkeypatch):
    """The registry, with the part `typo` of the package cmkit-typo, which is this file."""
    plugin = Plugin("objective", "typo", f"{__name__}:Typo", "a typo")
    row = Row("objective", "typo", "cmkit-typo", "0.3", plugin)
    made = Registry([*discover().rows, row])
    for module in ("cmkit.plugins", "cmkit.cli.entry", "cmkit.plan.checks"):
        monkeypatch.setattr(f"{module}.discover", lambda: made)


@pytest.mark.usefixtures("typo")
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_a_strangers_part_names_package_file_and_line(cmkit, tmp_path, fault):
    recipe = re.sub("objective = .*", f'objective = {{use="typo", fault="{fault}"}}', RUN_RECIPE)
    (tmp_path / "tiny.toml").write_text(recipe)
    result = cmkit("run", "tiny.toml", "--device", "cpu")
    refused(result, 9, f"cmkit-typo 0.3, {__file__}:", FAULTS[fault], "debug.log")
    line = int(re.search(rf"{re.escape(__file__)}:(\d+)", result[2])[1])
    first = Path(__file__).read_text().splitlines()[line - 1]
    assert "return" in first or "raise" in first


def test_a_fault_of_ours_is_still_a_bug_in_cmkit(cmkit, tmp_path, monkeypatch):
    (tmp_path / "tiny.toml").write_text(RUN_RECIPE)
    monkeypatch.setattr("cmkit.runs.folder.RunFolder.rewind_log", lambda *_: 1 / 0)
    refused(cmkit("run", "tiny.toml"), 70, "a bug in cmkit: ZeroDivisionError")


WRAPPED = ("module.", "_orig_mod.", "module.model.", "net.unet.")


@pytest.mark.parametrize(
    ("prefix", "layout"),
    [
        (WRAPPED[0], "cmkit"),
        *(pytest.param(prefix, "cmkit", marks=pytest.mark.slow) for prefix in WRAPPED[1:]),
        pytest.param(WRAPPED[0], "openai", marks=pytest.mark.slow),
    ],
)
def test_a_prefix_of_all_names_of_weights_is_left_out_and_said(cmkit, tmp_path, prefix, layout):
    recipe = written(tmp_path, DataSpec(1, 8, 10), frozenset({"label"}))
    assert cmkit("sample", recipe, "-n", 2, "--out", "a.npz", "--device", "cpu")[0] == 0
    if layout != "cmkit":
        source = ("random.safetensors", "theirs.safetensors")
        assert cmkit("convert", *source, "--to", layout, "--recipe", recipe)[0] == 0
        (tmp_path / source[1]).replace(tmp_path / source[0])
    weights = load_file(tmp_path / "random.safetensors")
    wrapped = {f"{prefix}{name}": tensor for name, tensor in weights.items()}
    save_file(wrapped, tmp_path / "random.safetensors")
    told = "random.safetensors: the prefix "
    code, out, err = cmkit("check", recipe)
    assert (code, told in out) == (0, True), err
    code, _, err = cmkit("sample", recipe, "-n", 2, "--out", "b.npz", "--device", "cpu")
    assert code == 0, err
    assert told in err
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    code, _, err = cmkit("convert", "random.safetensors", "c", "--to", "cmkit", "--recipe", recipe)
    assert (code, told in err) == (0, True)


def test_a_compiled_block_inside_is_found_as_well(cmkit, tmp_path):
    recipe = written(tmp_path, DataSpec(1, 8, 10), frozenset({"label"}))
    weights = load_file(tmp_path / "random.safetensors")
    compiled = {name.replace("time.", "time._orig_mod."): t for name, t in weights.items()}
    assert compiled.keys() != weights.keys()
    save_file(compiled, tmp_path / "random.safetensors")
    assert cmkit("sample", recipe, "-n", 1, "--device", "cpu")[0] == 0


def test_weights_of_another_network_show_their_names_and_their_own_prefix(cmkit, tmp_path):
    recipe = written(tmp_path, DataSpec(1, 8, 10), frozenset({"label"}))
    save_file({"module.other.weight": torch.zeros(3)}, tmp_path / "random.safetensors")
    refused(cmkit("sample", recipe), 4, "its own names begin module.other.weight")


SHADOWS = {
    "shadow_params": lambda state: {"shadow_params": list(state.values()), "decay": 0.999},
    "a list": lambda state: list(state.values()),
    "numbers": lambda state: {"decay": 0.999, "num_updates": 5},
    "empty": lambda state: {},
}


@pytest.mark.slow
@pytest.mark.parametrize("shadow", SHADOWS)
def test_an_average_without_names_is_passed_over_and_said(
    cmkit, tmp_path, forked_reader, monkeypatch, shadow
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    recipe = written(tmp_path, DataSpec(1, 8, 10), frozenset({"label"}))
    state = load_file(tmp_path / "random.safetensors")
    torch.save({"model": state, "ema": SHADOWS[shadow](state), "step": 7}, tmp_path / "w.pt")
    told = "w.pt: 'ema' in it has no names of tensors; 'model' is taken"
    for number in range(2):  # converted, then known
        change = ("--set", "denoiser.weights=w.pt", "--out", f"{number}.npz", "--device", "cpu")
        code, _, err = cmkit("sample", recipe, "-n", 2, *change)
        assert (code, told in err) == (0, True), err
    assert cmkit("sample", recipe, "-n", 2, "--out", "a.npz", "--device", "cpu")[0] == 0
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "1.npz").read_bytes()


def test_a_checkpoint_without_any_names_is_refused(cmkit, tmp_path, forked_reader, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    recipe = written(tmp_path, DataSpec(1, 8, 10), frozenset({"label"}))
    torch.save({"ema": {"shadow_params": [torch.zeros(2)]}, "model": [1]}, tmp_path / "w.pt")
    told = cmkit("sample", recipe, "--set", "denoiser.weights=w.pt", "--device", "cpu")
    refused(told, 4, "w.pt: holds no state dict")


def test_arrays_are_what_numpy_would_write(tmp_path):
    images = torch.arange(5 * 3 * 64, dtype=torch.int64).to(torch.uint8).view(5, 3, 8, 8)
    labels = torch.arange(5)
    batches = [Batch(0, images[:2], labels[:2]), Batch(2, images[2:], labels[2:])]
    np.savez(tmp_path / "a.npz", arr_0=images.permute(0, 2, 3, 1).numpy(), arr_1=labels.numpy())
    assert npz(batches) == (tmp_path / "a.npz").read_bytes()
    assert sorted(np.load(io.BytesIO(npz([Batch(0, images, None)])))) == ["arr_0"]


@pytest.mark.parametrize("out", ["x.npz", "folder"])
def test_no_more_than_a_batch_waits_to_be_written(tmp_path, monkeypatch, out):
    alive = weakref.WeakSet()
    most = 0

    def drawn(*_):
        nonlocal most
        for first in range(0, 40, 2):
            images = torch.zeros(2, 1, 8, 8, dtype=torch.uint8)
            alive.add(images)
            most = max(most, len(alive))
            yield Batch(first, images, torch.zeros(2, dtype=torch.int64))
            del images

    written(tmp_path, DataSpec(1, 8, 10), frozenset({"label"}))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("cmkit.runs.drawing.sample", drawn)
    recipe = drawn_from("random.toml", [], discover(), 40)
    events = list(draw(recipe, 0, (), tmp_path / out, torch.device("cpu")))
    assert [event.done for event in events if isinstance(event, Sampled)] == [*range(2, 41, 2)]
    assert most <= 2
    found = SavedImages([tmp_path / out]) if out == "x.npz" else list((tmp_path / out).iterdir())
    assert len(found) == 40


@pytest.mark.parametrize("out", ["x.npz", "folder"])
def test_a_drawing_that_is_broken_off_leaves_nothing(tmp_path, monkeypatch, out):
    written(tmp_path, DataSpec(1, 8, 10), frozenset({"label"}))
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    recipe = drawn_from("random.toml", [], discover(), 9)
    events = draw(recipe, 0, (), tmp_path / out, torch.device("cpu"))
    assert any(isinstance(event, Sampled) for event in events)
    events.close()
    assert sorted(tmp_path.rglob("*")) == before


def test_temporaries_of_killed_processes_are_swept_wherever_a_run_writes(tmp_path):
    places = [tmp_path, *(tmp_path / name for name in ("search", "samples", "checkpoints"))]
    for place in places:
        place.mkdir(exist_ok=True)
        (place / f"{files.TEMPORARY}abc").touch()
        (place / f"{files.TEMPORARY}folder").mkdir()
        (place / f"{files.TEMPORARY}folder" / "x").touch()
        (place / "kept").touch()
    elsewhere = tmp_path.parent / f"{tmp_path.name}-elsewhere"
    elsewhere.mkdir()
    (elsewhere / f"{files.TEMPORARY}abc").touch()
    (tmp_path / "link").symlink_to(elsewhere)
    with RunFolder(tmp_path).held():
        left = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file())
    assert left == [".lock", "checkpoints/kept", "kept", "samples/kept", "search/kept"]
    assert list(elsewhere.iterdir())  # what a link leads to is another's


def test_old_temporaries_in_the_users_cache_are_swept(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name in ("digests", "features"):
        (tmp_path / "cmkit" / name).mkdir(parents=True)
        for age in (0, 2 * files.ABANDONED):
            path = tmp_path / "cmkit" / name / f"{files.TEMPORARY}{age}"
            path.touch()
            os.utime(path, (time.time() - age,) * 2)
    files.cached_digest("something new", lambda: "0" * 64)
    stored.save("0" * 64, {"x": torch.zeros(2)})
    left = [path.name for path in tmp_path.rglob(f"{files.TEMPORARY}*")]
    assert left == [f"{files.TEMPORARY}0"] * 2  # another process may be writing it now


GONE = {
    "renamed": lambda path: path.rename(path.with_name("other")),
    "removed": shutil.rmtree,
    "replaced": lambda path: (path.rename(path.with_name("other")), path.mkdir()),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("when", "how"),
    [
        *((stage, "renamed") for stage in ("train", "search", "sample", "metric")),
        ("train", "removed"),
        ("sample", "replaced"),
    ],
)
def test_a_run_folder_that_is_gone_under_its_run_is_said(tmp_path, monkeypatch, how, when):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.toml").write_text(RUN_RECIPE)
    made = plan(load("tiny.toml", ["train.save_every=1"], discover()))
    running = run(made, discover(), tmp_path / "runs", torch.device("cpu"), StopSignal())
    for event in running:
        if isinstance(event, StageStarted) and event.stage == when:
            (path,) = (tmp_path / "runs").iterdir()
            GONE[how](path)
            break
    with pytest.raises(ResourceError, match="is gone, it was renamed or removed"):
        list(running)
    assert how == "replaced" or not path.exists()
    assert how != "replaced" or not list(path.iterdir())


CLOSED = """
import os, sys, contextlib, io
from cmkit.cli import main
sys.argv = ["cmkit", "check", "random.toml"]
with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit): main()
if os.getuid() == 0: os.setgid(65534); os.setuid(65534)  # root passes permissions by
sys.argv = ["cmkit", *{words}]
main()
"""
REFUSED = {
    "recipe": ("random.toml", ["check", "random.toml"]),
    "folder of the recipe": ("inner", ["check", "inner/random.toml"]),
    "weights": ("random.safetensors", ["sample", "random.toml", "--out", "/dev/shm/x.png"]),
    "pictures": ("colours", ["check", "random.toml", "--set", "sample.images=1"]),
    "picture": ("colours/0.png", ["check", "random.toml", "--set", "sample.images=1"]),
    "run": ("inner", ["sample", "inner"]),
    "report": ("report.json", ["compare", "."]),
}


@pytest.mark.slow
@pytest.mark.parametrize("what", REFUSED)
def test_what_may_not_be_read_says_permission(what):
    path, words = REFUSED[what]
    with tempfile.TemporaryDirectory() as home:
        os.chmod(home, 0o755)
        written(Path(home), DataSpec(3, 8))
        (Path(home) / "inner").mkdir()
        for name in ("inner/random.toml", "report.json"):
            (Path(home) / name).write_text((Path(home) / "random.toml").read_text())
        os.chmod(f"{home}/{path}", 0)
        code = CLOSED.format(words=words)
        done = Fork(code, cwd=home, XDG_CACHE_HOME=f"{home}/none").wait()
    assert done.returncode in (2, 3, 4, 5), done.stderr
    refused((done.returncode, done.stdout, done.stderr), done.returncode, "ermission")
    assert "did you mean" not in done.stderr
    assert "give this user permission" in done.stderr or "cannot be listed" in done.stderr


def test_compiling_without_a_compiler_is_refused_before_any_work(cmkit, tmp_path, monkeypatch):
    (tmp_path / "tiny.toml").write_text(RUN_RECIPE)
    change = ("--set", "train.compile=true", "--device", "cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CXX", "no-such-compiler")
    for command in ("check", "run"):
        told = cmkit(command, "tiny.toml", *change)
        refused(told, 5, "train.compile", "no-such-compiler", "install it")
    assert not (tmp_path / "runs").exists()
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path))
    refused(cmkit("check", "tiny.toml", *change), 5, "CXX")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    refused(cmkit("check", "tiny.toml", *change), 5, "gcc or clang or cc")
    (tmp_path / "cc").write_text("")
    (tmp_path / "cc").chmod(0o755)
    assert cmkit("check", "tiny.toml", *change)[0] == 0


def test_several_devices_or_processes_say_what_works(cmkit, tmp_path, monkeypatch):
    (tmp_path / "tiny.toml").write_text(RUN_RECIPE)
    for device in ("cuda:0,1", "0,1", "cuda:0,cuda:1", "cpu,cpu"):
        told = cmkit("run", "tiny.toml", "--device", device)
        refused(told, 2, f"--device {device}", "one process on one device", "--device cuda:0")
    for name, value in {"MASTER_ADDR": "127.0.0.1", "RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    refused(cmkit("run", "tiny.toml"), 2, "a launcher of 2 processes", "`cmkit run` by itself")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert cmkit("check", "tiny.toml")[0] == 0


@pytest.mark.parametrize("missing", ["fcntl", "resource"])
def test_a_system_without_file_locks_is_one_line(missing):
    code = f"import sys; sys.modules[{missing!r}] = None; from cmkit.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code, "plugins"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (5, "")
    assert done.stderr == (
        "error: cmkit needs Linux or macOS, whose file locks it holds a run with; on Windows"
        " use WSL\n"
    )
