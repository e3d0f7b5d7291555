"""Sites by their family: "skip.3" is member 3 of the family "skip"."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from cmkit import RecipeError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from cmkit import Scales

Scale = Annotated[float, Field(ge=-100, le=100)]
"""What a feature is multiplied by."""
FAMILIES = ("skip", "emb", "attn", "mlp")
"""The families of sites, each a field of every policy; a network has some of them."""
LABELS = {"skip": "skip (s0)", "emb": "emb (s1)"}
"""The families with the names of the paper's listing."""


def members(family: str, value: float | tuple[float, ...], sites: Iterable[str]) -> list[str]:
    """The family's sites, in the network's order; RecipeError when `value`, other than 1, has
    none to scale."""
    every = list(sites)
    found = [site for site in every if _family(site) == family]
    if not found and any(v != 1 for v in (value if isinstance(value, tuple) else (value,))):
        shown = list(value) if isinstance(value, tuple) else value
        raise RecipeError(
            f"rescaler.{family} = {shown}: the backbone has no {family!r} sites; it has"
            f" {', '.join(sorted({_family(site) for site in every})) or 'none'}"
        )
    return found


def constant(used: Mapping[str, float]) -> Callable[[Tensor], Scales]:
    """The map sigma (B,) -> scales, the same at every sigma, of the number of each site."""

    @functools.lru_cache(maxsize=4)
    def scales(device: torch.device, dtype: torch.dtype) -> Scales:
        import torch

        # One tensor a value: networks reuse an activation while the scale is the same object.
        values = {
            value: torch.tensor(value, device=device, dtype=dtype) for value in set(used.values())
        }
        return {site: values[value] for site, value in used.items()}

    return lambda sigma: scales(sigma.device, sigma.dtype)


def decided(values: Mapping[str, float], names: Iterable[str]) -> dict[str, float]:
    """Those of `names` that have a value, or else a family with one."""
    known = ((name, values.get(name, values.get(_family(name)))) for name in names)
    return {name: value for name, value in known if value is not None}


def spans(sites: Iterable[str]) -> str:
    """All sites in a few words: "skip.0 to skip.8, emb.0 to emb.12"."""
    families: dict[str, list[str]] = {}
    for site in sites:
        families.setdefault(_family(site), []).append(site)
    ends = (dict.fromkeys((own[0], own[-1])) for own in families.values())
    return ", ".join(" to ".join(pair) for pair in ends) or "none"


def _family(site: str) -> str:
    return site.partition(".")[0]
