"""Confidence intervals of scores and of their differences, and the words that they allow.

Over training seeds: Student's t. Of two checkpoints on the same noise: the influence of each image
on the score. Nothing here is a bootstrap: its percentiles over 3 seeds cover the truth in 71 of 100
cases instead of 95, and those of a Frechet distance, which is biased, in none. The coverage of
each interval is in tests/test_intervals.py, and at 2,048 features in benchmarks/coverage.py.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cmkit.errors import DataError, NonFiniteError

LEVEL = 0.95
LEAST_SEEDS = 3
"""Two seeds give an interval of 12.7 standard errors, which says nothing."""
CHECKPOINTS = "of these two checkpoints, not of the two methods"
LEAST_IMAGES = 10
BLOCK = 2048

Array: TypeAlias = NDArray[Any]


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95 % confidence interval and the two-sided p of the truth being 0.

    `of` says of what it is. Where there is no interval, `low`, `high` and `p` are None, and `of`
    says why: "of the method, over 2 training seeds: no interval".
    """

    value: float
    low: float | None
    high: float | None
    p: float | None
    of: str


@dataclass(frozen=True)
class Influence:
    """A score of n images, and how it depends on each.

    whole: (n,), the derivative of the score at h = 0 where the image weighs (1 - h) / n + h and
    each other (1 - h) / n. halves: the same for the score of the images numbered `_halves(n)[0]`
    alone, and for that of the others. The features are needed no longer: all differences follow.
    """

    value: float
    whole: Array
    halves: tuple[Array, Array]


def mean_interval(values: Sequence[float]) -> Interval:
    """The mean of one score a training seed, with Student's t interval.

    Of independent trainings, each sampled with noise of its own: with one noise for all, the
    interval covers in 46 to 87 % of cases. DataError for no value, NonFiniteError for NaN.
    """
    return _over_seeds(values, f"of the method, over {_seeds(len(values))}")


def paired_difference(a: Mapping[int, float], b: Mapping[int, float]) -> Interval:
    """The mean of a[seed] - b[seed], with Student's t interval of the differences.

    For trainings that share teacher and order of the data, and sampling noise, where the seed is
    the same. Seeds that only one has are left out, and `of` says so.
    """
    shared, known = sorted(a.keys() & b.keys()), len(a.keys() | b.keys())
    some = f"{len(shared)} of " if len(shared) < known else ""
    of = f"of the two methods, paired over {some}{_seeds(known)}"
    return _over_seeds([a[seed] - b[seed] for seed in shared], of)


def welch_difference(a: Sequence[float], b: Sequence[float]) -> Interval:
    """The difference of the means of two sets of independent trainings, mean(a) - mean(b).

    Welch (1947): error^2 = u + v with u = s_a^2 / n_a and v = s_b^2 / n_b, and Student's t with
    (u + v)^2 / (u^2 / (n_a - 1) + v^2 / (n_b - 1)) degrees of freedom.
    """
    value = _mean(a) - _mean(b)
    of = f"of the two methods, over {len(a)} and {_seeds(len(b))}"
    if min(len(a), len(b)) < LEAST_SEEDS:
        return Interval(value, None, None, None, f"{of}: no interval")
    u, v = (statistics.variance(values) / len(values) for values in (a, b))
    parts = u**2 / (len(a) - 1) + v**2 / (len(b) - 1)
    freedom = (u + v) ** 2 / parts if parts else 1.0
    return _student(value, math.sqrt(u + v), freedom, of)


def same_noise_difference(a: Influence, b: Influence) -> Interval:
    """The score of one checkpoint less that of another, on images of the same noise.

    Image i of both is drawn from the same noise and label. The variance is that of the difference
    of the influences over n, v, less what v counts twice: the second-order part of the score
    (Efron and Stein, 1981), of which there is much in samples near the reference. If w is the same
    of half as many images, that part is (w - 2 v) / 4, and what remains is at least v / 2. The
    interval is for scores of n images: where they are biased, as Frechet distances are, it is for
    the difference with its bias (see `few_images`).
    """
    if a.whole.shape != b.whole.shape:
        raise DataError(
            f"{len(a.whole)} and {len(b.whole)} images: compare as many, of the same noise"
        )
    v = _variance(a.whole - b.whole)
    w = statistics.fmean(_variance(x - y) for x, y in zip(a.halves, b.halves, strict=True))
    error = math.sqrt(max(1.5 * v - w / 4, v / 2))
    return _student(a.value - b.value, error, len(a.whole) - 1, CHECKPOINTS)


def frechet_influence(x: ArrayLike, mu: ArrayLike, sigma: ArrayLike) -> Influence:
    """The Frechet distance of features x (n, d) from a reference mu (d,), sigma (d, d), which is
    taken as exact. One eigendecomposition of min(n, d), and two of half the images.

    With c = x_i - mean, S and S_r the covariances and r the reference's mean, the influence is
    2 (mean - r).c + n / (n - 1) c^T (I - T) c, less its mean, where
    T = S_r^(1/2) (S_r^(1/2) S S_r^(1/2))^(-1/2) S_r^(1/2) is the derivative of
    2 tr((S_r S)^(1/2)) by S.
    """
    mu, root = _checked(mu, 1), _root(_checked(sigma, 2))
    return _influence(x, lambda some: _frechet(some, mu, root))


def kid_influence(x: ArrayLike, real: ArrayLike) -> Influence:
    """The kernel distance (KID) of features x (n, d) from real (m, d), which are taken as all there
    are, less the term of `real` alone, which a difference does not have.

    With k(x, y) = (x.y / d + 1)^3 it is the unbiased MMD^2 of Binkowski et al. (2018) over all
    pairs, where torch-fidelity's "kid_mean" takes random subsets: the mean of k over pairs of
    different rows of x, less twice that over x and real. The influence is twice (mean over j != i
    of k(x_i, x_j) - mean over y of k(x_i, y)), less its mean (Hoeffding, 1948).
    """
    real = _checked(real, 2)
    return _influence(x, lambda some: _kid(some, real))


def holm(p: Iterable[float | None]) -> list[float | None]:
    """The p of k comparisons, corrected for their number (Holm, 1979); None stays None.

    The i-th smallest is multiplied by k - i + 1, is no less than those before it, and at most 1.
    """
    found = list(p)
    order = sorted((value, i) for i, value in enumerate(found) if value is not None)
    least = 0.0
    for rank, (value, i) in enumerate(order):
        least = max(least, min(1.0, (len(order) - rank) * value))
        found[i] = least
    return found


def verdict(
    difference: Interval, better: Literal["lower", "higher"], p: float | None = None
) -> Literal["better", "worse", "cannot tell"]:
    """What a difference a - b says of a: "better", "worse" or "cannot tell".

    `better`: which direction of the score is. `p`: that of `holm`, where there are several
    comparisons; else the difference's own.
    """
    p = difference.p if p is None else p
    if p is None or p >= 1 - LEVEL:
        return "cannot tell"
    return "better" if (difference.value < 0) == (better == "lower") else "worse"


def few_images(n: int, d: int) -> bool:
    """Whether a Frechet distance of n images and d features is too biased to say which of two
    models is better: below n = 5 d, where KID is the better score. Their biases differ, and of
    fewer images than features the sign of the difference may be that of the biases."""
    return n < 5 * d


def _over_seeds(values: Sequence[float], of: str) -> Interval:
    mean = _mean(values)
    if len(values) < LEAST_SEEDS:
        return Interval(mean, None, None, None, f"{of}: no interval")
    error = statistics.stdev(values) / math.sqrt(len(values))
    return _student(mean, error, len(values) - 1, of)


def _mean(values: Sequence[float]) -> float:
    if not len(values):
        raise DataError("no seed has a score; look at the runs' status.json")
    if not all(map(math.isfinite, values)):
        raise NonFiniteError(f"scores {list(values)} hold NaN or infinity; leave those seeds out")
    return statistics.fmean(values)


def _seeds(count: int) -> str:
    return f"{count} training seed" + "s" * (count != 1)


def _student(value: float, error: float, freedom: float, of: str) -> Interval:
    """value +- t error, with the quantile of Student's t for `freedom` degrees."""
    from scipy.special import stdtr, stdtrit  # type: ignore[import-untyped]

    if error == 0:
        return Interval(value, None, None, None, f"{of}, without spread: no interval")
    half = float(stdtrit(freedom, (1 + LEVEL) / 2)) * error
    p = float(2 * stdtr(freedom, -abs(value) / error))
    return Interval(value, value - half, value + half, p, of)


def _variance(influence: Array) -> float:
    return float(influence.var(ddof=1)) / len(influence)


def _halves(n: int) -> tuple[Array, Array]:
    """Numbers of two halves of n images, at random, as their labels may have an order."""
    order = np.random.default_rng(0).permutation(n)
    return order[: n // 2], order[n // 2 :]


def _influence(x: ArrayLike, score: Callable[[Array], tuple[float, Array]]) -> Influence:
    x = _checked(x, 2)
    if len(x) < LEAST_IMAGES:
        raise DataError(f"features of {len(x)} images; an interval needs {LEAST_IMAGES}")
    value, whole = score(x)
    first, second = (score(x[half])[1] for half in _halves(len(x)))
    return Influence(value, whole, (first, second))


def _checked(x: ArrayLike, dimensions: int) -> Array:
    """x as a finite float64 array."""
    found: Array = np.asarray(x, np.float64)
    if found.ndim != dimensions:
        raise DataError(f"features or statistics {found.shape}; {dimensions} dimensions are due")
    if not np.isfinite(found).all():
        raise NonFiniteError("features or statistics hold NaN or infinity; are the images whole?")
    return found


def _root(sigma: Array) -> Array:
    """L (d, d) with L L^T = sigma."""
    try:
        return np.linalg.cholesky(sigma)
    except np.linalg.LinAlgError:  # not of full rank
        values, vectors = np.linalg.eigh(sigma)
        root: Array = vectors * np.sqrt(values.clip(min=0))
        return root


def _frechet(x: Array, mu: Array, root: Array) -> tuple[float, Array]:
    """The distance, and the influences (n,), of a reference of mean mu and L L^T = S_r.

    With X = (x - mean) / sqrt(n - 1) and the singular values s and vectors U, V of X L, which are
    the root of the eigenvalues of S_r S, c^T T c = (n - 1) sum_k s_k U_ik^2, whatever the rank.
    """
    n, d = x.shape
    if mu.shape != (d,) or root.shape != (d, d):
        raise DataError(f"{d} features, but a reference of {len(mu)} and {len(root)}")
    shift = x.mean(0) - mu
    x = (x - x.mean(0)) / math.sqrt(n - 1)
    y = x @ root
    if n > d:
        squares, vectors = np.linalg.eigh(y.T @ y)
        kept = squares > squares[-1] * n * np.finfo(float).eps  # else S_r or S has no full rank
        s = np.sqrt(squares[kept])
        twisted = (y @ vectors[:, kept]) ** 2 @ (1 / s)
    else:
        squares, vectors = np.linalg.eigh(y @ y.T)
        s = np.sqrt(squares.clip(min=0))
        twisted = vectors**2 @ s
    own = (x * x).sum(1)
    value = shift @ shift + own.sum() + (root * root).sum() - 2 * s.sum()
    influence = 2 * math.sqrt(n - 1) * (x @ shift) + n * (own - twisted)
    return float(value), influence - influence.mean()


def _kid(x: Array, real: Array) -> tuple[float, Array]:
    n, d = x.shape
    if real.shape[1] != d:
        raise DataError(f"{d} features, but a reference of {real.shape[1]}")
    itself = ((x * x).sum(1) / d + 1) ** 3
    own = (n * _kernel_means(x, x) - itself) / (n - 1)
    cross = _kernel_means(x, real)
    influence = 2 * (own - cross)
    return float(own.mean() - 2 * cross.mean()), influence - influence.mean()


def _kernel_means(x: Array, y: Array) -> Array:
    """The mean over y (m, d) of k(x_i, y), (n,)."""
    found = np.zeros(len(x))
    for rows in (slice(i, i + BLOCK) for i in range(0, len(x), BLOCK)):
        for j in range(0, len(y), BLOCK):
            kernel = (x[rows] @ y[j : j + BLOCK].T) / x.shape[1] + 1
            found[rows] += (kernel * kernel * kernel).sum(1)
    return found / len(y)
