"""A search that shares the encoder beside one that runs the whole network for every cell.

python benchmarks/search.py --config m64 --cells 11
Both draw the same grid in turns, cell by cell the same images; times are medians of the rounds.

python benchmarks/search.py --run runs/NAME-KEY [--run ANOTHER ..] --images 500
Every method of search on trained models instead: see benchmarks/methods.py.
"""

from __future__ import annotations

import argparse
import statistics
import time

import methods
import torch
from cmkit_std.rescalers.global_ import Global
from cmkit_std.samplers.multistep import Multistep
from sampling import CONFIGS, filled, finished
from torch import Tensor

from cmkit import Cond, DataSpec, Denoiser
from cmkit.denoiser import Encodings
from cmkit.device import autocast, pick_device


def main() -> None:
    """Print both times, their ratio, and the largest difference of a cell's images; the table of
    all methods for a trained run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", choices=CONFIGS, default="m64")
    parser.add_argument("--batch", type=int, help="4, or 250 of a trained run's")
    parser.add_argument("--cells", type=int, default=11, help="values of skip, and of emb")
    parser.add_argument("--rows", type=int, default=1, help="values of emb that are drawn")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--cpu-time", action="store_true", help="CPU seconds, for busy machines")
    methods.add_options(parser)
    options = parser.parse_args()
    options.batch = options.batch or (250 if options.run else 4)
    if options.run:
        methods.tables(options)
        return
    device = pick_device(options.device)
    side, backbone = CONFIGS[options.config]
    network = filled(backbone.build(DataSpec(3, side), frozenset())).requires_grad_(False)
    network = network.to(device).to(memory_format=torch.channels_last)
    if options.precision == "bf16":
        network.lower(torch.bfloat16)
    denoiser, sampler = Denoiser(network).eval(), Multistep()
    noise = torch.randn(options.batch, 3, side, side, generator=torch.Generator().manual_seed(0))
    x = (80 * noise).to(device, memory_format=torch.channels_last)
    values = torch.linspace(0.9, 1.1, options.cells).tolist()
    cast, cond = autocast(options.precision, device), Cond()

    @torch.inference_mode()
    def draw(shared: bool) -> list[Tensor]:
        images = []
        for emb in values[: options.rows]:
            encodings = Encodings(x) if shared else None
            for skip in values:
                model = denoiser.rescaled(Global(skip=skip, emb=emb), encodings)
                with cast:
                    images.append(sampler.sample(model, x, cond, lambda k: noise).float())
        finished(x, device)
        return images

    worst = max(
        ((a - b).square().mean() / a.square().mean()).sqrt().item()
        for a, b in zip(draw(False), draw(True), strict=True)
    )
    clock = time.process_time if options.cpu_time else time.perf_counter
    times: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(options.rounds):
        for shared, spent in times.items():
            began = clock()
            draw(shared)
            spent.append(clock() - began)
    full, less = (statistics.median(spent) for spent in times.values())
    print(
        f"{options.config} {options.precision}, batch {options.batch}, {options.rows} x"
        f" {options.cells} cells, {torch.get_num_threads()} threads,"
        f" {torch.cuda.get_device_name(device) if device.type == 'cuda' else 'CPU'}: whole network"
        f" {full:.2f} s, shared {less:.2f} s, ratio {full / less:.2f},"
        f" worst difference {worst:.1e} rms"
    )


if __name__ == "__main__":
    main()
