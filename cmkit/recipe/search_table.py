"""The keys of [search], and what follows from them alone: cells, rungs, nodes."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from cmkit.recipe.tables import Batch, Precision, StageTable
from cmkit.values import DataSpec

MAX_CELLS = 10_000
"""Of a search; the paper's have 121."""
TUNERS = ("tpe", "cmaes")
"""Methods of a search that are Optuna's."""
FEW_IMAGES = 50
"""Of the first rung of successive halving, unless the recipe says how many rungs there are."""
MAX_NODES = 1024
"""Of a search by interpolation."""
DRAWN_CELLS = 5
"""Cells beside the nodes that such a search draws to see how good it is: (1, 1), three by lot, and
the winner."""


def _fitted(axes: int, degree: int) -> int:
    """Nodes that fit a polynomial of a total degree: half as many again as it has terms."""
    return math.ceil(1.5 * math.comb(axes + degree, degree))


OF_METHOD = {"rounds": "coordinate", "tolerance": "surrogate", "candidates": "surrogate"}
"""Keys of [search] that only one method reads."""


class SearchTable(StageTable):
    """The keys of [search]."""

    PRODUCT: ClassVar[int] = 3
    """Up to so many numbers, "surrogate" interpolates on a grid of nodes."""

    images: int = Field(ge=2, le=10**7)
    """Images a cell."""
    grid: dict[str, Annotated[tuple[float, ...], Field(min_length=1, max_length=1000)]] = Field(
        min_length=1, max_length=256
    )
    """Values of each of the rescaler's numbers: of a field such as skip, or, in
    quotation marks, of a part of it such as "skip.3", where the rescaler has parts."""
    method: Literal["grid", "coordinate", "surrogate", "tpe", "cmaes"] | None = None
    """Which cells are tried: "grid", the default, every combination; "coordinate" one number after
    the other, the others at their best so far and at first the rescaler's own; "surrogate" every
    combination, most of them with images that are interpolated from those of few; "tpe" and "cmaes"
    as many `trials`, for many numbers at once, anywhere between the lowest and the highest value
    of each axis (extra `search`: Optuna's tree of Parzen estimators, or CMA-ES). They begin with
    the rescaler's own numbers, brought into these ranges; an axis of one value keeps it."""
    rounds: int | None = Field(None, ge=1, le=100)
    """How often "coordinate" goes through the numbers; absent = once."""
    tolerance: float | None = Field(None, gt=0)
    """How far an interpolated score of "surrogate" may be from the exact one, in cells that are
    drawn to see it; absent = the standard error of the winner's own score."""
    candidates: int | None = Field(None, ge=2, le=MAX_CELLS)
    """Most cells that "surrogate" scores, absent = 1000. Of a grid with more it takes half as many
    by lot, and goes on from the best of them one number after the other."""
    trials: int | None = Field(None, ge=1, le=MAX_CELLS)
    """Cells of "tpe" and "cmaes"."""
    halving: int | None = Field(None, ge=2, le=100)
    """Successive halving: cells that are tried together are scored on few images, of which the
    best 1 in `halving` go on to `halving` times as many, the first of them the same, and so on up
    to `images`. Only cells with all `images` may win. Absent = every cell has all."""
    rungs: int | None = Field(None, ge=2, le=20)
    """Numbers of images in `halving`, `images` the last; absent = as many as leave 50 or more to
    the first, and at least 2."""
    minimize: str = "fid"
    """The metric's number that decides."""
    batch: Batch = 64
    """Images at a time."""
    precision: Precision = "auto"
    """Autocast while sampling."""
    rerank: int = Field(5, ge=0, le=1000)
    """Best cells that are scored again on more images, before the winner is chosen; 0 = none."""
    rerank_images: int = Field(0, ge=0, le=10**7)
    """Images a cell then; 0 = four times `images`."""
    confirm_images: int = Field(0, ge=0, le=10**7)
    """Images a seed when the winner meets the unscaled model on fresh noise; 0 = as `images`."""
    confirm_seeds: int = Field(5, ge=2, le=1000)
    """Noise seeds of that comparison."""
    thumbnails: int = Field(25, ge=1, le=400)
    """Pictures kept of every cell."""

    @model_validator(mode="after")
    def _cells_can_be_counted(self) -> SearchTable:
        for key, method in OF_METHOD.items():
            if getattr(self, key) is not None and self.method != method:
                raise ValueError(
                    f'{key} = {getattr(self, key):g} is of method = "{method}"; add it, or drop'
                    f" {key}"
                )
        values = sum(map(len, self.grid.values()))
        if self.method == "surrogate":
            self._nodes_can_be_drawn()
            return self
        if self.method in TUNERS:
            count, cure = float(self.trials or 0), ""
        elif self.method == "coordinate":
            count, cure = float(values * (self.rounds or 1)), "name fewer values"
        else:
            count = math.prod(map(len, self.grid.values()), start=1.0)
            cure = f'name fewer values, or set method = "coordinate", which tries {values:,}'
        if count > MAX_CELLS:
            raise ValueError(f"{count:.3g} cells, of which {MAX_CELLS:,} are the most: {cure}")
        return self

    @model_validator(mode="after")
    def _tuner_has_its_keys(self) -> SearchTable:
        if self.method not in TUNERS:
            if self.trials:
                raise ValueError(
                    f'trials = {self.trials} is of method = "tpe" and "cmaes"; set one of them'
                )
            return self
        if not self.trials:
            raise ValueError(f'method = "{self.method}" needs trials, the number of its cells')
        ranges = sum(min(values) < max(values) for values in self.grid.values())
        if not ranges:
            raise ValueError(
                f'method = "{self.method}" needs a range: give an axis of the grid two values'
            )
        if self.method == "cmaes" and ranges < 2:
            raise ValueError('method = "cmaes" needs two axes with a range; set method = "tpe"')
        return self

    @model_validator(mode="after")
    def _rungs_have_images(self) -> SearchTable:
        if self.halving is None:
            if self.rungs:
                raise ValueError(f"rungs = {self.rungs} are of halving; add halving = 4")
        elif self.method == "surrogate":
            raise ValueError(
                f'halving = {self.halving} is not of method = "surrogate", whose cells share their'
                " nodes' images; drop one"
            )
        elif (first := self.rung_images[0]) < 2:
            raise ValueError(
                f"{len(self.rung_images)} rungs of halving = {self.halving} up to {self.images}"
                f" images begin with {first}, and 2 are the least; set fewer rungs, a smaller"
                " halving, or more images"
            )
        return self

    @property
    def rung_images(self) -> tuple[int, ...]:
        """Images of a cell in the rungs of successive halving, rising to `images`; without halving
        only these."""
        if self.halving is None:
            return (self.images,)
        rungs = self.rungs
        if rungs is None:
            rungs = 2
            while self.images // self.halving**rungs >= FEW_IMAGES:
                rungs += 1
        return tuple(self.images // self.halving**k for k in reversed(range(rungs)))

    def _nodes_can_be_drawn(self) -> None:
        axes = self._moving()
        if axes > self.PRODUCT and (nodes := _fitted(axes, 2)) > MAX_NODES:
            most = max(n for n in range(axes) if _fitted(n, 2) <= MAX_NODES)
            raise ValueError(
                f"{axes} numbers take {nodes:,} nodes to interpolate, of which {MAX_NODES:,} are"
                f' the most: name at most {most} of them, or set method = "coordinate"'
            )

    def _moving(self) -> int:
        return sum(len(set(values)) > 1 for values in self.grid.values())

    def node_sizes(self) -> tuple[int, ...]:
        """What "surrogate" interpolates with, coarse to fine: up to so many nodes an axis, or of
        more than `PRODUCT` axes the total degree."""
        axes, sizes = self._moving(), (3, 5, 9)
        if axes > self.PRODUCT:
            return tuple(d for d in range(2, 9) if _fitted(axes, d) <= MAX_NODES)
        longest = max(len(set(values)) for values in self.grid.values())
        return tuple(n for k, n in enumerate(sizes) if k == 0 or sizes[k - 1] < longest)

    def node_counts(self) -> tuple[int, ...]:
        """Nodes that each of `node_sizes` has."""
        axes = self._moving()
        if axes > self.PRODUCT:
            return tuple(_fitted(axes, degree) for degree in self.node_sizes())
        lengths = [len(set(values)) for values in self.grid.values()]
        return tuple(math.prod(min(n, length) for length in lengths) for n in self.node_sizes())

    def passes(self) -> tuple[int, ...]:
        """How often "surrogate" draws an image with each of `node_sizes`, at most: in the nodes, in
        (1, 1), three cells by lot and the winner. First images, of which a few are drawn once
        more, are left out."""
        return tuple(count + DRAWN_CELLS for count in self.node_counts())

    def smallest(self, data: DataSpec) -> Mapping[str, Any]:
        """The ends of every axis, of parts such as "skip.3" the first, on a dozen images, with
        halving on two."""
        images = min(self.images, 24 if self.halving else 12)
        firsts: dict[str, tuple[float, ...]] = {}
        for key, values in self.grid.items():
            firsts.setdefault(re.sub(r"\.\d+$", ".0", key), values)
        ranges = sum(min(values) < max(values) for values in firsts.values())
        return {
            **({"method": "tpe"} if self.method == "cmaes" and ranges < 2 else {}),
            "trials": self.trials and min(self.trials, 4),
            **dict.fromkeys(("halving", "rungs"), self.halving and 2),
            **dict.fromkeys(("images", "batch", "rerank_images", "confirm_images"), images),
            "grid": {key: sorted({min(values), max(values)}) for key, values in firsts.items()},
            "rounds": self.rounds and 1,
            "rerank": min(self.rerank, 1),
            "confirm_seeds": 2,
            "thumbnails": 4,
        }
