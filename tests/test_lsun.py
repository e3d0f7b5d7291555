"""Laws of LSUN: the LMDB of the real library is read to the byte, and no damage goes unnamed."""

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
from cmkit_std.datasets import mdb, pictures
from cmkit_std.datasets.image_folder import ImageFolder
from cmkit_std.datasets.lsun import LSUN
from cmkit_std.datasets.mdb import Mdb
from PIL import Image

from cmkit import DataError, DataSpec
from tests.test_datasets import one_line, png_header, rows, same, take

CPU = torch.device("cpu")
PAGE = 4096


def encoded(seed: int, kind: str, size: tuple[int, int] = (40, 36)) -> bytes:
    """A random picture of blocks, as a file of this kind."""
    noise = np.random.default_rng(seed).integers(0, 256, (9, 10, 3)).astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(noise).resize(size, Image.Resampling.NEAREST).save(stream, kind)
    return stream.getvalue()


def write(folder: Path, records: dict[bytes, bytes]) -> Path:
    """A database made by the library itself, as LSUN's were."""
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


@pytest.mark.parametrize("count", [1, 2, 70, 3000])
def test_records_are_those_of_the_library(tmp_path, count):
    rng = np.random.default_rng(count)
    sizes = rng.choice([1, 90, 1900, 2100, 4080, 4081, 9000], count, p=[0.3, 0.3] + [0.08] * 5)
    values = {rng.bytes(int(rng.integers(1, 300))): rng.bytes(int(size)) for size in sizes}
    folder = write(tmp_path / "db", values)
    # a second transaction moves pages about
    with lmdb.open(str(folder)) as environment, environment.begin(write=True) as transaction:
        for key in sorted(values)[1::3]:
            transaction.delete(key)
            del values[key]
    with lmdb.open(str(folder), readonly=True) as environment, environment.begin() as transaction:
        expected = list(transaction.cursor())
    assert dict(expected) == values
    records = Mdb.open(folder)
    assert [records.read(i) for i in range(len(records))] == [value for _, value in expected]
    for i, (key, _) in enumerate(expected):
        printable = all(32 <= byte < 127 for byte in key)
        text = key.decode() if printable else key.hex()
        assert records.name(i) == f"{folder / 'data.mdb'}: record {text!r}"


def test_reading_needs_no_package_and_writes_nothing(database, monkeypatch):
    monkeypatch.setitem(sys.modules, "lmdb", None)
    before = {path.name: path.read_bytes() for path in database.iterdir()}
    take(LSUN(path=str(database), resolution=16), 1)
    assert before == {path.name: path.read_bytes() for path in database.iterdir()}


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
    read = Mdb.read
    monkeypatch.setattr(Mdb, "read", lambda self, i: opened.append(i) or read(self, i))
    monkeypatch.setattr("cmkit_std.datasets.lsun.CHECKED", 9)
    monkeypatch.setattr(Image.Image, "load", None)
    data.spec()
    assert sorted(opened) == list(range(0, 90, 10))


@pytest.mark.parametrize("count", [1, 5, 9, 10, 11, 1000])
def test_a_sample_is_spread_over_all(count):
    chosen = mdb.spread(count, 10)
    assert chosen[0] == 0
    assert min(count, 5) <= len(chosen) <= 10
    assert count - chosen[-1] <= chosen.step


def test_fingerprint_follows_values_keys_shape_and_time(database, monkeypatch):
    data = LSUN(path=str(database), resolution=16)
    monkeypatch.setattr(mdb, "SAMPLED", 1)  # the changed record is not in the sample
    seen = [data.reference().fingerprint, LSUN(path=str(database)).reference().fingerprint]
    assert data.reference().fingerprint == seen[0]
    last = max(PICTURES)
    file = database / "data.mdb"
    info = file.stat()
    for change in ({last: PICTURES[last][:-1] + b"\1"}, {b"zzz": PICTURES[last]}):
        write(database, change)
        os.utime(file, ns=(info.st_atime_ns, info.st_mtime_ns))
        mdb._index.cache_clear()
        seen.append(data.reference().fingerprint)
    os.utime(file, ns=(1, 1))
    seen.append(data.reference().fingerprint)
    assert len(set(seen)) == len(seen) == 5


def test_fingerprint_tells_keys_apart_in_databases_made_alike(tmp_path, monkeypatch):
    monkeypatch.setattr(mdb, "SAMPLED", 1)
    prints = []
    for name in ("one", "two"):
        folder = write(tmp_path / name, {b"a": b"first", name.encode(): b"second"})
        os.utime(folder / "data.mdb", ns=(1, 1))
        prints.append(Mdb.open(folder).fingerprint())
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
        (b"x" * (2**16 + 1), "more than 65536"),
    ],
    ids=["text", "bomb", "81M", "large"],
)
def test_a_value_that_is_no_usable_picture_is_named_by_its_key(
    database, value, reason, monkeypatch
):
    monkeypatch.setattr(mdb, "MAX_BYTES", 2**16)
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
    with pytest.raises(DataError) as error:
        take(data, 1, size=11)
    one_line(error, database, key.decode(), "cannot be decoded")
    with pytest.raises(DataError, match="cannot be decoded"):
        list(torch.utils.data.DataLoader(data.reference().images, 4))


def test_databases_within_a_database_and_doubled_keys_are_refused(tmp_path):
    for name, dupsort in (("named", False), ("doubled", True)):
        with lmdb.open(str(tmp_path / name), max_dbs=2, map_size=2**24) as environment:
            inner = environment.open_db(b"inner", dupsort=dupsort)
            with environment.begin(write=True, db=inner) as transaction:
                transaction.put(b"key", b"value")
        refused(tmp_path / name, "holds databases in a database")


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> tuple[bytes, list[bytes], list[int]]:
    """A file of 300 records with branch pages and overflow, its values, its pages with keys."""
    rng = np.random.default_rng(0)
    values = keyed([rng.bytes(int(rng.integers(3000, 9000))) for _ in range(300)])
    folder = write(tmp_path_factory.mktemp("sound") / "db", values)
    raw = (folder / "data.mdb").read_bytes()
    structural = [0, 1]
    for number in range(2, len(raw) // PAGE):
        itself, _, flags = struct.unpack_from("<QHH", raw, number * PAGE)
        if itself == number and flags in (1, 2):
            structural.append(number)
    assert len(structural) > 6
    return raw, [values[key] for key in sorted(values)], structural


def outcome(folder: Path, raw: bytes) -> list[bytes] | str:
    """All values, or the one line that says why not."""
    (folder / "data.mdb").write_bytes(raw)
    mdb._index.cache_clear()
    try:
        records = Mdb.open(folder)
        return [records.read(i) for i in range(len(records))]
    except DataError as error:
        return str(error)


def test_a_truncated_file_is_always_named(sound, tmp_path):
    raw, values, _ = sound
    assert outcome(tmp_path, raw) == values
    draw = random.Random(0)
    for cut in [0, 1, 16, 151, 152, PAGE, 2 * PAGE, *(draw.randrange(len(raw)) for _ in range(40))]:
        found = outcome(tmp_path, raw[:cut])
        assert isinstance(found, str)
        assert found.startswith(f"{tmp_path / 'data.mdb'}: ")
        assert "\n" not in found


def test_a_zeroed_page_of_keys_is_always_named(sound, tmp_path):
    raw, _, structural = sound
    stale = 0
    for number in structural:
        zeroed = raw[: number * PAGE] + bytes(PAGE) + raw[(number + 1) * PAGE :]
        stale += not isinstance(outcome(tmp_path, zeroed), str)
    assert stale <= 3  # of two meta pages the older, and pages that no transaction uses any more


def test_random_damage_is_named_or_stays_inside_the_file(sound, tmp_path):
    """Nothing but DataError, whatever the bytes: the library dies of some of these."""
    raw, values, structural = sound
    draw = random.Random(1)
    named = 0
    for attempt in range(200):
        damaged = bytearray(raw)
        start = draw.choice(structural) * PAGE + draw.randrange((PAGE - 8, 48)[attempt % 2])
        damaged[start : start + 8] = draw.choice([draw.randbytes(8), b"\xff" * 8, bytes(8)])
        found = outcome(tmp_path, bytes(damaged))
        named += isinstance(found, str)
        assert isinstance(found, str) or len(found) == len(values)
    assert named > 70


def root_of(raw: bytes) -> int:
    """Where the page of the root begins, by the later of the two meta pages."""
    metas = [struct.unpack_from("<QQQ", raw, page * PAGE + 128) for page in (0, 1)]
    return max(metas, key=lambda meta: meta[-1])[0] * PAGE


def nodes_of(raw: bytes, page: int) -> list[int]:
    """Where the nodes of the page at this offset begin."""
    count = (struct.unpack_from("<H", raw, page + 12)[0] - 16) // 2
    return [page + node for node in struct.unpack_from(f"<{count}H", raw, page + 16)]


def first_leaf(raw: bytes) -> int:
    """Where the page of the first keys begins, below a root of one branch page."""
    return struct.unpack_from("<I", raw, nodes_of(raw, root_of(raw))[0])[0] * PAGE


@pytest.mark.parametrize("child", [0, 1])
@pytest.mark.parametrize("leads", ["back", "out"])
def test_a_page_number_that_leads_astray_ends(sound, tmp_path, child, leads):
    astray = bytearray(sound[0])
    number = root_of(astray) // PAGE if leads == "back" else len(astray) // PAGE + 10
    struct.pack_into("<IH", astray, nodes_of(astray, root_of(astray))[child], number, 0)
    assert "one too many" in outcome(tmp_path, bytes(astray))


@pytest.mark.parametrize("number", [0, 1, 10**9, 2**63, 2**64 - 1])
def test_a_value_outside_the_file_is_named_before_it_is_read(sound, tmp_path, number):
    outside = bytearray(sound[0])
    node = nodes_of(outside, first_leaf(outside))[3]
    assert outside[node + 4] == 1  # its value has pages of its own
    struct.pack_into("<Q", outside, node + 8 + outside[node + 6], number)
    assert "a value of page" in outcome(tmp_path, bytes(outside))


def test_exchanged_pages_and_a_wrong_count_are_named(sound, tmp_path):
    raw, _, structural = sound
    exchanged = bytearray(raw)
    one, two = first_leaf(raw), next(n * PAGE for n in structural if n * PAGE > first_leaf(raw))
    exchanged[one : one + PAGE], exchanged[two : two + PAGE] = (
        raw[two : two + PAGE],
        raw[one : one + PAGE],
    )
    assert f"says {two // PAGE}" in outcome(tmp_path, bytes(exchanged))
    counted = bytearray(raw)
    for page in (0, 1):
        struct.pack_into("<Q", counted, page * PAGE + 120, 299)
    assert "300 records, not the 299" in outcome(tmp_path, bytes(counted))


def test_other_formats_are_told_apart(tmp_path, sound):
    raw = bytearray(sound[0])
    struct.pack_into("<I", raw, 20, 3)
    assert "version 3" in outcome(tmp_path, bytes(raw))
    assert "begins with 504b0304" in outcome(tmp_path, b"\0" * 16 + b"\x04\x03KP" + bytes(5000))
