"""The kinds of part between pictures or prompts and a network."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from cmkit.errors import RecipeError
from cmkit.kinds.part import Part
from cmkit.values import DataSpec, TextSpec

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from cmkit.denoiser import Cond


class Coder(Protocol):
    """A codec with its weights on a device."""

    def encode(self, x0: Tensor) -> tuple[Tensor, Tensor | None]:
        """Mean (B, c, h, w) of the latents of images (B, C, H, W) in [-1, 1], and their standard
        deviation, of the same shape, where they are drawn; both float32."""

    def decode(self, latents: Tensor) -> Tensor:
        """Images (B, C, H, W), about [-1, 1], float32, of latents (B, c, h, w)."""


class Codec(Part, ABC):
    """Pictures as latents, in which networks are trained and drawn from.

    Latents are scaled so that their standard deviation is about 1, unless published networks want
    them otherwise.
    """

    @abstractmethod
    def spec(self, data: DataSpec) -> DataSpec:
        """Shape of the latents of images like `data`, whose classes and text they keep; reads no
        weights. RecipeError for images that it cannot take, CheckpointError for missing files."""

    @abstractmethod
    def load(self, device: torch.device) -> Coder:
        """The codec on `device`, whose parameters require no gradient."""

    def exported(self) -> Mapping[str, Any]:
        """What a pipeline of diffusers has in the place of this codec, by name: models, such as
        "vae", on the CPU, and options; RecipeError where there is none."""
        raise RecipeError("no pipeline of diffusers has such a codec; draw with `cmkit sample`")


class Prompts(Protocol):
    """A prompt encoder with its weights on a device."""

    null: Cond
    """The unconditional prompt: `text`, and `pooled` if any, of one row."""

    def __call__(self, prompts: Sequence[str]) -> Cond:
        """`text` (B, L, D), and `pooled` (B, P) if any, of these prompts; float32."""


class TextEncoder(Part, ABC):
    """Prompts as features, which networks are conditioned on."""

    @abstractmethod
    def spec(self) -> TextSpec:
        """Shape of the features; reads no weights. CheckpointError for missing files."""

    def cut(self, prompts: Sequence[str]) -> list[int]:
        """How many tokens of each prompt are cut off because it is too long; reads no weights."""
        return [0] * len(prompts)

    def unknown(self, prompts: Sequence[str]) -> list[tuple[str, ...]]:
        """Words of each prompt that say nothing to this encoder and are left out; RecipeError where
        a prompt has no others. Reads no weights."""
        return [()] * len(prompts)

    @abstractmethod
    def load(self, device: torch.device) -> Prompts:
        """The encoder on `device`, whose parameters require no gradient."""

    def exported(self) -> Mapping[str, Any]:
        """What a pipeline of diffusers has in the place of this encoder, by name: models, such as
        "text_encoder" and "tokenizer", on the CPU, and options; RecipeError where there is none."""
        raise RecipeError(
            "no pipeline of diffusers has such a prompt encoder; draw with `cmkit sample`"
        )
