"""Steps of consistency training and distillation beside the official ones.

python benchmarks/training.py --config m64 --batch 2 --openai CHECKOUT
Each contender takes a step in every round, in a process of its own. Ours is the real training loop
(`cmkit.train.train`) on a folder of noise; theirs is `KarrasDenoiser.consistency_losses` with l2,
RAdam and their EMAs, in float32. A step is forward, backward, optimizer, target and three EMAs.
"plain" is ours in NCHW, with loops over parameters.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file
from sampling import CONFIGS, filled, official, official_unet, pick_device_name
from torch import Tensor, nn
from turns import Contender, Formatter, add_options, medians

from cmkit import DataSpec, Models, Rng, discover, shared_dropout
from cmkit.device import autocast, pick_device
from cmkit.plan import plan
from cmkit.recipe import load
from cmkit.tensors import save_weights
from cmkit.train import Training, start, train

EMAS = (0.999, 0.9999, 0.99994322)
RECIPE = """
name = "bench"
[dataset]
use = "image_folder"
path = "{pictures}"
resolution = {side}
labels = false
[backbone]
use = "adm"
{backbone}
[objective]
use = "{objective}"
{options}
[denoiser]
weights = "{weights}"
{teacher}
[train]
steps = 1000
batch = {batch}
lr = 1e-5
optimizer = "radam"
ema = [0.999, 0.9999, 0.99994322]
log_every = 1000
save_every = 1000
precision = "{precision}"
"""
TEACHER = """
[teacher]
weights = "{weights}"
"""
OPTIONS = {
    "ct": 'distance = "l2"\nnum_sigmas = 18\ntarget_ema = 0.95',
    "cd": 'distance = "l2"\nnum_sigmas = 18\ntarget_ema = 0.95',
    "ict": "",
}
OURS: dict[str, tuple[str, dict[str, Any]]] = {
    "ours fp32": ("fp32", {}),
    "ours bf16": ("bf16", {}),
    "ours bf16, recomputed": ("bf16", {"gradient_checkpointing": True}),
    "ours fp32, plain": ("fp32", {}),
}
"""Precision, and fields of the backbone."""


def main() -> None:
    """Print seconds a step of each contender, ratios, and the memory kept for the backward pass."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Formatter)
    parser.add_argument("--config", choices=CONFIGS, default="m64")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--openai", type=Path, help="a checkout of openai/consistency_models")
    parser.add_argument("--objectives", nargs="+", choices=OPTIONS, default=["ct", "cd"])
    add_options(parser, rounds=5)
    options = parser.parse_args()
    device = pick_device(options.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(
        f"{options.config}, batch {options.batch}, {options.rounds} rounds,"
        f" {torch.get_num_threads()} threads, {name}, torch {torch.__version__},"
        f" {'CPU' if options.cpu_time else 'wall'} seconds"
    )
    with tempfile.TemporaryDirectory() as folder:
        write_inputs(Path(folder), options)
        for objective in options.objectives:
            names = list(OURS)
            if options.openai and objective in ("ct", "cd"):
                names.append("openai fp32")
            with ExitStack() as stack:
                contenders = {
                    each: stack.enter_context(
                        Contender(stepping, (each, objective, options, Path(folder)))
                    )
                    for each in names
                }
                kept = {each: contender.turn().out for each, contender in contenders.items()}
                seconds = medians(contenders, options.rounds, options.cpu_time)
            base = names[-1]
            for each in names:
                print(
                    f"{objective:4} {each:22} {seconds[each]:7.3f} s"
                    f"  {seconds[base] / seconds[each]:5.2f}x"
                    f"  keeps {kept[each] / 2**20:6.1f} MiB an image, {kept[each] / kept[base]:.2f}"
                )


def write_inputs(folder: Path, options: argparse.Namespace) -> None:
    """Weights and pictures of noise."""
    side, backbone = CONFIGS[options.config]
    torch.manual_seed(0)
    network = filled(backbone.build(DataSpec(3, side), frozenset()))
    save_weights(folder / "weights.safetensors", network.state_dict())
    (folder / "pictures").mkdir()
    generator = torch.Generator().manual_seed(0)
    for index in range(8):
        pixels = torch.randint(256, (side, side, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / "pictures" / f"{index}.png")


def stepping(
    name: str, objective: str, options: argparse.Namespace, folder: Path
) -> Callable[[], int]:
    """What takes a step of the contender `name`, and tells the bytes an image that it keeps."""
    own = name in OURS or options.same_allocator
    device = pick_device(options.device) if own else torch.device(pick_device_name(options.device))
    step, kept = (our_step if name in OURS else official_step)(
        name, objective, options, folder, device
    )

    def call() -> int:
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return kept

    return call


def our_step(
    name: str, objective: str, options: argparse.Namespace, folder: Path, device: torch.device
) -> tuple[Callable[[], object], int]:
    """The training loop's next step, and the bytes an image that its forward pass keeps."""
    kind, changed = OURS[name]
    side, backbone = CONFIGS[options.config]
    weights = folder / "weights.safetensors"
    recipe = folder / f"{objective}-{name.replace(' ', '-')}.toml"
    fields = backbone.model_copy(update=changed).model_dump(exclude_defaults=True, mode="json")
    recipe.write_text(
        RECIPE.format(
            pictures=folder / "pictures",
            side=side,
            backbone="\n".join(f"{k} = {str(v).lower()}" for k, v in fields.items()),
            objective=objective,
            options=OPTIONS[objective],
            weights=weights,
            teacher=TEACHER.format(weights=weights) if objective == "cd" else "",
            batch=options.batch,
            precision=kind,
        )
    )
    made = start(plan(load(recipe, [], discover())), device)
    if name.endswith("plain"):
        made = made_plain(made)
    kept = kept_an_image(
        lambda batch: our_loss(made, kind, batch, device),
        options.batch,
        list(made.models.online.parameters()),
    )
    steps = train(made)
    return lambda: next(steps), kept


def our_loss(made: Training, name: str, batch: int, device: torch.device) -> Tensor:
    """The loss of a batch, as the loop computes it."""
    recipe = made.plan.recipe
    assert recipe.objective is not None
    x0, cond = next(recipe.dataset.batches(batch, 0, device))
    rng = Rng(0, "train", 0, device)
    made.models.online.train()
    with shared_dropout(rng), autocast(name, device):
        phase = recipe.objective.phase(0, 1000)
        return recipe.objective.loss(made.models, x0, cond, phase, rng).mean()


def made_plain(made: Training) -> Training:
    """The same training without what makes it fast."""
    models = made.models
    for model in {id(m): m for m in (models.online, models.target, *models.ema.values())}.values():
        model.network.to(memory_format=torch.contiguous_format)
    made.optimizer = torch.optim.RAdam(models.online.parameters(), lr=1e-5, foreach=False)

    class Plain(Models):
        @torch.no_grad()
        def update(self, phase: Any) -> None:
            copies = [(phase.target_ema, self.target), *self.ema.items()]
            for decay, copied in copies:
                if copied is self.online:
                    continue
                for old, new in zip(copied.parameters(), self.online.parameters(), strict=True):
                    old.mul_(decay).add_(new, alpha=1 - decay)

    models.__class__ = Plain
    return made


def official_step(
    name: str, objective: str, options: argparse.Namespace, folder: Path, device: torch.device
) -> tuple[Callable[[], object], int]:
    """A step of the official modules, in float32 with exact attention; as of `our_step`."""
    side, backbone = CONFIGS[options.config]
    data = DataSpec(3, side)
    network = backbone.build(data, frozenset())
    network.load_state_dict(load_file(folder / "weights.safetensors"))
    karras = official(options.openai, "cm.karras_diffusion")
    update_ema = official(options.openai, "cm.nn").update_ema

    def model() -> nn.Module:
        made = official_unet(network, backbone, data, options.openai, "QKVAttention")
        return made.to(device).train()

    online, target = model(), model().requires_grad_(False)
    averages = [copy.deepcopy(target) for _ in EMAS]
    settings = {"loss_norm": "l2", "weight_schedule": "uniform"}
    diffusion = karras.KarrasDenoiser(distillation=True, **settings)
    teacher: dict[str, Any] = {}
    if objective == "cd":
        teacher = {
            "teacher_model": model().eval().requires_grad_(False),
            "teacher_diffusion": karras.KarrasDenoiser(distillation=False, **settings),
        }
    optimizer = torch.optim.RAdam(online.parameters(), lr=1e-5)
    generator = torch.Generator().manual_seed(0)
    shape = 2 * options.batch, 3, data.resolution, data.resolution
    x0 = torch.rand(shape, generator=generator).mul(2).sub(1).to(device)

    def loss(batch: int) -> Tensor:
        found = diffusion.consistency_losses(online, x0[:batch], 18, target_model=target, **teacher)
        return found["loss"].mean()

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for copied, rate in zip((target, *averages), (0.95, *EMAS), strict=True):
                update_ema(list(copied.parameters()), list(online.parameters()), rate)

    kept = kept_an_image(loss, options.batch, list(online.parameters()))

    def step() -> None:
        loss(options.batch).backward()
        update()

    return step, kept


def kept_an_image(loss: Callable[[int], Tensor], batch: int, parameters: list[Tensor]) -> int:
    """Bytes that autograd keeps for the backward pass of one more image.

    Rounded copies of the weights, which autocast keeps once a step, cancel in the difference.
    """
    twice, once = (kept_bytes(lambda n=n: loss(n), parameters) for n in (2 * batch, batch))
    return (twice - once) // batch


def kept_bytes(loss: Callable[[], Tensor], parameters: list[Tensor]) -> int:
    """Bytes of what autograd keeps, parameters aside, each storage once."""
    own = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    seen: dict[int, int] = {}
    alive: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)  # an address must not be used twice while we count
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss()
    return sum(seen.values())


if __name__ == "__main__":
    main()
