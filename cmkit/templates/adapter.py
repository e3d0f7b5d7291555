"""Shifts of biases (BitFit; Zaken, Goldberg, Ravfogel, 2021)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cmkit import Adapter, CheckpointError, DataSpec, RecipeError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from cmkit import Network


class Mine(Adapter):
    """Beside each bias a shift of it, which alone is trained."""

    def identity(self) -> Mapping[str, Any]:
        from cmkit.files import cached_sha256
        from cmkit.weights import adapter_file

        found = [(count, adapter_file(name)) for name, count in _counts(self)]
        return {"weights": [f"{count:g} of {cached_sha256(path)}" for count, path in found]}

    def smallest(self, data: DataSpec) -> Mapping[str, Any]:
        return {"weights": None}

    def attach(self, network: Network) -> None:
        import torch
        from torch.nn.utils import parametrize

        from cmkit_mine.mine_shift import Shift

        network.requires_grad_(False)
        shifts: dict[str, nn.Module] = {}
        for name, module in list(network.named_modules()):
            if isinstance(getattr(module, "bias", None), torch.nn.Parameter):
                shifts[name] = Shift(module.bias)
                parametrize.register_parametrization(module, "bias", shifts[name])
        if not shifts:
            raise RecipeError("the backbone has no biases; choose another, or drop [adapter]")
        if self.weights is not None:
            found = _sum(self)
            if found.keys() != shifts.keys():
                strange = sorted(found.keys() ^ shifts.keys())
                raise CheckpointError(
                    f"{self.weights}: {len(strange)} layers are not in both, first {strange[0]};"
                    " choose the backbone that it was trained on"
                )
            with torch.no_grad():
                for name, shift in shifts.items():
                    shift.shift.copy_(found[name])

    @contextmanager
    def off(self, network: Network) -> Iterator[None]:
        own = [shift for _, _, shift in _shifts(network)]
        for shift in own:
            shift.on = False
        try:
            yield
        finally:
            for shift in own:
                shift.on = True

    def fold(self, network: Network) -> None:
        from torch.nn.utils import parametrize

        for _, module, _ in list(_shifts(network)):
            parametrize.remove_parametrizations(module, "bias")
        network.requires_grad_(False)

    def write(self, network: Network, path: Path) -> None:
        from cmkit.tensors import save_weights

        save_weights(path, {name: shift.shift for name, _, shift in _shifts(network)})

    def mix(self, path: Path) -> None:
        from cmkit.tensors import save_weights

        save_weights(path, _sum(self))


def _counts(adapter: Mine) -> list[tuple[str, float]]:
    said = adapter.weights or {}
    return [(said, 1.0)] if isinstance(said, str) else list(said.items())


def _sum(adapter: Mine) -> dict[str, Tensor]:
    """The sum of the shifts that are named, by layer."""
    from cmkit.tensors import read_safetensors
    from cmkit.weights import adapter_file

    total: dict[str, Tensor] = {}
    for name, count in _counts(adapter):
        for key, shift in read_safetensors(adapter_file(name)).items():
            # A checkpoint of a run has the whole name of the parameter.
            layer = key.removesuffix(".parametrizations.bias.0.shift")
            if layer in total and total[layer].shape != shift.shape:
                raise CheckpointError(f"{name}: {layer} has another shape than in the others")
            total[layer] = total.get(layer, 0.0) + count * shift
    return total


def _shifts(network: Network) -> Iterator[tuple[str, Any, Any]]:
    """Name, layer and shift of each bias that has one."""
    from torch.nn.utils import parametrize

    for name, module in network.named_modules():
        if parametrize.is_parametrized(module, "bias"):
            yield name, module, module.parametrizations.bias[0]
