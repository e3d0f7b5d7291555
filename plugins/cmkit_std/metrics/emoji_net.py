"""Two small classifiers of 32x32 emoji, made by benchmarks/train_emoji_nets.py: one gives the
features of `fidelity`, the other, of another architecture, judges in `emoji_judge`."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_fidelity import register_feature_extractor

from cmkit_std.datasets.emoji import GROUPS
from cmkit_std.metrics.digits_net import LabelExtractor, MixerBlock, shipped
from cmkit_std.metrics.fidelity_options import EMOJI

SHA256 = {
    "emoji_features": "dd9e95e0528291c02743c18c730869fef7f5b29327c1431274c933b3f82bf7c6",
    "emoji_judge": "b513d158b4c76d0709de254eb24b1dd914ab8cb0a6d179841628cbebe9d4bd0d",
}
SIDE = 32


class FeatureNet(nn.Module):
    """Five 3x3 convolutions, then 64 features, then logits of the groups.

    The features are linear, so that their covariance has full rank, and are given out with mean 0
    and variance 1 over the pictures of the train split.
    """

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs, halve in (
            (3, 16, True),
            (16, 32, False),
            (32, 48, True),
            (48, 96, True),
            (96, 96, False),
        ):
            conv = nn.Conv2d(inputs, outputs, 3, padding=1)
            layers += [conv, nn.GroupNorm(8, outputs), nn.SiLU()]
            layers += [nn.AvgPool2d(2)] if halve else []
        self.trunk = nn.Sequential(*layers, nn.Flatten())
        self.features = nn.Linear(96 * 4 * 4, 64)
        self.logits = nn.Linear(64, len(GROUPS))
        self.register_buffer("mean", torch.zeros(64))
        self.register_buffer("deviation", torch.ones(64))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Features (B, 64) and logits (B, 8) of x (B, 3, 32, 32) in [-1, 1]."""
        features = self.features(self.trunk(x))
        return (features - self.mean) / self.deviation, self.logits(F.silu(features))


class JudgeNet(nn.Module):
    """A patch embedding of 4x4 pixels and three residual MLP-Mixer blocks (Tolstikhin et al.,
    2021): no convolution sees the picture, unlike in `FeatureNet`."""

    def __init__(self, width: int = 64, blocks: int = 3) -> None:
        super().__init__()
        self.embed = nn.Linear(48, width)
        self.position = nn.Parameter(torch.zeros(64, width))
        self.blocks = nn.ModuleList(MixerBlock(64, width) for _ in range(blocks))
        self.norm = nn.LayerNorm(width)
        self.logits = nn.Linear(width, len(GROUPS))

    def pooled(self, x: Tensor) -> Tensor:
        """(B, width) of x (B, 3, 32, 32) in [-1, 1]."""
        patches = F.pixel_unshuffle(x, 4).flatten(2).transpose(1, 2)  # (B, 64, 48)
        h = self.embed(patches) + self.position
        for block in self.blocks:
            h = block(h)
        return self.norm(h).mean(1)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, 8) of x (B, 3, 32, 32) in [-1, 1]."""
        return self.logits(self.pooled(x))


class EmojiExtractor(LabelExtractor):
    """`FeatureNet`, as `feature_extractor="cmkit-emoji"`."""

    pooled = "64"
    black = (3, 32, 32)

    def __init__(self, name: str, features_list: list[str], **kwargs: object):
        super().__init__(name, features_list)
        self.net = feature_net()

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """The requested features, each (B, d), of uint8 images (B, 3, H, W)."""
        features, logits = self.net(to_net(images))
        found = {"64": features, "logits": logits}
        return tuple(found[name] for name in self.features_list)


def to_net(images: Tensor) -> Tensor:
    """uint8 (B, 3, H, W) -> (B, 3, 32, 32) in [-1, 1], by averaging areas where it is not 32x32."""
    x = images.to(torch.float32) / 127.5 - 1
    return x if x.shape[-2:] == (SIDE, SIDE) else F.interpolate(x, size=(SIDE, SIDE), mode="area")


def feature_net() -> FeatureNet:
    """The shipped net of features, frozen."""
    return shipped(FeatureNet, "emoji_features", SHA256)


@functools.lru_cache(maxsize=2)
def judge_net(device: torch.device) -> JudgeNet:
    """The shipped judge on `device`, frozen."""
    return shipped(JudgeNet, "emoji_judge", SHA256).to(device)


register_feature_extractor(EMOJI, EmojiExtractor)
