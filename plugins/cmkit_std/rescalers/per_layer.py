"""A scale for every site: the global rescaling of Zhu, Lin, Liu, Ning, Blaschko (Rescaling
Intermediate Features Makes Trained Consistency Models Perform Better, 2024), layer by layer.

The paper has two numbers for all layers. Of diffusion models, FreeU (Si, Huang, Jiang, Liu, 2023)
rescales the coarsest two stages of the decoder alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from cmkit import DataSpec, Rescaler
from cmkit.errors import RecipeError
from cmkit_std.rescalers.families import (
    FAMILIES,
    LABELS,
    Scale,
    constant,
    decided,
    members,
    spans,
)

if TYPE_CHECKING:
    from torch import Tensor

    from cmkit import Scales


class PerLayer(Rescaler):
    """A number for every layer: the fields of `global`, or for any of them a list with one each.

    Lists run from the input on. With one number for each family it is `global`, bit for bit. A
    search calls the numbers `skip`, `emb`, and by site `"skip.3"`.
    """

    labels: ClassVar[Mapping[str, str]] = LABELS

    skip: Scale | tuple[Scale, ...] = 1.0
    """Scale of the copies that travel from encoder to decoder: one for all, or a list."""
    emb: Scale | tuple[Scale, ...] = 1.0
    """Scale of the embedding before each block reads it: one for all blocks, or a list."""
    attn: Scale | tuple[Scale, ...] = 1.0
    """Scale of the attention branch of a transformer's blocks: one for all, or a list."""
    mlp: Scale | tuple[Scale, ...] = 1.0
    """Scale of the perceptron branch of a transformer's blocks: one for all, or a list."""
    sites: dict[str, Scale] = Field({}, max_length=10_000)
    """Scales of single sites, such as { "skip.3" = 0.9 }; they win over the family's."""

    def bind(self, sites: tuple[str, ...]) -> Callable[[Tensor], Scales]:
        """A number at each site; RecipeError for a list of another length and an unknown site."""
        numbers: dict[str, float] = {}
        for family in FAMILIES:
            value: float | tuple[float, ...] = getattr(self, family)
            own = members(family, value, sites)
            if isinstance(value, tuple) and len(value) != len(own):
                raise RecipeError(
                    f"rescaler.{family}: {len(value)} values, but the backbone has {len(own)}"
                    f" {family!r} sites: {spans(own)}; give one for each, or one number for all"
                )
            each = value if isinstance(value, tuple) else (value,) * len(own)
            numbers |= dict(zip(own, each, strict=True))
        for site in self.sites:
            if site not in sites:
                raise RecipeError(
                    f"rescaler.sites: the backbone has no {site!r}; it has {spans(sites)}"
                )
        return constant(numbers | self.sites)

    def smallest(self, data: DataSpec) -> Mapping[str, Any]:
        """Of lists the first number, of a family's sites the first: small networks have few."""
        lists = {key: v[0] for key in FAMILIES if isinstance(v := getattr(self, key), tuple)}
        return {**lists, "sites": {f"{name.split('.')[0]}.0": v for name, v in self.sites.items()}}

    def value_of(self, name: str) -> float:
        """The number of a field, or of a site: its own in `sites`, otherwise its family's."""
        family, dot, member = name.partition(".")
        if not dot:
            return super().value_of(name)
        value = self.sites.get(name, getattr(self, family) if family in FAMILIES else 1.0)
        if not isinstance(value, tuple):
            return value
        if not member.isdecimal() or int(member) >= len(value):
            raise ValueError(f"rescaler.{family} ends with {family}.{len(value) - 1}")
        return value[int(member)]

    def complete(self, values: Mapping[str, float], names: Iterable[str]) -> dict[str, float]:
        """A site follows its family, unless it has a number of its own."""
        return decided(values, (name for name in names if name in values or name not in self.sites))

    def with_values(self, values: Mapping[str, Any]) -> PerLayer:
        """The same policy with other fields and sites; `bind` refuses sites that do not exist."""
        own = {name: value for name, value in values.items() if "." in name}
        rest = {name: value for name, value in values.items() if "." not in name}
        return super().with_values({**rest, "sites": {**self.sites, **own}})
