"""Low-rank adaptation (LoRA; Hu et al., 2021) of any network, by peft."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from cmkit import Adapter, CheckpointError, DataSpec

if TYPE_CHECKING:
    from cmkit import Network

RANK = 64


class Lora(Adapter):
    """Low-rank adaptation: beside each chosen layer's weight W a product, W + alpha / rank B A, of
    which A and B alone are trained; B begins as zeros.

    Files are those that diffusers loads, with alpha beside the weights. Those of peft, of the
    scripts for latent consistency models, and of kohya are read as well.
    """

    rank: int | None = Field(None, ge=1, le=4096)
    """Rows of A; absent = as the file says, or 64."""
    alpha: float | None = Field(None, gt=0, le=1e6)
    """Absent = as the file says, or the rank."""
    targets: tuple[str, ...] | None = Field(None, min_length=1, max_length=10_000)
    """Layers, by the ends of their names, of a fresh adapter; absent = of networks of diffusers
    those that the authors of latent consistency models adapt, of others every linear layer and
    convolution."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Of what A is given, in training."""
    how: Literal["add", "factors"] = "add"
    """Of several `weights` w: "add" is the sum of the changes w B A, of any ranks; "factors" the
    product of the sums of w B and of w A, which has cross terms and needs equal ranks."""

    @model_validator(mode="after")
    def _something_counts(self) -> Lora:
        if isinstance(self.weights, dict) and not any(self.weights.values()):
            raise ValueError("weights: all count 0, so that nothing is left; give one a number")
        return self

    def identity(self) -> Mapping[str, Any]:
        from cmkit.files import cached_sha256

        if self.weights is None:
            return {}
        counts = zip(self._files(), self._named().values(), strict=True)
        return {"weights": [f"{count:g} of {cached_sha256(path)}" for path, count in counts]}

    def smallest(self, data: DataSpec) -> Mapping[str, Any]:
        return {"rank": 2, "alpha": None, "weights": None}

    def attach(self, network: Network) -> None:
        from cmkit_latent import factors, injected

        if self.weights is None:
            rank = self.rank or RANK
            names = injected.chosen(network, self.targets)
            injected.attach_fresh(network, names, rank, self.alpha or rank, self.dropout)
            return
        found = self._mixed(network)
        if self.rank and (ranks := {one.rank for one in found.values()}) != {self.rank}:
            said = ", ".join(map(str, sorted(ranks)))
            raise CheckpointError(
                f"{', '.join(self._named())}: of rank {said}, not rank = {self.rank}; drop the key"
            )
        injected.attach_found(network, found, self.dropout)
        factors.check_written(found)

    def off(self, network: Network) -> AbstractContextManager[None]:
        from cmkit_latent.injected import off

        return off(network)

    def fold(self, network: Network) -> None:
        from cmkit_latent.injected import fold

        fold(network)

    def write(self, network: Network, path: Path) -> None:
        """Write the adapter as diffusers reads it; of its networks a fresh one is made to load the
        file. CheckpointError where it would not load all of it."""
        from cmkit_latent import injected
        from cmkit_latent.factors import write

        write(injected.taken(network), path)
        injected.check_loaded(network, path)

    def mix(self, path: Path) -> None:
        from cmkit_latent.factors import write

        write(self._mixed(None), path)

    def _named(self) -> dict[str, float]:
        return {self.weights: 1.0} if isinstance(self.weights, str) else dict(self.weights or {})

    def _files(self) -> list[Path]:
        from cmkit.weights import adapter_file

        return [adapter_file(name) for name in self._named()]

    def _mixed(self, network: Network | None) -> dict[str, Any]:
        """What `weights` say, by layer."""
        from cmkit_latent import factors

        pairs = zip(self._named(), self._files(), strict=True)
        names = None if network is None else {name for name, _ in network.named_modules()}
        read = {
            name: factors.read(path, name, names, self.alpha, self.rank) for name, path in pairs
        }
        if isinstance(self.weights, str):
            return read[self.weights]
        return factors.mixed(read, self._named(), self.how)
