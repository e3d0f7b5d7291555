"""Small exact things that several tests need."""

from __future__ import annotations

import torch

from cmkit import Cond, Denoiser, Network, Noise


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
