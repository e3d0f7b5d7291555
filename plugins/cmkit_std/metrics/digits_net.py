"""Two small classifiers of 8x8 digits, made by benchmarks/train_digits_nets.py: one gives the
features of `fidelity`, the other, of another architecture, judges in `digits_judge`."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_fidelity import FeatureExtractorBase, register_feature_extractor

from cmkit import CheckpointError
from cmkit_std.metrics.fidelity_options import DIGITS

Net = TypeVar("Net", bound=nn.Module)
SHA256 = {
    "digits_features": "0b42f7e0d8b8ffd542ea3ad14e0e52d565a5c176131483c4b02917947b18aae2",
    "digits_judge": "fc6f0166c5f3b82b3a7a57be2a0689649e855695d28dd43963f813b3f26f6847",
}


class FeatureNet(nn.Module):
    """Four 3x3 convolutions, then 64 features, then 10 logits.

    The features are linear, so that their covariance has full rank, and are given out with mean 0
    and variance 1 over the digits of the train split.
    """

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(1, 24, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(24, 32, 3, padding=1),
            nn.SiLU(),
            nn.AvgPool2d(2),
            nn.Conv2d(32, 48, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(48, 48, 3, padding=1),
            nn.SiLU(),
            nn.AvgPool2d(2),
            nn.Flatten(),
        )
        self.features = nn.Linear(48 * 2 * 2, 64)
        self.logits = nn.Linear(64, 10)
        self.register_buffer("mean", torch.zeros(64))
        self.register_buffer("deviation", torch.ones(64))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Features (B, 64) and logits (B, 10) of x (B, 1, 8, 8) in [-1, 1]."""
        features = self.features(self.trunk(x))
        return (features - self.mean) / self.deviation, self.logits(F.silu(features))


class JudgeNet(nn.Module):
    """A patch embedding of 2x2 pixels and three residual MLP-Mixer blocks (Tolstikhin et al.,
    2021): no convolution sees the picture, unlike in `FeatureNet`."""

    def __init__(self, width: int = 48, blocks: int = 3) -> None:
        super().__init__()
        self.embed = nn.Linear(4, width)
        self.position = nn.Parameter(torch.zeros(16, width))
        self.blocks = nn.ModuleList(MixerBlock(16, width) for _ in range(blocks))
        self.norm = nn.LayerNorm(width)
        self.logits = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, 10) of x (B, 1, 8, 8) in [-1, 1]."""
        patches = F.pixel_unshuffle(x, 2).flatten(2).transpose(1, 2)  # (B, 16, 4)
        h = self.embed(patches) + self.position
        for block in self.blocks:
            h = block(h)
        return self.logits(self.norm(h).mean(1))


class MixerBlock(nn.Module):
    """Mixes over the patches, then over the channels, each time added to its input."""

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.norm_tokens = nn.LayerNorm(width)
        self.tokens = nn.Sequential(
            nn.Linear(tokens, 2 * tokens), nn.GELU(), nn.Linear(2 * tokens, tokens)
        )
        self.norm_width = nn.LayerNorm(width)
        self.width = nn.Sequential(
            nn.Linear(width, 3 * width), nn.GELU(), nn.Linear(3 * width, width)
        )

    def forward(self, h: Tensor) -> Tensor:
        """(B, tokens, width) -> the same."""
        h = h + self.tokens(self.norm_tokens(h).transpose(1, 2)).transpose(1, 2)
        return h + self.width(self.norm_width(h))


class LabelExtractor(FeatureExtractorBase):
    """A classifier as torch-fidelity takes it: "logits" for the Inception score, `pooled` features
    for all else. `black` is the shape (C, H, W) of an image to compile it with."""

    pooled: ClassVar[str]
    black: ClassVar[tuple[int, int, int]]

    @classmethod
    def get_provided_features_list(cls) -> tuple[str, ...]:
        return cls.pooled, "logits"

    @classmethod
    def get_default_feature_layer_for_metric(cls, metric: str) -> str:
        return "logits" if metric == "isc" else cls.pooled

    @staticmethod
    def can_be_compiled() -> bool:
        return True

    @classmethod
    def get_dummy_input_for_compile(cls) -> Tensor:
        return torch.zeros(1, *cls.black, dtype=torch.uint8)


class DigitsExtractor(LabelExtractor):
    """`FeatureNet`, as `feature_extractor="cmkit-digits"`."""

    pooled = "64"
    black = (1, 8, 8)

    def __init__(self, name: str, features_list: list[str], **kwargs: object):
        super().__init__(name, features_list)
        self.net = feature_net()

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """The requested features, each (B, d), of uint8 images (B, 1, H, W)."""
        features, logits = self.net(to_net(images))
        found = {"64": features, "logits": logits}
        return tuple(found[name] for name in self.features_list)


def to_net(images: Tensor) -> Tensor:
    """uint8 (B, 1, H, W) -> (B, 1, 8, 8) in [-1, 1], by averaging areas where H, W are not 8."""
    x = images.to(torch.float32) / 127.5 - 1
    return x if x.shape[-2:] == (8, 8) else F.interpolate(x, size=(8, 8), mode="area")


def feature_net() -> FeatureNet:
    """The shipped net of features, frozen."""
    return shipped(FeatureNet, "digits_features", SHA256)


@functools.lru_cache(maxsize=2)
def judge_net(device: torch.device) -> JudgeNet:
    """The shipped judge on `device`, frozen."""
    return shipped(JudgeNet, "digits_judge", SHA256).to(device)


def shipped(build: Callable[[], Net], name: str, sha256: Mapping[str, str]) -> Net:
    """The network of the file `name`.safetensors beside this one, frozen; CheckpointError where its
    SHA-256 is not sha256[name]."""
    from safetensors.torch import load

    file = Path(__file__).with_name(f"{name}.safetensors")
    try:
        data = file.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error}); reinstall cmkit") from error
    found = hashlib.sha256(data).hexdigest()
    if found != sha256[name]:
        raise CheckpointError(
            f"{file}: SHA-256 {found[:12]}.. is not {sha256[name][:12]}..; reinstall cmkit"
        )
    with torch.device("meta"):
        net = build()
    net.load_state_dict(load(data), assign=True)
    return net.eval().requires_grad_(False)


register_feature_extractor(DIGITS, DigitsExtractor)
