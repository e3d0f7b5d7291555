"""Layers of peft in networks: put there, switched off, folded into the weights, taken out."""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners import lora
from peft.tuners.lora import LoraLayer
from torch import nn

from cmkit import CheckpointError, Network, RecipeError
from cmkit.export import quiet
from cmkit.tensors import read_with_metadata
from cmkit_latent.factors import METADATA, UNET, Factors, config
from cmkit_latent.network import UNet

NAME = "default"
"""peft's name of the one adapter."""
AUTHORS = (
    *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
    *("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv"),
    *("time_emb_proj", "time_embedding.linear_1", "time_embedding.linear_2"),
)
"""What the authors of LCM-LoRA adapt: the list of their script and the embedding of time, by which
their published sizes come out."""


def chosen(network: Network, targets: Sequence[str] | None) -> list[str]:
    """Names of the layers that a fresh adapter changes; RecipeError where there are none."""
    layers = [name for name, module in network.named_modules() if _adaptable(module)]
    if not layers:
        raise RecipeError(
            "the backbone has no linear layers or convolutions of torch, which LoRA changes; choose"
            " another backbone, or drop [adapter]"
        )
    if targets is None and not isinstance(network, UNet):
        return layers
    found = [n for n in layers if any(f".{n}".endswith(f".{t}") for t in targets or AUTHORS)]
    for target in targets or ():
        if not any(f".{name}".endswith(f".{target}") for name in found):
            raise RecipeError(
                f'targets: no layer is called "{target}"; there are {len(layers)}, such as'
                f" {', '.join(layers[:3])}"
            )
    return found


def _adaptable(module: nn.Module) -> bool:
    """Whether a layer is what torch's linear layer or convolution of its size is."""
    if isinstance(module, nn.Linear):
        return type(module) is nn.Linear
    if not isinstance(module, nn.Conv2d) or module.groups != 1:
        return False
    if type(module) is nn.Conv2d:
        return True
    x = torch.empty(1, module.in_channels, 8, 8, device="meta")
    own = copy.deepcopy(module).to("meta")
    plain = nn.Conv2d.forward(own, x)
    return type(module).forward(own, x).shape == plain.shape


def attach_fresh(
    network: Network, names: Sequence[str], rank: int, alpha: float, dropout: float
) -> None:
    """Put fresh factors, B = 0, beside layers; all other parameters are frozen."""
    options = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(names), lora_dropout=dropout)  # type: ignore[arg-type]
    _inject(network, options, names)


def attach_found(network: Network, found: Mapping[str, Factors], dropout: float) -> None:
    """Put these factors beside layers; all other parameters are frozen. CheckpointError where one
    has another shape."""
    modules = dict(network.named_modules())
    for name, factors in found.items():
        module = modules[name]
        if not isinstance(module, nn.Linear | nn.Conv2d):
            raise CheckpointError(f"adapter: {name} is no linear layer or convolution here")
        weight = module.weight
        if factors.b.shape[0] * factors.a[0].numel() != weight.numel() or len(factors.b) != len(
            weight
        ):
            raise CheckpointError(
                f"adapter: {name} is changed from {factors.a[0].numel()} to {len(factors.b)}"
                f" numbers, and is {tuple(weight.shape)} here; choose the backbone that the weights"
                " were trained on"
            )
    said = config(found)
    said |= {"target_modules": list(found)}
    for key in ("rank_pattern", "alpha_pattern"):
        own = {k.removeprefix("^").removesuffix("$"): v for k, v in said[key].items()}
        prefixed = {k.removeprefix(UNET): k for k in found}
        said[key] = {f"^{prefixed[k]}$": v for k, v in own.items()}
    _inject(network, LoraConfig(**said, lora_dropout=dropout), list(found))
    with torch.no_grad():
        for name, layer in layers_of(network).items():
            for half, given in (("lora_A", found[name].a), ("lora_B", found[name].b)):
                own_weight = getattr(layer, half)[NAME].weight
                own_weight.copy_(given.view(own_weight.shape))
            assert layer.scaling[NAME] == found[name].scale


class _PlainConv2d(lora.Conv2d):
    """peft's layer for convolutions of a class of their own, with factors of torch's."""

    def update_layer(self, *given: Any, **options: Any) -> None:
        base = self.get_base_layer()
        own = type(base)
        base.__class__ = nn.Conv2d  # peft makes factors by the constructor of this class
        try:
            super().update_layer(*given, **options)
        finally:
            base.__class__ = own


def _inject(network: Network, options: LoraConfig, names: Sequence[str]) -> None:
    network.requires_grad_(False)
    options._register_custom_module({nn.Conv2d: _PlainConv2d})
    inject_adapter_in_model(options, network, NAME)
    if (got := set(layers_of(network))) != set(names):
        raise CheckpointError(
            f"adapter: peft put {len(got)} layers where {len(names)} were asked for; first"
            f" {sorted(got ^ set(names))[0]}"
        )


def layers_of(network: nn.Module) -> dict[str, LoraLayer]:
    """The layers that peft has put into a network, by the names of what they change."""
    return {name: m for name, m in network.named_modules() if isinstance(m, LoraLayer)}


@contextlib.contextmanager
def off(network: Network) -> Iterator[None]:
    """Inside, the layers compute what they did before; whether weights require gradients stays."""
    layers = layers_of(network).values()
    trained = {
        parameter: parameter.requires_grad
        for layer in layers
        for half in (layer.lora_A, layer.lora_B)
        for parameter in half.parameters()
    }

    def switch(enabled: bool) -> None:
        for layer in layers:
            layer.enable_adapters(enabled)
        for parameter, requires in trained.items():  # which peft sets
            parameter.requires_grad_(requires)

    switch(False)
    try:
        yield
    finally:
        switch(True)


def fold(network: Network) -> None:
    """Add the changes to the weights, and put the layers back as they were named."""
    for name, layer in layers_of(network).items():
        layer.merge(safe_merge=False)
        network.set_submodule(name, layer.get_base_layer())


def taken(network: Network) -> dict[str, Factors]:
    """The factors of the layers in a network."""
    return {
        name: Factors(
            layer.lora_A[NAME].weight.detach(),
            layer.lora_B[NAME].weight.detach(),
            float(layer.scaling[NAME] * layer.r[NAME]),
        )
        for name, layer in layers_of(network).items()
    }


def check_loaded(network: Network, path: Path) -> None:
    """CheckpointError unless diffusers, where the network is one of its own, loads all of a file
    into a fresh one."""
    if not isinstance(network, UNet):
        return
    tensors, about = read_with_metadata(path)
    with torch.device("meta"), quiet():
        fresh = UNet2DConditionModel.from_config(network.unet.config)
        fresh.load_lora_adapter(
            tensors, prefix=UNET[:-1], metadata=json.loads(about[METADATA]), low_cpu_mem_usage=True
        )
    loaded, wanted = layers_of(fresh), layers_of(network)
    same = [
        name
        for name, layer in loaded.items()
        if UNET + name in wanted
        and [*layer.scaling.values()] == [*wanted[UNET + name].scaling.values()]
    ]
    if len(same) != len(wanted):
        raise CheckpointError(
            f"{path}: diffusers would load {len(same)} of {len(wanted)} layers; write it anew with"
            " diffusers>=0.42,<0.44"
        )
