"""The discriminator of projected GANs (Sauer, Chitta, Mueller, Geiger: Projected GANs Converge
Faster, 2021), as sony/ctm trains it: small heads that look at an image through frozen networks.

Each feature network gives maps at four scales; random convolutions that stay as they are mix their
channels and then, from coarse to fine, the scales; a head at each scale tells real from fake.
Labels are not used. The heads' weights have spectral norm 1 and their batch normalisation the
statistics of the batch at hand, always: nothing of it is remembered. The published code measures
its feature networks by images of zeros, which also moves their running statistics, and makes other
random convolutions when it resumes; neither happens here.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from cmkit import RecipeError
from cmkit_std import timm_network
from cmkit_std.timm_network import Files

MIXED = (64, 128, 256, 512)
"""Channels of the four scales, from fine to coarse, once they are mixed."""
FUSED = (64, 64, 128, 256)
"""The same once the scales are mixed."""


class Discriminator(nn.Module):
    """Tells images (B, 1 or 3, H, W) in [-1, 1] of the data from others."""

    def __init__(self, names: Sequence[str], files: Files):
        super().__init__()
        self.features = nn.ModuleList(Features(name, files) for name in names)
        self.projections = nn.ModuleList(Projection(f.channels) for f in self.features)
        self.heads = nn.ModuleList(nn.ModuleList(map(head, range(4))) for _ in names)

    def forward(self, x: Tensor, views: Sequence[Callable[[Tensor], Tensor]]) -> list[Tensor]:
        """Logits of each feature network, (B, L), which looks at its own view of x; float32."""
        logits = []
        with torch.autocast(x.device.type, enabled=False):
            x = x.float().expand(-1, 3, -1, -1)
            parts = zip(views, self.features, self.projections, self.heads, strict=True)
            for view, features, projection, heads in parts:
                maps = projection(features(view(x)))
                seen = [judge(each).flatten(1) for judge, each in zip(heads, maps, strict=True)]
                logits.append(torch.cat(seen, 1))
        return logits

    @contextlib.contextmanager
    def still(self) -> Iterator[None]:
        """Inside, images get gradients through the discriminator, which gets none and stays as it
        is: estimates of spectral norms as well."""
        trained = [p for p in self.parameters() if p.requires_grad]
        self.eval()
        for p in trained:
            p.requires_grad_(False)
        try:
            yield
        finally:
            for p in trained:
                p.requires_grad_(True)
            self.train()


def fooling(fake: Sequence[Tensor]) -> Tensor:
    """The generator's hinge loss, (B,), of the logits of its images."""
    return torch.stack([-logits.mean(1) for logits in fake]).mean(0)


def judging(real: Sequence[Tensor], fake: Sequence[Tensor]) -> Tensor:
    """The discriminator's hinge loss, (B,), of logits of real and of fake images."""
    losses = [
        F.relu(1 - r).mean(1) + F.relu(1 + f).mean(1) for r, f in zip(real, fake, strict=True)
    ]
    return torch.stack(losses).mean(0)


class Features(nn.Module):
    """Four maps of a frozen network of timm, the finest first, each half as wide as the one before.

    Images are resized and normalised as that network was trained. Of a transformer, whose blocks
    all have one size, those a quarter of the depth apart are brought to four sizes by random
    convolutions.
    """

    def __init__(self, name: str, files: Files):
        super().__init__()
        weights = timm_network.weights_of(name, files, "gan_features", "gan_weights")
        self.network = timm_network.network(name, weights, "gan_weights")
        self.indices, channels, self.flat = _scales(name, self.network)
        config = self.network.pretrained_cfg
        self.size = config["input_size"][-1]
        for key in ("mean", "std"):
            values = torch.tensor(config[key]).view(1, -1, 1, 1)
            self.register_buffer(key, values, persistent=False)
        self.readouts = nn.ModuleList()
        if self.flat:
            self.channels = [channels[0] // part for part in (8, 4, 2, 1)]
            self.readouts.extend(_readout(channels[0], c, k) for k, c in enumerate(self.channels))
        else:
            self.channels = channels
        self.eval()

    def train(self, mode: bool = True) -> Features:
        """It never trains."""
        return super().train(False)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Four maps (B, C, H, W) of images x (B, 3, H, W) in [-1, 1]."""
        x = ((x + 1) / 2 - self.mean) / self.std
        x = F.interpolate(x, size=self.size, mode="bilinear", align_corners=False)
        maps = self.network.forward_intermediates(
            x, indices=self.indices, output_fmt="NCHW", intermediates_only=True
        )
        if not self.flat:
            return list(maps)
        return [readout(each) for readout, each in zip(self.readouts, maps, strict=True)]


class Projection(nn.Module):
    """Random mixtures of the channels of four maps, and of each with the coarser ones."""

    def __init__(self, channels: Sequence[int]):
        super().__init__()
        pairs = zip(channels, MIXED, strict=True)
        self.across_channels = nn.ModuleList(fixed(nn.Conv2d(c, m, 1)) for c, m in pairs)
        pairs = zip(MIXED, FUSED, strict=True)
        self.across_scales = nn.ModuleList(fixed(nn.Conv2d(m, f, 1)) for m, f in pairs)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Four maps (B, FUSED[k], H, W), each twice as wide as it came."""
        mixed = [mix(each) for mix, each in zip(self.across_channels, maps, strict=True)]
        sizes = [[2 * side for side in mixed[0].shape[2:]], *(each.shape[2:] for each in mixed)]
        fused: list[Tensor] = []
        for k in (3, 2, 1, 0):
            each = mixed[k] + fused[0] if fused else mixed[k]
            wider = F.interpolate(each, size=sizes[k], mode="bilinear", align_corners=True)
            fused.insert(0, self.across_scales[k](wider))
        return fused


def head(scale: int) -> nn.Sequential:
    """What judges the fused map of a scale: convolutions that halve it down to one size, then
    logits."""
    widths = [*FUSED[scale:], 512]
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [
            spectral_norm(nn.Conv2d(before, after, 4, stride=2, padding=1)),
            nn.BatchNorm2d(after, track_running_stats=False),
            nn.LeakyReLU(0.2),
        ]
    return nn.Sequential(*layers, spectral_norm(nn.Conv2d(512, 1, 4, bias=False)))


def fixed(conv: nn.Module) -> nn.Module:
    """`conv`, whose random weights are never trained, but are part of what a checkpoint holds."""
    for name, parameter in list(conv.named_parameters()):
        delattr(conv, name)
        conv.register_buffer(name, parameter.detach())
    return conv


def _scales(name: str, network: nn.Module) -> tuple[list[int], list[int], bool]:
    """Which of a network's maps to take, their channels, and whether all have one size."""
    info = getattr(network, "feature_info", None) or []
    info = info if isinstance(info, list) else info.get_dicts()
    count = len(info)
    if count < 4 or not hasattr(network, "forward_intermediates"):
        raise RecipeError(
            f"gan_features: {name} gives {count} feature maps, the discriminator takes four;"
            " choose another network"
        )
    flat = len({entry["reduction"] for entry in info}) == 1
    last_four = range(count - 4, count)
    indices = [count * part // 4 - 1 for part in (1, 2, 3, 4)] if flat else list(last_four)
    return indices, [info[index]["num_chs"] for index in indices], flat


def _readout(width: int, channels: int, scale: int) -> nn.Sequential:
    """A random convolution, and one that makes the map 4, 2, 1 or 1/2 times as wide."""
    resize: list[nn.Module] = [
        nn.ConvTranspose2d(channels, channels, 4, stride=4),
        nn.ConvTranspose2d(channels, channels, 2, stride=2),
        nn.Identity(),
        nn.Conv2d(channels, channels, 3, stride=2, padding=1),
    ]
    return nn.Sequential(fixed(nn.Conv2d(width, channels, 1)), fixed(resize[scale]))
