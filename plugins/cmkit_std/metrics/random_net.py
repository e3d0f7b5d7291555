"""Features of no meaning, for trying a metric without its extractor's weights."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_fidelity import register_feature_extractor

from cmkit_std.metrics.digits_net import LabelExtractor
from cmkit_std.metrics.fidelity_options import RANDOM


class RandomExtractor(LabelExtractor):
    """Three convolutions with random weights, always the same, as `extractor = "cmkit-random"`."""

    pooled = "64"
    black = (3, 32, 32)

    def __init__(self, name: str, features_list: list[str], **kwargs: object):
        super().__init__(name, features_list)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            convs = [nn.Conv2d(a, b, 3, 2, 1) for a, b in ((1, 16), (16, 32), (32, 64))]
            for conv in convs:
                nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
            self.convs, self.logits = nn.ModuleList(convs), nn.Linear(64, 10)

    @classmethod
    def get_provided_features_list(cls) -> tuple[str, ...]:
        return *super().get_provided_features_list(), "spatial"

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """The requested features, each (B, d), of uint8 images (B, C, H, W), whose channels it
        averages."""
        h = images.float().mean(1, keepdim=True) / 127.5 - 1
        for conv in self.convs:
            h = F.silu(conv(h))
        pooled = h.mean((2, 3))
        found = {"64": pooled, "logits": self.logits(pooled), "spatial": h[:, :7].flatten(1)}
        return tuple(found[name] for name in self.features_list)


register_feature_extractor(RANDOM, RandomExtractor)
