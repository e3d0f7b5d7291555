"""What parts are tried on: images, devices, a small network; and how closely tensors agree."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from cmkit.denoiser import Cond, Network, Scaling, consistency_scalings, edm_scalings
from cmkit.kinds import Objective
from cmkit.sample import Draws
from cmkit.values import DataSpec, TextSpec

CPU, META = torch.device("cpu"), torch.device("meta")
DIGITS = DataSpec(channels=1, resolution=8, num_classes=10)
PROMPTS = TextSpec(length=5, width=12, pooled=6, size=True)
"""What prompts are told by, of data that says nothing of them."""


def draws(data: DataSpec, seed: int = 0) -> Draws:
    """Noise like images of `data`, and the classes in turns as labels."""
    return Draws(data, seed, "testing", tuple(range(data.num_classes or 0)))


def told(text: TextSpec, n: int) -> dict[str, Tensor]:
    """The conditions of n different prompts as `text` says, by name."""
    generator = torch.Generator().manual_seed(3)
    found = {"text": torch.randn(n, text.length, text.width, generator=generator)}
    if text.pooled is not None:
        found["pooled"] = torch.randn(n, text.pooled, generator=generator)
    if text.size:
        found["size"] = torch.randint(0, 512, (n, 6), generator=generator).float()
    return found


def scalings_for(objective: Objective) -> Scaling:
    """Scalings that have what an objective needs of them."""
    edm = objective.needed() & {"diffusion", "identity", "edm"}
    return edm_scalings if edm else consistency_scalings


def companions(objective: Objective, data: DataSpec, seed: int = 0) -> dict[str, nn.Module]:
    """Fresh companions of an objective, by name, as training holds them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = objective.companions(data)
    return {name: companion.network.train() for name, companion in made.items()}


def close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    """Whether a is b up to `tolerance` of the root mean square of b."""
    a, b = a.double(), b.double()
    return bool((a - b).square().mean().sqrt() <= tolerance * b.square().mean().sqrt())


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    """Whether named tensors have the same names and agree bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class Small(Network):
    """A network with dropout that embeds whatever it is given, and knows what that was."""

    sites = ("skip.0", "emb.0")

    def __init__(self, data: DataSpec):
        super().__init__()
        generator = torch.Generator().manual_seed(2)
        self.first = nn.Conv2d(data.channels, 8, 3, padding=1)
        self.label = nn.Embedding(data.num_classes or 1, 8)
        self.dropout = nn.Dropout(0.3)
        self.second = nn.Conv2d(8, data.channels, 3, padding=1)
        self.seen: set[str] = set()
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.normal_(std=0.3, generator=generator)

    def forward(
        self, x: Tensor, c_noise: Tensor, cond: Cond, scales: Mapping[str, Tensor]
    ) -> Tensor:
        self.seen |= {name for name, value in vars(cond).items() if value is not None}
        emb = torch.sin(c_noise)[:, None]
        if cond.label is not None:
            emb = emb + self.label(cond.label)
        for level in (cond.guidance, cond.sigma_to):
            if level is not None:
                emb = emb + torch.cos(level.float())[:, None]
        for features in (cond.text, cond.pooled, cond.size):
            if features is not None:
                emb = emb + torch.sin(features.flatten(1).mean(1, keepdim=True))
        h = self.dropout(torch.tanh(self.first(x) + emb[:, :, None, None]))
        return self.second(h).float()
