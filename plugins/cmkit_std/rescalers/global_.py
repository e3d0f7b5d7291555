"""Global rescaling (Zhu, Lin, Liu, Ning, Blaschko: Rescaling Intermediate Features Makes Trained
Consistency Models Perform Better, 2024)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from cmkit import Rescaler
from cmkit_std.rescalers.families import LABELS, members

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from cmkit import Scales


class Global(Rescaler):
    """Two numbers: `skip` multiplies every encoder-decoder connection, `emb` every embedding.

    `skip` is s0 and `emb` is s1 of the paper's listing and of its Table 2; its prose swaps them.
    """

    labels: ClassVar[Mapping[str, str]] = LABELS

    skip: float = Field(1.0, ge=-100, le=100)
    """Scale of the copies that travel from encoder to decoder (s0)."""
    emb: float = Field(1.0, ge=-100, le=100)
    """Scale of the embedding, label included, before each block reads it (s1)."""

    def bind(self, sites: tuple[str, ...]) -> Callable[[Tensor], Scales]:
        """One tensor a family for every site; RecipeError when a scale other than 1 has no site."""
        families = {"skip": self.skip, "emb": self.emb}
        used = {
            site: family
            for family, value in families.items()
            for site in members(family, value, sites)
        }

        @functools.lru_cache(maxsize=4)
        def scales(device: torch.device, dtype: torch.dtype) -> Scales:
            import torch

            values = {
                family: torch.tensor(value, device=device, dtype=dtype)
                for family, value in families.items()
            }
            return {site: values[family] for site, family in used.items()}

        return lambda sigma: scales(sigma.device, sigma.dtype)
