"""The rescaler's numbers by search, and the comparison of the winner with the unscaled model."""

from cmkit.search.cells import Cell, Comparison, confirm, rerank, search
from cmkit.search.score import CellsDrawn, PartialCells, Scoring
from cmkit.search.statistics import best, interval, verdict
from cmkit.search.strategies import all_images, most_cells, most_images, trace, trials
from cmkit.search.surrogate import Interpolated, interpolate
