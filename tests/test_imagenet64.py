"""Laws of ImageNet at 64x64: pixels, labels, order, the unpacked file, and hostile .npz files."""

from __future__ import annotations

import os
import pickle
import shutil
import struct
import subprocess
import sys
import time
import tracemalloc
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from cmkit_std.datasets import downsampled, npz
from cmkit_std.datasets.image_folder import ImageFolder
from cmkit_std.datasets.imagenet64 import ImageNet64
from PIL import Image

from cmkit import CmkitError, DataError, DataSpec, ResourceError
from tests.test_datasets import one_line, picture, rows, same, take

WIDTH = 3 * 64 * 64


def batch(seed: int, count: int) -> dict[str, np.ndarray]:
    """Random pictures as the files hold them."""
    rng = np.random.default_rng(seed)
    return {
        "data": rng.integers(0, 256, (count, WIDTH)).astype(np.uint8),
        "labels": rng.integers(1, 1001, count),
        "mean": rng.random(WIDTH),
    }


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """The user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def folder(tmp_path, home) -> Path:
    """Ten small train batches, two of them compressed, and the validation batch."""
    path = tmp_path / "Imagenet64"
    path.mkdir()
    for number in range(1, 11):
        save = np.savez_compressed if number in (2, 10) else np.savez
        save(path / f"train_data_batch_{number}.npz", **batch(number, 3 + number % 3))
    np.savez(path / "val_data.npz", **batch(99, 5))
    return path


def expected(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Pictures (N, 3, 64, 64) and labels from 0, in the order of the numbers of the files."""
    parts = [batch(99, 5)] if split == "val" else [batch(n, 3 + n % 3) for n in range(1, 11)]
    data = np.concatenate([part["data"] for part in parts])
    planes = [data[:, k * 4096 : (k + 1) * 4096].reshape(-1, 64, 64) for k in range(3)]
    return np.stack(planes, 1), np.concatenate([part["labels"] for part in parts]) - 1


def unpacked(home: Path) -> list[Path]:
    return sorted(path for path in home.rglob("*") if path.is_file() and path.name != "lock")


@pytest.mark.parametrize("split", ["train", "val"])
def test_pictures_are_red_green_and_blue_planes_in_the_order_of_the_numbers(folder, split):
    data = ImageNet64(path=str(folder), split=split)
    images, labels = expected(split)
    found = data.reference().images
    assert len(found) == len(images)
    assert np.array_equal(np.stack([found[i].numpy() for i in range(len(found))]), images)
    assert found[0].dtype == torch.uint8
    counts = tuple(np.bincount(labels, minlength=1000).tolist())
    assert data.spec() == DataSpec(channels=3, resolution=64, num_classes=1000, counts=counts)


def test_labels_belong_to_their_pictures_and_begin_at_zero(folder):
    images, labels = expected("train")
    ((x0, label),) = take(ImageNet64(path=str(folder)), 1, size=len(images))
    of = {rows_key(image): int(k) for image, k in zip(images, labels, strict=True)}
    seen = ((x0 + 1) * 127.5).round().to(torch.uint8).numpy()
    assert [of[rows_key(image)] for image in seen] == label.tolist()
    assert torch.equal(rows(x0), rows(torch.from_numpy(images).float() / 127.5 - 1))


def rows_key(image: np.ndarray) -> bytes:
    return np.ascontiguousarray(image).tobytes()


@pytest.mark.parametrize(("given", "ours"), [(1, 0), (1000, 999)])
@pytest.mark.parametrize("dtype", [np.int64, np.uint16, ">i4"])
def test_first_and_last_label_in_any_integers(tmp_path, home, given, ours, dtype):
    arrays = batch(0, 2) | {"labels": np.full(2, given, dtype)}
    np.savez(tmp_path / "train_data_batch_1.npz", **arrays)
    ((_, label),) = take(ImageNet64(path=str(tmp_path)), 1, size=2)
    assert label.tolist() == [ours] * 2


def test_batches_from_k_are_those_of_batch_k(folder):
    data = ImageNet64(path=str(folder), flip=True)
    whole = take(data, 12, size=7)
    assert same(whole[5:], take(data, 7, size=7, start=5))
    assert not same(whole, take(data, 12, size=7, seed=1))


def test_flip_mirrors_some_and_nothing_else(folder):
    data = ImageNet64(path=str(folder))
    plain = torch.cat([x0 for x0, _ in take(data, 10, size=7)])
    some = torch.cat([x0 for x0, _ in take(data.model_copy(update={"flip": True}), 10, size=7)])
    as_is, mirrored = ((x == some).flatten(1).all(1) for x in (plain, plain.flip(-1)))
    assert (as_is ^ mirrored).all()
    assert 15 < mirrored.sum() < 55


def test_spec_reads_headers_and_labels_only(folder, home, monkeypatch):
    read = []
    array = npz.array
    monkeypatch.setattr(
        downsampled, "array", lambda path, name: read.append(name) or array(path, name)
    )
    downsampled.labels.cache_clear()
    ImageNet64(path=str(folder)).spec()
    assert read == ["labels"] * 10
    assert not home.exists()


def test_pixels_are_unpacked_once_and_again_after_a_change(folder, home):
    data = ImageNet64(path=str(folder))
    before = data.reference()
    (file,) = unpacked(home)
    stamp = file.stat().st_mtime_ns
    assert data.reference().fingerprint == before.fingerprint
    assert file.stat().st_mtime_ns == stamp
    source = folder / "train_data_batch_1.npz"
    os.utime(source, ns=(1, 1))
    assert data.reference().fingerprint == before.fingerprint
    changed = batch(1, 4)
    changed["data"][0, 0] ^= 1
    np.savez(source, **changed)
    os.utime(source, ns=(1, 1))
    after = data.reference()
    assert after.fingerprint != before.fingerprint
    assert after.images[0][0, 0, 0] == before.images[0][0, 0, 0] ^ 1
    (other,) = unpacked(home)
    assert other != file


def test_splits_and_folders_do_not_share_pixels(folder, home, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    for data in (
        ImageNet64(path=str(folder)),
        ImageNet64(path=str(folder), split="val"),
        ImageNet64(path=str(tmp_path / "copy")),
    ):
        data.reference()
    assert len(unpacked(home)) == 3


def test_what_an_interrupted_process_left_is_neither_used_nor_kept(folder, home, monkeypatch):
    def dies(path, name):
        if path.name.endswith("_2.npz"):
            raise KeyboardInterrupt
        return np.zeros((4, WIDTH), np.uint8)

    data = ImageNet64(path=str(folder))
    with monkeypatch.context() as patched:
        patched.setattr(downsampled, "array", dies)
        downsampled.labels.cache_clear()
        with pytest.raises(KeyboardInterrupt):
            downsampled._unpack(downsampled.find(folder, "train"), lost_labels(home, patched))
    assert unpacked(home) == []
    data.reference()
    (file,) = unpacked(home)
    left = file.rename(file.with_suffix(".npy.part"))
    left.write_bytes(left.read_bytes()[:500])
    assert np.array_equal(data.reference().images[0].numpy(), expected("train")[0][0])
    assert unpacked(home) == [file]


def lost_labels(home: Path, patched: pytest.MonkeyPatch) -> Path:
    """Where to unpack; labels need not be read for it."""
    patched.setattr(downsampled, "labels", lambda files: np.zeros(1))
    (home / "cmkit").mkdir(parents=True)
    return home / "cmkit" / "x.npy"


def test_a_second_process_waits_for_the_first(folder, home):
    (cache := downsampled._cache(downsampled.find(folder, "train"))).parent.mkdir(parents=True)
    code = (
        "from cmkit_std.datasets import downsampled; from pathlib import Path\n"
        f"print(downsampled.pixels(downsampled.find(Path({str(folder)!r}), 'train')), flush=True)"
    )
    with downsampled._locked(cache.parent):
        other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        time.sleep(1.5)
        assert other.poll() is None
        assert not cache.exists()
    assert other.communicate(timeout=60)[0].strip() == str(cache)
    assert cache.exists()


def test_a_full_disk_is_told_before_anything_is_written(folder, home, monkeypatch):
    free = shutil.disk_usage(folder)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    data = ImageNet64(path=str(folder))
    for step in (data.spec, data.reference, lambda: take(data, 1)):
        with pytest.raises(ResourceError) as error:
            step()
        one_line(error, home, 40 * WIDTH, 1000, "XDG_CACHE_HOME")
    assert unpacked(home) == []
    np.savez(folder.parent / "s.npz", mu=np.zeros(4), sigma=np.eye(4))
    ImageNet64(path=str(folder), reference_npz=str(folder.parent / "s.npz")).spec()


def test_a_cache_that_cannot_be_written_is_named(folder, home):
    home.write_text("a file")
    with pytest.raises(ResourceError) as error:
        ImageNet64(path=str(folder)).reference()
    one_line(error, home, "XDG_CACHE_HOME")


def test_statistics_that_were_published_win(folder, home):
    np.savez(folder.parent / "s.npz", mu=np.zeros(4), sigma=np.eye(4))
    data = ImageNet64(path=str(folder), reference_npz=str(folder.parent / "s.npz"))
    assert data.reference().statistics["mu"].shape == (4,)
    assert [path.name for path in (home / "cmkit").iterdir()] == ["digests"]  # nothing is unpacked
    with pytest.raises(DataError, match=r"none\.npz"):
        ImageNet64(path=str(folder), reference_npz="none.npz").spec()


def test_a_folder_of_classes_is_read_as_image_folder_reads_it(tmp_path):
    for n in range(9):
        picture(tmp_path / f"n{n % 3:08d}" / f"{n}.png", n, (150 + n, 140))
    data = ImageNet64(path=str(tmp_path), flip=True)
    keys = {"resolution": 64, "labels": True, "flip": True, "orientation": "stored"}
    plain = ImageFolder(path=str(tmp_path), **keys)
    names = tuple(f"n{n:08d}" for n in range(3))
    assert data.spec() == plain.spec() == DataSpec(3, 64, 3, names, (3, 3, 3))
    assert same(take(data, 5), take(plain, 5))
    assert data.reference().fingerprint == plain.reference().fingerprint
    with pytest.raises(DataError) as error:
        ImageNet64(path=str(tmp_path), split="val").spec()
    one_line(error, tmp_path, "val_data.npz")


def refused(folder: Path, *parts: object, split: str = "train") -> None:
    with pytest.raises(CmkitError) as error:
        ImageNet64(path=str(folder), split=split).spec()
    assert type(error.value) is DataError
    one_line(error, folder, *parts)


def test_a_missing_file_is_named(folder):
    (folder / "train_data_batch_7.npz").unlink()
    refused(folder, "train_data_batch_7.npz", "no such file")
    (folder / "val_data.npz").unlink()
    refused(folder, "val_data.npz", "no such file", split="val")
    refused(folder / "nowhere", "no such folder")
    (folder / "train_data_batch_7.npz").mkdir()
    refused(folder, "train_data_batch_7.npz", "no regular file")


class Bomb:
    """Touches a file when it is unpickled."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return os.mkdir, (str(self.file),)


def test_nothing_is_unpickled(tmp_path, folder):
    for name in ("labels", "data", "mean"):
        arrays = batch(4, 4) | {name: np.array([Bomb(tmp_path / "boom")] * 4)}
        np.savez(folder / "train_data_batch_4.npz", **arrays)
        refused(folder, "train_data_batch_4.npz", f"{name}.npy announces object")
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "train_data_batch_1").write_bytes(pickle.dumps(Bomb(tmp_path / "boom")))
    refused(tmp_path / "old", "a pickle")
    assert not (tmp_path / "boom").exists()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"data": np.zeros((3, WIDTH), np.float32)}, "float32"),
        ({"data": np.zeros((3, WIDTH), np.int8)}, "int8"),
        ({"data": np.zeros((3, 3072), np.uint8)}, "(3, 3072)"),
        ({"data": np.zeros((3, 3, 64, 64), np.uint8)}, "(3, 3, 64, 64)"),
        ({"data": np.zeros((0, WIDTH), np.uint8), "labels": np.zeros(0, int)}, "(0, 12288)"),
        ({"labels": np.array([1, 0, 5])}, "label 0 of picture 1"),
        ({"labels": np.array([1, 2, 1001])}, "label 1001 of picture 2"),
        ({"labels": np.array([1, -3, 2])}, "label -3 of picture 1"),
        ({"labels": np.array([1.0, 2.0, 3.0])}, "float64"),
        ({"labels": np.array([1, 2])}, "(2,), not integers (3,)"),
        ({"labels": np.array(["a", "b", "c"])}, "<U1"),
        ({"labels": None}, "holds data, mean, not"),
        ({"data": None}, "holds labels, mean, not"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_arrays_of_another_kind_are_named(folder, change, reason):
    arrays = {k: v for k, v in (batch(0, 3) | change).items() if v is not None}
    np.savez(folder / "train_data_batch_3.npz", **arrays)
    refused(folder, "train_data_batch_3.npz", reason)


def member(shape: object, body: bytes = b"", descr: str = "|u1") -> bytes:
    """A .npy file whose header says what we like."""
    text = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + body


HUGE = 2**31


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (member((HUGE, WIDTH)), f"announces uint8 ({HUGE}, 12288), but holds 0"),
        (member((2, WIDTH), bytes(2 * WIDTH - 1)), "but holds 24575"),
        (member((2, WIDTH), bytes(2 * WIDTH + 1)), "but holds 24577"),
        (member((-2, -WIDTH), bytes(2 * WIDTH)), "(-2, -12288), but holds"),
        (member("(" * 300), "not a whole"),
        (member("[" * 9000), "not a whole"),
        (member((10**4000, 1)), "not a whole"),
        (b"\x93NUMPY\x03\x00" + bytes(100), "npy version (3, 0)"),
        (b"", "not a whole"),
        (bytes(2**26), "not a whole"),
    ],
    ids=["huge", "short", "long", "negative", "brackets", "deep", "digits", "v3", "empty", "bomb"],
)
def test_a_hostile_member_costs_nothing_and_is_named(folder, data, reason):
    with zipfile.ZipFile(folder / "val_data.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("data.npy", data)
        archive.writestr("labels.npy", member((2,), b"\1\2"))
    del data
    tracemalloc.start()
    refused(folder, "val_data.npz", reason, split="val")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**22


def test_pixels_in_fortran_order_are_the_same_pictures(folder):
    plain = [x0 for x0, _ in take(ImageNet64(path=str(folder)), 5)]
    arrays = batch(3, 3) | {"data": np.asfortranarray(batch(3, 3)["data"])}
    np.savez(folder / "train_data_batch_3.npz", **arrays)
    again = [x0 for x0, _ in take(ImageNet64(path=str(folder)), 5)]
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED])
@pytest.mark.parametrize("count", [1, 3, 22, 40])
def test_a_changed_bit_is_found_wherever_it_is(tmp_path, home, method, count):
    """By the CRC-32, also where the damaged stream still decompresses to as many bytes."""
    body = member((count, WIDTH), batch(count, count)["data"].tobytes())
    crc = struct.pack("<I", zlib.crc32(body))
    with zipfile.ZipFile(tmp_path / "val_data.npz", "w", method) as archive:
        archive.writestr("data.npy", body)
        archive.writestr("labels.npy", member((count,), bytes([1]) * count))
    raw = (tmp_path / "val_data.npz").read_bytes()
    (tmp_path / "val_data.npz").write_bytes(raw.replace(crc, bytes([crc[0] ^ 1, *crc[1:]])))
    with pytest.raises(DataError) as error:
        ImageNet64(path=str(tmp_path), split="val").reference()
    one_line(error, tmp_path, "data.npy is damaged", "CRC")
    assert unpacked(home) == []


def test_a_truncated_or_emptied_file_is_named(folder):
    whole = (folder / "val_data.npz").read_bytes()
    for cut in (0, 10, len(whole) // 2, len(whole) - 1):
        (folder / "val_data.npz").write_bytes(whole[:cut])
        refused(folder, "val_data.npz", "not a whole", split="val")


@pytest.mark.parametrize("number", [1, 2])
def test_damaged_pixels_stop_training_and_leave_nothing(folder, home, number):
    file = folder / f"train_data_batch_{number}.npz"
    damaged = bytearray(file.read_bytes())
    damaged[len(damaged) // 4] ^= 255
    file.write_bytes(damaged)
    data = ImageNet64(path=str(folder))
    data.spec()
    with pytest.raises(DataError) as error:
        take(data, 1)
    one_line(error, file, "data.npy is damaged")
    assert unpacked(home) == []


def test_a_member_shorter_than_the_zip_says_is_damaged(folder, home):
    """A zip that overstates a stored member reads as an early end, with the right CRC-32."""
    body = member((2, WIDTH), bytes(WIDTH))
    file = folder / "val_data.npz"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("data.npy", body)
        archive.writestr("labels.npy", member((2,), b"\1\2"))
    raw = bytearray(file.read_bytes())
    entry = raw.index(b"PK\1\2")
    assert struct.unpack_from("<I", raw, entry + 24)[0] == len(body)
    struct.pack_into("<I", raw, entry + 24, len(body) + WIDTH)
    file.write_bytes(raw)
    data = ImageNet64(path=str(folder), split="val")
    data.spec()
    with pytest.raises(DataError) as error:
        data.reference()
    one_line(error, file, "data.npy is damaged")
    assert unpacked(home) == []


def test_an_unpacked_file_that_was_cut_is_named(folder, home):
    data = ImageNet64(path=str(folder))
    data.reference()
    (file,) = unpacked(home)
    os.truncate(file, 5000)
    with pytest.raises(DataError) as error:
        data.reference()
    one_line(error, file, "remove it")


def test_images_travel_to_other_processes_without_their_pixels(folder):
    images = ImageNet64(path=str(folder)).reference().images
    images[0]
    sent = pickle.dumps(images)
    assert len(sent) < 1000
    assert torch.equal(pickle.loads(sent)[3], images[3])


def test_a_picture_saved_as_a_row_is_the_picture_of_a_folder(tmp_path, home):
    """Both forms agree where the preprocessing is the identity."""
    file = picture(tmp_path / "classes" / "n0" / "0.png", 0, (64, 64))
    planes = np.array(Image.open(file)).transpose(2, 0, 1).reshape(1, WIDTH)
    (tmp_path / "npz").mkdir()
    np.savez(tmp_path / "npz" / "val_data.npz", data=planes, labels=[1])
    from_rows = take(ImageNet64(path=str(tmp_path / "npz"), split="val"), 2)
    assert same(from_rows, take(ImageNet64(path=str(tmp_path / "classes")), 2))
