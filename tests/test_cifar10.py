"""Laws of CIFAR-10: pixels, labels, and files that are not the binary archive."""

import itertools

import numpy as np
import pytest
import torch
from cmkit_std.datasets import cifar10
from cmkit_std.datasets.cifar10 import CIFAR10, RECORD

from cmkit import DataError, DataSpec

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The six files, with 20 images each."""
    monkeypatch.setattr(cifar10, "IMAGES", 20)
    rng = np.random.default_rng(0)
    for name in (*cifar10.FILES["train"], *cifar10.FILES["test"]):
        records = rng.integers(0, 256, (20, RECORD)).astype(np.uint8)
        records[:, 0] %= 10
        records.tofile(tmp_path / name)
    return tmp_path


def test_pixels_are_planes_and_labels_stay_with_their_images(folder):
    data = CIFAR10(path=str(folder))
    files = [np.fromfile(folder / name, np.uint8) for name in cifar10.FILES["train"]]
    counts = np.bincount(np.concatenate(files)[::RECORD])
    assert data.spec() == DataSpec(3, 32, 10, cifar10.CLASSES, tuple(counts.tolist()))
    images = data.reference().images
    assert len(images) == 100
    raw = (folder / "data_batch_2.bin").read_bytes()
    label, pixels = raw[3 * RECORD], raw[3 * RECORD + 1 : 4 * RECORD]
    channel, row, column = 1, 4, 7
    assert images[23][channel, row, column] == pixels[1024 * channel + 32 * row + column]
    x0, cond = next(data.batches(100, 0, CPU))
    known = (images[23].float() / 127.5 - 1).expand_as(x0)
    (where,) = (x0 == known).flatten(1).all(1).nonzero()
    assert cond.label[where] == label


def test_test_split_and_labels_are_told(folder):
    data = CIFAR10(path=str(folder), split="test", labels=False)
    assert data.spec() == DataSpec(3, 32, None)
    assert len(data.reference().images) == 20
    assert next(data.batches(4, 0, CPU))[1].label is None


def test_half_of_the_images_are_mirrored_when_told(folder):
    plain = CIFAR10(path=str(folder)).batches(50, 0, CPU)
    flipped = CIFAR10(path=str(folder), flip=True).batches(50, 0, CPU)
    mirrored = 0
    for (a, _), (b, _) in itertools.islice(zip(plain, flipped, strict=True), 2):
        same = (a == b).flatten(1).all(1)
        assert (same | (a.flip(-1) == b).flatten(1).all(1)).all()
        mirrored += int((~same).sum())
    assert 25 < mirrored < 75


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda f: (f / "data_batch_3.bin").unlink(), "no such file; unpack cifar-10-binary"),
        (
            lambda f: (f / "data_batch_3.bin").rename(f / "data_batch_3"),
            "pickles of the Python version",
        ),
        (lambda f: (f / "data_batch_3.bin").write_bytes(b"\x80\x02"), "2 bytes, not the 61460"),
        (
            lambda f: (f / "data_batch_3.bin").write_bytes(b"\x0b" * 20 * RECORD),
            "label 11 of image 0 is not one of 0 .. 9",
        ),
    ],
)
def test_another_file_is_refused_in_one_line(folder, spoil, said):
    spoil(folder)
    with pytest.raises(DataError) as caught:
        CIFAR10(path=str(folder)).spec()
    assert said in str(caught.value)
    assert "data_batch_3.bin" in str(caught.value)
    assert "\n" not in str(caught.value)
