"""Interpolation in a box of several numbers: images at few nodes become those at every other place
by one matrix product."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cmkit.recipe import SearchTable

Array = NDArray[Any]


@dataclass(frozen=True)
class Interpolation:
    """A polynomial f(s) = sum_k w_k(s) f(node k) with w(s) = basis(s) @ matrix.

    A term of the basis is the product over the axes of T_n(x), the Chebyshev polynomial of degree n
    of an axis, with its box mapped to x in [-1, 1]; an axis of one value has x = 0.
    """

    axes: tuple[str, ...]
    low: Array
    """(axes,): the corner of the box, and `high` the other."""
    high: Array
    exponents: Array
    """(terms, axes): the degrees n."""
    nodes: Array
    """(nodes, axes)"""
    matrix: Array
    """(terms, nodes): the pseudo-inverse of the basis at the nodes."""

    def weights(self, places: ArrayLike) -> Array:
        """w of places (n, axes), (n, nodes); at a node it is that node, exactly."""
        s = np.asarray(places, float)
        found = basis(s, self.low, self.high, self.exponents) @ self.matrix
        row, node = np.nonzero((s[:, None] == self.nodes[None]).all(2))
        found[row] = 0
        found[row, node] = 1
        return found


def basis(s: Array, low: Array, high: Array, exponents: Array) -> Array:
    """Every term at the places s (n, axes), (n, terms)."""
    width = high - low
    x = np.where(width > 0, (2 * s - low - high) / np.where(width > 0, width, 1), 0).clip(-1, 1)
    degrees = np.arange(exponents.max(initial=0) + 1)
    chebyshev = np.cos(degrees[:, None, None] * np.arccos(x))  # (degree, n, axis)
    factors = [chebyshev[n, :, axis].T for axis, n in enumerate(exponents.T)]
    return np.prod(factors, axis=0)  # type: ignore[no-any-return]


def interpolations(table: SearchTable) -> Iterator[Interpolation]:
    """Those of the box of `table.grid`, coarse to fine, with `table.node_counts()` nodes.

    Of up to `table.PRODUCT` axes with more than one value it is the tensor product of polynomials
    through the extrema of Chebyshev polynomials, nested from one to the next, or through the
    values of an axis that has no more. Of more axes it is the polynomial of a total degree that
    fits, by least squares, a scrambled Halton sequence (seed 0) with the Chebyshev density.
    """
    axes = {axis: sorted(set(values)) for axis, values in table.grid.items()}
    low, high = (np.array([end(values) for values in axes.values()]) for end in (min, max))
    moving = [k for k, values in enumerate(axes.values()) if len(values) > 1]
    seen = 0
    for size, count in zip(table.node_sizes(), table.node_counts(), strict=True):
        if len(moving) <= table.PRODUCT:
            each = [_extrema(values, size) for values in axes.values()]
            nodes = np.array(list(itertools.product(*each)))
            degrees = [range(len(values)) for values in each]
            exponents = np.array(list(itertools.product(*degrees)))
        else:
            exponents = np.zeros((math.comb(len(moving) + size, size), len(axes)), int)
            exponents[:, moving] = list(_total(len(moving), size))
            nodes = np.tile(low, (count, 1))
            spread = high[moving] - low[moving]
            nodes[:, moving] = low[moving] + spread * _scattered(len(moving), count)
        assert len(nodes) == count > seen
        seen = count
        matrix = np.linalg.pinv(basis(nodes, low, high, exponents))
        yield Interpolation(tuple(axes), low, high, exponents, nodes, matrix)


def _extrema(values: Sequence[float], n: int) -> list[float]:
    """The n extrema of T_{n-1} over the range of `values`, or they themselves if they are no
    more."""
    if len(values) <= n:
        return list(values)
    low, high = values[0], values[-1]

    def known(at: float) -> float:
        """The value of the axis at this place, which rounding would miss, or else the place."""
        near = min(values, key=lambda value: abs(value - at))
        return near if abs(near - at) <= 1e-9 * (high - low) else at

    middle, half = (low + high) / 2, (high - low) / 2
    return [known(middle - half * math.cos(math.pi * k / (n - 1))) for k in range(n)]


def _total(axes: int, degree: int) -> Iterator[list[int]]:
    """Every tuple of degrees whose sum is at most `degree`."""
    for total in range(degree + 1):
        for chosen in itertools.combinations_with_replacement(range(axes), total):
            yield [chosen.count(axis) for axis in range(axes)]


def _scattered(axes: int, count: int) -> Array:
    """`count` places in [0, 1]^axes with the density of Chebyshev nodes."""
    from scipy.stats import qmc  # type: ignore[import-untyped]

    even = qmc.Halton(axes, seed=0).random(count)
    return (1 - np.cos(np.pi * even)) / 2  # type: ignore[no-any-return]
