"""The record of a checked recipe and its cost."""

from __future__ import annotations

from dataclasses import dataclass

from cmkit.recipe import Recipe
from cmkit.values import DataSpec
from cmkit.weights import Weights

CONDITIONS = frozenset({"label", "guidance", "sigma_to", "text", "pooled", "size"})


@dataclass(frozen=True)
class Plan:
    """A recipe whose parts are known to fit, with what it will cost."""

    recipe: Recipe
    data: DataSpec
    """Shape of the pictures."""
    space: DataSpec
    """Shape of what the network sees: of the codec's latents, or else of the pictures; with that of
    the prompts' features."""
    conditions: frozenset[str]
    sites: tuple[str, ...]
    parameters: int
    flops: int
    """Floating-point operations of one forward pass for one image."""
    disk: int
    """Bytes that the run folder will hold at most, pictures aside."""
    memory: int
    """Bytes of weights, their copies and the optimizer's state."""
    downloads: tuple[Weights, ...] = ()
    """Published weights that are not here yet."""
    trained: int = 0
    """Those of `parameters` that training changes: of an adapter its own."""
    nfe: int | None = None
    """Network evaluations a sample, if any are drawn."""
    notes: tuple[str, ...] = ()
    """What is not taken as the recipe's weights have it, and what its numbers do not mean."""

    @property
    def label_rule(self) -> str | None:
        """How classes of samples are drawn: "data", in the proportions of the data, or "uniform";
        None where the model has no classes."""
        if "label" not in self.conditions:
            return None
        said = self.recipe.sample.labels if self.recipe.sample else "data"
        return said if self.data.counts else "uniform"
