"""Laws of the metrics: closed forms, torch-fidelity's own numbers, and weights that are missing."""

from __future__ import annotations

import hashlib
import os
import pickle
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch_fidelity
from cmkit_std.datasets.digits import Digits, digits
from cmkit_std.metrics import digits_net, extract, fidelity_meter, manifold, stored, streams
from cmkit_std.metrics.digits_judge import DigitsJudge
from cmkit_std.metrics.extract import Extractor, Want
from cmkit_std.metrics.extractor_weights import PUBLIC, Weights
from cmkit_std.metrics.fidelity import Fidelity
from cmkit_std.metrics.frechet import frechet, frechet_of_few
from cmkit_std.metrics.streams import IS_SPLITS, Gaussian, Score
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

from cmkit import (
    CheckpointError,
    DataError,
    DataSpec,
    DownloadError,
    NonFiniteError,
    RecipeError,
    Reference,
)
from cmkit.measure import meter

CPU = torch.device("cpu")
ALL = Fidelity(fid=True, isc=True, kid=True, precision_recall=True, kid_subset_size=100)
INCEPTION = "weights-inception-2015-12-05-6726825d.pth"
THEIRS = {
    "fid": torch_fidelity.KEY_METRIC_FID,
    "is_mean": torch_fidelity.KEY_METRIC_ISC_MEAN,
    "is_std": torch_fidelity.KEY_METRIC_ISC_STD,
    "kid_mean": torch_fidelity.KEY_METRIC_KID_MEAN,
    "kid_std": torch_fidelity.KEY_METRIC_KID_STD,
    "precision": torch_fidelity.KEY_METRIC_PRECISION,
    "recall": torch_fidelity.KEY_METRIC_RECALL,
}


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
    ours = measured(ALL, fake, truth)
    assert set(ours) == set(ALL.keys()) == set(THEIRS)
    assert ours == pytest.approx({key: theirs[name] for key, name in THEIRS.items()}, rel=1e-5)


@pytest.mark.parametrize("metric", [ALL, DigitsJudge()])
@pytest.mark.parametrize("sizes", [(355,), (1, 100, 254)])
def test_a_meter_gives_what_the_metric_measures_whatever_the_batches(metric, sizes):
    fake, truth = noisy(images("test"), 30), real(images("train")[:500])
    taken = meter(metric, len(fake), truth, CPU)
    for part in fake.split(list(sizes)):
        taken.add(part)
    assert taken.values() == pytest.approx(metric.measure(Counted(fake), truth, CPU), rel=1e-6)


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
    extract._references.cache_clear()
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
    assert extract._references.cache_info().currsize <= extract.KEPT_REFERENCES


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
    assert Fidelity(sfid=True).only("sfid").keys() == ("sfid",)
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


def test_missing_inception_weights_are_named_with_the_place_where_torch_keeps_them(
    monkeypatch, tmp_path
):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(DownloadError) as error:
        Fidelity().check(DataSpec(3, 64), 1000)
    line = str(error.value)
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


@pytest.fixture(scope="module")
def timm_weights(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("timm") / "test_efficientnet.safetensors"
    save_file(timm.create_model("test_efficientnet").state_dict(), path)
    return path


def test_a_network_of_timm_sees_images_as_it_was_trained(timm_weights):
    metric = Fidelity(extractor="timm-test_efficientnet", weights=str(timm_weights), isc=True)
    metric.check(DataSpec(3, 160), 1000)
    extractor = fidelity_meter.network(metric, 3, 160)
    wanted = [Want("pooled", "rows"), Want("logits", "rows")]
    shades = torch.arange(256, dtype=torch.uint8).repeat(3, 75)[:, : 160 * 160 // 2]
    image = torch.cat([shades, shades.flip(1)], 1).reshape(3, 160, 160)
    found = extract.features(extractor, wanted, Counted(image[None].repeat(2, 1, 1, 1)), CPU, 2)
    network = timm.create_model("test_efficientnet").eval()
    network.load_state_dict(load_file(timm_weights))
    mean, std = (torch.tensor(network.default_cfg[key]).view(-1, 1, 1) for key in ("mean", "std"))
    seen = ((image / 255 - mean) / std)[None]  # 160 pixels are its own size
    with torch.no_grad():
        expected = {"pooled": network.forward_features(seen).mean((2, 3)), "logits": network(seen)}
    for want in wanted:
        rows = found[want]["rows"]
        torch.testing.assert_close(rows, expected[want.layer].expand(2, -1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "weights", "error", "message"),
    [
        ("timm-test_vit9", None, RecipeError, "has no network 'test_vit9'"),
        ("timm-test_resnet", None, DownloadError, "needs the weights of test_resnet: put hugg"),
        ("timm-test_resnet", "nowhere", CheckpointError, "'nowhere': no such file"),
        ("timm-test_resnet", "", CheckpointError, "metric.weights: .*test_efficientnet"),
    ],
)
def test_weights_of_timm_that_are_none_are_refused(
    timm_weights, tmp_path, monkeypatch, name, weights, error, message
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    given = str(timm_weights) if weights == "" else weights
    black = torch.zeros(4, 3, 16, 16).byte()
    with pytest.raises(error, match=message):
        measured(Fidelity(extractor=name, weights=given), black, black)


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
    rng = np.random.default_rng(0)
    few = rng.standard_normal((count, 64)) * np.linspace(0.1, 3, 64)
    many = torch.from_numpy(1 + rng.standard_normal((400, 64)) @ rng.standard_normal((64, 64)))
    real = fid_features_to_statistics(many)
    full = fid_statistics_to_metric(fid_features_to_statistics(torch.from_numpy(few)), real, False)
    (expected,) = full.values()
    rows = {"rows": torch.from_numpy(few)}
    assert frechet(rows, real) == pytest.approx(expected, rel=1e-5)
    assert frechet(real, rows) == pytest.approx(expected, rel=1e-5)


def test_the_distance_of_two_small_sets_is_that_of_the_full_matrices():
    rng = np.random.default_rng(0)
    few, others = rng.standard_normal((20, 32)), 1 + 2 * rng.standard_normal((30, 32))
    full = frechet_of_few(few, {"mu": others.mean(0), "sigma": np.cov(others, rowvar=False)})
    assert frechet({"rows": few}, {"rows": others}) == pytest.approx(full, rel=1e-9)


@pytest.mark.parametrize("size", [1, 7, 64, 500])
def test_streamed_mean_and_covariance_are_those_of_all_rows_however_far_from_zero(size):
    rng = np.random.default_rng(0)
    rows = 1e6 + rng.standard_normal((500, 8)) @ rng.standard_normal((8, 8))
    found = streamed(Gaussian, torch.from_numpy(rows), size)
    assert found["mu"].numpy() == pytest.approx(rows.mean(0), rel=1e-14)
    assert found["sigma"].numpy() == pytest.approx(np.cov(rows, rowvar=False), rel=1e-7, abs=1e-8)


@pytest.mark.parametrize(("count", "few"), [(5, True), (8, True), (9, False)])
def test_rows_are_kept_only_while_they_take_less_room_than_their_covariance(count, few):
    rows = torch.randn(count, 8)
    found = streamed(Gaussian, rows, 2)
    assert found.keys() == ({"rows"} if few else {"mu", "sigma"})
    if few:
        assert torch.equal(found["rows"], rows)


@pytest.mark.parametrize(("stream", "bytes_an_image"), [(Gaussian, 0), (Score, 8)])
def test_what_a_stream_holds_does_not_grow_with_the_features_it_has_seen(stream, bytes_an_image):
    def after(count: int) -> int:
        made = stream(count)
        for batch in torch.randn(count, 16).split(32):
            made.add(batch)
        values = [x for v in vars(made).values() for x in (v if isinstance(v, list) else [v])]
        return sum(x.nbytes for x in values if isinstance(x, Tensor))

    assert after(640) - after(64) == bytes_an_image * (640 - 64)


@pytest.mark.parametrize("count", [10, 37, 500])
def test_the_streamed_inception_score_is_that_of_torch_fidelity(count):
    logits = 5 * torch.randn(count, 12)
    scores = streamed(Score, logits, 7)["scores"]
    theirs = torch_fidelity.metric_isc.isc_features_to_metric(logits, IS_SPLITS)
    found = scores.mean().item(), scores.std(correction=0).item()
    assert found == pytest.approx(tuple(theirs.values()), rel=1e-12)


def by_definition(samples: np.ndarray, real: np.ndarray, k: int) -> tuple[float, float]:
    """Precision and recall, ball by ball."""

    def inside(points, centres):
        radii = []
        for i, centre in enumerate(centres):
            others = np.delete(centres, i, 0)
            radii.append(np.sort(((others - centre) ** 2).sum(1))[k - 1])
        near = [
            any(((p - c) ** 2).sum() <= r for c, r in zip(centres, radii, strict=True))
            for p in points
        ]
        return np.mean(near)

    return inside(samples, real), inside(real, samples)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("kind", ["distinct", "ties", "copies"])
def test_precision_and_recall_are_those_of_the_definition(monkeypatch, kind, k):
    monkeypatch.setattr(manifold, "BLOCK", 7)
    rng = np.random.default_rng(k)
    samples, real = rng.standard_normal((30, 4)) + 1, rng.standard_normal((45, 4))
    if kind == "ties":
        samples, real = samples.round(), real.round()
    if kind == "copies":  # balls of radius 0, which hold their own copies
        real[:10], samples[:5] = real[0], real[0]
    samples, real = samples.astype(np.float32), real.astype(np.float32)
    expected = by_definition(samples.astype(np.float64), real.astype(np.float64), k)
    found = manifold.precision_recall(torch.from_numpy(samples), torch.from_numpy(real), k, CPU)
    assert found == expected
    assert found[0] != found[1]


def test_copies_are_in_balls_of_radius_zero_and_nothing_else_is(monkeypatch):
    monkeypatch.setattr(manifold, "BLOCK", 33)
    points = 1e3 + torch.randn(40, 2048)
    five_times = points.repeat(5, 1)
    near = points * (1 + 1e-4)
    assert (manifold._distances(points, points, CPU).diagonal() == 0).all()
    assert manifold.precision_recall(points, five_times, 3, CPU)[0] == 1
    assert manifold.precision_recall(near, five_times, 3, CPU)[0] == 0


class Shades(torch.utils.data.Dataset):
    """Two sets of RGB pictures that differ, and among themselves."""

    def __init__(self, seed: int, count: int = 12):
        generator = torch.Generator().manual_seed(seed)
        coarse = torch.rand(count, 3, 1 + seed, 1 + seed, generator=generator) * 255
        fine = torch.randn(count, 3, 24, 20, generator=generator) * 20
        smooth = torch.nn.functional.interpolate(coarse, size=(24, 20), mode="bilinear")
        self.pictures, self.reads = (smooth + fine).clamp(0, 255).to(torch.uint8), 0

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> Tensor:
        self.reads += 1
        return self.pictures[index]

    def save(self, folder: Path) -> str:
        folder.mkdir()
        for index, picture in enumerate(self.pictures):
            Image.fromarray(picture.permute(1, 2, 0).numpy()).save(folder / f"{index:03d}.png")
        return str(folder)


@pytest.fixture(scope="session")
def inception(tmp_path_factory):
    """A file of Inception weights with random content, of a scale that keeps signals alive."""
    from torch_fidelity import feature_extractor_inceptionv3 as theirs

    class Unloaded(theirs.FeatureExtractorInceptionV3):
        def load_state_dict(self, state):
            assert state == {}

    generator = torch.Generator().manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(theirs, "load_state_dict_from_url", lambda *_, **__: {})
        network = Unloaded("inception-v3-compat", ["2048"])
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=generator)
        elif isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.bias, std=0.2, generator=generator)
            torch.nn.init.normal_(module.running_mean, std=0.2, generator=generator)
    torch.nn.init.normal_(network.fc.weight, std=0.5, generator=generator)
    file = tmp_path_factory.mktemp("inception") / INCEPTION
    torch.save(network.state_dict(), file)
    return file


@pytest.fixture(scope="session")
def shades(inception):
    """(samples, real pictures, all metrics, their numbers) with these weights, in one pass each."""
    fake, real = Shades(1), Shades(2)
    metric = Fidelity(
        **{"fid": True, "sfid": True, "isc": True, "kid": True, "precision_recall": True},
        **{"kid_subset_size": 10, "weights": str(inception), "batch": 5},
    )
    with pytest.MonkeyPatch.context() as patch:
        trust(patch, inception)
        found = metric.measure(fake, Reference(real, "shades"), CPU)
    assert (fake.reads, real.reads) == (len(fake), len(real))
    return fake, real, metric, found


def trust(patch: pytest.MonkeyPatch, file: Path) -> None:
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    patch.setitem(PUBLIC, "inception-v3-compat", Weights(file.name, "example.org", digest))


def spatial_by_hand(file: Path, pictures: Tensor) -> Tensor:
    """`mixed_6/conv:0` of ADM's evaluator, written out: (N, 17 * 17 * 7), channels last."""
    network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], str(file))
    x = interpolate_bilinear_2d_like_tensorflow1x(pictures.float(), (299, 299), align_corners=False)
    blocks = [name for name, _ in network.named_children()]
    mixed = [name for name in blocks if name.startswith("Mixed")]
    with torch.inference_mode():
        x = (x - 128) / 128
        for name in blocks[: blocks.index(mixed[6])]:
            x = getattr(network, name)(x)
        layer = getattr(network, mixed[6]).branch1x1
        x = layer.bn(layer.conv(x)).clamp(min=0)
    return torch.stack([x[:, c, h, w] for h in range(17) for w in range(17) for c in range(7)], 1)


@pytest.mark.slow
def test_numbers_of_two_folders_are_those_of_torch_fidelity(shades, inception, tmp_path):
    fake, real, metric, ours = shades
    assert tuple(ours) == metric.keys()
    theirs = torch_fidelity.calculate_metrics(
        input1=fake.save(tmp_path / "fake"),
        input2=real.save(tmp_path / "real"),
        feature_extractor="inception-v3-compat",
        feature_extractor_weights_path=str(inception),
        **{"fid": True, "isc": True, "kid": True, "prc": True, "kid_subset_size": 10},
        **{"cuda": False, "cache": False, "verbose": False, "save_cpu_ram": True},
    )
    assert {key: ours[key] for key in THEIRS} == pytest.approx(
        {key: theirs[name] for key, name in THEIRS.items()}, rel=1e-4
    )


@pytest.mark.slow
def test_spatial_features_are_those_of_adms_evaluator(shades, inception):
    few = shades[0].pictures[:3]
    want = Want("spatial", "rows")
    network = Extractor("inception-v3-compat", str(inception), None)
    found = extract.features(network, [want], Counted(few), CPU, 2)[want]["rows"]
    expected = spatial_by_hand(inception, few)
    assert expected.shape == (3, 2023)
    assert (expected == 0).any()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_published_spatial_statistics_stand_for_the_images(shades, inception, monkeypatch):
    fake, real, metric, numbers = shades
    trust(monkeypatch, inception)
    want, alone = Want("spatial", "gaussian"), metric.only("sfid")
    assert alone.keys() == ("sfid",)
    extractor = fidelity_meter.network(alone, 3, 24)
    kept = extract.reference_features(extractor, [want], Reference(real, "shades"), CPU, 5)
    rows = kept[want]["rows"].numpy()
    assert real.reads == len(real)
    statistics = {"mu_s": rows.mean(0), "sigma_s": np.cov(rows, rowvar=False)}
    nothing = Counted(torch.zeros(0, 3, 24, 20, dtype=torch.uint8))
    found = alone.measure(fake, Reference(nothing, "npz", statistics), CPU)
    assert found == pytest.approx({"sfid": numbers["sfid"]}, rel=1e-4)
    assert alone.provenance()["compared_with"] == "sfid: published statistics"
    with pytest.raises(DataError, match=r"0 reference images.*mu_s and sigma_s"):
        alone.measure(fake, Reference(nothing, "npz", {"mu": 0, "sigma": 0}), CPU)


def test_spatial_features_are_refused_where_the_extractor_has_none():
    for metric in (Fidelity(sfid=True), Fidelity(sfid=True, extractor="vgg16")):
        with pytest.raises(RecipeError, match=r"fidelity.sfid.*inception-v3-compat"):
            metric.check(DataSpec(1, 8), 1000)


@pytest.fixture
def disk(monkeypatch, tmp_path):
    """An empty folder of stored features, and a process that remembers none."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    extract._references.cache_clear()
    return tmp_path / "cmkit" / "features"


def test_a_second_process_reads_no_real_image(disk):
    fake, real = images("test"), Counted(images("train")[:500])
    first = ALL.measure(Counted(fake), Reference(real, "stored"), CPU)
    assert real.reads == len(real)
    extract._references.cache_clear()
    assert ALL.measure(Counted(fake), Reference(real, "stored"), CPU) == first
    assert real.reads == len(real)
    extract._references.cache_clear()
    ALL.measure(Counted(fake), Reference(real, "another"), CPU)
    assert real.reads == 2 * len(real)


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-99] ^= 1
    file.write_bytes(data)


DAMAGE = {
    "flipped": flip,
    "cut": lambda file: file.write_bytes(file.read_bytes()[:-100]),
    "empty": lambda file: file.write_bytes(b""),
    "fifo": lambda file: (file.unlink(), os.mkfifo(file)),
    "shape": lambda file: stored.save(file.stem, {"rows": torch.zeros(3, 64)}),
}


@pytest.mark.parametrize("fault", sorted(DAMAGE))
def test_damaged_features_are_made_anew(disk, fault):
    reference = Reference(Counted(images("train")[:500]), "damaged")
    first = Fidelity().measure(Counted(images("test")), reference, CPU)
    (file,) = disk.iterdir()
    whole = file.read_bytes()
    DAMAGE[fault](file)
    extract._references.cache_clear()
    assert Fidelity().measure(Counted(images("test")), reference, CPU) == first
    assert reference.images.reads == 2 * len(reference.images)
    assert file.read_bytes() == whole


@pytest.mark.parametrize("width", [63, 2048])
def test_statistics_of_other_features_are_refused_before_any_work(width):
    fake, odd = Counted(images("test")), {"mu": np.zeros(width), "sigma": np.eye(width)}
    for statistics in (odd, {**odd, "sigma": np.eye(64)}, {**odd, "mu": np.zeros(64)}):
        with pytest.raises(DataError, match=r"fidelity\.fid: .*cmkit-digits gives 64"):
            Fidelity().measure(fake, Reference(Counted(images("test")), "odd", statistics), CPU)
    assert fake.reads == 3 * Fidelity().batch  # the first batch tells the shape


@pytest.mark.parametrize("stream", ["rows", "gaussian"])
def test_stored_tensors_of_another_shape_are_not_taken(stream):
    rows, few = torch.zeros(9, 4), torch.zeros(3, 4)
    gaussian = {"mu": torch.zeros(4), "sigma": torch.eye(4)}
    whole = streams.whole
    assert whole("rows", {"rows": rows}, 9)
    assert whole("gaussian", gaussian, 9)
    assert whole("gaussian", {"rows": few}, 3)
    for tensors, count in [
        ({"rows": rows}, 8),
        ({"rows": rows[0]}, 4),
        ({"rows": rows, "mu": rows}, 9),
        ({"rows": rows / 0}, 9),
        ({"mu": rows, "sigma": rows}, 9),
        ({"mu": rows[0], "sigma": rows}, 9),
        ({"mu": rows[0]}, 9),
        (gaussian, 4),
        ({}, 9),
    ]:
        assert not whole(stream, tensors, count)
    assert not whole("rows", gaussian, 9)
    assert not whole("gaussian", {"rows": rows}, 9)


def test_what_is_stored_is_named_by_all_that_it_follows_from():
    first = ("pixels", "inception-v3-compat", "weights", CPU, "2048", "rows")
    other = ("Pixels", "vgg16", "Weights", torch.device("cuda", 1), "768", "gaussian")
    names = {stored.name(*first)}
    for place, value in enumerate(other):
        changed = [*first]
        changed[place] = value
        names.add(stored.name(*changed))
    assert len(names) == 1 + len(other)


def test_features_of_weights_that_nobody_knows_are_not_stored(disk):
    Fidelity(extractor="toy").measure(Counted(images("test")), real(images("train")), CPU)
    assert not disk.exists()


def test_a_disk_that_takes_nothing_costs_no_number(disk):
    disk.parent.write_text("in the way")
    assert measured(Fidelity(), images("test"), images("train"))["fid"] > 0
    assert stored.load("anything") is None


def test_stored_features_are_bounded_and_the_least_used_go_first(disk, monkeypatch):
    monkeypatch.setattr(stored, "MAX_BYTES", 3 * 4500)
    tensors = {"rows": torch.zeros(1000)}
    for age, name in enumerate("abc"):
        stored.save(name, tensors)
        os.utime(disk / f"{name}.safetensors", (age, age))
    assert stored.load("a").keys() == {"rows"}
    stored.save("d", tensors)
    assert {file.stem for file in disk.iterdir()} == {"a", "c", "d"}
    monkeypatch.setattr(stored, "MAX_BYTES", 1)
    stored.save("e", tensors)
    assert {file.stem for file in disk.iterdir()} == {"e"}
