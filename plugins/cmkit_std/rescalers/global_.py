"""Global rescaling (Zhu, Lin, Liu, Ning, Blaschko: Rescaling Intermediate Features Makes Trained
Consistency Models Perform Better, 2024)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, ClassVar

from cmkit import Rescaler
from cmkit_std.rescalers.families import FAMILIES, LABELS, Scale, constant, members

if TYPE_CHECKING:
    from torch import Tensor

    from cmkit import Scales


class Global(Rescaler):
    """Two numbers: `skip` multiplies every encoder-decoder connection, `emb` every embedding.

    `skip` is s0 and `emb` is s1 of the paper's listing and of its Table 2; its prose swaps them.
    A transformer has no skips: there `attn` and `mlp` multiply its residual branches.
    """

    labels: ClassVar[Mapping[str, str]] = LABELS

    skip: Scale = 1.0
    """Scale of the copies that travel from encoder to decoder (s0)."""
    emb: Scale = 1.0
    """Scale of the embedding, label included, before each block reads it (s1)."""
    attn: Scale = 1.0
    """Scale of the attention branch of every transformer block."""
    mlp: Scale = 1.0
    """Scale of the perceptron branch of every transformer block."""

    def bind(self, sites: tuple[str, ...]) -> Callable[[Tensor], Scales]:
        """Each family's number at its sites; RecipeError when one other than 1 has no site."""
        return constant(
            {
                site: getattr(self, family)
                for family in FAMILIES
                for site in members(family, getattr(self, family), sites)
            }
        )
