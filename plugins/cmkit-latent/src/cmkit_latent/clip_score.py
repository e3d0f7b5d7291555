"""CLIPScore."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from cmkit import CheckpointError, DataError, DataSpec, Metric, Reference
from cmkit_latent import hub

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.utils.data import Dataset as Images

    from cmkit_latent.similarity import ClipMeter

RANDOM = "random"
"""In place of weights: features that mean nothing, for smoke runs."""


class ClipScore(Metric):
    """How well samples agree with their prompts: the mean of 100 max(cos(i, t), 0), with CLIP's
    features i of a picture and t of its prompt (Hessel et al., 2021, with torchmetrics' factor 100
    instead of 2.5).

    Pictures are resized and normalized by the processor of the weights' folder; prompts are cut to
    what the model takes, 77 tokens. Scores of different CLIPs do not compare; say which one, as the
    report does. Real images are not looked at.
    """

    read_by = {"batch": ()}
    higher: ClassVar[tuple[str, ...]] = ("clip_score",)

    weights: str = Field(min_length=1, max_length=1000)
    """A folder of CLIP in the form of transformers, with its tokenizer and processor, or
    hub:OWNER/NAME or hub:OWNER/NAME@REVISION of the Hugging Face Hub, such as
    hub:openai/clip-vit-large-patch14; or "random": features that mean nothing, for smoke runs."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Type of the model's weights and activations."""
    batch: int = Field(64, ge=1, le=4096)
    """Pictures at a time."""

    def keys(self) -> tuple[str, ...]:
        return ("clip_score",)

    def smallest(self, data: DataSpec) -> Mapping[str, Any]:
        """The same number, in features that need no file and mean nothing."""
        return {"weights": RANDOM}

    def identity(self) -> Mapping[str, Any]:
        return {} if self.weights == RANDOM else {"clip": self._digest()}

    def check(self, data: DataSpec, images: int) -> None:
        """Reads the model's configuration alone: DownloadError or CheckpointError where it cannot
        be had, or is of another model; DataError for pictures that are neither grey nor RGB."""
        if data.channels not in (1, 3):
            raise DataError(
                f"clip_score: pictures of {data.channels} channels; CLIP takes grey and RGB ones"
            )
        if self.weights == RANDOM:
            return
        folder = self._folder(config_only=True)
        whole = (folder / "config.json").is_file()
        kind = hub.config_of(folder).get("model_type") if whole else "pipeline or none"
        if kind != "clip":
            raise CheckpointError(
                f"clip_score: {self.weights} holds a model of type {kind!r}; name a whole CLIP, of"
                " pictures and text, such as hub:openai/clip-vit-large-patch14"
            )

    def check_reference(self, data: DataSpec, reference: Reference, device: torch.device) -> None:
        """DataError where samples have no prompts; loads the model."""
        self.meter(1, reference, device)

    def measure(
        self, images: Images[Tensor], reference: Reference, device: torch.device
    ) -> dict[str, float]:
        """{"clip_score": ..} of images[i] (C, H, W) uint8, whose prompts are
        reference.captions[i % n]."""
        import torch

        count = len(images)  # type: ignore[arg-type]
        meter = self.meter(count, reference, device)
        for first in range(0, count, self.batch):
            rows = range(first, min(first + self.batch, count))
            meter.add(torch.stack([images[k] for k in rows]))
        return meter.values()

    def meter(self, images: int, reference: Reference, device: torch.device) -> ClipMeter:
        """A meter of pictures as they are drawn; DataError where these have no prompts."""
        from cmkit_latent.similarity import ClipMeter, clip, random_features

        if not reference.captions:
            raise DataError(
                "clip_score: the samples have no prompts; drop this metric, or add [text] with a"
                " network that reads prompts"
            )
        if self.weights == RANDOM:
            features = random_features(device)
        else:
            features = clip(self._folder(), self.dtype, device)
        return ClipMeter(features, reference.captions, self.batch)

    def provenance(self) -> dict[str, Any]:
        """The model, the digest of its files, and the formula."""
        known = self.weights != RANDOM
        return {
            "clip": self.weights,
            "clip_sha256": self._digest() if known else None,
            "dtype": self.dtype,
            "formula": "100 max(cos, 0)",
        }

    def _digest(self) -> str:
        return hub.digest(self._folder())

    def _folder(self, config_only: bool = False) -> Path:
        return hub.folder_of(self.weights, "metric.weights", (), config_only)
