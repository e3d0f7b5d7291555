"""One-step sampling beside other implementations, on the same weights.

python benchmarks/sampling.py --config m64 --batch 4 --openai CHECKOUT
needs `pip install 'cmkit[bench]'` for diffusers; CHECKOUT is one of openai/consistency_models.
Each contender draws a batch in every round, in a process of its own; times are medians of the
rounds, ratios of medians.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import sys
import time
import types
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from cmkit_std.backbones.adm import ADM
from cmkit_std.samplers.multistep import Multistep
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from turns import Contender, Formatter, add_options, medians

from cmkit import Cond, DataSpec, Denoiser
from cmkit.device import autocast, pick_device, precision

HEADS = {"num_head_channels": 32, "resblock_updown": True}
CONFIGS = {
    "t32": (32, ADM(channels=32, channel_mult=(1, 2, 2), attention_resolutions=(16, 8), **HEADS)),
    "s32": (32, ADM(channels=64, channel_mult=(1, 2, 2), attention_resolutions=(16, 8), **HEADS)),
    "m64": (64, ADM(channels=96, channel_mult=(1, 2, 3, 4), **HEADS)),
    "imagenet64": (64, ADM(preset="openai-imagenet64")),
    "lsun256": (256, ADM(preset="openai-lsun256")),
}
"""Side in pixels and network; all without classes."""
Draw = Callable[[Tensor], Tensor]


def main() -> None:
    """Print images/s of each contender, its ratio to the others', and how far outputs differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Formatter)
    parser.add_argument("--config", choices=CONFIGS, default="m64")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--openai", type=Path, help="a checkout of openai/consistency_models")
    parser.add_argument("--no-diffusers", action="store_true")
    parser.add_argument("--compile", action="store_true", help="also our network, compiled")
    parser.add_argument("--only-ours", action="store_true")
    add_options(parser, rounds=7)
    options = parser.parse_args()
    device = pick_device(options.device)
    default = precision("auto", device)
    names = [f"ours {name}{' (default)' if name == default else ''}" for name in ("fp32", "bf16")]
    if options.compile:
        names.append("ours default, compiled")
    if not options.only_ours and not options.no_diffusers:
        names += ["diffusers fp32", "diffusers bf16 channels_last"]
    if not options.only_ours and options.openai:
        names += ["openai fp32, QKVAttention", "openai fp32, QKVAttentionLegacy"]

    print(
        f"{options.config}, batch {options.batch}, {options.rounds} rounds,"
        f" {torch.get_num_threads()} threads,"
        f" {torch.cuda.get_device_name(device) if device.type == 'cuda' else 'CPU'},"
        f" torch {torch.__version__}, {'CPU' if options.cpu_time else 'wall'} seconds"
    )
    with ExitStack() as stack:
        contenders = {
            name: stack.enter_context(Contender(drawing, (name, options))) for name in names
        }
        firsts = {name: contender.turn().out for name, contender in contenders.items()}
        reference = firsts[names[0]][0]
        for name, (images, _) in firsts.items():
            error = np.sqrt(np.square(images - reference).mean() / np.square(reference).mean())
            print(f"  {name}: differs by {error:.1e} rms")
        seconds = medians(contenders, options.rounds, options.cpu_time)
        peaks = {name: contender.turn().out[1] for name, contender in contenders.items()}
    rates = {name: options.batch / spent for name, spent in seconds.items()}
    flops, peak = flops_of(options.config), {name: peak_of(name, device) for name in firsts}
    print(f"{flops / 1e9:.1f} GFLOP an image; share: of what one large convolution reaches here")
    mine = [name for name in rates if name.startswith("ours")]
    print(f"{'contender':34} images/s  share  " + "  ".join(f"{name:>20}" for name in mine))
    for name, rate in rates.items():
        ratios = "  ".join(f"{rates[own] / rate:19.2f}x" for own in mine)
        memory = f"  peak {peaks[name] / 2**30:.2f} GiB" if peaks[name] else ""
        print(f"{name:34} {rate:8.3f}  {flops * rate / peak[name]:4.0%}  {ratios}{memory}")


def drawing(name: str, options: argparse.Namespace) -> Callable[[], tuple[np.ndarray, int]]:
    """What draws a batch of the contender `name`, and tells the peak of a GPU's memory so far."""
    own = name.startswith("ours") or options.same_allocator
    device = pick_device(options.device) if own else torch.device(pick_device_name(options.device))
    side, backbone = CONFIGS[options.config]
    data = DataSpec(3, side)
    torch.manual_seed(0)
    network = filled(backbone.build(data, frozenset())).eval().requires_grad_(False)
    if name.startswith("ours"):
        compiled = name.endswith("compiled")
        kind = precision("auto", device) if compiled else name.split()[1]
        draw = ours(network, device, kind, compiled)
    elif name.startswith("diffusers"):
        draw = diffusers(network, backbone, data, device, tuned=name.endswith("channels_last"))
    else:
        draw = openai(network, backbone, data, device, options.openai, name.split()[-1])
    shape = options.batch, 3, side, side
    x = 80 * torch.randn(shape, generator=torch.Generator().manual_seed(0))

    def call() -> tuple[np.ndarray, int]:
        images = draw(x).float().cpu().numpy()
        return images, torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0

    return call


def flops_of(config: str) -> int:
    """Of a forward pass of one image; upsampling convolutions are counted in full."""
    side, backbone = CONFIGS[config]
    with torch.device("meta"):
        network = backbone.build(DataSpec(3, side), frozenset())
        with FlopCounterMode(display=False) as counter:
            network(torch.empty(1, 3, side, side), torch.empty(1), Cond(), {})
    return int(counter.get_total_flops())


def peak_of(name: str, device: torch.device) -> float:
    """FLOP/s that one large convolution reaches in a contender's precision, the best of ten."""
    lower = "bf16" in name or "default" in name
    return convolution_rate(torch.bfloat16 if lower else torch.float32, device)


@functools.cache
def convolution_rate(kind: torch.dtype, device: torch.device) -> float:
    """See `peak_of`."""
    batch, width, side = 64 if device.type == "cuda" else 4, 512, 64
    x = torch.randn(batch, width, side, side, device=device, dtype=kind)
    weight = torch.randn(width, width, 3, 3, device=device, dtype=kind)
    x, weight = (each.to(memory_format=torch.channels_last) for each in (x, weight))
    times = []
    for _ in range(10):
        finished(x, device)
        began = time.perf_counter()
        finished(nn.functional.conv2d(x, weight, padding=1), device)
        times.append(time.perf_counter() - began)
    return 2 * batch * side**2 * 9 * width**2 / min(times)


def pick_device_name(name: str) -> str:
    """The device that `--device` names, with nothing changed in this process."""
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def filled(network: nn.Module) -> nn.Module:
    """`network` with seeded weights of unit gain and no zeros, so that all of it works."""
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        if parameter.ndim > 1:
            std = parameter[0].numel() ** -0.5
            parameter.data.normal_(std=std, generator=generator)
    return network


def ours(network: nn.Module, device: torch.device, name: str, compiled: bool = False) -> Draw:
    """Sampling as `cmkit run` does it."""
    import copy

    network = copy.deepcopy(network).to(device).to(memory_format=torch.channels_last)
    cast = autocast(name, device)
    if name == "bf16":
        network.lower(torch.bfloat16)
    if compiled:
        network.compile()
    denoiser, sampler = Denoiser(network).eval(), Multistep()

    @torch.inference_mode()
    def draw(x: Tensor) -> Tensor:
        x = x.to(device, memory_format=torch.channels_last)
        with cast:
            out = sampler.sample(denoiser, x, Cond(), lambda k: torch.randn_like(x))
        return finished(out, device)

    return draw


def diffusers(
    network: nn.Module,
    backbone: ADM,
    data: DataSpec,
    device: torch.device,
    tuned: bool = False,
) -> Draw:
    """`ConsistencyModelPipeline` as shipped, or with bf16 weights in channels_last."""
    from diffusers import CMStochasticIterativeScheduler, ConsistencyModelPipeline, UNet2DModel

    (layout,) = (each for each in backbone.layouts(data) if each.name == "diffusers")
    own = network.state_dict()
    config = {k: v for k, v in layout.config(own).items() if not k.startswith("_")}
    unet = UNet2DModel(**config)
    unet.load_state_dict(layout.write(own))
    unet = unet.to(device).eval()
    if tuned:
        unet = unet.to(torch.bfloat16).to(memory_format=torch.channels_last)
    scheduler = CMStochasticIterativeScheduler(num_train_timesteps=40)
    pipeline = ConsistencyModelPipeline(unet=unet, scheduler=scheduler)
    pipeline.set_progress_bar_config(disable=True)

    @torch.inference_mode()
    def draw(x: Tensor) -> Tensor:
        latents = (x / 80).to(device, unet.dtype)
        if tuned:
            latents = latents.to(memory_format=torch.channels_last)
        out = pipeline(
            batch_size=len(x), num_inference_steps=1, latents=latents, output_type="pt"
        ).images
        return finished(out * 2 - 1, device)

    return draw


def openai(
    network: nn.Module,
    backbone: ADM,
    data: DataSpec,
    device: torch.device,
    checkout: Path,
    attention: str,
) -> Draw:
    """The official U-Net in a one-step sampler."""
    model = official_unet(network, backbone, data, checkout, attention).to(device).eval()

    @torch.inference_mode()
    def draw(x: Tensor) -> Tensor:
        x = x.to(device)
        sigma = x.new_full((len(x), 1, 1, 1), 80.0)
        c_skip = 0.25 / ((sigma - 0.002) ** 2 + 0.25)
        c_out = (sigma - 0.002) * 0.5 / (sigma**2 + 0.25) ** 0.5
        c_in = 1 / (sigma**2 + 0.25) ** 0.5
        out = model(c_in * x, 1000 * 0.25 * torch.log(sigma.flatten() + 1e-44))
        return finished((c_out * out + c_skip * x).clamp(-1, 1), device)

    return draw


def official_unet(
    network: nn.Module, backbone: ADM, data: DataSpec, checkout: Path, attention: str
) -> nn.Module:
    """The U-Net of a checkout of openai/consistency_models, with the weights of `network`.

    Its flash attention needs a GPU and a package that is not here, so the checkout's own class
    `attention` stands in.
    """
    unet = official(checkout, "cm.unet")

    class Block(unet.AttentionBlock):  # type: ignore[misc, name-defined]
        def __init__(self, *args: object, **options: object):
            super().__init__(*args, **{**options, "attention_type": "other"})

    kind = getattr(unet, attention)
    with mock.patch.multiple(unet, AttentionBlock=Block, QKVAttentionLegacy=kind):
        model = unet.UNetModel(
            image_size=data.resolution,
            in_channels=3,
            model_channels=backbone.channels,
            out_channels=3,
            num_res_blocks=backbone.num_res_blocks,
            attention_resolutions=tuple(
                data.resolution // side
                for _, side in backbone.levels(data.resolution)
                if backbone.attends(side)
            ),
            channel_mult=backbone.channel_mult,
            num_head_channels=backbone.num_head_channels,
            use_scale_shift_norm=backbone.use_scale_shift_norm,
            resblock_updown=True,
        )
    (layout,) = (each for each in backbone.layouts(data) if each.name == "openai")
    model.load_state_dict(layout.write(network.state_dict()))
    return model


def official(checkout: Path, module: str) -> Any:
    """A module of the checkout; packages that it imports and never needs here are left empty."""
    sys.path.insert(0, str(checkout))
    for absent, names in {
        "flash_attn": (),
        "flash_attn.flash_attention": (),
        "piq": ("LPIPS",),
        "blobfile": (),
        "mpi4py": ("MPI",),
    }.items():
        empty = types.ModuleType(absent)
        vars(empty).update(dict.fromkeys(names))
        sys.modules.setdefault(absent, empty)
    return importlib.import_module(module)


def finished(out: Tensor, device: torch.device) -> Tensor:
    """`out` once the device has really computed it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return out


if __name__ == "__main__":
    main()
