"""Polynomials through the nodes of a box are as exact as their degree says."""

import itertools
import math

import numpy as np
import pytest

from cmkit.recipe import SearchTable
from cmkit.search.interpolation import interpolations


def table(**keys):
    grid = {axis: tuple(map(float, values)) for axis, values in keys.pop("grid").items()}
    return SearchTable(images=4, method="surrogate", grid=grid, **keys)


def box(axes, low=0.7, high=1.4, values=21):
    ends = [high - 0.1 * k / axes for k in range(axes)]
    return {f"a{k}": np.linspace(low, end, values) for k, end in enumerate(ends)}


def places_in(by, count=200):
    rng = np.random.default_rng(0)
    return by.low + (by.high - by.low) * rng.random((count, len(by.low)))


@pytest.mark.parametrize("axes", [1, 2, 3, 4, 6])
def test_polynomials_of_its_degree_are_exact(axes):
    for by in interpolations(table(grid=box(axes))):
        powers, s = by.exponents, places_in(by)
        factors = np.random.default_rng(1).normal(size=len(powers))
        at_nodes, exact = ((x[:, None] ** powers).prod(2) @ factors for x in (by.nodes, s))
        assert np.abs(by.weights(s) @ at_nodes - exact).max() < 1e-8 * np.abs(exact).max()


@pytest.mark.parametrize("axes", [2, 5])
def test_one_degree_more_is_not(axes):
    """Else the test above would see nothing."""
    by = next(interpolations(table(grid=box(axes))))
    s = places_in(by)
    assert np.abs(by.weights(s) @ by.nodes[:, 0] ** 3 - s[:, 0] ** 3).max() > 1e-3


def test_the_error_falls_as_fast_as_the_chebyshev_series_of_the_function():
    """1 / (2 + x) is analytic in the Bernstein ellipse of rho = 2 + sqrt(3) (Trefethen, 2013,
    theorem 8.2): the error of n nodes is at most 4 M rho^(1 - n) / (rho - 1)."""
    errors = []
    for by in interpolations(table(grid={"a": np.linspace(-1, 1, 21)})):
        s = places_in(by)
        off = by.weights(s) @ (1 / (2 + by.nodes[:, 0])) - 1 / (2 + s[:, 0])
        errors.append(np.abs(off).max())
    rho = 2 + math.sqrt(3)
    for (n, error), (m, finer) in itertools.pairwise(zip((3, 5, 9), errors, strict=True)):
        assert 0.5 < (error / finer) / rho ** (m - n) < 2, (n, m)


def test_extrema_are_nested_and_hit_the_grid():
    levels = [{tuple(n) for n in by.nodes.tolist()} for by in interpolations(table(grid=box(2)))]
    assert levels[0] < levels[1] < levels[2]
    assert list(map(len, levels)) == [9, 25, 81]
    by = next(interpolations(table(grid={"a": [0.9, 0.95, 1.0, 1.05, 1.1]})))
    assert by.nodes.tolist() == [[0.9], [1.0], [1.1]]


def test_short_axes_and_axes_of_one_value_take_no_more_nodes_than_values():
    found = table(grid={"a": [1.0], "b": [2.0, 0.5], "c": [1.0, 2.0, 4.0, 5.0]})
    assert found.node_counts() == (6, 8)
    by = list(interpolations(found))[-1]
    assert {tuple(node) for node in by.nodes.tolist()} == set(
        itertools.product([1.0], [0.5, 2.0], [1.0, 2.0, 4.0, 5.0])
    )
    assert np.array_equal(by.weights(by.nodes), np.eye(8))
    one = table(grid={"a": [1.0]})
    assert one.node_counts() == (1,)
    assert next(interpolations(one)).weights([[1.0]]).tolist() == [[1.0]]


@pytest.mark.parametrize("axes", [4, 16])
def test_nodes_of_many_axes_are_the_same_at_every_start_and_fill_the_box(axes):
    by, again = (next(interpolations(table(grid=box(axes)))) for _ in range(2))
    assert np.array_equal(by.nodes, again.nodes)
    assert len(by.nodes) == math.ceil(1.5 * math.comb(axes + 2, 2))
    assert ((by.low <= by.nodes) & (by.nodes <= by.high)).all()
