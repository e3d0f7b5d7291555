"""Global rescaling (Zhu, Lin, Liu, Ning, Blaschko: Rescaling Intermediate Features Makes Trained
Consistency Models Perform Better, 2024)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

from pydantic import Field

from cmkit.errors import RecipeError
from cmkit.kinds import Rescaler

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from cmkit import Scales


class Global(Rescaler):
    """Two numbers: `skip` multiplies every encoder-decoder connection, `emb` every embedding.

    `skip` is s0 and `emb` is s1 of the paper's listing and of its Table 2; its prose swaps them.
    """

    skip: float = Field(1.0, ge=-100, le=100)
    """Scale of the copies that travel from encoder to decoder (s0)."""
    emb: float = Field(1.0, ge=-100, le=100)
    """Scale of the embedding, label included, before each block reads it (s1)."""

    def bind(self, sites: tuple[str, ...]) -> Callable[[Tensor], Scales]:
        """One tensor a family for every site; RecipeError when a scale other than 1 has no site."""
        families = {"skip": self.skip, "emb": self.emb}
        for family, value in families.items():
            if value != 1 and not any(_family(site) == family for site in sites):
                raise RecipeError(
                    f"rescaler.{family} = {value}: the backbone has no {family!r} sites;"
                    f" it has {', '.join(sorted({_family(site) for site in sites})) or 'none'}"
                )
        used = {site: _family(site) for site in sites if _family(site) in families}

        @functools.lru_cache(maxsize=4)
        def scales(device: torch.device, dtype: torch.dtype) -> Scales:
            import torch

            values = {
                family: torch.tensor(value, device=device, dtype=dtype)
                for family, value in families.items()
            }
            return {site: values[family] for site, family in used.items()}

        return lambda sigma: scales(sigma.device, sigma.dtype)


def _family(site: str) -> str:
    return site.split(".", 1)[0]
