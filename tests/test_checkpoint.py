"""Laws of `cmkit.checkpoint`: nothing damaged is loaded, nothing good is lost, nothing runs."""

from __future__ import annotations

import contextlib
import copy
import errno
import hashlib
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cmkit import checkpoint, files, tensors
from cmkit.errors import (
    BusyError,
    CheckpointError,
    CmkitError,
    NonFiniteError,
    ResourceError,
)
from cmkit.runs import RunFolder
from tests.forks import Fork

ROOT = os.geteuid() == 0


def groups() -> dict[str, dict[str, Tensor]]:
    """Every type and shape that training saves."""
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(3, 4, 5, 6, generator=rng)
    tied = torch.randn(7, generator=rng)
    return {
        "online": {
            "channels_last": x.to(memory_format=torch.channels_last),
            "transposed": x[0, 0].t(),
            "strided": x[:, ::2, 1:],
            "bfloat16": x.to(torch.bfloat16),
            "float16": x.half(),
            "float64": x.double(),
            "parameter": nn.Parameter(x),
            "empty": torch.zeros(0, 3),
            "tied.0": tied,
            "tied.1": tied,
            "view": tied[2:5],
            "subnormal, minus zero": torch.tensor([1e-45, -0.0]),
        },
        "ema-0.999": {"a": x + 1},
        "ema-0.9999": {"a": x + 2},
        "optimizer": {
            "step": torch.tensor(3),
            "scale": torch.tensor(2.5),
            "bool": x > 0,
            "a bool of odd size": x[0, 0, 0] > 0,
            "float64 after it": x.double(),
            "int32": torch.arange(5, dtype=torch.int32),
            "uint8": torch.arange(5, dtype=torch.uint8),
        },
    }


def save(root: Path, step: int, keep: int = 2) -> Path:
    return checkpoint.save_checkpoint(root, step, groups(), {"loss": 0.5}, keep)


def latest(root: Path) -> checkpoint.Checkpoint | None:
    """The latest checkpoint, where no warning is due."""
    return checkpoint.latest_checkpoint(root, warn=pytest.fail)


def steps(root: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in root.iterdir())


def bits(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def test_round_trip_is_bit_identical(tmp_path: Path) -> None:
    folder = save(tmp_path, 1000)
    found = latest(tmp_path)
    assert folder == tmp_path / "step-00001000" == found.path
    assert (found.step, found.state) == (1000, {"loss": 0.5})
    assert found.names == tuple(sorted(groups()))
    for name, group in groups().items():
        loaded = found.tensors(name)
        assert loaded.keys() == group.keys()
        for key, tensor in group.items():
            assert (loaded[key].dtype, loaded[key].shape) == (tensor.dtype, tensor.shape)
            assert bits(loaded[key]) == bits(tensor), key


def test_coreutils_accepts_the_manifest(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    done = subprocess.run(
        ["sha256sum", "--strict", "-c", "SHA256SUMS"], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0
    assert sorted(done.stdout.split()[::2]) == sorted(
        f"{name}:" for name in os.listdir(folder) if name != "SHA256SUMS"
    )


def test_files_are_those_that_safetensors_would_write(tmp_path: Path) -> None:
    group = {k: v.detach().clone().contiguous() for k, v in groups()["online"].items()}
    theirs = tmp_path / "theirs.safetensors"
    save_file(group, theirs)
    ours = save(tmp_path, 1) / "online.safetensors"
    assert {k: bits(v) for k, v in load_file(ours).items()} == {
        k: bits(v) for k, v in load_file(theirs).items()
    }
    assert {k: bits(v) for k, v in checkpoint.read_weights(theirs).items()} == {
        k: bits(v) for k, v in group.items()
    }


def test_missing_name_is_refused_with_those_that_exist(tmp_path: Path) -> None:
    save(tmp_path, 1)
    with pytest.raises(CheckpointError, match=r"no 'target', only ema-0.999, .*online"):
        latest(tmp_path).tensors("target")


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    assert latest(tmp_path / "absent") is None
    assert latest(tmp_path) is None


def test_step_saved_intact_is_not_written_again(tmp_path: Path) -> None:
    before = (save(tmp_path, 1) / "state.json").stat()
    assert (save(tmp_path, 1) / "state.json").stat() == before


def test_damaged_step_is_written_again(tmp_path: Path) -> None:
    (save(tmp_path, 1) / "state.json").write_text("{}")
    save(tmp_path, 1)
    assert latest(tmp_path).state == {"loss": 0.5}
    assert steps(tmp_path) == [1]


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_prune_keeps_the_newest_intact_ones(tmp_path: Path, keep: int) -> None:
    for step in range(1, 6):
        save(tmp_path, step, keep)
        assert steps(tmp_path) == list(range(max(1, step - keep + 1), step + 1))


def test_prune_does_not_count_damaged_ones(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (save(tmp_path, 2) / "online.safetensors").write_bytes(b"")
    save(tmp_path, 3)
    assert steps(tmp_path) == [1, 2, 3]
    save(tmp_path, 4)
    assert steps(tmp_path) == [3, 4]


def test_prune_never_deletes_what_was_just_saved(tmp_path: Path) -> None:
    save(tmp_path, 9)
    save(tmp_path, 5, keep=1)
    assert steps(tmp_path) == [5, 9]


def test_all_checkpoints_are_intact_whenever_a_name_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1, keep=1)
    seen = []

    def watch(name: str) -> None:
        real = getattr(os, name)

        def watched(*args: Any, **keywords: Any) -> None:
            for folder in tmp_path.glob("step-*"):
                checkpoint.verify(folder)
            seen.append(checkpoint._newest(tmp_path, warn=pytest.fail).step)
            real(*args, **keywords)

        monkeypatch.setattr(os, name, watched)

    for name in ("rename", "unlink", "rmdir"):
        watch(name)
    for step in range(2, 6):
        save(tmp_path, step, keep=1)
    assert len(seen) > 20
    assert min(seen) >= 1
    assert seen == sorted(seen)


def test_remains_of_dead_attempts_are_removed(tmp_path: Path) -> None:
    save(tmp_path, 1)
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").touch()
    for attempt in (lambda: latest(tmp_path), lambda: save(tmp_path, 2)):
        shutil.copytree(tmp_path / "step-00000001", tmp_path / ".tmp-cmkit-step-00000009")
        (tmp_path / ".tmp-cmkit-file").touch()
        (tmp_path / ".tmp-cmkit-link").symlink_to(outside)
        (tmp_path / ".tmp-of-somebody-else").touch()
        attempt()
        assert [path.name for path in tmp_path.glob(".*")] == [".tmp-of-somebody-else"]
    assert (outside / "precious").exists()


def test_links_are_neither_followed_nor_pruned(tmp_path: Path) -> None:
    elsewhere = save(tmp_path / "elsewhere", 9)
    root = tmp_path / "root"
    root.mkdir()
    for step in (1, 9):
        (root / f"step-{step:08d}").symlink_to(elsewhere)
    assert latest(root) is None
    for step in (2, 3, 4):
        save(root, step, keep=1)
    assert latest(root).step == 4
    assert not save(root, 9).is_symlink()
    checkpoint.verify(elsewhere)


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".hidden", "a\nb", "a\\b", "ü"])
def test_names_that_are_no_file_names_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="no file name"):
        checkpoint.save_checkpoint(tmp_path / "root", 1, {name: {}}, {})
    assert list(tmp_path.iterdir()) == []


def flip(path: Path, rng: random.Random, others: list[Path]) -> None:
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def cut(path: Path, rng: random.Random, others: list[Path]) -> None:
    os.truncate(path, rng.randrange(path.stat().st_size))


def zero_tail(path: Path, rng: random.Random, others: list[Path]) -> None:
    data = path.read_bytes()
    last = max(i for i, byte in enumerate(data) if byte)
    start = rng.randint(0, last)
    path.write_bytes(data[:start] + bytes(len(data) - start))


def swap(path: Path, rng: random.Random, others: list[Path]) -> None:
    other = rng.choice([file for file in others if file != path])
    ours, theirs = path.read_bytes(), other.read_bytes()
    path.write_bytes(theirs)
    other.write_bytes(ours)


def test_no_fault_is_silent_and_each_names_its_file(tmp_path: Path) -> None:
    rng = random.Random(20240501)
    good, root = save(tmp_path / "good", 7), tmp_path / "root"
    save(root, 3)
    bad = root / good.name
    for _ in range(600):
        shutil.copytree(good, bad)
        files = sorted(bad.iterdir())
        path, fault = rng.choice(files), rng.choice([flip, cut, zero_tail, swap])
        fault(path, rng, files)
        with pytest.raises(CheckpointError) as caught:
            checkpoint.verify(bad)
        named = ["SHA256SUMS"] if path.name == "SHA256SUMS" else files if fault is swap else [path]
        assert any(str(file) in str(caught.value) for file in named), (fault, path)
        told: list[str] = []
        assert checkpoint.latest_checkpoint(root, told.append).step == 3
        assert len(told) == 1
        assert str(caught.value) in told[0]
        shutil.rmtree(bad)


def test_all_damaged_is_an_error_that_names_the_newest_file_and_the_cure(tmp_path: Path) -> None:
    for step in (1, 2):
        (save(tmp_path, step) / "online.safetensors").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"step-00000002/online.safetensors.*delete"):
        latest(tmp_path)


def test_missing_and_foreign_files_are_named(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    (folder / ".nfs0001").touch()
    checkpoint.verify(folder)
    (folder / "foreign.safetensors").touch()
    with pytest.raises(CheckpointError, match=r"foreign.safetensors: not listed"):
        checkpoint.verify(folder)
    (folder / "foreign.safetensors").unlink()
    (folder / "optimizer.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"optimizer.safetensors: missing"):
        checkpoint.verify(folder)
    os.mkfifo(folder / "optimizer.safetensors")
    with pytest.raises(CheckpointError, match=r"optimizer.safetensors: not a regular file"):
        checkpoint.verify(folder)


def reseal(folder: Path) -> None:
    """A manifest that agrees, as an attacker or an editor would make one."""
    names = sorted(set(os.listdir(folder)) - {"SHA256SUMS"})
    lines = [f"{hashlib.sha256((folder / n).read_bytes()).hexdigest()}  {n}\n" for n in names]
    (folder / "SHA256SUMS").write_text("".join(lines))


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "{}",
        '{"step": 1}',
        '{"step": "1", "state": {}}',
        '{"step": 1, "state": 5}',
        '{"step": 2, "state": {}}',
        "[" * 100_000,
        "\xff",
    ],
)
def test_state_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    folder = save(tmp_path, 1)
    (folder / "state.json").write_bytes(text.encode("latin-1"))
    reseal(folder)
    with pytest.raises(CheckpointError, match="step-00000001"):
        latest(tmp_path)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_non_finite_tensor_is_not_saved(tmp_path: Path, bad: float, dtype: torch.dtype) -> None:
    save(tmp_path, 1)
    group = {"good": torch.ones(3), "bad.weight": torch.ones(4, 4, dtype=dtype)}
    group["bad.weight"][2, 1] = bad
    with pytest.raises(NonFiniteError, match=r"online: bad.weight"):
        checkpoint.save_checkpoint(tmp_path, 2, {"online": group}, {})
    assert steps(tmp_path) == [1]


def test_non_finite_state_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match=r"state.json"):
        checkpoint.save_checkpoint(tmp_path, 1, groups(), {"loss": float("nan")})
    assert list(tmp_path.iterdir()) == []


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3)
        self.norm = nn.BatchNorm2d(3)
        self.out = nn.Linear(3, 2)


def changed(kind: str, group: dict[str, Tensor], key: str) -> dict[str, Tensor]:
    group, tensor = dict(group), group[key]
    if kind == "drop":
        del group[key]
    elif kind == "reshape":
        group[key] = torch.zeros(*tensor.shape, 1, dtype=tensor.dtype)
    elif kind == "rename":
        group[key + "x"] = group.pop(key)
    else:
        group[key] = tensor.float() if tensor.dtype == torch.int64 else tensor.long()
    return group


@pytest.mark.parametrize("kind", ["drop", "reshape", "rename", "retype"])
@pytest.mark.parametrize("key", list(Net().state_dict()))
def test_weights_that_differ_are_refused_whole(kind: str, key: str) -> None:
    network, other = Net(), Net()
    before = copy.deepcopy(network.state_dict())
    given = changed(kind, other.state_dict(), key)
    with pytest.raises(CheckpointError, match=rf"file: .*{key}") as caught:
        tensors.load_weights(network, given, "file")
    own = str(tuple(before[key].shape))
    theirs = str(tuple(given[key].shape)) if key in given else "absent"
    assert own in str(caught.value)
    assert theirs in str(caught.value)
    assert all(torch.equal(before[k], v) for k, v in network.state_dict().items())


def test_only_the_first_three_differences_are_named() -> None:
    with pytest.raises(CheckpointError, match=r"9 tensors do not fit: ") as caught:
        tensors.load_weights(Net(), {}, "file")
    assert str(caught.value).count(" is absent") == 3
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_weights_not_finite_in_the_networks_type_are_refused_whole(bad: float) -> None:
    network = Net().half()
    before = copy.deepcopy(network.state_dict())
    given = copy.deepcopy(Net().state_dict())
    given["out.bias"][1] = bad
    with pytest.raises(NonFiniteError, match=r"file: out.bias"):
        tensors.load_weights(network, given, "file")
    assert all(torch.equal(before[k], v) for k, v in network.state_dict().items())


@pytest.mark.parametrize("own", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_are_converted_to_the_networks_type(own: torch.dtype, given: torch.dtype) -> None:
    network, source = Net().to(own), Net().to(given)
    network = network.to(memory_format=torch.channels_last)
    tensors.load_weights(network, source.state_dict(), "file")
    for key, value in network.state_dict().items():
        theirs = source.state_dict()[key]
        assert value.dtype == (own if value.is_floating_point() else theirs.dtype)
        assert torch.equal(value, theirs.to(value.dtype))
    assert network.conv.weight.is_contiguous(memory_format=torch.channels_last)


def test_read_weights_prefers_the_slowest_ema(tmp_path: Path) -> None:
    save(tmp_path, 1)
    folder = save(tmp_path, 2)
    for path in (folder, tmp_path):
        assert torch.equal(checkpoint.read_weights(path)["a"], groups()["ema-0.9999"]["a"])
    folder = checkpoint.save_checkpoint(tmp_path, 3, {"online": {"w": torch.ones(2)}}, {})
    assert checkpoint.read_weights(tmp_path).keys() == {"w"}


def test_read_weights_of_a_run_are_its_model_or_its_newest_checkpoint(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    save(run.checkpoints, 1)
    assert torch.equal(
        checkpoint.read_weights(run.newest_weights())["a"], groups()["ema-0.9999"]["a"]
    )
    group = groups()["online"]
    for _ in range(2):
        tensors.save_weights(run.weights, group)
    loaded = checkpoint.read_weights(run.newest_weights())
    assert {k: bits(v) for k, v in loaded.items()} == {k: bits(v) for k, v in group.items()}
    with pytest.raises(NonFiniteError, match=r"model\.safetensors: w holds"):
        tensors.save_weights(run.weights, {"w": torch.tensor([torch.nan])})
    assert sorted(os.listdir(tmp_path)) == ["checkpoints", "model.safetensors"]
    checkpoint.read_weights(run.newest_weights())


def test_texts_beside_weights_are_in_order(tmp_path):
    about = {key: f'{key}\n"é"' for key in "hgfedcba"}  # eight: 1 in 40,320 is right by chance
    tensors.save_weights(tmp_path / "a.safetensors", {"w": torch.arange(3.0)}, about)
    header = (tmp_path / "a.safetensors").read_bytes()
    keys = list(json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])["__metadata__"])
    assert keys == sorted([*about, "format"])
    read, texts = tensors.read_with_metadata(tmp_path / "a.safetensors")
    assert read["w"].tolist() == [0, 1, 2]
    assert texts == {**about, "format": "pt"}


def test_read_weights_refuses_a_damaged_newest_checkpoint(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (save(tmp_path, 2) / "ema-0.999.safetensors").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"step-00000002/ema-0.999.safetensors: damaged"):
        checkpoint.read_weights(tmp_path)


def test_read_weights_leaves_a_save_in_progress_alone(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (tmp_path / ".tmp-cmkit-step-00000002").mkdir()
    checkpoint.read_weights(tmp_path)
    assert (tmp_path / ".tmp-cmkit-step-00000002").exists()


def header(text: str, data: bytes = b"", claim: int | None = None) -> bytes:
    claim = len(text.encode()) if claim is None else claim
    return claim.to_bytes(8, "little") + text.encode() + data


SPEC = '{"a":{"dtype":"%s","shape":[%s],"data_offsets":[0,%s]}}'
GARBAGE = {
    "empty": b"",
    "short": b"\x00" * 7,
    "zeros": bytes(4096),
    "text": b"hello, world, this is no checkpoint",
    "html": b"<!DOCTYPE html><html>404</html>",
    "header longer than the file": header("{}", claim=1000),
    "absurd header length": header("{}", claim=2**63 + 1),
    "header length minus one": header("{}", claim=2**64 - 1),
    "not json": header("{nonsense}"),
    "nested": header('{"a":' * 50_000),
    "truncated data": header(SPEC % ("F32", "4", "16"), bytes(15)),
    "extra data": header(SPEC % ("F32", "4", "16"), bytes(17)),
    "wrong size": header(SPEC % ("F32", "5", "16"), bytes(16)),
    "overflow": header(SPEC % ("F32", "4611686018427387905", "4"), bytes(4)),
    "negative": header(SPEC % ("F32", "-1", "4"), bytes(4)),
    "absurd tensor": header(SPEC % ("F32", "1000000000000", "4000000000000")),
    "unknown type": header(SPEC % ("F99", "4", "16"), bytes(16)),
}


@pytest.mark.parametrize("what", GARBAGE)
def test_garbage_is_refused(tmp_path: Path, what: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(GARBAGE[what])
    with pytest.raises(CheckpointError, match=r"model.safetensors: "):
        checkpoint.read_weights(path)


def test_fuzzed_files_raise_nothing_else(tmp_path: Path) -> None:
    rng = random.Random(7)
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.randn(4, 5), "b": torch.ones(3).bool(), "c": torch.ones(2).half()}, path)
    good = path.read_bytes()
    types = [b"F4", b"F8_E4M3", b"F8_E8M0", b"F6_E2M3", b"C64", b"U64", b"[]", b"null", b"-1"]
    for _ in range(2000):
        data = bytearray(good)
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(len(data))
            if rng.random() < 0.3:
                token = rng.choice(types)
                data[at : at + len(token)] = token
            else:
                data[at] = rng.randrange(256)
        path.write_bytes(data[: rng.choice([len(data), rng.randrange(len(data))])])
        with contextlib.suppress(CheckpointError):
            checkpoint.read_weights(path)


def test_missing_file_folder_and_device_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.safetensors", tmp_path, Path("/dev/zero")):
        with pytest.raises(CheckpointError, match=str(path)):
            checkpoint.read_weights(path)


class Payload:
    """Unpickling it creates the file `marker`."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.marker),)


def hostile(folder: Path, marker: Path) -> Iterator[Path]:
    """Files that create `marker` when they are unpickled, under many names."""
    payload = {"state_dict": Payload(marker)}
    for legacy in (False, True):
        path = folder / f"legacy-{legacy}.pt"
        torch.save(payload, path, _use_new_zipfile_serialization=not legacy)
        yield path
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        path = folder / f"protocol-{protocol}.pkl"
        path.write_bytes(pickle.dumps(payload, protocol))
        yield path
    broken = folder / "broken-crc.ckpt"
    data = bytearray((folder / "legacy-False.pt").read_bytes())
    at = data.index(b"PK\x01\x02") + 16
    data[at : at + 4] = b"\0\0\0\0"
    broken.write_bytes(data)
    yield broken
    with zipfile.ZipFile(folder / "weights.npz", "w") as archive:
        archive.writestr("a.npy", b"\x93NUMPY" + pickle.dumps(payload))
    yield folder / "weights.npz"
    # a valid pickle whose first bytes look like a safetensors header: BININT, POP, then the payload
    polyglot = folder / "polyglot.safetensors"
    polyglot.write_bytes(b"\x80\x02K\x00000{" + pickle.dumps(payload)[2:])
    yield polyglot


def test_pickles_run_nothing(tmp_path: Path) -> None:
    marker, files = tmp_path / "marker", tmp_path / "files"
    files.mkdir()
    pickle.loads(pickle.dumps(Payload(marker)))
    assert marker.exists(), "the payload must be able to act"
    marker.rmdir()
    refused = 0
    save(tmp_path / "warm", 1)
    checkpoint.read_weights(tmp_path / "warm")
    paths = list(hostile(files, marker))
    modules = set(sys.modules)
    for path in paths:
        for suffix in (path.suffix, ".safetensors", ".bin", ".dat", ""):
            copied = files / f"copy{suffix}"
            shutil.copy(path, copied)
            with pytest.raises(CheckpointError, match=copied.name) as caught:
                checkpoint.read_weights(copied)
            assert caught.value.exit_code == 4
            refused += 1
        folder = save(tmp_path / "planted", 1)
        shutil.copy(path, folder / "ema-0.9999.safetensors")
        reseal(folder)
        for attempt in (
            lambda: checkpoint.read_weights(tmp_path / "planted"),
            lambda: latest(tmp_path / "planted").tensors("ema-0.9999"),
        ):
            with pytest.raises(CheckpointError, match=r"ema-0\.9999\.safetensors"):
                attempt()
            refused += 1
        shutil.rmtree(tmp_path / "planted")
    assert refused >= 70
    assert not marker.exists()
    assert set(sys.modules) == modules


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".pkl", ".ckpt", ".bin"])
def test_a_pickle_is_called_one(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"model{suffix}"
    torch.save({"a": torch.ones(2)}, path)
    with pytest.raises(CheckpointError, match=rf"model\{suffix}: a pickle.*run code.*safetensors"):
        checkpoint.read_weights(path)


def test_names_in_a_file_are_never_imported(tmp_path: Path) -> None:
    names = ["os.system", "antigravity", "this", "__class__", "../../etc/passwd", "a\0b", "file:x"]
    path = tmp_path / "model.safetensors"
    save_file({name: torch.ones(1) for name in names}, path, metadata={n: n for n in names})
    checkpoint.read_weights(path)
    modules = set(sys.modules)
    assert checkpoint.read_weights(path).keys() == set(names)
    with pytest.raises(CheckpointError):
        tensors.load_weights(Net(), checkpoint.read_weights(path), "file")
    assert set(sys.modules) == modules


def test_atomic_write_replaces_whole(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    for data in ("first", b"second", "dritte Fassung, größer"):
        files.atomic_write(path, data)
        assert path.read_bytes() == (data if isinstance(data, bytes) else data.encode())
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]


def test_files_are_durable_before_their_writer_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """File, then name, then folder: the crash matrix ends before the last of a run's files."""
    order = []

    def watch(name: str, what: Callable[..., str]) -> None:
        real = getattr(os, name)

        def watched(*args: Any) -> None:
            order.append(what(*args))
            real(*args)

        monkeypatch.setattr(os, name, watched)

    watch("fsync", lambda handle: "folder" if Path(f"/proc/self/fd/{handle}").is_dir() else "file")
    watch("replace", lambda old, new: "replace")
    files.atomic_write(tmp_path / "report.html", "x")
    assert order == ["file", "replace", "folder"]
    order.clear()
    files.append_jsonl(tmp_path / "log.jsonl", {"step": 1})
    assert order == []
    files.append_jsonl(tmp_path / "log.jsonl", {"step": 2}, durable=True)
    assert order == ["file", "folder"]


def test_atomic_write_replaces_a_link_and_not_what_it_points_to(tmp_path: Path) -> None:
    (tmp_path / "outside").write_text("precious")
    (tmp_path / "link").symlink_to(tmp_path / "outside")
    files.atomic_write(tmp_path / "link", "x")
    assert (tmp_path / "outside").read_text() == "precious"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS, errno.EACCES])
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_failed_write_leaves_the_old_file_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, call: str
) -> None:
    path = tmp_path / "status.json"
    path.write_text("old")

    def fail(*args: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, call, fail)
    room = r"\(3 bytes needed, \d+ free\)" if number == errno.ENOSPC else ""
    with pytest.raises(ResourceError, match=rf"status.json: .*{room}; ") as caught:
        files.atomic_write(path, "new")
    assert caught.value.exit_code == 5
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_log_grows_and_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    files.truncate_jsonl(path, lambda record: True)
    assert not path.exists()
    assert files.read_jsonl(path) == []
    for step in range(10):
        files.append_jsonl(path, {"step": step, "loss": step / 3}, durable=step % 2 == 0)
    whole = path.read_bytes()
    for torn in (b'{"step": 1', b'{"step": 10}', b"\0\0\0\n", b"[1]\n", b"\xff\n", b"[" * 99999):
        path.write_bytes(whole + torn)
        files.truncate_jsonl(path, lambda record: True)
        assert path.read_bytes() == whole
    files.truncate_jsonl(path, lambda record: record["step"] <= 6)
    assert [record["step"] for record in files.read_jsonl(path)] == list(range(7))
    assert whole.startswith(path.read_bytes())
    assert list(tmp_path.iterdir()) == [path]


def test_log_refuses_non_finite_numbers(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match=r"log.jsonl"):
        files.append_jsonl(tmp_path / "log.jsonl", {"loss": float("nan")})


def test_disk_is_checked_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)
    usage = shutil.disk_usage(tmp_path)._replace(free=5000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(checkpoint, "_stage_and_publish", pytest.fail)
    with pytest.raises(ResourceError, match=r"\d{5,} bytes needed, 5000 free\); free some space"):
        save(tmp_path, 2)


@pytest.fixture
def tmpfs(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("may not mount; RLIMIT_FSIZE is tested instead")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("room", [0, 1, 5000, 40_000, 100_000, 300_000, 600_000])
@pytest.mark.parametrize("preflight", [True, False])
def test_full_disk_keeps_the_older_checkpoint(
    tmpfs: Path, monkeypatch: pytest.MonkeyPatch, room: int, preflight: bool
) -> None:
    root = tmpfs / "checkpoints"
    group = {"online": {"a": torch.ones(50_000)}}
    checkpoint.save_checkpoint(root, 1, group, {})
    free = shutil.disk_usage(tmpfs).free
    (tmpfs / "ballast").write_bytes(bytes(max(0, free - room)))
    if not preflight:
        monkeypatch.setattr(files, "require_space", lambda *args: None)
    if room < 200_000:
        with pytest.raises(ResourceError, match=r"No space left on device \(\d+ bytes needed, \d+"):
            checkpoint.save_checkpoint(root, 2, group, {})
    else:
        checkpoint.save_checkpoint(root, 2, group, {})
    assert list(root.glob(".*")) == []
    assert latest(root).step == (1 if room < 200_000 else 2)


def test_full_disk_leaves_no_torn_line_and_no_torn_file(tmpfs: Path) -> None:
    log, file = tmpfs / "log.jsonl", tmpfs / "status.json"
    files.append_jsonl(log, {"step": 1})
    files.atomic_write(file, "old")
    (tmpfs / "ballast").write_bytes(bytes(shutil.disk_usage(tmpfs).free))
    with pytest.raises(ResourceError, match=r"log.jsonl: No space"):
        files.append_jsonl(log, {"text": "x" * 20_000})
    with pytest.raises(ResourceError, match=r"status.json: No space"):
        files.atomic_write(file, "new" * 20_000)
    assert files.read_jsonl(log, checked=True) == [{"step": 1}]
    assert log.read_text().count("\n") == 1
    assert file.read_text() == "old"


def test_read_only_file_system_is_a_resource_error(tmpfs: Path) -> None:
    save(tmpfs / "root", 1)
    subprocess.run(["mount", "-o", "remount,ro", str(tmpfs)], check=True)
    assert latest(tmpfs / "root").step == 1
    assert checkpoint.read_weights(tmpfs / "root")
    with pytest.raises(ResourceError, match="Read-only file system; mount it read-write"):
        save(tmpfs / "root", 2)
    with (
        pytest.raises(ResourceError, match=r"\.lock: Read-only file system"),
        files.lock(tmpfs),
    ):
        pass


FILE_LIMIT = """
import resource, sys, pathlib, torch
from cmkit import checkpoint, errors, files, tensors
root = pathlib.Path(sys.argv[1])
checkpoint.save_checkpoint(root / "c", 1, {"online": {"a": torch.ones(10)}}, {})
resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
for attempt in (
    lambda: checkpoint.save_checkpoint(root / "c", 2, {"online": {"a": torch.ones(10_000)}}, {}),
    lambda: files.atomic_write(root / "file", bytes(10_000)),
    lambda: files.append_jsonl(root / "log", {"x": "x" * 10_000}),
):
    try:
        attempt()
    except errors.ResourceError as error:
        print(error)
print(checkpoint.latest_checkpoint(root / "c", print).step, (root / "log").read_bytes())
"""


def test_limit_on_file_sizes_is_a_resource_error(tmp_path: Path) -> None:
    done = Fork(FILE_LIMIT, tmp_path, cwd=tmp_path).wait()
    assert done.returncode == 0, done.stderr
    save_error, write_error, log_error, last = done.stdout.splitlines()
    assert "step-00000002: File too large" in save_error
    assert "raise the limit on file sizes" in save_error
    assert "file: File too large" in write_error
    assert "log: " in log_error
    assert last == "1 b''"
    assert not list(tmp_path.rglob(".tmp*"))


READ_ONLY = """
import os, sys, pathlib, torch
from cmkit import checkpoint, errors, files, tensors
root = pathlib.Path(sys.argv[1])
if os.geteuid() == 0:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
def lock():
    with files.lock(root):
        pass
for attempt in (
    lambda: checkpoint.save_checkpoint(root / "c", 2, {"online": {"a": torch.ones(10)}}, {}),
    lambda: checkpoint.save_checkpoint(root / "new", 2, {"online": {"a": torch.ones(10)}}, {}),
    lambda: files.atomic_write(root / "file", "x"),
    lambda: files.append_jsonl(root / "log", {}),
    lock,
    lambda: checkpoint.read_weights(root / "secret.safetensors"),
):
    try:
        attempt()
    except errors.ResourceError as error:
        print(error)
found = checkpoint.latest_checkpoint(root / "c", print)
print(found.step, len(checkpoint.read_weights(root / "c")))
"""


def test_read_only_folder_is_a_resource_error_and_can_be_read() -> None:
    root = Path(tempfile.mkdtemp())
    try:
        checkpoint.save_checkpoint(root / "c", 1, {"online": {"a": torch.ones(10)}}, {})
        save_file({"a": torch.ones(1)}, root / "secret.safetensors")
        (root / "secret.safetensors").chmod(0)
        for folder in (root / "c", root):
            folder.chmod(0o555)
        done = Fork(READ_ONLY, root, cwd=root).wait()
        assert done.returncode == 0, done.stderr
        *errors, last = done.stdout.splitlines()
        assert len(errors) == 6
        for error, name in zip(errors, ["c", "new", "file", "log", ".lock", "secret"], strict=True):
            assert f"{root / name}" in error
            assert "Permission denied" in error
            assert "give this user permission" in error
        assert last == "1 1"
    finally:
        for folder in (root, root / "c"):
            folder.chmod(0o755)
        shutil.rmtree(root)


def test_lock_is_exclusive_and_names_its_holder(tmp_path: Path) -> None:
    (tmp_path / ".tmp-cmkit-dead").touch()
    with files.lock(tmp_path):
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]
        expected = rf"in use by pid {os.getpid()} on {os.uname().nodename} since \d{{4}}-"
        with pytest.raises(BusyError, match=expected) as caught, files.lock(tmp_path):
            pass
        assert caught.value.exit_code == 7
    with files.lock(tmp_path):
        pass


HOLD = """
import os, sys, time, pathlib
from cmkit import files
with files.lock(pathlib.Path(sys.argv[1])):
    child = os.fork()
    if child:
        files.atomic_write(pathlib.Path(sys.argv[1]) / "orphan", str(child))
    time.sleep(60)
"""


def test_lock_of_a_killed_process_is_free_even_while_its_child_lives(tmp_path: Path) -> None:
    holder = Fork(HOLD, tmp_path, cwd=tmp_path)
    while not (tmp_path / "orphan").exists():
        assert holder.process.is_alive(), holder.wait()
        time.sleep(0.01)
    orphan = int((tmp_path / "orphan").read_text())
    started = time.monotonic()
    with (
        pytest.raises(BusyError, match=rf"pid {holder.process.pid} on .* since"),
        files.lock(tmp_path),
    ):
        pass
    assert time.monotonic() - started < 1
    holder.process.kill()
    assert holder.wait().returncode == -signal.SIGKILL
    os.kill(orphan, 0)
    with files.lock(tmp_path):
        pass
    os.kill(orphan, signal.SIGKILL)


def test_lock_passes_on_errors_of_its_body(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="mine"), files.lock(tmp_path):
        raise OSError("mine")
    with files.lock(tmp_path):
        pass


def test_every_error_is_one_line_that_ends_in_a_cure(tmp_path: Path) -> None:
    (tmp_path / "garbage").write_bytes(b"x" * 100)
    folder = save(tmp_path / "root", 1)
    (folder / "state.json").write_text("x")
    for attempt in (
        lambda: checkpoint.read_weights(tmp_path / "garbage"),
        lambda: checkpoint.read_weights(tmp_path / "absent"),
        lambda: latest(tmp_path / "root"),
        lambda: tensors.load_weights(Net(), {}, "file"),
        lambda: files.atomic_write(tmp_path / "absent" / "file", "x"),
        lambda: save(tmp_path / "garbage", 1),
    ):
        with pytest.raises(CmkitError) as caught:
            attempt()
        assert "\n" not in str(caught.value)
        assert ";" in str(caught.value)
        assert json.dumps(str(caught.value)).isascii()
