"""What `clip_score` computes, in a module of its own because it imports torch."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, cosine_similarity

from cmkit import CheckpointError, Cond
from cmkit.latents.memo import Memo
from cmkit_latent import hub
from cmkit_latent.prompting import tokens

WIDTH = 64
"""Of random features."""
GRID = 8


class Features(NamedTuple):
    """What pictures and prompts are compared by."""

    pictures: Callable[[Tensor], Tensor]
    """(B, d) of RGB pictures, uint8 (B, 3, H, W)."""
    prompts: Memo
    """"pooled", (B, d), of prompts."""


class ClipMeter:
    """The mean of 100 max(cos, 0) of pictures that come in batches, picture k beside
    captions[k % n]."""

    def __init__(self, features: Features, captions: Sequence[str], batch: int):
        self.features, self.captions, self.batch = features, captions, batch
        self.total, self.count = torch.zeros((), dtype=torch.float64), 0

    @torch.no_grad()
    def add(self, images: Tensor) -> None:
        """Take the next images, uint8 (B, C, H, W)."""
        for part in images.split(self.batch):
            numbers = range(self.count, self.count + len(part))
            said = [self.captions[k % len(self.captions)] for k in numbers]
            pictures = self.features.pictures(part.expand(-1, 3, -1, -1))
            prompts = self.features.prompts(said)["pooled"].to(pictures)
            cosines = cosine_similarity(pictures.double(), prompts.double())
            self.total += 100 * cosines.clamp(min=0).sum().cpu()
            self.count += len(part)

    def values(self) -> dict[str, float]:
        """{"clip_score": ..}."""
        return {"clip_score": self.total.item() / self.count}

    def state(self) -> dict[str, Tensor]:
        """The sum so far, and of how many images it is."""
        return {"total": self.total.clone(), "count": torch.tensor(self.count)}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a state, whatever number of images is to come."""
        self.total, self.count = state["total"].clone(), int(state["count"])


@functools.lru_cache(maxsize=1)
def clip(folder: Path, dtype: str, device: torch.device) -> Features:
    """The features of CLIP in a local folder; CheckpointError where it is not whole."""
    from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

    if not (folder / "preprocessor_config.json").is_file():
        raise CheckpointError(
            f"{folder}: no preprocessor_config.json, which says how pictures are resized; fetch or"
            " save CLIP's processor beside its weights"
        )
    model = hub.loaded(CLIPModel, folder, dtype, device)
    tokenizer = hub.tokenizer_of(AutoTokenizer, folder)
    processor = CLIPImageProcessor.from_pretrained(folder, local_files_only=True)
    length = model.config.text_config.max_position_embeddings

    def pictures(images: Tensor) -> Tensor:
        pixels = processor(images=images.to(device), return_tensors="pt")["pixel_values"]
        found = model.get_image_features(pixel_values=pixels.to(model.dtype))
        return found.pooler_output.float()  # type: ignore[no-any-return]

    def prompts(said: Sequence[str]) -> Cond:
        # Padding stands behind the end mark, whose features are taken, and is hidden by causality.
        inputs: Any = tokens(tokenizer, said, length).to(device)
        found = model.get_text_features(inputs["input_ids"], inputs["attention_mask"])
        return Cond(pooled=found.pooler_output.float())

    return Features(pictures, Memo(prompts))  # type: ignore[arg-type]


def random_features(device: torch.device) -> Features:
    """Features that mean nothing: pictures of 8x8 means times a fixed random matrix, and a random
    vector for each prompt."""
    own = torch.Generator().manual_seed(0)
    matrix = torch.randn(3 * GRID**2, WIDTH, generator=own).to(device)

    def pictures(images: Tensor) -> Tensor:
        return adaptive_avg_pool2d(images.to(device).float() / 127.5 - 1, GRID).flatten(1) @ matrix

    def prompts(said: Sequence[str]) -> Cond:
        seeds = [torch.Generator().manual_seed(zlib.crc32(one.encode())) for one in said]
        rows = [torch.randn(WIDTH, generator=seed) for seed in seeds]
        return Cond(pooled=torch.stack(rows).to(device))

    return Features(pictures, Memo(prompts))  # type: ignore[arg-type]
