"""Pictures drawn while a network trains, of the same prompts and noise each time."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cmkit.errors import NonFiniteError
from cmkit.files import digest_of
from cmkit.pictures import grid_png
from cmkit.plan.networks import guided_as_said
from cmkit.runs.events import Note, Shown
from cmkit.sample import Draws, Start, finite_uint8, pictures

if TYPE_CHECKING:
    from cmkit.denoiser import Denoiser
    from cmkit.runs.job import Job
    from cmkit.train import Training

SIDE = 256
"""Pixels of the largest pictures that are kept; others are made smaller by a whole factor."""
COLUMNS = 4


class Showing:
    """The pictures of [train] show: by the recipe's sampler and guidance, unscaled, from the first
    average.

    The codec and the prompt encoder are loaded at the start and kept, since samples want them too.
    A step whose picture is there already, drawn before the run was stopped, is not drawn again. No
    bit of the training changes.
    """

    def __init__(self, job: Job):
        recipe, table = job.plan.recipe, job.plan.recipe.train
        assert table is not None
        self.job, self.table = job, table
        given = table.show if isinstance(table.show, tuple) else ()
        self.count = len(given) if isinstance(table.show, tuple) else table.show
        prompts, rule = given or job.prompts, job.plan.label_rule
        self.draws = Draws(job.plan.space, recipe.seed, "show", (), rule, prompts, job.coding)
        self.prompts = self.draws.prompts_of(range(self.count))
        parts = {"sampler": recipe.resolved["sampler"], "guidance": recipe.denoiser.guidance}
        about = {"prompts": self.prompts, "count": self.count, "seed": recipe.seed, **parts}
        self.about = digest_of(json.dumps(about, sort_keys=True))
        self.drawn = job.folder.shown(self.about)

    def due(self, step: int) -> bool:
        """Whether pictures of a step are to be drawn, and are not there."""
        every = self.table.show_every or self.table.save_every
        return step not in self.drawn and (step % every == 0 or step == self.table.steps)

    def draw(self, training: Training) -> Iterator[Note | Shown]:
        """Draw the pictures of the training's step; a note instead where they are not finite."""
        average = training.models.ema[self.table.ema[0]]
        images = []
        try:
            with apart(average.network, self.job.device):
                for start, x0 in drawn(self.job, average, self.draws, self.count):
                    images.append(finite_uint8(x0, start.rows))
        except NonFiniteError as error:
            yield Note(f"train.show: nothing drawn at step {training.step}: {error}")
            return
        sheet = grid_png(_smaller(torch.cat(images)), COLUMNS)
        name = self.job.folder.keep_shown(training.step, self.about, sheet)
        self.drawn[training.step] = name
        yield Shown(training.step, self.job.folder.picture(name))

    def result(self) -> dict[str, Any]:
        """What report.json says of the pictures: their names by step, prompts, number and side."""
        side = self.job.plan.data.resolution
        return {
            "steps": {str(step): name for step, name in sorted(self.drawn.items())},
            "prompts": self.prompts,
            "images": self.count,
            "side": side // math.ceil(side / SIDE),
        }


def _smaller(images: Tensor) -> Tensor:
    """uint8 images (B, C, H, W) of at most SIDE pixels: means of squares of pixels."""
    factor = math.ceil(images.shape[-1] / SIDE)
    if factor == 1:
        return images
    return nn.functional.avg_pool2d(images.float(), factor).round().to(torch.uint8)


def drawn(job: Job, average: Denoiser, draws: Draws, count: int) -> Iterator[tuple[Start, Tensor]]:
    """`cmkit.sample.pictures` of an average of the training, by the recipe's sampler and guidance,
    unscaled, at the training's batch and precision."""
    recipe, table = job.plan.recipe, job.plan.recipe.train
    assert table is not None
    assert recipe.sampler is not None
    denoiser, batch = guided_as_said(recipe, average), table.batch // table.accumulate
    indices, precision = range(count), table.precision
    return pictures(denoiser, recipe.sampler, draws, indices, batch, job.device, precision)


@contextlib.contextmanager
def apart(network: nn.Module, device: torch.device) -> Iterator[None]:
    """Inside, `network` is evaluated without a trace in a training of it: its modules are put back
    into their modes, default generators into their states, and nothing is compiled anew."""
    modes = {module: module.training for module in network.modules()}
    devices = [device] if device.type == "cuda" else []
    network.eval()
    try:
        # Not inference_mode: a part may keep tensors, which training then cannot compute with.
        with (
            torch.random.fork_rng(devices),
            torch.no_grad(),
            torch.compiler.set_stance("force_eager"),
        ):
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
