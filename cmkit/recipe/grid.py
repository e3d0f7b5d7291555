"""The cells of a search, and the rescaler and the metric of one cell."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping

from pydantic import ValidationError

from cmkit.kinds import Metric, Rescaler
from cmkit.recipe.recipe import Recipe


def cells(recipe: Recipe) -> Iterator[dict[str, float]]:
    """Values of each cell of the search's grid, the last axis fastest; of other methods than the
    grid, of each that differs from the recipe's own rescaler in one number, and of the middle of
    the box that is interpolated in."""
    if recipe.search is None or recipe.rescaler is None:
        return
    grid = recipe.search.grid
    if recipe.search.method not in (None, "grid"):
        yield from ({axis: value} for axis, values in grid.items() for value in values)
        if recipe.search.method == "surrogate":
            yield {axis: (min(values) + max(values)) / 2 for axis, values in grid.items()}
    else:
        for combined in itertools.product(*grid.values()):
            yield dict(zip(grid, combined, strict=True))


def with_values(recipe: Recipe, values: Mapping[str, float]) -> Rescaler:
    """The recipe's rescaler with other values of some of its numbers, validated."""
    assert recipe.rescaler is not None
    try:
        return recipe.rescaler.with_values(values)
    except ValueError as error:
        reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
        raise recipe.source.error(
            ("search", "grid"), f"the rescaler refuses {dict(values)}: {reason}"
        ) from error


def numbers(metric: Metric) -> tuple[str, ...]:
    """Names of a metric's numbers in the recipe."""
    return tuple(f"{metric.prefix}{key}" for key in metric.keys())  # noqa: SIM118 - of Metric


def scored(recipe: Recipe, images: int) -> tuple[Metric, str]:
    """The metric that scores a training on so few images, compared with images that are in none of
    its batches where the data set has any, and the name of its number that is the score."""
    assert recipe.train is not None
    said = recipe.train.score
    known: dict[str, Metric] = {}
    for metric in recipe.metric:
        for found in (metric.quick(images), metric):
            keys = [key for key in found.keys() if key not in found.neither]  # noqa: SIM118
            known |= {key: found for key in keys if key not in known}
    if not known:
        raise recipe.source.error(
            ("train", "score_every"),
            'a score needs a [[metric]] table: [[metric]] use = "fidelity"',
        )
    key = said.removeprefix("heldout_") if said else next(iter(known))
    if key not in known:
        raise recipe.source.error(
            ("train", "score"),
            f"no [[metric]] returns it as a score; known: {', '.join(known)}",
            f" = {said!r}",
        )
    heldout = recipe.dataset.heldout() is not None
    return known[key].only(key).model_copy(update={"heldout": heldout}), key


def minimized(recipe: Recipe) -> Metric:
    """The cheapest metric that returns the number that the search minimizes."""
    assert recipe.search is not None
    key = recipe.search.minimize
    for metric in recipe.metric:
        if key in numbers(metric):
            name = key.removeprefix(metric.prefix)
            if name in metric.higher:
                raise recipe.source.error(
                    ("search", "minimize"),
                    "more of it is better, and a search takes the least; name another number",
                    f" = {key!r}",
                )
            return metric.only(name)
    known = ", ".join(key for metric in recipe.metric for key in numbers(metric))
    raise recipe.source.error(
        ("search", "minimize"), f"no [[metric]] returns it; known: {known or 'none'}", f" = {key!r}"
    )
