"""Reference files: their statistics decide the Frechet distance, their images the rest."""

import zipfile

import numpy as np
import pytest
import torch
from cmkit_std.datasets.digits import Digits, digits
from cmkit_std.datasets.image_folder import ImageFolder
from cmkit_std.datasets.reference_npz import check, read
from cmkit_std.metrics.extract import Extractor, Want, features
from cmkit_std.metrics.fidelity import Fidelity

from cmkit import DataError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """The digits' training split as guided-diffusion would publish it."""
    reference = Digits().reference()
    want = Want("64", "gaussian")
    digits_net = Extractor("cmkit-digits", None, None)
    gaussian = features(digits_net, [want], reference.images, CPU, 64)[want]
    images = digits("train")[0].transpose(0, 2, 3, 1)
    path = tmp_path_factory.mktemp("published") / "VIRTUAL_digits.npz"
    np.savez(path, mu=gaussian["mu"], sigma=gaussian["sigma"], arr_0=images)
    return path


def test_published_statistics_give_the_distance_that_their_images_give(published):
    samples = Digits(split="test").reference().images
    metric = Fidelity(fid=True, precision_recall=True)
    from_file = metric.measure(samples, read(published, 1), CPU)
    from_images = metric.measure(samples, Digits().reference(), CPU)
    assert from_file == pytest.approx(from_images, rel=1e-6)


def test_statistics_win_over_the_images_beside_them(published, tmp_path):
    with np.load(published) as arrays:
        shifted = {**arrays, "mu": arrays["mu"] + 1}
    np.savez(tmp_path / "shifted.npz", **shifted)
    samples = Digits(split="test").reference().images
    near = Fidelity().measure(samples, read(published, 1), CPU)["fid"]
    far = Fidelity().measure(samples, read(tmp_path / "shifted.npz", 1), CPU)["fid"]
    assert far > near + 10


def test_a_file_without_images_serves_the_distance_only(published, tmp_path):
    with np.load(published) as arrays:
        np.savez(tmp_path / "edm.npz", mu=arrays["mu"], sigma=arrays["sigma"])
    samples = Digits(split="test").reference().images
    reference = read(tmp_path / "edm.npz", 1)
    assert Fidelity().measure(samples, reference, CPU)["fid"] > 0
    with pytest.raises(DataError, match="0 reference images"):
        Fidelity(precision_recall=True).measure(samples, reference, CPU)


def test_statistics_of_another_network_are_refused(tmp_path):
    np.savez(tmp_path / "other.npz", mu=np.zeros(7), sigma=np.eye(7))
    samples = Digits(split="test").reference().images
    with pytest.raises(DataError, match="7 features, extractor cmkit-digits gives 64"):
        Fidelity().measure(samples, read(tmp_path / "other.npz", 1), CPU)


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"mu": np.zeros(4)}, "not mu"),
        ({"mu": np.zeros(4), "sigma": np.zeros((3, 3))}, "not mu"),
        (
            {"mu": np.zeros(4), "sigma": np.eye(4), "arr_0": np.zeros((2, 8, 8, 3), np.uint8)},
            "arr_0",
        ),
        ({"mu": np.zeros(4), "sigma": np.eye(4), "arr_0": np.zeros((2, 8, 8, 1))}, "arr_0"),
        ({"mu": np.full(4, np.nan), "sigma": np.eye(4)}, "NaN or infinity"),
        ({"mu": np.array([None] * 4), "sigma": np.eye(4)}, "mu"),
    ],
)
def test_a_file_that_is_no_reference_is_refused(tmp_path, arrays, said):
    path = tmp_path / "odd.npz"
    np.savez(path, **arrays)
    with pytest.raises(DataError, match=said) as caught:
        read(path, 1)
    assert "odd.npz" in str(caught.value)


def test_a_damaged_or_swollen_file_is_refused(published, tmp_path):
    path = tmp_path / "cut.npz"
    path.write_bytes(published.read_bytes()[:-500])
    with pytest.raises(DataError, match="not a whole"):
        check(path, 1)
    with pytest.raises(DataError, match="No such file"):
        check(tmp_path / "none.npz", 1)
    data = bytearray(published.read_bytes())
    data[len(data) // 2] ^= 255
    path.write_bytes(data)
    with pytest.raises(DataError, match="damaged"):
        read(path, 1).images[0]
    bomb = tmp_path / "bomb.npz"
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("mu.npy", bytes(2**26))
    with pytest.raises(DataError, match="would take"):
        check(bomb, 1)


def test_an_image_folder_measures_against_its_published_reference(published, tmp_path):
    from PIL import Image

    Image.fromarray(digits("test")[0][0, 0]).save(tmp_path / "0.png")
    dataset = ImageFolder(
        path=str(tmp_path), resolution=8, channels=1, reference_npz=str(published)
    )
    assert dataset.spec().resolution == 8
    reference = dataset.reference()
    assert len(reference.images) == len(digits("train")[0])
    assert reference.statistics["mu"].shape == (64,)
    with pytest.raises(DataError, match=r"none\.npz"):
        ImageFolder(path=str(tmp_path), resolution=8, reference_npz="none.npz").spec()
