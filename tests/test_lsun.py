"""Laws of LSUN: pictures and order of an LMDB, and one line for each file that is none."""

from __future__ import annotations

import hashlib
import io
import multiprocessing
import os
import pickle
import random
import struct
import sys
from pathlib import Path

import lmdb
import numpy as np
import pytest
import torch
from cmkit_std.datasets import lsun, pictures
from cmkit_std.datasets.image_folder import ImageFolder
from cmkit_std.datasets.lsun import LSUN, Records
from PIL import Image

from cmkit import DataError, DataSpec, PluginError
from tests.test_datasets import one_line, png_header, rows, same, take

PAGE = 4096


def encoded(seed: int, kind: str, size: tuple[int, int] = (40, 36)) -> bytes:
    """A random picture of blocks, as a file of this kind."""
    noise = np.random.default_rng(seed).integers(0, 256, (9, 10, 3)).astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(noise).resize(size, Image.Resampling.NEAREST).save(stream, kind)
    return stream.getvalue()


def write(folder: Path, records: dict[bytes, bytes]) -> Path:
    """A database made as LSUN's were; the library opens a file once a process."""
    lsun._held.clear()
    with (
        lmdb.open(str(folder), map_size=2**28) as environment,
        environment.begin(write=True) as transaction,
    ):
        for key, value in records.items():
            transaction.put(key, value)
    return folder


def keyed(values: list[bytes]) -> dict[bytes, bytes]:
    return {hashlib.sha1(value).hexdigest().encode(): value for value in values}


PICTURES = keyed([encoded(n, ("WEBP", "JPEG", "PNG")[n % 3]) for n in range(11)])


@pytest.fixture
def database(tmp_path: Path) -> Path:
    """Eleven pictures, webp, jpeg and png, under their SHA-1."""
    return write(tmp_path / "bedroom_train_lmdb", PICTURES)


@pytest.fixture
def unpacked(tmp_path: Path) -> Path:
    """The same pictures as files, whose names come in the order of the keys."""
    folder = tmp_path / "unpacked"
    folder.mkdir()
    for key, value in PICTURES.items():
        (folder / key.decode()).write_bytes(value)
    return folder


def refused(folder: Path, *parts: object) -> None:
    with pytest.raises(DataError) as error:
        LSUN(path=str(folder), resolution=16).spec()
    one_line(error, folder, *parts)


@pytest.mark.parametrize("resolution", [8, 16, 40])
def test_pictures_are_those_of_image_folder(database, unpacked, resolution):
    data = LSUN(path=str(database), resolution=resolution)
    folder = ImageFolder(path=str(unpacked), resolution=resolution)
    assert data.spec() == folder.spec() == DataSpec(3, resolution, None)
    ours, theirs = data.reference().images, folder.reference().images
    assert len(ours) == len(theirs) == 11
    assert all(torch.equal(ours[i], theirs[i]) for i in range(11))


@pytest.mark.parametrize("kept", [True, False])
def test_batches_are_those_of_image_folder_from_any_start(database, unpacked, kept, monkeypatch):
    if not kept:
        monkeypatch.setattr(pictures, "RESIDENT_BYTES", 0)
    data = LSUN(path=str(database), resolution=16, flip=True)
    whole = take(data, 9)
    assert same(whole, take(ImageFolder(path=str(unpacked), resolution=16, flip=True), 9))
    assert same(whole, take(LSUN(path=str(unpacked), resolution=16, flip=True), 9))
    assert same(whole[5:], take(data, 4, start=5))
    assert not same(whole, take(data, 9, seed=1))
    assert all(label is None for _, label in whole)


def test_an_epoch_is_the_reference(database):
    data = LSUN(path=str(database), resolution=16)
    ((x0, _),) = take(data, 1, size=11)
    images = data.reference().images
    expected = torch.stack([images[i] for i in range(11)]).float() / 127.5 - 1
    assert torch.equal(rows(x0), rows(expected))


def test_records_come_in_the_order_of_their_keys_and_errors_name_them(tmp_path):
    values = {b"b": b"small", b"a": b"large" * 2000, bytes([0, 255]): b"", b"a long key" * 20: b"x"}
    records = Records.open(write(tmp_path / "db", values))
    assert [records.read(i) for i in range(len(records))] == [values[key] for key in sorted(values)]
    names = ["00ff", "a", "a long key" * 20, "b"]
    file = tmp_path / "db" / "data.mdb"
    assert [records.name(i) for i in range(4)] == [f"{file}: record {name!r}" for name in names]


def test_reading_writes_nothing(database):
    before = {path.name: path.read_bytes() for path in database.iterdir()}
    take(LSUN(path=str(database), resolution=16), 1)
    assert before == {path.name: path.read_bytes() for path in database.iterdir()}


def test_only_an_lmdb_needs_the_package(database, unpacked, monkeypatch):
    lsun._held.clear()
    monkeypatch.setitem(sys.modules, "lmdb", None)
    assert LSUN(path=str(unpacked)).spec().resolution == 256
    with pytest.raises(PluginError) as error:
        LSUN(path=str(database)).spec()
    one_line(error, database, "pip install 'cmkit[lsun]'")


def test_a_file_that_was_replaced_is_read_anew(database, tmp_path):
    data = LSUN(path=str(database), resolution=16)
    before = data.reference()
    first = before.images[0]
    other = write(tmp_path / "other", keyed([encoded(99, "PNG")]))
    assert len(data.reference().images) == 11
    os.replace(other / "data.mdb", database / "data.mdb")
    after = data.reference()
    assert (len(after.images), after.fingerprint != before.fingerprint) == (1, True)
    assert not torch.equal(after.images[0], first)


def test_forked_and_spawned_workers_read_the_same(database, monkeypatch):
    monkeypatch.setattr(pictures, "RESIDENT_BYTES", 0)
    images = LSUN(path=str(database), resolution=16).reference().images
    expected = torch.stack([images[i] for i in range(11)])
    again = pickle.loads(pickle.dumps(images))
    assert torch.equal(torch.stack([again[i] for i in range(11)]), expected)
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    worker = context.Process(target=lambda: results.put(images[7].numpy()))
    worker.start()
    got = results.get(timeout=60)
    worker.join(60)
    assert np.array_equal(got, expected[7].numpy())


def test_spec_decodes_nothing_and_opens_a_sample(tmp_path, monkeypatch):
    data = LSUN(path=str(write(tmp_path / "db", keyed([encoded(n, "PNG") for n in range(90)]))))
    opened = []
    read = Records.read
    monkeypatch.setattr(Records, "read", lambda self, i: opened.append(i) or read(self, i))
    monkeypatch.setattr("cmkit_std.datasets.lsun.CHECKED", 9)
    monkeypatch.setattr(Image.Image, "load", None)
    data.spec()
    assert sorted(opened) == list(range(0, 90, 10))


@pytest.mark.parametrize("count", [1, 5, 9, 10, 11, 1000])
def test_a_sample_is_spread_over_all(count):
    chosen = lsun.spread(count, 10)
    assert chosen[0] == 0
    assert min(count, 5) <= len(chosen) <= 10
    assert count - chosen[-1] <= chosen.step


def test_fingerprint_follows_values_keys_shape_and_time(database, monkeypatch):
    data = LSUN(path=str(database), resolution=16)
    monkeypatch.setattr(lsun, "SAMPLED", 1)  # the changed record is not in the sample
    seen = [data.reference().fingerprint, LSUN(path=str(database)).reference().fingerprint]
    assert data.reference().fingerprint == seen[0]
    last = max(PICTURES)
    file = database / "data.mdb"
    info = file.stat()
    for change in ({last: PICTURES[last][:-1] + b"\1"}, {b"zzz": PICTURES[last]}):
        write(database, change)
        os.utime(file, ns=(info.st_atime_ns, info.st_mtime_ns))
        seen.append(data.reference().fingerprint)
    os.utime(file, ns=(1, 1))
    seen.append(data.reference().fingerprint)
    assert len(set(seen)) == len(seen) == 5


def test_fingerprint_tells_keys_apart_in_databases_made_alike(tmp_path, monkeypatch):
    monkeypatch.setattr(lsun, "SAMPLED", 1)
    prints = []
    for name in ("one", "two"):
        folder = write(tmp_path / name, {b"a": b"first", name.encode(): b"second"})
        os.utime(folder / "data.mdb", ns=(1, 1))
        prints.append(Records.open(folder).fingerprint())
    assert prints[0] != prints[1]


def test_statistics_that_were_published_win(database, tmp_path):
    np.savez(tmp_path / "stats.npz", mu=np.zeros(4), sigma=np.eye(4))
    data = LSUN(path=str(database), resolution=16, reference_npz=str(tmp_path / "stats.npz"))
    assert data.spec().resolution == 16
    assert data.reference().statistics["mu"].shape == (4,)
    with pytest.raises(DataError, match=r"none\.npz"):
        LSUN(path=str(database), reference_npz="none.npz").spec()


def test_a_database_in_a_folder_below_is_pointed_at(database):
    refused(database.parent, database.name, "in a folder below")


def test_no_folder_no_file_no_record(tmp_path):
    refused(tmp_path / "missing", "no such folder")
    refused(write(tmp_path / "empty", {}), "data.mdb", "no records")
    (tmp_path / "odd" / "data.mdb").mkdir(parents=True)
    refused(tmp_path / "odd", "no regular file")


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (b"hello", "not a picture"),
        (png_header(60_000, 60_000), "shrink it"),
        (png_header(9_000, 9_000), "9000x9000"),
    ],
    ids=["text", "bomb", "81M"],
)
def test_a_value_that_is_no_usable_picture_is_named_by_its_key(database, value, reason):
    write(database, {b"0culprit": value})
    refused(database, "data.mdb", "'0culprit'", reason)


@pytest.mark.parametrize("kept", [True, False])
def test_a_damaged_picture_stops_training_and_metrics(database, kept, monkeypatch):
    if not kept:
        monkeypatch.setattr(pictures, "RESIDENT_BYTES", 0)
    key = min(key for key, value in PICTURES.items() if value.startswith(b"\xff\xd8"))
    write(database, {key: PICTURES[key][:-200]})
    data = LSUN(path=str(database), resolution=16)
    data.spec()
    (fault,) = data.faults()
    assert key.decode() in fault
    with pytest.raises(DataError) as error:
        take(data, 1, size=11)
    one_line(error, database, key.decode(), "cannot be decoded")
    with pytest.raises(DataError, match="cannot be decoded"):
        list(torch.utils.data.DataLoader(data.reference().images, 4))


def test_databases_within_a_database_are_no_pictures(tmp_path):
    with lmdb.open(str(tmp_path / "db"), max_dbs=2, map_size=2**24) as environment:
        inner = environment.open_db(b"inner")
        with environment.begin(write=True, db=inner) as transaction:
            transaction.put(b"key", b"value")
    refused(tmp_path / "db", "'inner'", "not a picture")


def test_a_truncated_file_is_always_refused_before_it_is_read(tmp_path):
    """A page behind the end of the file would end the process by SIGBUS."""
    rng = np.random.default_rng(0)
    values = keyed([rng.bytes(int(rng.integers(3000, 9000))) for _ in range(300)])
    folder = write(tmp_path / "db", values)
    raw = (folder / "data.mdb").read_bytes()
    records = Records.open(folder)
    assert [records.read(i) for i in range(300)] == [values[key] for key in sorted(values)]
    draw = random.Random(0)
    cuts = [0, 1, 16, 151, 152, PAGE, PAGE + 152, 2 * PAGE, len(raw) - 1]
    for cut in [*cuts, *(draw.randrange(len(raw)) for _ in range(40))]:
        (folder / "data.mdb").write_bytes(raw[:cut])
        refused(folder, "data.mdb", "download")


def test_other_formats_are_refused(database):
    raw = bytearray((database / "data.mdb").read_bytes())
    struct.pack_into("<I", raw, 20, 3)  # its version
    for content in (raw, b"PK\3\4" * 2000):
        (database / "data.mdb").write_bytes(content)
        refused(database, "data.mdb", "not an LMDB")


def test_a_page_that_lmdb_finds_damaged_is_one_line(database):
    """Damage that it does not find can end the process, which no test can want."""
    raw = bytearray((database / "data.mdb").read_bytes())
    metas = [struct.unpack_from("<QQQ", raw, page * PAGE + 128) for page in (0, 1)]
    root = max(metas, key=lambda meta: meta[-1])[0]
    struct.pack_into("<H", raw, root * PAGE + 10, 0)  # a page of no type
    (database / "data.mdb").write_bytes(raw)
    refused(database, "data.mdb", "not a whole LMDB")
