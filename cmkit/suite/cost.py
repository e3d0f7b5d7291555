"""What a cell costs: parameters, and network evaluations of training, search and sampling."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from cmkit.denoiser import Cond, Denoiser, Network
from cmkit.models import Models
from cmkit.plan import conditions_of, noise_of, plan, space_of
from cmkit.plan.networks import built, conditions_of_teacher, denoiser_of, teacher_of
from cmkit.plan.record import Plan
from cmkit.plan.trial import dry_run
from cmkit.recipe import Recipe
from cmkit.rng import Rng
from cmkit.search import all_images
from cmkit.suite.cells import Cell
from cmkit.values import DataSpec
from cmkit.weights import TO_COME

IMAGES = 4
"""A batch in which evaluations are counted."""
CHEAP = 1e9
"""FLOPs beside the networks of a step of which hundreds may be taken."""


@dataclass(frozen=True)
class Costs:
    """What a cell costs, apart from what it shares. Evaluations are forward passes of one image."""

    parameters: int
    flops: int
    """Of one evaluation."""
    nfe: int | None
    """Evaluations a sample."""
    steps: int = 0
    images: int = 0
    """Seen in training."""
    trained: float = 0.0
    """Evaluations of training."""
    searched: float = 0.0
    """Evaluations of a search; of one by interpolation the least, when its first nodes will do."""
    sampled: float = 0.0
    """Evaluations of sampling."""

    @property
    def gflop(self) -> float:
        """An estimate: every evaluation as a forward pass."""
        return (self.trained + self.searched + self.sampled) * self.flops / 1e9


def costs(cells: Iterable[Cell]) -> dict[str, Costs]:
    """What each cell costs, by its name; a training that it shares costs nothing.

    Raises what `plan` does of each, for weights that other cells make as if they were there.
    """
    cells = list(cells)
    token = TO_COME.set({f"run:{cell.name}": cell.recipe for cell in cells})
    try:
        found: dict[str, Costs] = {}
        of_row: dict[tuple[str, ...], Costs] = {}
        for cell in cells:  # seeds cost the same
            alike = (cell.row, *cell.axis.values(), str(cell.alone))
            if alike not in of_row:
                of_row[alike] = _costs(cell, plan(cell.recipe))
            found[cell.name] = of_row[alike]
        return found
    finally:
        TO_COME.reset(token)


def _costs(cell: Cell, plan: Plan) -> Costs:
    recipe, nfe = cell.recipe, plan.nfe or 0
    found = Costs(plan.parameters, plan.flops, plan.nfe)
    if recipe.train and cell.group == cell.name:
        images = recipe.train.steps * recipe.train.batch
        trained = images * per_image(recipe)
        found = replace(found, steps=recipe.train.steps, images=images, trained=trained)
    if recipe.search:
        found = replace(found, searched=float(all_images(recipe) * nfe))
    sampled = float(recipe.sample.images * nfe) if recipe.sample else 0.0
    return replace(found, sampled=sampled)


def per_step(recipe: Recipe) -> float:
    """Network evaluations of a training step."""
    assert recipe.train is not None
    return recipe.train.batch * per_image(recipe)


def per_image(recipe: Recipe) -> float:
    """Network evaluations that a training step takes for each image, in forward passes of the
    network that is trained: a forward pass counts 1, with a derivative in forward mode 2, a
    backward pass 2 more, or 1 where it only passes through a frozen network.

    Counted in real steps of the objective, spread over the training, on networks that do nothing
    but count; so are the FLOPs of whatever else it computes (companions, a perceptual distance,
    a teacher with a network of its own), as their share of a forward pass. CT takes 4, CD with
    Heun's solver 6.
    """
    objective, table = recipe.objective, recipe.train
    assert objective is not None
    assert table is not None
    data = space_of(recipe, recipe.data or recipe.dataset.spec())
    models = _counting(recipe, data)
    share = _teacher_share(recipe, data)
    with FlopCounterMode(display=False) as counter:
        steps = _spread(table.steps, blocks=4, length=2)
        counted = [_step(recipe, models, data, *at, share) for at in enumerate(steps)]
    other = counter.get_total_flops() / len(steps)
    if len(set(counted)) > 1 and other < CHEAP:  # the length of a solver may be drawn
        steps = _spread(table.steps, blocks=32, length=4)
        counted = [_step(recipe, models, data, *at, share) for at in enumerate(steps)]
    count = sum(counted) / len(counted)
    if other:
        count += other / _flops(recipe, data)
    return count / IMAGES


class _Counting(Network):
    """A network without a matrix product, whose evaluations are counted."""

    def __init__(self, data: DataSpec):
        super().__init__()
        self.count = 0
        self.null_label = data.num_classes
        self.first = nn.Parameter(torch.full((data.channels, 1, 1), 0.5))
        self.label = nn.Parameter(torch.zeros((data.num_classes or 0) + 1))
        self.last = nn.Parameter(torch.full((data.channels, 1, 1), 0.5))

    def forward(self, x: Tensor, c_noise: Tensor, cond: Cond, scales: object) -> Tensor:
        levels = [c_noise]
        levels += [level for level in (cond.guidance, cond.sigma_to) if level is not None]
        dual = any(forward_ad.unpack_dual(t).tangent is not None for t in (x, *levels))
        self.count += len(x) * (1 + dual)
        back = len(x) * (2 if self.first.requires_grad else 1)
        emb = torch.stack([torch.sin(level) for level in levels]).sum(0)
        if cond.label is not None:
            emb = emb + self.label[cond.label]
        h = self.first * x
        if dual and h.requires_grad:  # a hook there would not be called
            self.count += 2 * back
        elif h.requires_grad:  # only a pass back to the first layer is a whole one
            h.register_hook(lambda _: self._passed_back(back))
        f: Tensor = self.last * (h + emb[:, None, None, None])
        return f

    def _passed_back(self, images: int) -> None:
        self.count += images


def _network(denoiser: Denoiser) -> _Counting:
    assert isinstance(denoiser.network, _Counting)
    return denoiser.network


def _counting(recipe: Recipe, data: DataSpec) -> Models:
    """The networks that training would hold, each a `_Counting`."""
    assert recipe.objective is not None
    noise, needs, sigma_data = noise_of(recipe), recipe.needs, recipe.denoiser.sigma_data

    def denoiser(scalings: object) -> Denoiser:
        return Denoiser(_Counting(data), noise, scalings, sigma_data)  # type: ignore[arg-type]

    online, teacher = denoiser(recipe.precond.scalings).train(), None
    target = denoiser(recipe.precond.scalings).requires_grad_(False)
    if "teacher" in needs and recipe.teacher:
        teacher = denoiser(recipe.teacher.precond.scalings).eval().requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = recipe.objective.companions(data)
    companions = {name: companion.network.train() for name, companion in made.items()}
    target = target if "target" in needs else online
    return Models(online, target, teacher, companions=companions)


def _spread(total: int, blocks: int, length: int) -> list[int]:
    """Steps of a training: `blocks` runs of `length` steps, evenly spread."""
    starts = [total * block // blocks for block in range(blocks)]
    return [min(start + n, total - 1) for start in starts for n in range(length)]


def _step(
    recipe: Recipe, models: Models, data: DataSpec, index: int, step: int, share: float
) -> float:
    """Evaluations of a step of training on a batch, with the draws `index`; those of the teacher
    each count `share`."""
    objective, table = recipe.objective, recipe.train
    assert objective is not None
    assert table is not None
    rng = Rng(0, "cost", index, torch.device("cpu"))
    shape = (IMAGES, data.channels, data.resolution, data.resolution)
    x0 = rng.normal_like(torch.empty(shape)).clamp(-1, 1)
    label = rng.integers(data.num_classes, IMAGES) if data.num_classes else None
    networks = {_network(models.online): 1.0, _network(models.target): 1.0}
    if models.teacher:
        networks[_network(models.teacher)] = share
    phase = objective.phase(step, table.steps)
    before = {network: network.count for network in networks}
    objective.loss(models, x0, Cond(label=label), phase, rng).mean().backward()
    return sum(weight * (n.count - before[n]) for n, weight in networks.items())


def _flops(recipe: Recipe, data: DataSpec) -> int:
    """FLOPs of a forward pass of one image."""
    conditions = conditions_of(recipe, data)
    with torch.device("meta"):
        denoiser = denoiser_of(recipe, built(recipe.backbone, data, conditions))
    return dry_run(replace(recipe, sampler=None), denoiser, data, conditions)


def _teacher_share(recipe: Recipe, data: DataSpec) -> float:
    """FLOPs of the teacher's forward pass over those of the student's."""
    given = recipe.teacher
    if given is None or given.table.backbone is None:
        return 1.0
    with torch.device("meta"):
        teacher = teacher_of(given, recipe.denoiser, data)
    conditions = conditions_of_teacher(given, data)
    flops = dry_run(replace(recipe, sampler=None), teacher, data, conditions)
    return flops / _flops(recipe, data)
