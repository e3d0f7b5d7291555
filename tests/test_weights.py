"""Weights by name and from pickles: nothing in a file runs, and what comes in is what is kept."""

from __future__ import annotations

import argparse
import functools
import http.server
import io
import os
import pickle
import subprocess
import sys
import threading
import types
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from cmkit_std.backbones.adm import ADM
from torch import Tensor, nn

from cmkit import CheckpointError, DownloadError
from cmkit.tensors import save_weights
from cmkit.weights import Weights, download, find, read
from tests.toys import TinyNetwork


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def state() -> dict[str, Tensor]:
    return {
        "a.weight": torch.randn(3, 4, generator=torch.Generator().manual_seed(0)),
        "a.half": torch.arange(5).half(),
        "steps": torch.tensor(7),
    }


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a
    )


def tensors_of(path: Path) -> dict[str, Tensor]:
    return read(find(str(path), ADM()))


@pytest.mark.slow
def test_a_new_process_reads_a_pickle_bit_for_bit(tmp_path):
    torch.save(state(), tmp_path / "w.pt")
    assert same(tensors_of(tmp_path / "w.pt"), state())


@pytest.mark.parametrize("new_format", [True, False])
def test_a_state_dict_comes_out_of_a_pickle_bit_for_bit(tmp_path, forked_reader, new_format):
    torch.save(state(), tmp_path / "w.pt", _use_new_zipfile_serialization=new_format)
    assert same(tensors_of(tmp_path / "w.pt"), state())


def test_of_a_training_checkpoint_the_average_is_taken(tmp_path, forked_reader):
    content = {
        "model": {"a": torch.zeros(2)},
        "ema": state(),
        "opt": {"state": {}},
        "args": argparse.Namespace(lr=1.0),
    }
    torch.save(content, tmp_path / "w.pt")
    assert same(tensors_of(tmp_path / "w.pt"), state())


def persistent(module: nn.Module) -> tuple:
    """As EDM's modules pickle: a function of a package that is not here, and one dict."""
    return (_reconstruct, ({"type": "class", "class_name": "Net", "state": module.__dict__},))


def _reconstruct(meta: dict) -> None:
    raise AssertionError("code named by a file was called")


class Persistent(nn.Sequential):
    def __reduce__(self):
        return persistent(self)


@pytest.mark.parametrize("save", [torch.save, lambda x, p: p.write_bytes(pickle.dumps(x))])
@pytest.mark.parametrize("kind", [nn.Sequential, Persistent])
def test_tensors_of_a_pickled_module_have_their_module_names(tmp_path, forked_reader, save, kind):
    module = kind(nn.Conv2d(3, 4, 1), nn.Sequential(nn.BatchNorm2d(4)))
    save({"ema": module, "augment": None}, tmp_path / "w.pkl")
    assert same(tensors_of(tmp_path / "w.pkl"), dict(nn.Sequential(*module).state_dict()))


def test_a_checkpoint_in_a_dict_of_nvidias_own_is_read(tmp_path, forked_reader, monkeypatch):
    """NVlabs/edm2 pickles `dnnlib.util.EasyDict`, half precision; the class need not be here."""
    module = types.ModuleType("dnnlib.util")
    module.EasyDict = type("EasyDict", (dict,), {"__module__": module.__name__})
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "dnnlib", types.ModuleType("dnnlib"))
        patch.setitem(sys.modules, module.__name__, module)
        halves = {name: tensor.half() for name, tensor in state().items()}
        nested = module.EasyDict(path="somewhere")
        content = module.EasyDict(encoder=None, dataset_kwargs=nested, ema=dict(halves))
        (tmp_path / "w.pkl").write_bytes(pickle.dumps(content))
    assert same(tensors_of(tmp_path / "w.pkl"), halves)


def test_a_pickle_is_converted_once(tmp_path, forked_reader, monkeypatch):
    torch.save(state(), tmp_path / "w.pt")
    tensors_of(tmp_path / "w.pt")
    monkeypatch.setattr("cmkit.weights.pickles.pickle_to_safetensors", None)
    assert same(tensors_of(tmp_path / "w.pt"), state())


def test_a_damaged_conversion_is_made_again(tmp_path, forked_reader):
    torch.save(state(), tmp_path / "w.pt")
    tensors_of(tmp_path / "w.pt")
    (kept,) = (tmp_path / "cache/cmkit/converted").glob("*.safetensors")
    data = bytearray(kept.read_bytes())
    data[-3] ^= 1
    kept.write_bytes(data)
    assert same(tensors_of(tmp_path / "w.pt"), state())


class Runs:
    """Unpickled, it would leave a mark."""

    marker: ClassVar[str] = ""

    def __reduce__(self):
        return (os.system, (f"touch {self.marker}",))


class Allocates:
    def __reduce__(self):
        return (bytearray, (3_000_000_000,))


def hostile(kind: str, path: Path) -> None:
    match kind:
        case "runs code":
            torch.save({"a": Runs()}, path)
        case "runs code, plain pickle":
            path.write_bytes(pickle.dumps(Runs()))
        case "allocates":
            path.write_bytes(pickle.dumps(Allocates()))
        case "a view larger than its file":
            torch.save({"a": torch.zeros(1).expand(10**10)}, path)
        case "sparse":
            torch.save({"a": torch.eye(3).to_sparse_coo()}, path)
        case "complex":
            torch.save({"a": torch.zeros(3, dtype=torch.complex64)}, path)
        case "compressed":
            torch.save({"a": torch.zeros(1 << 22)}, stored := io.BytesIO())
            with (
                zipfile.ZipFile(stored) as old,
                zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new,
            ):
                for name in old.namelist():
                    new.writestr(name, old.read(name))
        case "truncated":
            torch.save(state(), path)
            path.write_bytes(path.read_bytes()[:-200])
        case "random bytes":
            path.write_bytes(b"\x80" + bytes(range(256)))
        case "empty":
            path.write_bytes(b"")
        case "deep":
            path.write_bytes(b"\x80\x02" + b"(" * 500_000 + b"t" * 500_000 + b".")
        case "endless":
            path.write_bytes(b"\x80\x02" + b"]q\x00" + b"h\x00a" * 10 + b".")
        case "no tensors":
            torch.save({"a": 1}, path)


KINDS = [
    "runs code",
    "runs code, plain pickle",
    pytest.param("allocates", marks=pytest.mark.slow),
    "a view larger than its file",
    "sparse",
    "complex",
    "compressed",
    "truncated",
    "random bytes",
    "empty",
    "deep",
    "endless",
    "no tensors",
]


@pytest.mark.parametrize("kind", KINDS)
def test_a_hostile_or_damaged_pickle_is_one_line_and_runs_nothing(
    tmp_path, monkeypatch, request, kind
):
    if kind not in {"runs code", "allocates"}:  # which a new process reads, as in earnest
        request.getfixturevalue("forked_reader")
    monkeypatch.setattr(Runs, "marker", str(tmp_path / "executed"))
    hostile(kind, tmp_path / "w.pt")
    with pytest.raises(CheckpointError) as error:
        tensors_of(tmp_path / "w.pt")
    assert str(tmp_path / "w.pt") in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "executed").exists()
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


@pytest.mark.slow
def test_the_readers_memory_is_bounded_by_its_file(tmp_path):
    """A child that allocates far more than its file holds ends, and says so."""
    content = b"\x80\x04" + b"".join(
        # BINBYTES8 claims what the file does not hold; the reader must not take it at its word.
        [b"\x8e" + (3 << 30).to_bytes(8, "little"), b"x" * 100]
    )
    (tmp_path / "w.pkl").write_bytes(content)
    # In a process of its own, whose only child is the reader.
    code = """
import resource, sys
from pathlib import Path
from cmkit import CheckpointError
from cmkit.weights.pickles import pickle_to_safetensors
try:
    pickle_to_safetensors(*map(Path, sys.argv[1:]))
except CheckpointError:
    print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""
    command = [sys.executable, "-c", code, tmp_path / "w.pkl", tmp_path / "o.safetensors"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert int(done.stdout) < 2 << 20, done.stderr  # KiB


def test_a_view_of_a_shared_storage_is_taken_as_it_is(tmp_path, forked_reader):
    base = torch.arange(12.0).reshape(3, 4)
    torch.save({"a": base, "b": base.t()}, tmp_path / "w.pt")
    assert torch.equal(tensors_of(tmp_path / "w.pt")["b"], base.t())


class Server(http.server.BaseHTTPRequestHandler):
    """Serves `content`; cuts the connection after `cut` bytes, honours Range by If-Range."""

    content: ClassVar[bytes] = b""
    tag: ClassVar[str] = '"1"'
    cut: ClassVar[int | None] = None
    ranges: ClassVar[list[str | None]] = []

    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        self.ranges.append(wanted)
        start = 0
        if wanted and self.headers.get("If-Range") == self.tag:
            start = int(wanted.removeprefix("bytes=").rstrip("-"))
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(self.content) - start))
        self.send_header("ETag", self.tag)
        self.end_headers()
        self.wfile.write(self.content[start : self.cut])

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def published(tmp_path, forked_reader) -> Iterator[functools.partial]:
    torch.save(state(), file := io.BytesIO())
    Server.content, Server.tag, Server.cut, Server.ranges = file.getvalue(), '"1"', None, []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()

    class Published(ADM):
        published: ClassVar = {"site:w": f"http://127.0.0.1:{server.server_port}/w.pt"}

    yield functools.partial(find, "site:w", Published())
    server.shutdown()
    server.server_close()


def test_published_weights_are_fetched_once_with_progress(published):
    weights = published()
    assert weights.missing
    events = list(download(weights))
    size = len(Server.content)
    assert (events[0].done, events[-1].done) == (0, size)
    assert {event.total for event in events} == {size}
    assert not published().missing
    assert same(read(published()), state())
    assert not list(weights.path.parent.glob("*.part*"))


def test_a_cut_download_goes_on_where_it_stopped(published):
    Server.cut = 500
    with pytest.raises(DownloadError):
        list(download(published()))
    assert published().missing
    Server.cut = None
    events = list(download(published()))
    assert Server.ranges[-1] == "bytes=500-"
    assert events[0].done == 500
    assert same(read(published()), state())


def test_a_file_that_changed_meanwhile_is_fetched_anew(published):
    Server.cut = 500
    with pytest.raises(DownloadError):
        list(download(published()))
    Server.cut, Server.tag = None, '"2"'
    list(download(published()))
    assert published().path.read_bytes() == Server.content


def test_published_weights_that_differ_from_their_first_use_are_refused(published):
    list(download(published()))
    read(published())
    torch.save({"a": torch.ones(3)}, published().path)
    with pytest.raises(CheckpointError, match="SHA-256") as error:
        read(published())
    assert "w.pt.sha256" in str(error.value)


def test_published_safetensors_are_pinned_as_well(published):
    weights = published()
    weights.path.parent.mkdir(parents=True)
    save_weights(weights.path, state())
    read(weights)
    save_weights(weights.path, {"a": torch.ones(3)})
    with pytest.raises(CheckpointError, match="SHA-256"):
        read(weights)


def test_without_a_network_the_file_its_address_and_its_folder_are_named(tmp_path):
    weights = Weights("site:w", tmp_path / "cache" / "w.pt", "http://127.0.0.1:9/w.pt")
    with pytest.raises(DownloadError) as error:
        list(download(weights))
    for word in ("site:w", "http://127.0.0.1:9/w.pt", str(tmp_path / "cache" / "w.pt")):
        assert word in str(error.value)


def test_a_name_that_is_not_published_suggests_the_nearest():
    with pytest.raises(CheckpointError, match="did you mean 'openai:ct_bedroom256'"):
        find("openai:ct_bedrom256", ADM())


def test_every_published_checkpoint_of_openai_has_a_name():
    openai = {name for name in ADM.published if name.startswith("openai:")}
    assert len({ADM.published[name].rsplit("/", 1)[1] for name in openai}) == 12
    assert ADM.published["openai:cd_imagenet64_lpips"].endswith(
        "/consistency/cd_imagenet64_lpips.pt"
    )


def test_a_path_may_say_so(tmp_path, forked_reader):
    torch.save(state(), tmp_path / "a:b.pt")
    assert same(read(find(f"path:{tmp_path / 'a:b.pt'}", ADM())), state())


def test_a_diffusers_folder_stands_for_its_weights(tmp_path, forked_reader):
    torch.save(state(), tmp_path / "x")
    (tmp_path / "pipe" / "unet").mkdir(parents=True)
    os.rename(tmp_path / "x", tmp_path / "pipe" / "unet" / "diffusion_pytorch_model.bin")
    assert same(tensors_of(tmp_path / "pipe"), state())


def test_tensors_of_no_known_layout_keep_their_names():
    from cmkit.weights import adapt

    network = TinyNetwork()
    assert same(adapt(state(), network, ()), state())
