"""Laws of the intervals: coverage where the truth is known, closed forms, and what may be said."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cmkit_std.metrics.frechet import frechet
from scipy.integrate import quad
from torch_fidelity.metric_kid import kernel_mmd, kid_features_to_metric

from benchmarks.coverage import (
    distance,
    draw,
    frechet_rows,
    kernel_truth,
    kid_rows,
    over_seeds,
    world,
)
from cmkit.errors import DataError, NonFiniteError
from cmkit.suite.intervals import (
    CHECKPOINTS,
    Influence,
    Interval,
    _halves,
    few_images,
    frechet_influence,
    holm,
    kid_influence,
    mean_interval,
    paired_difference,
    same_noise_difference,
    verdict,
    welch_difference,
)

WORLD = world(64, np.random.default_rng(0))
POLY = {"kid_kernel": "poly", "kid_kernel_poly_degree": 3, "kid_kernel_poly_coef0": 1}


def features(n: int, d: int = 12, seed: int = 0) -> np.ndarray:
    """Correlated features (n, d) of skewed, heavy-tailed marginals."""
    rng = np.random.default_rng(seed)
    return rng.gamma(2, size=(n, d)) @ rng.standard_normal((d, d)) / 3 + rng.standard_normal(d)


@pytest.mark.slow
def test_intervals_over_seeds_cover_the_truth():
    """Over 1,000 draws or more, of a pool of 5,000 pairs of trainings."""
    rows = list(over_seeds(WORLD, 40, 5000, 1000, np.random.default_rng(1)))
    assert len(rows) == 9
    assert all(0.93 <= covered <= 0.97 for *_, covered in rows), rows


@pytest.mark.slow
def test_the_interval_of_a_difference_of_frechet_distances_covers_the_truth():
    (_, _, _, covered), _ = frechet_rows(WORLD, 320, 500, np.random.default_rng(2))
    assert 0.93 <= covered <= 0.97


def test_it_does_where_the_bias_is_most_of_the_distance():
    """Fewer images than features, and models so near the reference that the distance of so few is
    dozens of times the truth. The jackknife's variance would cover in 99 of 100 cases."""
    near = world(64, np.random.default_rng(0), far=0.3)
    (_, _, _, covered), _ = frechet_rows(near, 60, 500, np.random.default_rng(3))
    assert 0.93 <= covered <= 0.97


def test_the_interval_of_a_difference_of_kids_covers_the_truth():
    ((_, _, _, covered),) = kid_rows(WORLD, 128, 500, np.random.default_rng(4))
    assert 0.93 <= covered <= 0.97


def t_density(x: float, freedom: float) -> float:
    return (1 + x * x / freedom) ** (-(freedom + 1) / 2)


def test_the_interval_of_a_mean_is_student_s():
    found = mean_interval([2.0, 4.0, 9.0])
    error = (13 / 3) ** 0.5  # variance 13, three seeds
    assert found.value == 5
    assert (found.high - 5, 5 - found.low) == pytest.approx((4.302653 * error,) * 2)  # t(0.975, 2)
    whole, _ = quad(t_density, -np.inf, np.inf, (2,))
    tail, _ = quad(t_density, 5 / error, np.inf, (2,))
    assert found.p == pytest.approx(2 * tail / whole)
    assert found.of == "of the method, over 3 training seeds"


def test_the_paired_interval_is_of_the_differences_by_seed():
    a, b = {3: 5.0, 1: 2.0, 2: 7.0}, {1: 0.0, 2: 3.0, 3: -4.0, 7: 100.0}
    found, inner = paired_difference(a, b), mean_interval([2.0, 4.0, 9.0])
    assert (found.value, found.low, found.high, found.p) == (5, inner.low, inner.high, inner.p)
    assert found.of == "of the two methods, paired over 3 of 4 training seeds"
    assert paired_difference(b, a).value == -5


def test_welch_s_interval_by_hand():
    """Variances 4 and 1 of 4 and 3 seeds: u = 1, v = 1/3, 16/9 / (1/3 + 1/18) = 32/7 degrees."""
    a, b = [10 + sign * 3**0.5 for sign in (-1, -1, 1, 1)], [0.0, 1.0, 2.0]
    found = welch_difference(a, b)
    error = (4 / 3) ** 0.5
    freedom, half = 32 / 7, found.high - found.value
    whole, _ = quad(t_density, -np.inf, np.inf, (freedom,))
    inside, _ = quad(t_density, -half / error, half / error, (freedom,))
    assert found.value == pytest.approx(9)
    assert inside / whole == pytest.approx(0.95)
    assert found.value - found.low == pytest.approx(half)
    assert found.of == "of the two methods, over 4 and 3 training seeds"


@pytest.mark.parametrize("seeds", [1, 2])
def test_fewer_than_three_seeds_have_no_interval(seeds):
    few, three = [1.0, 2.0][:seeds], [1.0, 2.0, 4.0]
    plural = "s" * (seeds > 1)
    for found, of in (
        (mean_interval(few), f"of the method, over {seeds} training seed{plural}: no interval"),
        (
            paired_difference(dict(enumerate(few)), dict(enumerate(three))),
            f"of the two methods, paired over {seeds} of 3 training seeds: no interval",
        ),
        (
            welch_difference(three, few),
            f"of the two methods, over 3 and {seeds} training seed{plural}: no interval",
        ),
    ):
        assert (found.low, found.high, found.p, found.of) == (None, None, None, of)
        assert verdict(found, "lower") == "cannot tell"


def test_equal_scores_of_all_seeds_have_no_interval():
    """Student's t would call 10 classes against 9 in each of three trainings certain."""
    a, b = {0: 10.0, 1: 10.0, 2: 10.0}, {0: 9.0, 1: 9.0, 2: 9.0}
    for found in (paired_difference(a, b), welch_difference([10.0] * 3, [9.0] * 3)):
        assert (found.value, found.p) == (1, None)
        assert found.of.endswith("without spread: no interval")


def test_scores_that_are_none():
    with pytest.raises(DataError, match="no seed"):
        mean_interval([])
    with pytest.raises(DataError, match="no seed"):
        paired_difference({0: 1.0}, {1: 1.0})
    with pytest.raises(NonFiniteError, match="nan"):
        welch_difference([1.0, 2.0, 3.0], [1.0, float("nan"), 2.0])


def gaussian(x: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
    """Mean and covariance of images of these weights, which are n / (n - 1) of theirs."""
    mu = weights @ x
    centred = x - mu
    return {"mu": mu, "sigma": len(x) / (len(x) - 1) * (centred.T * weights) @ centred}


@pytest.mark.parametrize("n", [60, 12, 10])
def test_the_influence_on_the_frechet_distance_is_its_derivative_by_weights(n):
    """Of cmkit's own distance, by torch-fidelity or by the few rows, at more and fewer images than
    features; the covariances have no common eigenvectors."""
    x, real = features(n), features(300, seed=1)
    reference = gaussian(real, np.full(300, 1 / 300))
    found = frechet_influence(x, reference["mu"], reference["sigma"])
    value, influence = found.value, found.whole
    whole = {"rows": x} if n <= x.shape[1] else gaussian(x, np.full(n, 1 / n))
    assert value == pytest.approx(frechet(whole, reference), rel=1e-6)
    assert abs(influence.mean()) < 1e-9 * abs(influence).max()

    def at(weights: np.ndarray) -> float:
        # the distance of n images by their n by n Gram matrix, whatever their weights
        mine = gaussian(x, weights)
        centred = np.sqrt(n / (n - 1) * weights)[:, None] * (x - mine["mu"])
        roots = np.linalg.svd(centred @ np.linalg.cholesky(reference["sigma"]), compute_uv=False)
        shift = mine["mu"] - reference["mu"]
        return shift @ shift + np.trace(mine["sigma"] + reference["sigma"]) - 2 * roots.sum()

    assert at(np.full(n, 1 / n)) == pytest.approx(value, rel=1e-6)
    step = 1e-5
    for i in range(0, n, 4):
        up, down = ((1 - size) / n + size * (np.arange(n) == i) for size in (step, -step))
        assert (at(up) - at(down)) / (2 * step) == pytest.approx(influence[i], rel=1e-4, abs=1e-5)


def test_the_influence_on_kid_is_its_derivative_by_weights():
    x, real = features(40), features(30, seed=1)
    found = kid_influence(x, real)
    value, influence = found.value, found.whole
    kernel, cross = (x @ x.T / 12 + 1) ** 3, (x @ real.T / 12 + 1) ** 3
    off = kernel - np.diag(np.diag(kernel))

    def at(weights: np.ndarray) -> float:
        return 40 / 39 * weights @ off @ weights - 2 * weights @ cross.mean(1)

    assert at(np.full(40, 1 / 40)) == pytest.approx(value)
    for i in range(40):
        toward = (np.arange(40) == i) - 1 / 40
        up, down = (at(1 / 40 + size * toward) for size in (1e-4, -1e-4))
        assert (up - down) / 2e-4 == pytest.approx(influence[i], abs=1e-6 * abs(influence).max())


def test_the_kid_difference_is_torch_fidelity_s():
    """Over all images it is their estimate; their mean over subsets is near."""
    a, b, real = (features(200, seed=seed) for seed in (0, 1, 2))
    a += 0.3
    theirs = [kernel_mmd(x, real, **POLY) for x in (a, b)]
    found = kid_influence(a, real).value - kid_influence(b, real).value
    assert found == pytest.approx(theirs[0] - theirs[1], rel=1e-9)
    means = [
        kid_features_to_metric(
            *map(torch.from_numpy, (x, real)), kid_subset_size=100, verbose=False
        )["kernel_inception_distance_mean"]
        for x in (a, b)
    ]
    assert found == pytest.approx(means[0] - means[1], rel=0.1)


def test_the_kernel_means_do_not_depend_on_blocks(monkeypatch):
    x, real = features(50), features(30, seed=2)
    whole = kid_influence(x, real)
    monkeypatch.setattr("cmkit.suite.intervals.BLOCK", 7)
    parts = kid_influence(x, real)
    assert parts.value == pytest.approx(whole.value)
    assert parts.whole == pytest.approx(whole.whole)


def test_the_influence_of_halves_is_that_of_their_images_alone():
    """The halves are random, not the first and the last: labels may have an order."""
    x, mu, sigma = features(41), np.zeros(12), np.eye(12)
    first, second = _halves(41)
    assert sorted([*first, *second]) == list(range(41))
    assert len(first) == 20
    assert {*first} not in ({*range(20)}, {*range(0, 40, 2)}, {*range(1, 40, 2)})
    found = frechet_influence(x, mu, sigma).halves
    for half, influence in zip((first, second), found, strict=True):
        assert np.array_equal(influence, frechet_influence(x[half], mu, sigma).whole)


def test_one_seed_s_variance_counts_the_second_order_once():
    """v + (v - w / 2) / 2 with v of all images and w of half as many, but no less than v / 2."""
    zero = np.zeros(10)
    a = Influence(3.0, np.array([2.0, -2.0] * 5), (np.array([3.0, -3, 3, -3, 0]), zero[:5]))
    b = Influence(1.0, zero, (zero[:5], zero[:5]))
    v, w = 40 / 9 / 10, 36 / 4 / 5 / 2
    found = same_noise_difference(a, b)
    half = 2.262157 * (1.5 * v - w / 4) ** 0.5  # t(0.975, 9)
    assert (found.value, found.low, found.high) == pytest.approx((2, 2 - half, 2 + half))
    assert found.of == CHECKPOINTS == "of these two checkpoints, not of the two methods"
    far = Influence(3.0, a.whole, (10 * a.halves[0], zero[:5]))
    floored = same_noise_difference(far, b)
    assert floored.high - 2 == pytest.approx(2.262157 * (v / 2) ** 0.5)


@pytest.mark.parametrize("n", [50, 100])
def test_a_model_differs_from_itself_by_exactly_nothing(n):
    a, _ = draw(WORLD, n, np.random.default_rng(0))
    frechets = [frechet_influence(x, np.zeros(64), WORLD.sigma) for x in (a, a.copy())]
    kernels = [kid_influence(x, a[:20]) for x in (a, a.copy())]
    for found in (
        same_noise_difference(*frechets),
        same_noise_difference(*kernels),
        paired_difference({0: 0.1, 1: 0.2, 2: 0.7}, {0: 0.1, 1: 0.2, 2: 0.7}),
    ):
        assert found.value == 0
        assert verdict(found, "lower") == "cannot tell"


def test_a_reference_without_full_rank():
    """Features that the reference never shows count by their variance alone."""
    x, thin = features(40), np.diag([1.0, 2.0, 3.0] + [0.0] * 9)
    found = frechet_influence(x, np.zeros(12), thin)
    inner = frechet_influence(x[:, :3], np.zeros(3), thin[:3, :3])
    rest = x[:, 3:]
    expected = inner.value + (rest.mean(0) ** 2).sum() + rest.var(0, ddof=1).sum()
    assert found.value == pytest.approx(expected)
    lone = frechet_influence(rest, np.zeros(9), np.zeros((9, 9)))
    assert found.whole == pytest.approx(inner.whole + lone.whole)


def test_features_that_cannot_be_compared():
    x, mu, sigma = features(20), np.zeros(12), np.eye(12)
    found = kid_influence(x, x)
    with pytest.raises(DataError, match="20 and 19 images"):
        same_noise_difference(found, kid_influence(x[:19], x))
    with pytest.raises(DataError, match="12 features"):
        frechet_influence(x, np.zeros(13), np.eye(13))
    with pytest.raises(DataError, match="12 features"):
        kid_influence(x, np.zeros((5, 13)))
    with pytest.raises(DataError, match="9 images"):
        frechet_influence(x[:9], mu, sigma)
    with pytest.raises(DataError, match="2 dimensions"):
        frechet_influence(x, mu, mu)
    with pytest.raises(NonFiniteError, match="NaN"):
        kid_influence(x + np.inf, x)


def test_the_truth_of_kid_is_the_mean_of_its_estimates():
    """The closed form that the coverage is judged by, itself checked by many images."""
    real = np.random.default_rng(0).standard_normal((30, 64))
    a, b = draw(WORLD, 4000, np.random.default_rng(1))
    truth = kernel_truth(WORLD, real)
    for x, expected in zip((a, b), truth, strict=True):
        found = kid_influence(x, real)
        assert abs(found.value - expected) < 4 * found.whole.std() / 4000**0.5


def test_holm_s_correction_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, None, 0.7]) == [1, None, 1]
    assert holm([0.01]) == [0.01]
    assert holm([]) == []


@pytest.mark.parametrize(
    ("value", "better", "word"),
    [
        (-1, "lower", "better"),
        (1, "lower", "worse"),
        (1, "higher", "better"),
        (-1, "higher", "worse"),
    ],
)
def test_three_words(value, better, word):
    found = Interval(value, value - 0.5, value + 0.5, 0.01, "")
    assert verdict(found, better) == word
    assert verdict(found, better, p=0.051) == "cannot tell"
    assert verdict(Interval(value, -2, 2, 0.051, ""), better) == "cannot tell"


def test_the_word_and_the_interval_agree():
    """Without a correction, "cannot tell" is said where 0 lies in the interval."""
    rng = np.random.default_rng(0)
    for shift in np.linspace(0, 4, 20):
        found = mean_interval(list(rng.standard_normal(4) + shift))
        assert (verdict(found, "higher") == "cannot tell") == (found.low <= 0 <= found.high)


@pytest.mark.parametrize(("n", "few"), [(319, True), (320, False)])
def test_images_are_few_below_five_times_the_features(n, few):
    assert few_images(n, 64) is few


def test_of_few_images_the_bias_decides_which_frechet_distance_is_less():
    """Why `few_images` sends to KID: of infinitely many images the first model is the better."""
    rng = np.random.default_rng(5)
    assert WORLD.population()[0] < WORLD.population()[1]
    found = [[distance(x, WORLD.root) for x in draw(WORLD, 32, rng)] for _ in range(400)]
    gap = np.subtract(*np.transpose(found))
    assert gap.mean() > 3 * gap.std() / 20
