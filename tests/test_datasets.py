"""Laws of the data sets: order, resumption, and one line for every kind of damaged file."""

from __future__ import annotations

import gzip
import itertools
import os
import struct
import subprocess
import sys
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from cmkit_std.datasets import pictures
from cmkit_std.datasets.digits import Digits, digits
from cmkit_std.datasets.fashion_mnist import CLASSES, DEBIAN, FashionMNIST
from cmkit_std.datasets.image_folder import ImageFolder
from cmkit_std.datasets.imagenet64 import ImageNet64
from cmkit_std.datasets.lsun import LSUN
from PIL import Image

from cmkit import DataError, Dataset, DataSpec
from cmkit.batches import batch_indices

CPU = torch.device("cpu")


def take(dataset: Dataset, count: int, size: int = 4, seed: int = 0, start: int = 0) -> list:
    """(x0, label) of `count` batches from `start` on."""
    stream = dataset.batches(size, seed, CPU, start=start)
    return [(x0, cond.label) for x0, cond in itertools.islice(stream, count)]


def same(a: list, b: list) -> bool:
    return all(
        torch.equal(x, y) and (k is None or torch.equal(k, m))
        for (x, k), (y, m) in zip(a, b, strict=True)
    )


def one_line(error: pytest.ExceptionInfo, *parts: object) -> None:
    message = str(error.value)
    assert "\n" not in message
    assert ";" in message or ":" in message
    for part in parts:
        assert str(part) in message


def picture(path: Path, seed: int, size: tuple[int, int] = (20, 16), mode: str = "RGB") -> Path:
    """A random picture in a lossless file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    bands = len(Image.new(mode, (1, 1)).getbands())
    shape = (size[1], size[0], bands) if bands > 1 else (size[1], size[0])
    noise = np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)
    Image.fromarray(noise).convert(mode).save(path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Eleven pictures of three classes."""
    for n in range(11):
        picture(tmp_path / "pictures" / f"class_{n % 3}" / f"{n:02d}.png", n)
    return tmp_path / "pictures"


@pytest.fixture(params=["digits", "folder", "streamed", "labelled"])
def dataset(request, folder: Path, monkeypatch) -> Dataset:
    if request.param == "digits":
        return Digits(split="test")
    if request.param == "streamed":
        monkeypatch.setattr(pictures, "RESIDENT_BYTES", 0)
    labels = request.param == "labelled"
    return ImageFolder(path=str(folder), resolution=8, labels=labels, flip=True)


@pytest.mark.parametrize("size", [1, 3, 10, 11, 25])
def test_every_image_is_seen_once_an_epoch(size):
    drawn = np.concatenate(list(itertools.islice(batch_indices(10, size, 0), 60 // size + 1)))
    for epoch in range(3):
        assert sorted(drawn[10 * epoch : 10 * (epoch + 1)]) == list(range(10))
    assert not np.array_equal(drawn[:10], drawn[10:20])


@pytest.mark.parametrize("start", [1, 2, 7, 10])
@pytest.mark.parametrize("size", [3, 10, 25])
def test_indices_from_batch_k_are_those_of_batch_k(size, start):
    whole = list(itertools.islice(batch_indices(10, size, 5), start + 4))
    resumed = list(itertools.islice(batch_indices(10, size, 5, start), 4))
    assert np.array_equal(whole[start:], resumed)


def test_batches_from_k_are_those_of_batch_k(dataset):
    assert same(take(dataset, 9)[5:], take(dataset, 4, start=5))


def test_batches_are_a_function_of_the_seed(dataset):
    assert same(take(dataset, 3, seed=1), take(dataset, 3, seed=1))
    assert not same(take(dataset, 3, seed=1), take(dataset, 3, seed=2))


def test_batches_draw_nothing_from_global_generators(dataset):
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    take(dataset, 2)
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])  # noqa: NPY002


def test_batches_are_the_reference_in_minus_one_to_one(folder):
    for data in (Digits(split="test"), ImageFolder(path=str(folder), resolution=8)):
        images = data.reference().images
        count = len(images)
        (x0, _), *_ = take(data, 1, size=count)
        expected = torch.stack([images[i] for i in range(count)]).float() / 127.5 - 1
        assert x0.dtype == torch.float32
        assert images[0].dtype == torch.uint8
        assert torch.equal(rows(x0), rows(expected))


def rows(x: torch.Tensor) -> torch.Tensor:
    """Images as rows in the order of their values."""
    return torch.from_numpy(np.array(sorted(x.flatten(1).tolist()), np.float32))


def test_parts_import_no_torch_and_no_scikit_learn():
    code = (
        "import sys, cmkit_std.datasets.digits, cmkit_std.datasets.fashion_mnist,"
        " cmkit_std.datasets.image_folder, cmkit_std.metrics.fidelity,"
        " cmkit_std.metrics.digits_judge, cmkit_std.metrics.emoji_judge;"
        "from cmkit_std.datasets.emoji import Emoji; Emoji().spec();"
        "from cmkit_std.datasets.digits import Digits; Digits().spec();"
        "print([m for m in ('torch', 'sklearn', 'PIL', 'torch_fidelity') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_digits_are_those_of_scikit_learn():
    from sklearn.datasets import load_digits

    images, labels = digits("all")
    loaded = load_digits()
    assert np.array_equal(np.round(images[:, 0] * (16 / 255)), loaded.images)
    assert np.array_equal(labels, loaded.target)
    counts = tuple(np.bincount(digits("train")[1]).tolist())
    assert Digits().spec() == DataSpec(1, 8, 10, tuple("0123456789"), counts)
    assert Digits(labels=False).spec().num_classes is None


def test_inverted_digits_are_the_same_ones_dark_on_light():
    plain, inverted = (
        next(Digits(inverted=value).batches(8, 0, torch.device("cpu"))) for value in (False, True)
    )
    torch.testing.assert_close(inverted[0], -plain[0])
    assert torch.equal(inverted[1].label, plain[1].label)
    assert Digits(inverted=True).identity() != Digits().identity()
    assert Digits(inverted=True).heldout() == Digits(split="test", inverted=True)


def test_digits_splits_are_disjoint_and_stratified():
    (train, train_labels), (test, test_labels) = digits("train"), digits("test")
    assert len(train) + len(test) == len(digits("all")[0]) == 1797
    assert not {image.tobytes() for image in test} & {image.tobytes() for image in train}
    assert np.allclose(np.bincount(test_labels) / np.bincount(train_labels), 0.25, atol=0.01)


def test_fingerprint_changes_with_a_pixel_and_a_shape():
    from cmkit_std.datasets.pixels import Pixels

    images = digits("test")[0].copy()
    before = Pixels(images).fingerprint()
    assert before == Digits(split="test").reference().fingerprint
    assert before != Pixels(images.reshape(-1, 1, 4, 16)).fingerprint()
    images[7, 0, 3, 3] ^= 1
    assert before != Pixels(images).fingerprint()


def idx(array: np.ndarray) -> bytes:
    header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.astype(np.uint8).tobytes()


@pytest.fixture
def fashion(tmp_path: Path) -> Path:
    """A tiny data set in the files of Fashion-MNIST, one half gzipped."""
    rng = np.random.default_rng(0)
    for prefix, count in (("train", 20), ("t10k", 5)):
        images, labels = rng.integers(0, 256, (count, 28, 28)), np.arange(count) % 10
        (tmp_path / f"{prefix}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images)))
        (tmp_path / f"{prefix}-labels-idx1-ubyte").write_bytes(idx(labels))
    return tmp_path


def test_idx_files_are_padded_and_joined(fashion):
    counts = {
        split: len(FashionMNIST(path=str(fashion), split=split).reference().images)
        for split in ("train", "test", "all")
    }
    assert counts == {"train": 20, "test": 5, "all": 25}
    assert FashionMNIST(path=str(fashion)).spec() == DataSpec(1, 32, 10, counts=(2,) * 10)
    padded = FashionMNIST(path=str(fashion)).reference().images[3]
    plain = FashionMNIST(path=str(fashion), resolution=28).reference().images[3]
    assert torch.equal(padded[:, 2:-2, 2:-2], plain)
    assert padded.sum() == plain.sum()


IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
GOOD = idx(np.zeros((20, 28, 28)))


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        (IMAGES, b"", "nothing"),
        (IMAGES, b"\x89PNG" + GOOD[4:], "89504e47"),
        (IMAGES, GOOD[:2] + b"\x0d" + GOOD[3:], "00000d03"),
        (IMAGES, GOOD[:10], "header"),
        (IMAGES, GOOD[:-1], "truncated to 15679"),
        (IMAGES, GOOD + b"\0", "trailing bytes"),
        (IMAGES, idx(np.zeros((20, 28, 27))), "28x27"),
        (IMAGES, idx(np.zeros((0, 28, 28))), "(0, 28, 28)"),
        (IMAGES, bytes([0, 0, 8, 3]) + b"\xff" * 12, "announces"),
        (IMAGES, idx(np.zeros((19, 28, 28))), "20 labels for 19 images"),
        (LABELS, idx(np.full(20, 10)), "label 10 of image 0"),
        (LABELS, idx(np.zeros((20, 1))), "00000802"),
        (IMAGES + ".gz", GOOD, "Not a gzipped file"),
        (IMAGES + ".gz", gzip.compress(GOOD)[:-9], "end-of-stream"),
        (IMAGES + ".gz", gzip.compress(GOOD)[:30] + b"\0" * 40, "cannot be read"),
        (LABELS, None, "no such file"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_damaged_idx_file_is_named(fashion, name, content, reason):
    for file in fashion.glob(f"{name.removesuffix('.gz')}*"):
        file.unlink()
    if content is not None:
        (fashion / name).write_bytes(content)
    with pytest.raises(DataError) as error:
        FashionMNIST(path=str(fashion)).spec()
    one_line(error, fashion, reason)


def test_a_gzip_bomb_costs_no_more_than_its_header_announces(fashion):
    bomb = gzip.compress(GOOD[:16] + bytes(2**28), compresslevel=1)
    (fashion / f"{IMAGES}.gz").write_bytes(bomb)
    tracemalloc.start()
    with pytest.raises(DataError) as error:
        FashionMNIST(path=str(fashion)).spec()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    one_line(error, IMAGES, "trailing bytes")
    assert peak < 2**22


def test_a_changed_idx_file_is_read_again(fashion):
    (fashion / IMAGES).write_bytes(GOOD)
    before = FashionMNIST(path=str(fashion)).reference().fingerprint
    (fashion / IMAGES).write_bytes(GOOD[:-1] + b"\1")
    os.utime(fashion / IMAGES, ns=(1, 1))
    assert FashionMNIST(path=str(fashion)).reference().fingerprint != before


@pytest.mark.skipif(not DEBIAN.is_dir(), reason="needs Debian's dataset-fashion-mnist")
def test_the_real_fashion_mnist_is_found_by_itself():
    data = FashionMNIST(split="test")
    assert data.spec() == DataSpec(1, 32, 10, CLASSES, (1000,) * 10)
    (x0, label), *_ = take(data, 1, size=10_000)
    assert torch.equal(torch.bincount(label), torch.full((10,), 1000))
    assert x0.min() == -1
    assert x0.max() == 1


def test_classes_are_folders_in_the_order_of_their_names(folder):
    data = ImageFolder(path=str(folder), resolution=8, labels=True)
    assert data.spec() == DataSpec(3, 8, 3, ("class_0", "class_1", "class_2"), (4, 4, 3))
    (_, label), *_ = take(data, 1, size=11)
    assert sorted(label.tolist()) == [0] * 4 + [1] * 4 + [2] * 3
    assert ImageFolder(path=str(folder), resolution=8).spec().num_classes is None


def test_labels_belong_to_their_pictures(tmp_path):
    for shade in range(3):
        for n in range(4):
            file = tmp_path / f"{shade}" / f"{n}.png"
            file.parent.mkdir(exist_ok=True)
            Image.new("L", (8, 8), 100 * shade).save(file)
    data = ImageFolder(path=str(tmp_path), resolution=8, labels=True, channels=1)
    for x0, label in take(data, 4, size=5):
        assert torch.equal(((x0[:, 0, 0, 0] + 1) * 1.275).round().long(), label)


def test_streamed_batches_are_those_from_memory(folder, monkeypatch):
    data = ImageFolder(path=str(folder), resolution=8, labels=True, flip=True)
    kept = take(data, 6)
    fingerprint = data.reference().fingerprint
    monkeypatch.setattr(pictures, "RESIDENT_BYTES", 0)
    assert same(kept, take(data, 6))
    streamed = data.reference()
    assert streamed.fingerprint == fingerprint
    assert torch.equal(streamed.images[4], streamed.images.__getitems__([4])[0])


def test_flip_mirrors_about_half_and_nothing_else(folder):
    data = ImageFolder(path=str(folder), resolution=8)
    plain = torch.cat([x0 for x0, _ in take(data, 40)])
    some = torch.cat([x0 for x0, _ in take(data.model_copy(update={"flip": True}), 40)])
    as_is = (plain == some).flatten(1).all(1)
    mirrored = (plain.flip(-1) == some).flatten(1).all(1)
    assert (as_is ^ mirrored).all()
    assert 50 < mirrored.sum() < 110


def test_a_picture_of_the_right_size_is_kept_to_the_bit(tmp_path):
    file = picture(tmp_path / "a.png", 0, (8, 8))
    data = ImageFolder(path=str(tmp_path), resolution=8)
    expected = torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1)
    assert torch.equal(data.reference().images[0], expected)


def test_crop_takes_the_middle_and_box_halving_averages(tmp_path):
    wide = np.zeros((16, 40), np.uint8)
    wide[:, 12:28] = np.random.default_rng(0).integers(0, 256, (16, 16))
    Image.fromarray(wide).save(tmp_path / "a.png")
    image = ImageFolder(path=str(tmp_path), resolution=8, channels=1).reference().images[0]
    middle = wide[:, 12:28].reshape(8, 2, 8, 2).mean((1, 3))
    assert np.abs(image[0].numpy() - middle).max() <= 1  # Pillow rounds once a pass


def test_transparency_is_laid_on_white_and_grey_is_repeated(tmp_path):
    Image.new("RGBA", (8, 8), (200, 0, 0, 0)).save(tmp_path / "a.png")
    Image.new("L", (8, 8), 77).save(tmp_path / "b.png")
    images = ImageFolder(path=str(tmp_path), resolution=8).reference().images
    assert (images[0] == 255).all()
    assert (images[1] == 77).all()


def test_reference_follows_names_and_contents(folder):
    data = ImageFolder(path=str(folder), resolution=8)
    before = data.reference().fingerprint
    assert data.reference().fingerprint == before
    assert data.model_copy(update={"channels": 1}).reference().fingerprint != before
    picture(folder / "class_0" / "00.png", 99)
    assert data.reference().fingerprint != before


def png_header(width: int, height: int) -> bytes:
    """A PNG of a few bytes that announces any size."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        crc = zlib.crc32(kind + body)
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", crc)

    ihdr = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", ihdr) + chunk(b"IDAT", zlib.compress(b"\0" * 99))


@pytest.mark.parametrize("ending", ["png", "jpg", "webp", "bmp", "tif", "gif", "ppm"])
def test_common_formats_are_read(tmp_path, ending):
    Image.new("RGB", (8, 8), (200, 100, 50)).save(tmp_path / f"one.{ending}")
    image = ImageFolder(path=str(tmp_path), resolution=8).reference().images[0]
    assert (image.float().mean((1, 2)) - torch.tensor([200.0, 100.0, 50.0])).abs().max() < 3


@pytest.mark.parametrize("format", ["EPS", "PDF", "TGA", "ICO", "PCX", "SGI"])
def test_formats_that_nobody_trains_on_are_not_even_tried(tmp_path, format, monkeypatch):
    """PostScript is a program, and rare decoders are rarely looked at."""
    Image.new("RGB", (16, 16)).save(tmp_path / "one.png", format)
    monkeypatch.setattr("subprocess.check_call", lambda *_: pytest.fail("ran Ghostscript"))
    with pytest.raises(DataError) as error:
        ImageFolder(path=str(tmp_path), resolution=8).spec()
    one_line(error, tmp_path / "one.png", "not a picture of PNG, JPEG")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not a picture"),
        (b"hello", "not a picture"),
        (png_header(60_000, 60_000), "shrink it"),
        (png_header(12_000, 12_000), "shrink it"),
        (png_header(9_000, 9_000), "9000x9000"),
    ],
    ids=["empty", "text", "3600M", "144M", "81M"],
)
def test_a_file_that_is_no_usable_picture_is_named_by_its_header(folder, content, reason):
    bad = folder / "class_1" / "zz.png"
    bad.write_bytes(content)
    with pytest.raises(DataError) as error:
        ImageFolder(path=str(folder), resolution=8).spec()
    one_line(error, bad, reason)


def test_every_file_that_is_no_picture_is_named_at_once(folder):
    for k in range(25):
        (folder / f"bad{k:02d}.txt").write_text("no")
    os.mkfifo(folder / "bad00.pipe")
    with pytest.raises(DataError) as error:
        ImageFolder(path=str(folder), resolution=8).spec()
    one_line(
        error, "26 pictures cannot be used", "bad00.pipe: no regular", "bad18.txt", "and 6 more"
    )
    assert "bad19.txt" not in str(error.value)


@pytest.mark.parametrize("kind", ["image_folder", "imagenet64", "lsun"])
def test_faults_are_of_every_picture_that_cannot_be_decoded(tmp_path, kind):
    for n in range(12):
        file = picture(tmp_path / "a" / f"{n:02d}.png", n, (64, 64))
        if n % 4 == 1:
            file.write_bytes(file.read_bytes()[:-1500])
    data = {
        "image_folder": ImageFolder(path=str(tmp_path), resolution=8),
        "imagenet64": ImageNet64(path=str(tmp_path)),
        "lsun": LSUN(path=str(tmp_path), resolution=8),
    }[kind]
    data.spec()  # headers are right
    faults = list(data.faults())
    assert [fault.partition(".png: cannot be decoded")[0][-2:] for fault in faults] == [
        *("01", "05", "09")
    ]
    assert not list(Digits().faults())


@pytest.mark.parametrize("labels", [True, False])
def test_bad_pictures_are_left_out_when_told_and_decoded_once(folder, labels, monkeypatch):
    good = ImageFolder(path=str(folder), resolution=8, labels=labels)
    kept, spec = take(good, 6), good.spec()
    torn = picture(folder / "class_0" / "torn.png", 7, (64, 64))
    torn.write_bytes(torn.read_bytes()[:-1500])
    (folder / "class_2" / "a.txt").write_text("no")
    os.mkfifo(folder / "class_1" / "pipe.png")
    data = good.model_copy(update={"on_bad": "skip"})
    assert same(take(data, 6), kept)
    assert data.spec() == spec
    assert not list(data.faults())
    assert [bad.partition(": ")[0][-8:] for bad in sorted(data.left_out())] == [
        *("torn.png", "pipe.png", "_2/a.txt")
    ]
    assert data.identity()["left_out"] == 3
    pictures.judged.cache_clear()
    decoded, honest = [], pictures.decode
    monkeypatch.setattr(
        pictures, "decode", lambda s, i, shape: decoded.append(s.name(i)) or honest(s, i, shape)
    )
    picture(folder / "class_0" / "new.png", 8)
    picture(torn, 9)
    assert len(data.left_out()) == 2
    assert sorted(Path(name).name for name in decoded) == ["new.png", "pipe.png", "torn.png"]


def test_a_class_without_a_sound_picture_is_named(folder):
    for file in (folder / "class_1").iterdir():
        file.write_bytes(b"no")
    with pytest.raises(DataError, match="class_1: no sound picture"):
        ImageFolder(path=str(folder), resolution=8, labels=True, on_bad="skip").spec()


def test_names_are_those_of_fashion_mnist_and_not_of_files_that_look_like_it(fashion):
    labels = np.array([9, 0, 0, 3, 0, *range(10), *range(5)])
    (fashion / LABELS).write_bytes(idx(labels))
    assert FashionMNIST(path=str(fashion)).spec().classes[9] == "Ankle boot"
    labels[0] = 5
    (fashion / LABELS).write_bytes(idx(labels))
    os.utime(fashion / LABELS, ns=(1, 1))
    assert FashionMNIST(path=str(fashion)).spec().classes == ()


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_a_truncated_picture_stops_training_and_metrics(folder, suffix, kept, monkeypatch):
    if not kept:
        monkeypatch.setattr(pictures, "RESIDENT_BYTES", 0)
    bad = picture(folder / "class_1" / f"zz.{suffix}", 7, (64, 64))
    bad.write_bytes(bad.read_bytes()[:-1500])
    data = ImageFolder(path=str(folder), resolution=8)
    with pytest.raises(DataError) as error:
        take(data, 1, size=12)
    one_line(error, bad, "cannot be decoded")
    with pytest.raises(DataError, match="cannot be decoded"):
        list(torch.utils.data.DataLoader(data.reference().images, 4))


def test_a_strip_too_narrow_to_enlarge_is_refused(tmp_path):
    Image.new("L", (100_000, 1)).save(tmp_path / "strip.png")
    with pytest.raises(DataError) as error:
        take(ImageFolder(path=str(tmp_path), resolution=64), 1)
    one_line(error, "strip.png", "100000x1")


@pytest.mark.parametrize("labels", [True, False])
def test_an_empty_or_missing_folder_is_named(tmp_path, labels):
    (tmp_path / "empty" / "class").mkdir(parents=True)
    (tmp_path / "bare").mkdir()
    for name in ("empty", "bare", "missing"):
        with pytest.raises(DataError) as error:
            ImageFolder(path=str(tmp_path / name), resolution=8, labels=labels).spec()
        one_line(error, tmp_path / name)


def test_a_loose_file_among_classes_is_named(folder):
    picture(folder / "loose.png", 0)
    with pytest.raises(DataError) as error:
        ImageFolder(path=str(folder), resolution=8, labels=True).spec()
    one_line(error, folder / "loose.png", "dataset.labels")


def test_dead_links_and_pipes_are_named_and_hidden_files_ignored(folder):
    (folder / ".DS_Store").write_bytes(b"x")
    data = ImageFolder(path=str(folder), resolution=8)
    data.spec()
    os.mkfifo(folder / "pipe.png")
    with pytest.raises(DataError, match=r"pipe\.png"):
        data.spec()
    (folder / "pipe.png").unlink()
    (folder / "dead.png").symlink_to(folder / "nothing.png")
    with pytest.raises(DataError, match=r"dead\.png"):
        data.spec()
