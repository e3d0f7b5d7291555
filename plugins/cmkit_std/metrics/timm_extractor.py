"""Any network of timm as an extractor of torch-fidelity: `extractor = "timm-NAME"`."""

from __future__ import annotations

from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from torch import Tensor

from cmkit_std.metrics.digits_net import LabelExtractor
from cmkit_std.timm_network import network

PREFIX = "timm-"


class TimmExtractor(LabelExtractor):
    """Pooled features of a network of timm, and its logits for the Inception score, from images
    resized and normalised as in its training."""

    pooled = "pooled"
    black = (3, 64, 64)

    def __init__(
        self,
        name: str,
        features_list: list[str],
        feature_extractor_weights_path: str = "",
        **kwargs: object,
    ):
        super().__init__(name, features_list)
        weights = Path(feature_extractor_weights_path)
        self.net = network(name.removeprefix(PREFIX), weights, "metric.weights")
        config = timm.data.resolve_data_config(model=self.net)
        self.size, self.mode = config["input_size"][1:], config["interpolation"]
        for key in ("mean", "std"):
            self.register_buffer(key, torch.tensor(config[key]).view(1, -1, 1, 1))

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """The requested features, each (B, d), of uint8 images (B, 3, H, W)."""
        x = images.to(self.mean.dtype) / 255
        x = F.interpolate(x, self.size, mode=self.mode, align_corners=False, antialias=True)
        maps = self.net.forward_features((x - self.mean) / self.std)
        found = {"pooled": self.net.forward_head(maps, pre_logits=True)}
        if "logits" in self.features_list:
            found["logits"] = self.net.forward_head(maps)
        return tuple(found[name] for name in self.features_list)
