"""Small exact things that several tests need."""

from __future__ import annotations

import zlib
from dataclasses import replace
from importlib.metadata import EntryPoint, entry_points

import torch
from cmkit_std.datasets.invented import Invented

from cmkit import Backbone, Cond, DataSpec, Denoiser, Metric, Network, Noise, Plugin, hookimpl
from cmkit.kinds import Codec, TextEncoder
from cmkit.plugins import Registry, register
from cmkit.values import TextSpec


class TinyNetwork(Network):
    """A three-parameter network with one site of each family, for tests that need no U-Net."""

    sites = ("skip.0", "emb.0")

    def __init__(self, channels: int = 1):
        super().__init__()
        self.first = torch.nn.Conv2d(channels, channels, 3, padding=1)
        self.dropout = torch.nn.Dropout(0.5)
        self.second = torch.nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x, c_noise, cond, scales):
        skip = self.first(x)
        emb = torch.sin(c_noise) * scales.get("emb.0", 1)
        h = self.dropout(torch.tanh(skip + emb.view(-1, 1, 1, 1)))
        return self.second(h) + skip * scales.get("skip.0", 1)


class GaussianFlow(Denoiser):
    """The exact consistency function of x0 ~ N(0, s^2) for the probability-flow ODE that stops at
    eps: f(x, sigma) = x sqrt((s^2 + eps^2) / (s^2 + sigma^2))."""

    def __init__(self, s: float = 0.7, noise: Noise | None = None):
        super().__init__(TinyNetwork(), noise)
        self.s = s

    def forward(self, x, sigma, cond: Cond = None):
        ratio = (self.s**2 + self.noise.sigma_min**2) / (self.s**2 + sigma.double() ** 2)
        return x * ratio.sqrt().view(-1, 1, 1, 1)


class GaussianDenoiser(Denoiser):
    """The exact denoiser of x0 ~ N(0, s^2): D(x, sigma) = x s^2 / (s^2 + sigma^2)."""

    def __init__(self, s: float = 0.7, noise: Noise | None = None):
        super().__init__(TinyNetwork(), noise)
        self.s = s

    def forward(self, x, sigma, cond: Cond = None):
        return x * (self.s**2 / (self.s**2 + sigma**2)).view(-1, 1, 1, 1)


class Counting(Denoiser):
    """A denoiser that counts its calls and remembers the noise levels."""

    def __init__(self, inner: Denoiser):
        super().__init__(inner.network, inner.noise)
        self.inner = inner
        self.seen: list[float] = []

    def forward(self, x, sigma, cond: Cond = None):
        self.seen.append(float(sigma[0]))
        return self.inner(x, sigma, cond)


class Blocks(Codec):
    """Pixels of blocks as channels, drawn with a standard deviation that grows with them."""

    side: int = 2
    spread: float = 0.1
    factor: float = 2.0
    tiles: int = 1

    read_by = {"tiles": ("sample",)}

    def spec(self, data: DataSpec) -> DataSpec:
        channels, side = data.channels * self.side**2, data.resolution // self.side
        return replace(data, channels=channels, resolution=side)

    def load(self, device):
        return BlocksCoder(self)


class BlocksCoder:
    def __init__(self, codec: Blocks):
        self.codec = codec

    def encode(self, x0):
        mean = torch.nn.functional.pixel_unshuffle(x0, self.codec.side) * self.codec.factor
        return mean, self.codec.spread * (1 + mean.abs()) if self.codec.spread else None

    def decode(self, latents):
        return torch.nn.functional.pixel_shuffle(latents / self.codec.factor, self.codec.side)


class Words(TextEncoder):
    """A vector of each word, drawn by its hash; their mean as the feature of the whole prompt."""

    length: int = 4
    width: int = 6

    def spec(self) -> TextSpec:
        return TextSpec(self.length, self.width, self.width, size=True)

    def load(self, device):
        return WordsPrompts(self, device)


class WordsPrompts:
    def __init__(self, words: Words, device):
        self.words, self.device = words, device
        self.null = self([""])

    def __call__(self, prompts):
        text = torch.stack([self._features(prompt.split()) for prompt in prompts]).to(self.device)
        return Cond(text=text, pooled=text.mean(1))

    def _features(self, words):
        padded = (words + ["<pad>"] * self.words.length)[: self.words.length]
        seeds = [torch.Generator().manual_seed(zlib.crc32(word.encode())) for word in padded]
        return torch.stack([torch.randn(self.words.width, generator=seed) for seed in seeds])


class Reader(Backbone):
    """Convolutions that are told everything of a prompt, and a guidance weight."""

    accepts = frozenset({"guidance", "text", "pooled", "size"})
    width: int = 8

    def build(self, data: DataSpec, conditions):
        return ReaderNetwork(data, self.width, "guidance" in conditions)


class ReaderNetwork(Network):
    sites = ("skip.0",)
    prompted = True

    def __init__(self, data: DataSpec, width: int, guided: bool):
        super().__init__()
        text = data.text
        told = text.width + (text.pooled or 0) + 6 * text.size + 1
        self.first = torch.nn.Conv2d(data.channels, width, 3, padding=1)
        self.told = torch.nn.Linear(told, width)
        self.guided = torch.nn.Linear(1, width) if guided else None
        self.last = torch.nn.Conv2d(width, data.channels, 3, padding=1)

    def forward(self, x, c_noise, cond, scales):
        level = torch.log1p(c_noise.abs())[:, None] / 8
        told = self.told(torch.cat([cond.text.mean(1), cond.pooled, cond.size / 64, level], dim=1))
        if self.guided:
            told = told + self.guided(cond.guidance[:, None].sin())
        h = torch.tanh(self.first(x) + told[:, :, None, None])
        h = h * scales["skip.0"].reshape(-1, 1, 1, 1) if "skip.0" in scales else h
        return self.last(h).float()

    def lower(self, dtype):
        self.first.to(dtype)
        self.told.to(dtype)


class Mean(Metric):
    """The mean of pixels, and how often samples were measured beside a prompt."""

    neither = ("prompts",)

    def keys(self):
        return ("mean", "prompts")

    def measure(self, images, reference, device):
        pixels = torch.stack([images[k] for k in range(len(images))]).double()
        return {"mean": float(pixels.mean()), "prompts": len(reference.captions or ())}


class HearingNetwork(TinyNetwork):
    """A `TinyNetwork` that adds an image of the prompt, with dropout."""

    prompted = True

    def __init__(self, channels: int, width: int):
        super().__init__(channels)
        self.heard = torch.nn.Linear(width, channels)

    def forward(self, x, c_noise, cond, scales):
        colour = self.heard(cond.text.mean(1).to(x.dtype))
        return super().forward(x, c_noise, cond, scales) + colour[:, :, None, None]


class Hearing(Backbone):
    """Networks that read prompts."""

    accepts = frozenset({"label", "text", "pooled", "size", "guidance"})

    def build(self, data: DataSpec, conditions: frozenset[str]) -> Network:
        return HearingNetwork(data.channels, data.text.width)


class Captioned(Invented):
    """Invented pictures of which half are mirrored, with captions, some of which are left out."""

    flip: bool = True
    empty: float = 0.2
    numbered: bool = True

    def pictures(self):
        return self._images() if self.numbered else None

    def _images(self):
        made = super()._images()
        made.flip, made.empty = self.flip, self.empty if self.texts else 0.0
        return made


@hookimpl
def cmkit_register():
    return [
        Plugin("codec", "blocks", "tests.toys:Blocks", "toy"),
        Plugin("text", "words", "tests.toys:Words", "toy"),
        Plugin("backbone", "hearing", "tests.toys:Hearing", "toy"),
        Plugin("dataset", "captioned", "tests.toys:Captioned", "toy"),
        Plugin("backbone", "reader", "tests.toys:Reader", "toy"),
        Plugin("metric", "mean", "tests.toys:Mean", "toy"),
    ]


def toy_registry() -> Registry:
    """The installed parts and those of this file."""
    return register([*entry_points(group="cmkit"), EntryPoint("toys", "tests.toys", "cmkit")])
