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
        ({"mu": np.array([None] * 4), "sigma": np.eye(4)}, "announces object"),
        ({"mu": np.array(["a"] * 4), "sigma": np.eye(4)}, "not mu"),
        ({"mu": np.zeros(4), "sigma": np.eye(4, dtype=complex)}, "not mu"),
        ({"mu": np.zeros(0), "sigma": np.zeros((0, 0))}, "not mu"),
        ({"mu": np.zeros(4), "sigma": np.tri(4)}, "sigma is not symmetric"),
        ({"mu": np.zeros(4), "sigma": -np.eye(4)}, "diagonal of variances"),
        ({"mu": np.zeros(4), "sigma": np.eye(4), "mu_s": np.zeros(3)}, "not mu_s"),
        ({"mu": np.zeros(4), "sigma": np.eye(4), "sigma_s": np.eye(3)}, "not mu_s"),
        (
            {"mu": np.zeros(4), "sigma": np.eye(4), "mu_s": np.zeros(3), "sigma_s": np.tri(3)},
            "sigma_s is not symmetric",
        ),
    ],
)
def test_a_file_that_is_no_reference_is_refused(tmp_path, arrays, said):
    path = tmp_path / "odd.npz"
    np.savez(path, **arrays)
    with pytest.raises(DataError, match=said) as caught:
        read(path, 1)
    assert "odd.npz" in str(caught.value)


def npy(shape, extra: str = "0") -> bytes:
    """A header of float64 of a shape, and 16 bytes of data."""
    header = f"{{'descr': '<f8', 'fortran_order': False, 'shape': {shape}, 'x': {extra}}}"
    header = header.replace(", 'x': 0", "").encode() + b"\n"
    return b"\x93NUMPY\1\0" + len(header).to_bytes(2, "little") + header + bytes(16)


def test_spatial_statistics_are_passed_on_where_there_are_some(published, tmp_path):
    assert read(published, 1).statistics.keys() == {"mu", "sigma"}
    with np.load(published) as arrays:
        spatial = {"mu_s": np.arange(3.0), "sigma_s": np.diag([1.0, 2, 3])}
        np.savez(tmp_path / "adm.npz", **arrays, **spatial)
    found = read(tmp_path / "adm.npz", 1).statistics
    assert found.keys() == {"mu", "sigma", "mu_s", "sigma_s"}
    assert np.array_equal(found["mu_s"], spatial["mu_s"])
    assert np.array_equal(found["sigma_s"], spatial["sigma_s"])


def test_statistics_and_images_each_serve_their_numbers(published):
    samples = Digits(split="test").reference().images
    metric = Fidelity(fid=True, precision_recall=True)
    metric.measure(samples, read(published, 1), CPU)
    count = len(digits("train")[0])
    assert metric.provenance()["compared_with"] == (
        f"fid: published statistics; precision_recall: {count} images"
    )


def test_a_damaged_file_is_refused(published, tmp_path):
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
    for content in (npy((10**15,)), npy((-1,)), npy((2,), "-" * 5000 + "8"), b"\x93NUMPY"):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("mu.npy", content)
        with pytest.raises(DataError, match="not a whole"):
            check(path, 1)
    locked = bytearray(published.read_bytes())
    for start in (locked.index(b"PK\3\4") + 6, locked.index(b"PK\1\2") + 8):
        locked[start] |= 1  # the bit of encrypted members
    path.write_bytes(locked)
    with pytest.raises(DataError, match="not a whole"):
        check(path, 1)


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
    odd = published.with_name("odd.npz")
    np.savez(odd, mu=np.zeros(4), sigma=np.tri(4))
    with pytest.raises(DataError, match=r"odd\.npz: sigma is not symmetric"):
        ImageFolder(path=str(tmp_path), resolution=8, reference_npz=str(odd)).spec()
    with pytest.raises(DataError, match=r"none\.npz"):
        ImageFolder(path=str(tmp_path), resolution=8, reference_npz="none.npz").spec()
