"""Scales that depend on the noise level: the global rescaling of Zhu, Lin, Liu, Ning, Blaschko
(Rescaling Intermediate Features Makes Trained Consistency Models Perform Better, 2024), with other
numbers at other levels.

The paper finds its two numbers for one step, at sigma_max; whether they serve the lower levels of
several steps is open.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field, model_validator

from cmkit import RecipeError, Rescaler
from cmkit_std.rescalers.families import FAMILIES, LABELS, Scale, decided, members

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from cmkit import Noise, Scales

ROUNDED = 1e-3
"""By how much the ends of the noise levels may be rounded, such as 14.615 for 14.61464."""


class PerTimestep(Rescaler):
    """The fields of `global`, each with a value at every noise level of `sigmas`.

    Between levels they are linear in ln(sigma), and constant beyond the ends. With one value each
    it is `global`, bit for bit. A search calls the value at the first level `"skip.0"`.
    """

    labels: ClassVar[Mapping[str, str]] = LABELS

    sigmas: tuple[Annotated[float, Field(gt=0, le=10_000)], ...] = Field(
        min_length=1, max_length=1000
    )
    """Rising noise levels, none beyond denoiser.sigma_min and sigma_max."""
    skip: Scale | tuple[Scale, ...] = 1.0
    """Scale of the copies from encoder to decoder: one for all levels, or one for each."""
    emb: Scale | tuple[Scale, ...] = 1.0
    """Scale of the embedding, label included: one for all levels, or one for each."""
    attn: Scale | tuple[Scale, ...] = 1.0
    """Scale of a transformer's attention branches: one for all levels, or one for each."""
    mlp: Scale | tuple[Scale, ...] = 1.0
    """Scale of a transformer's perceptron branches: one for all levels, or one for each."""

    @model_validator(mode="after")
    def _levels_rise_and_have_values(self) -> PerTimestep:
        if any(a >= b for a, b in zip(self.sigmas, self.sigmas[1:], strict=False)):
            raise ValueError(f"sigmas {list(self.sigmas)} must rise")
        for family in FAMILIES:
            value = getattr(self, family)
            if isinstance(value, tuple) and len(value) != len(self.sigmas):
                raise ValueError(
                    f"{family} has {len(value)} values for {len(self.sigmas)} sigmas; give one for"
                    " each, or one number for all"
                )
        return self

    def bind(self, sites: tuple[str, ...]) -> Callable[[Tensor], Scales]:
        """One tensor a family for every site; RecipeError when a scale other than 1 has no site."""
        families = {family: getattr(self, family) for family in FAMILIES}
        used = {
            family: own
            for family, value in families.items()
            if (own := members(family, value, sites))
        }

        @functools.lru_cache(maxsize=4)
        def constants(device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
            import torch

            return {
                name: torch.tensor(value, device=device, dtype=dtype)
                for name, value in {"sigmas": self.sigmas, **families}.items()
            }

        def scales(sigma: Tensor) -> Scales:
            given = constants(sigma.device, sigma.dtype)
            found: dict[str, Tensor] = {}
            for family, own in used.items():
                value = families[family]
                if isinstance(value, tuple) and len(set(value)) > 1:
                    scale = interpolated(sigma, given["sigmas"], given[family])
                else:
                    scale = given[family].reshape(-1)[0]
                found |= dict.fromkeys(own, scale)
            return found

        return scales

    def check_noise(self, noise: Noise) -> None:
        """RecipeError for a level that no image has."""
        low, high = noise.sigma_min * (1 - ROUNDED), noise.sigma_max * (1 + ROUNDED)
        for sigma in self.sigmas:
            if not low <= sigma <= high:
                raise RecipeError(
                    f"rescaler.sigmas: {sigma:g} is no noise level of the model's, which has"
                    f" {noise.sigma_min:g} to {noise.sigma_max:g}; give levels within"
                )

    def value_of(self, name: str) -> float:
        """The number of a field, or at a level: "skip.1" is the value at the second one."""
        if "." not in name:
            return super().value_of(name)
        family, level = self._level(name)
        value: float | tuple[float, ...] = getattr(self, family)
        return value[level] if isinstance(value, tuple) else value

    def complete(self, values: Mapping[str, float], names: Iterable[str]) -> dict[str, float]:
        """The value at a level follows its family's."""
        return decided(values, names)

    def with_values(self, values: Mapping[str, Any]) -> PerTimestep:
        """The same policy with other numbers; where a level is named, one number becomes a list."""
        fields = {name: value for name, value in values.items() if "." not in name}
        for name in (name for name in values if "." in name):
            family, level = self._level(name)
            old = fields.get(family, getattr(self, family))
            every = list(old) if isinstance(old, tuple) else [old] * len(self.sigmas)
            every[level] = values[name]
            fields[family] = tuple(every)
        return super().with_values(fields)

    def _level(self, name: str) -> tuple[str, int]:
        """("skip", 1) of "skip.1"; ValueError where there is no such level."""
        family, _, level = name.partition(".")
        if family not in FAMILIES or not level.isdecimal() or int(level) >= len(self.sigmas):
            last = len(self.sigmas) - 1
            known = ", ".join(f"{family}.0 to {family}.{last}" for family in FAMILIES)
            raise ValueError(f"no level {name!r}; known: {known}")
        return family, int(level)


def interpolated(sigma: Tensor, sigmas: Tensor, values: Tensor) -> Tensor:
    """Values, (B,), at sigma (B,): `values` (K,) at the rising `sigmas` (K,), K > 1, bit for bit,
    linear in ln(sigma) between them and constant beyond."""
    import torch

    low = torch.searchsorted(sigmas[1:-1], sigma)
    high = low + 1
    # At a level both logarithms are of the same number, and the weight is exactly 1.
    weight = torch.log(sigma / sigmas[low]) / torch.log(sigmas[high] / sigmas[low])
    return torch.lerp(values[low], values[high], weight.clamp(0, 1))
