"""How often the intervals of cmkit.suite cover the truth, on Gaussian features where it is known.

python benchmarks/coverage.py --features 2048 --images 1000
Two models whose features differ a little from the reference's in mean and covariance; the noise of
an image is shared (correlation 0.8) and each training has an effect of its own (5 %). At 64
features these are laws of tests/test_intervals.py.
"""

from __future__ import annotations

import argparse
import itertools
import os
import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from cmkit.suite.intervals import (
    Interval,
    frechet_influence,
    kid_influence,
    mean_interval,
    paired_difference,
    same_noise_difference,
    welch_difference,
)

SHARED = 0.8
"""Correlation of the noise of an image in the two models."""
EFFECT = 0.05
"""Relative deviation of a training's means and scales."""


@dataclass(frozen=True)
class World:
    """Reference features of mean 0 and covariance root root^T (d, d), and two models' features:
    independent, of means and scales (2, d)."""

    root: np.ndarray
    means: np.ndarray
    scales: np.ndarray

    @property
    def sigma(self) -> np.ndarray:
        return self.root @ self.root.T

    def population(self) -> np.ndarray:
        """The two Frechet distances (2,) of infinitely many images."""
        found = []
        for mean, scale in zip(self.means, self.scales, strict=True):
            both = self.root.T @ (scale[:, None] ** 2 * self.root)
            roots = np.sqrt(np.linalg.eigvalsh(both).clip(min=0)).sum()
            found.append(mean @ mean + (self.root**2).sum() + (scale**2).sum() - 2 * roots)
        return np.array(found)


def world(d: int, rng: np.random.Generator, far: float = 1) -> World:
    """A world of d features whose variances fall by e^3; the models' distance from the reference
    grows with `far`."""
    deviation = np.exp(-1.5 * np.arange(d) / d)
    # of no common eigenvectors, so that the order of the covariances' product matters
    twist = np.eye(d) + 0.1 * rng.standard_normal((d, d)) / np.sqrt(d)
    means = far * 0.1 * deviation * rng.standard_normal((2, d))
    scales = deviation * (1 + far * np.array([[0.1], [0.12]]) * rng.standard_normal((2, d)))
    return World(deviation[:, None] * twist, means, scales)


def draw(world: World, n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Features (n, d) of images that both models draw from the same noise."""
    u, v = rng.standard_normal((2, n, len(world.root)))
    v = SHARED * u + np.sqrt(1 - SHARED**2) * v
    (mean_a, mean_b), (scale_a, scale_b) = world.means, world.scales
    return mean_a + u * scale_a, mean_b + v * scale_b


def trained(world: World, rng: np.random.Generator) -> World:
    """The same methods trained once more."""
    shape = world.means.shape
    return World(
        world.root,
        world.means + EFFECT * np.abs(world.scales) * rng.standard_normal(shape),
        world.scales * (1 + EFFECT * rng.standard_normal(shape)),
    )


def distance(x: np.ndarray, root: np.ndarray) -> float:
    """The Frechet distance of features x (n, d) from the reference."""
    n, d = x.shape
    mean = x.mean(0)
    x = (x - mean) / np.sqrt(n - 1)
    y = x @ root
    squares = np.linalg.eigvalsh(y.T @ y if n > d else y @ y.T)
    roots = np.sqrt(squares.clip(min=0)).sum()
    return float(mean @ mean + (x**2).sum() + (root**2).sum() - 2 * roots)


def share_covered(intervals: list[Interval], truth: float, part: float = 0) -> float:
    """The share of the intervals that hold the truth.

    Where that is a mean to which each of the estimates contributes `part`, the intervals are made
    shorter by sqrt(1 - part), as the estimates are by that nearer to it.
    """
    value, low, high = np.array([(i.value, i.low, i.high) for i in intervals], float).T
    shorter = np.sqrt(1 - part)
    low, high = value - shorter * (value - low), value + shorter * (high - value)
    return float(((low <= truth) & (truth <= high)).mean())


def over_seeds(
    world: World, n: int, trainings: int, draws: int, rng: np.random.Generator
) -> Iterator[tuple[str, int, int, float]]:
    """(interval, images, draws, share that covers) of the intervals over 3, 5 and 10 seeds.

    The seeds are taken from a pool of `trainings` pairs, each pair on noise of its own; where
    draws * seeds is more than the pool, it is dealt again.
    """
    pool = np.array(
        [
            [distance(x, world.root) for x in draw(trained(world, rng), n, rng)]
            for _ in range(trainings)
        ]
    )
    for seeds in (3, 5, 10):
        groups, others = (_dealt(trainings, seeds, draws, rng) for _ in range(2))
        a, b = ([pool[group, k].tolist() for group in groups] for k in (0, 1))
        apart = [pool[other, 1].tolist() for other in others]
        found = {
            "mean, t": map(mean_interval, a),
            "difference, paired t": (
                paired_difference(dict(enumerate(x)), dict(enumerate(y)))
                for x, y in zip(a, b, strict=True)
            ),
            "difference, Welch t": map(welch_difference, a, apart),
        }
        means = pool.mean(0)
        for name, intervals in found.items():
            truth = means[0] if "mean" in name else means[0] - means[1]
            covered = share_covered(list(intervals), truth, part=seeds / trainings)
            yield f"{seeds} seeds: {name}", n, len(groups), covered


def _dealt(count: int, size: int, draws: int, rng: np.random.Generator) -> list[np.ndarray]:
    """At least `draws` groups of `size` of the numbers below `count`, disjoint as long as there
    are enough."""
    groups: list[np.ndarray] = []
    while len(groups) < draws:
        order = rng.permutation(count)
        groups += [order[i : i + size] for i in range(0, count - size + 1, size)]
    return groups


def frechet_rows(
    world: World, n: int, draws: int, rng: np.random.Generator
) -> Iterator[tuple[str, int, int, float]]:
    """(interval, images, draws, share that covers) of the difference of two Frechet distances on
    the same noise: of the difference expected of as many images, and of infinitely many, which
    differs by the biases and which the interval does not claim to hold."""
    sigma, mu = world.sigma, np.zeros(len(world.root))
    found = [
        same_noise_difference(*(frechet_influence(x, mu, sigma) for x in draw(world, n, rng)))
        for _ in range(draws)
    ]
    expected = float(np.mean([interval.value for interval in found]))
    covered = share_covered(found, expected, part=1 / draws)
    yield "1 seed: difference of FID", n, draws, covered
    limit = -np.diff(world.population())[0]
    yield "the same, of infinitely many images", n, draws, share_covered(found, limit)


def kid_rows(
    world: World, n: int, draws: int, rng: np.random.Generator, real: int = 200
) -> Iterator[tuple[str, int, int, float]]:
    """(interval, images, draws, share that covers) of the difference of two kernel distances on the
    same noise, from `real` reference images."""
    reference = rng.standard_normal((real, len(world.root))) @ world.root.T
    found = [
        same_noise_difference(*(kid_influence(x, reference) for x in draw(world, n, rng)))
        for _ in range(draws)
    ]
    truth = -np.diff(kernel_truth(world, reference))[0]
    yield "1 seed: difference of KID", n, draws, share_covered(found, truth)


def kernel_truth(world: World, real: np.ndarray) -> np.ndarray:
    """E k(x, x') - 2 mean_y E k(x, y), (2,), of k(x, y) = (x.y / d + 1)^3, in closed form.

    The moments of s = x.x' / d for independent Gaussians of one mean m and variances v, and of
    s = x.y / d, which is Gaussian, in (1 + s)^3 = 1 + 3 s + 3 s^2 + s^3.
    """
    d = real.shape[1]
    found = []
    for m, scale in zip(world.means, world.scales, strict=True):
        v = scale**2
        mm, mvm, vv = m @ m, m @ (v * m), v @ v
        first, second = mm / d, (mm**2 + 2 * mvm + vv) / d**2
        third = (mm**3 + 6 * mm * mvm + 3 * mm * vv + 6 * m @ (v * v * m)) / d**3
        own = 1 + 3 * first + 3 * second + third
        mean, variance = 1 + real @ m / d, real**2 @ v / d**2
        found.append(own - 2 * (mean**3 + 3 * mean * variance).mean())
    return np.array(found)


def main() -> None:
    """Print the machine, the seed, and the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--features", type=int, default=64)
    parser.add_argument("--far", type=float, default=1, help="of the models from the reference")
    parser.add_argument("--images", type=int, nargs="+", default=[400])
    parser.add_argument("--trainings", type=int, default=1000, help="pairs in the pool of seeds")
    parser.add_argument("--draws", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    threads = os.environ.get("OMP_NUM_THREADS", "all")
    print(f"{platform.platform()}, {os.cpu_count()} cores, {threads} threads; {options}")
    print("| interval, nominal 0.95 | images | draws | covers |\n|---|---|---|---|", flush=True)
    rng = np.random.default_rng(options.seed)
    drawn = world(options.features, rng, options.far)
    began = time.perf_counter()
    for n in options.images:
        rows = [part(drawn, n, options.draws, rng) for part in (frechet_rows, kid_rows)]
        rows.append(over_seeds(drawn, n, options.trainings, max(500, options.draws), rng))
        for name, images, draws, covered in itertools.chain(*rows):
            print(f"| {name} | {images:,} | {draws} | {covered:.3f} |", flush=True)
    print(f"{time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
