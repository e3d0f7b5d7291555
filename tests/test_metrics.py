"""Laws of the metrics: closed forms, torch-fidelity's own numbers, and weights that are missing."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torch
import torch_fidelity
from cmkit_std.datasets.digits import Digits, digits
from cmkit_std.metrics import digits_net, extract
from cmkit_std.metrics.digits_judge import DigitsJudge
from cmkit_std.metrics.extract import Extractor, Want
from cmkit_std.metrics.fidelity import Fidelity
from cmkit_std.metrics.frechet import frechet
from cmkit_std.metrics.streams import Gaussian
from torch import Tensor

from cmkit import (
    CheckpointError,
    DataError,
    DataSpec,
    DownloadError,
    NonFiniteError,
    RecipeError,
    Reference,
)

CPU = torch.device("cpu")
ALL = Fidelity(fid=True, isc=True, kid=True, precision_recall=True, kid_subset_size=100)
INCEPTION = "weights-inception-2015-12-05-6726825d.pth"


class Counted(torch.utils.data.Dataset):
    """Images that count how often they are read."""

    def __init__(self, images: Tensor):
        self.images, self.reads = images, 0

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        self.reads += 1
        return self.images[index]


class Toy(torch_fidelity.FeatureExtractorBase):
    """Three numbers an image; like Inception, it takes RGB only."""

    def __init__(self, name, features_list, **kwargs):
        super().__init__(name, features_list)

    @staticmethod
    def get_provided_features_list():
        return ("rgb",)

    @staticmethod
    def get_default_feature_layer_for_metric(metric):
        return "rgb"

    def forward(self, images):
        assert images.dtype == torch.uint8
        assert images.shape[1] == 3
        means = images.float().mean((2, 3))
        return (means.log() if self.name == "toy-nan" else means,)


for _name in ("toy", "toy-nan"):
    torch_fidelity.register_feature_extractor(_name, Toy)


def images(split: str) -> Tensor:
    return torch.from_numpy(digits(split)[0])


def real(pictures: Tensor, name: str = "real") -> Reference:
    return Reference(Counted(pictures), f"{name}-{pictures.shape}-{pictures.sum()}")


def measured(metric, pictures: Tensor, reference: Tensor) -> dict[str, float]:
    return metric.measure(Counted(pictures), real(reference), CPU)


def streamed(stream, features: Tensor, size: int) -> dict[str, Tensor]:
    made = stream(len(features))
    for batch in features.split(size):
        made.add(batch)
    return made.tensors()


def noisy(pictures: Tensor, deviation: float) -> Tensor:
    noise = torch.randn(pictures.shape, generator=torch.Generator().manual_seed(0))
    return (pictures.float() + deviation * noise).round().clamp(0, 255).to(torch.uint8)


def test_numbers_are_those_of_torch_fidelity():
    fake, truth = noisy(images("test"), 30), images("train")[:500]
    theirs = torch_fidelity.calculate_metrics(
        input1=Counted(fake),
        input2=Counted(truth),
        feature_extractor="cmkit-digits",
        **{"fid": True, "isc": True, "kid": True, "prc": True, "kid_subset_size": 100},
        **{"cuda": False, "cache": False, "verbose": False, "save_cpu_ram": True},
    )
    names = {
        "fid": torch_fidelity.KEY_METRIC_FID,
        "is_mean": torch_fidelity.KEY_METRIC_ISC_MEAN,
        "is_std": torch_fidelity.KEY_METRIC_ISC_STD,
        "kid_mean": torch_fidelity.KEY_METRIC_KID_MEAN,
        "kid_std": torch_fidelity.KEY_METRIC_KID_STD,
        "precision": torch_fidelity.KEY_METRIC_PRECISION,
        "recall": torch_fidelity.KEY_METRIC_RECALL,
    }
    ours = measured(ALL, fake, truth)
    assert set(ours) == set(ALL.keys()) == set(names)
    assert ours == pytest.approx({key: theirs[name] for key, name in names.items()}, rel=1e-5)


def test_fid_of_two_gaussians_is_the_closed_form():
    rng = np.random.default_rng(0)
    variances, means = [np.full(8, 4.0), np.arange(1.0, 9.0)], [np.zeros(8), np.full(8, 0.5)]
    drawn = []
    for variance, mean in zip(variances, means, strict=True):
        z = rng.standard_normal((500, 8))
        z -= z.mean(0)
        white = z @ np.linalg.inv(np.linalg.cholesky(np.cov(z, rowvar=False))).T
        drawn.append(torch.from_numpy(white * np.sqrt(variance) + mean))
    closed = 8 * 0.25 + ((np.sqrt(variances[0]) - np.sqrt(variances[1])) ** 2).sum()
    fake, truth = (streamed(Gaussian, x, 64) for x in drawn)
    assert frechet(fake, truth) == pytest.approx(closed, rel=1e-9)


def test_a_set_is_at_distance_zero_from_itself():
    found = measured(ALL, images("test"), images("test"))
    assert abs(found["fid"]) < 1e-4
    assert found["precision"] == found["recall"] == 1
    assert abs(found["kid_mean"]) < 0.1


def test_fid_grows_with_noise_and_with_a_missing_class():
    pictures, labels = images("train"), torch.from_numpy(digits("train")[1])
    fids = [measured(Fidelity(), noisy(pictures, sd), pictures)["fid"] for sd in (4, 16, 64)]
    assert fids == sorted(fids)
    half = torch.randperm(len(pictures))[:721]
    nine = measured(Fidelity(), pictures[labels != 3], pictures)["fid"]
    assert nine > 5 * measured(Fidelity(), pictures[half], pictures)["fid"]


def test_numbers_do_not_depend_on_order_or_batch():
    metric = Fidelity(precision_recall=True)
    fake, truth = noisy(images("test"), 30), images("train")[:400]
    order = torch.randperm(len(fake))
    straight = measured(metric, fake, truth)
    extract._references.clear()
    other = metric.model_copy(update={"batch": 33})
    assert measured(other, fake[order], truth.flip(0)) == pytest.approx(straight, rel=1e-4)


def test_features_of_the_digits_have_full_rank_and_unit_scale():
    want = Want("64", "rows")
    found = extract.features(
        Extractor("cmkit-digits", None, None), [want], Counted(images("train")), CPU, 512
    )[want]["rows"]
    assert found.shape == (1442, 64)
    assert torch.linalg.eigvalsh(torch.cov(found.T.double())).min() > 1e-4
    assert found.mean(0).abs().max() < 1e-3
    assert (found.std(0) - 1).abs().max() < 1e-3


def test_the_reference_is_read_once():
    reference = real(images("test"), "read-once")
    for sd in (8, 16, 24):
        ALL.measure(Counted(noisy(images("test"), sd)), reference, CPU)
    assert reference.images.reads == len(reference.images)


def test_the_cache_of_references_is_bounded_and_keyed_by_fingerprint():
    fids = {
        sd: measured(Fidelity(), images("test"), noisy(images("train"), sd))["fid"]
        for sd in (0, 10, 20, 40)
    }
    assert len(set(fids.values())) == 4
    assert len(extract._references) <= extract.KEPT_REFERENCES


def test_measuring_draws_nothing_from_global_generators():
    torch.manual_seed(3)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    measured(ALL, images("test"), images("test"))
    measured(DigitsJudge(), images("test"), images("test"))
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])  # noqa: NPY002


def test_only_keeps_the_number_and_drops_the_rest():
    assert ALL.only("fid").keys() == ("fid",)
    assert ALL.only("is_std").keys() == ("is_mean", "is_std")
    assert ALL.only("recall").keys() == ("precision", "recall")
    assert ALL.only("kid_mean").kid_subset_size == 100
    with pytest.raises(RecipeError, match="fid"):
        Fidelity().only("recall")


def test_nothing_to_measure_is_an_error():
    with pytest.raises(ValueError, match="nothing to measure"):
        Fidelity(fid=False)


@pytest.mark.parametrize(
    ("metric", "fake", "truth", "reason"),
    [
        (Fidelity(), 1, 50, "fidelity.fid: 1 samples; it needs at least 2"),
        (Fidelity(), 50, 1, "1 reference images"),
        (Fidelity(), 0, 50, "0 samples"),
        (Fidelity(kid=True), 50, 50, "metric.kid_subset_size"),
        (Fidelity(fid=False, kid=True, kid_subset_size=40), 50, 39, "39 reference images"),
        (Fidelity(precision_recall=True), 3, 50, "at least 4"),
        (Fidelity(fid=False, isc=True), 9, 50, "at least 10"),
    ],
)
def test_too_few_images_are_refused(metric, fake, truth, reason):
    with pytest.raises(DataError, match=reason):
        measured(metric, images("test")[:fake], images("train")[:truth])


def test_the_score_of_samples_alone_needs_no_reference():
    found = measured(Fidelity(fid=False, isc=True), images("test"), images("test")[:0])
    assert 5 < found["is_mean"] <= 10


def test_images_of_another_type_are_refused():
    with pytest.raises(DataError, match="uint8"):
        measured(Fidelity(), images("test").float(), images("test"))


def test_grey_is_repeated_for_rgb_networks():
    grey = noisy(images("test"), 30)
    metric = Fidelity(extractor="toy", precision_recall=True)
    truth = images("train")
    as_grey = measured(metric, grey, truth)
    assert as_grey == measured(metric, grey.expand(-1, 3, -1, -1), truth)
    assert metric.provenance()["extractor"] == "toy"


def test_non_finite_features_are_an_error_and_never_a_number():
    with pytest.raises(NonFiniteError, match="toy-nan"):
        measured(Fidelity(extractor="toy-nan"), torch.zeros(9, 1, 8, 8).byte(), images("test"))


def test_auto_is_the_shipped_net_for_small_grey_images_only(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for resolution in (8, 16):
        metric = Fidelity()
        metric.check(DataSpec(1, resolution), 1000)
        assert metric.provenance()["extractor"] == "cmkit-digits"
        sha256 = digits_net.SHA256["digits_features"]
        assert metric.provenance()["weights_sha256"] == sha256
    for data in (DataSpec(1, 32), DataSpec(3, 8), DataSpec(3, 64)):
        with pytest.raises(DownloadError):
            Fidelity().check(data, 1000)
        with pytest.raises(DataError, match="inception-v3-compat"):
            Fidelity(extractor="cmkit-digits").check(data, 1000)


def test_missing_inception_weights_fail_at_once_without_torch(tmp_path):
    code = (
        "import sys, time; t = time.process_time();"
        "from cmkit_std.metrics.fidelity import Fidelity;"
        "from cmkit import DataSpec, DownloadError\n"
        "try: Fidelity().check(DataSpec(3, 64), 1000)\n"
        "except DownloadError as error: print(error)\n"
        "assert 'torch' not in sys.modules; assert time.process_time() - t < 1"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "TORCH_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    line = done.stdout.strip()
    assert "\n" not in line
    for part in (INCEPTION, "https://", str(tmp_path / "hub" / "checkpoints"), "metric.weights"):
        assert part in line
    assert not list(tmp_path.iterdir())


def test_damaged_inception_weights_are_named(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    file = tmp_path / "hub" / "checkpoints" / INCEPTION
    file.parent.mkdir(parents=True)
    file.write_bytes(b"half a download")
    with pytest.raises(CheckpointError, match=INCEPTION):
        Fidelity().check(DataSpec(3, 64), 1000)


class Payload:
    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return os.mkdir, (str(self.file),)


@pytest.mark.parametrize("fault", ["missing", "garbage", "pickle", "empty"])
def test_weights_that_cannot_be_trusted_are_refused_and_never_run(tmp_path, fault):
    file, ran = tmp_path / "inception.pth", tmp_path / "ran"
    content = {"garbage": b"\0" * 999, "pickle": pickle.dumps(Payload(ran)), "empty": b""}
    if fault != "missing":
        file.write_bytes(content[fault])
    with pytest.raises(CheckpointError) as error:
        Fidelity(weights=str(file)).check(DataSpec(3, 64), 1000)
    assert str(file) in str(error.value)
    assert not ran.exists()


def test_weights_of_another_network_are_refused(tmp_path):
    torch.save({"fc.weight": torch.zeros(2, 2)}, tmp_path / "other.pth")
    vgg = Extractor("vgg16", str(tmp_path / "other.pth"), "0")
    with torch.device("meta"), pytest.raises(CheckpointError, match=r"other\.pth"):
        extract.features(
            vgg, [Want("fc2", "rows")], Counted(torch.zeros(2, 3, 8, 8).byte()), CPU, 2
        )


def test_a_download_that_fails_is_one_line(monkeypatch, tmp_path):
    def offline(url, file, hash_prefix, progress):
        assert hash_prefix.startswith("6726825d")
        raise urllib.error.URLError("offline")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(DownloadError, match=INCEPTION):
        Fidelity(download=True).check(DataSpec(3, 64), 1000)


@pytest.mark.parametrize("name", ["clip-vit-b-32", "dinov2-vit-s-14"])
def test_other_extractors_download_nothing_unasked(name):
    with pytest.raises(DownloadError, match=r"metric\.weights"):
        Fidelity(extractor=name).check(DataSpec(3, 64), 1000)


def test_an_unknown_extractor_names_the_known_ones():
    with pytest.raises(RecipeError, match="cmkit-digits"):
        Fidelity(extractor="inceptionv3").check(DataSpec(3, 64), 1000)


@pytest.mark.parametrize("name", ["digits_features", "digits_judge"])
def test_shipped_weights_are_verified(name, monkeypatch):
    monkeypatch.setitem(digits_net.SHA256, name, "0" * 64)
    digits_net.judge_net.cache_clear()
    load = digits_net.feature_net if "features" in name else lambda: digits_net.judge_net(CPU)
    with pytest.raises(CheckpointError, match=name):
        load()


def test_both_nets_know_the_held_out_digits():
    pictures, labels = digits("test")
    x, y = digits_net.to_net(torch.from_numpy(pictures)), torch.from_numpy(labels)
    _, logits = digits_net.feature_net()(x)
    assert (logits.argmax(1) == y).float().mean() >= 0.985
    assert (digits_net.judge_net(CPU)(x).argmax(1) == y).float().mean() >= 0.98


def test_the_judge_is_sure_of_digits_and_of_little_else():
    pictures, labels = images("test"), torch.from_numpy(digits("test")[1])
    other = torch.randperm(len(pictures))
    different = labels != labels[other]
    averages = ((pictures.float() + pictures[other].float()) / 2).byte()[different]
    uniform = torch.randint(0, 256, (1000, 1, 8, 8)).byte()
    found = measured(DigitsJudge(), pictures, pictures)
    assert found["confident"] == found["real_confident"] >= 0.97
    assert found["classes"] == 10
    nothing = measured(DigitsJudge(), uniform, pictures)
    assert nothing["confident"] <= 0.005
    assert measured(DigitsJudge(), averages, pictures)["confident"] <= 0.05
    assert measured(DigitsJudge(), pictures[labels == 3], pictures)["classes"] <= 2


def test_the_judge_refuses_what_it_cannot_know():
    DigitsJudge().check(DataSpec(1, 8), 1000)
    for data in (DataSpec(3, 8), DataSpec(1, 32)):
        with pytest.raises(DataError, match="fidelity"):
            DigitsJudge().check(data, 1000)
    with pytest.raises(DataError, match="no images"):
        measured(DigitsJudge(), images("test")[:0], images("test"))


def test_larger_grey_images_are_seen_by_their_areas():
    pictures = images("test")
    doubled = pictures.repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert torch.equal(digits_net.to_net(doubled), digits_net.to_net(pictures))


def test_check_digits_recipe_costs_little():
    metric = Fidelity()
    metric.check(Digits().spec(), 1000)
    assert metric.provenance()["torch_fidelity"] == torch_fidelity.__version__


@pytest.mark.parametrize("count", [2, 30, 64])
def test_the_distance_of_few_images_is_that_of_the_full_matrices(count):
    from cmkit_std.metrics.frechet import frechet_of_few
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    rng = np.random.default_rng(0)
    few = rng.standard_normal((count, 64)) * np.linspace(0.1, 3, 64)
    many = torch.from_numpy(1 + rng.standard_normal((400, 64)) @ rng.standard_normal((64, 64)))
    real = fid_features_to_statistics(many)
    full = fid_statistics_to_metric(fid_features_to_statistics(torch.from_numpy(few)), real, False)
    (expected,) = full.values()
    assert frechet_of_few(few, real) == pytest.approx(expected, rel=1e-5)
