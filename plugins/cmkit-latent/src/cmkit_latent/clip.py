"""CLIP's text encoder, and the two of Stable Diffusion XL."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from cmkit import DataSpec, TextEncoder, TextSpec
from cmkit.files import read_json
from cmkit_latent import hub
from cmkit_latent.words import in_place_of

if TYPE_CHECKING:
    import torch

    from cmkit import Prompts

ENDS = ("", "_2")
"""How the names of the subfolders of the two encoders of Stable Diffusion XL end."""


class Clip(TextEncoder):
    """The text encoders of a Stable Diffusion pipeline, by transformers, with the features that
    diffusers' pipelines give its network.

    A folder with `text_encoder` alone is that of Stable Diffusion 1 or 2: features after the last
    normalization. With `text_encoder_2` it is that of Stable Diffusion XL: features of both before
    their last layers, side by side, and the projected features of the whole prompt by the second.
    """

    weights: str = Field(min_length=1, max_length=1000)
    """A pipeline's folder in the form of diffusers, or hub:OWNER/NAME or hub:OWNER/NAME@REVISION of
    the Hugging Face Hub."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Type of the encoders' weights and activations."""
    batch: int = Field(32, ge=1, le=4096)
    """Prompts encoded at once."""

    def spec(self) -> TextSpec:
        towers = self._towers(config_only=True)
        configs = [hub.config_of(encoder) for encoder, _ in towers]
        width = sum(config["hidden_size"] for config in configs)
        pooled = configs[1]["projection_dim"] if len(towers) == 2 else None
        return TextSpec(_length(towers), width, pooled, size=len(towers) == 2)

    def smallest(self, data: DataSpec) -> Mapping[str, Any]:
        return in_place_of(self)

    def cut(self, prompts: Sequence[str]) -> list[int]:
        from transformers import CLIPTokenizer

        towers = self._towers(config_only=True)
        length = _length(towers)
        cuts = [hub.cut_by(hub.tokenizer_of(CLIPTokenizer, t), prompts, length) for _, t in towers]
        return [max(of_one) for of_one in zip(*cuts, strict=True)]

    def identity(self) -> Mapping[str, Any]:
        towers = self._towers()
        about = {"weights": hub.digest(*(folder for tower in towers for folder in tower))}
        return {**about, "zeros": self._zeros()} if len(towers) == 2 else about

    def load(self, device: torch.device) -> Prompts:
        from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

        from cmkit_latent.prompting import EncodedPrompts, Tower

        folders = self._towers()
        length, both = _length(folders), len(folders) == 2
        models = (CLIPTextModel, CLIPTextModelWithProjection)
        towers = [
            Tower(
                hub.tokenizer_of(CLIPTokenizer, tokenizer),
                hub.loaded(model, encoder, self.dtype, device),
                length,
                -2 if both else None,
            )
            for model, (encoder, tokenizer) in zip(models, folders, strict=False)
        ]
        return EncodedPrompts(towers, self.batch, both and self._zeros())

    def exported(self) -> Mapping[str, Any]:
        import torch

        from cmkit_latent.prompting import components_of

        found = components_of(self.load(torch.device("cpu")))
        if "text_encoder_2" not in found:
            return found
        return {**found, "force_zeros_for_empty_prompt": self._zeros()}

    def _zeros(self) -> bool:
        """Whether zeros are the unconditional prompt of Stable Diffusion XL."""
        index = read_json(self._folder(config_only=True) / "model_index.json")
        return bool(index.get("force_zeros_for_empty_prompt", True))

    def _folder(self, config_only: bool = False) -> Path:
        parts = [f"{part}{end}" for end in ENDS for part in ("text_encoder", "tokenizer")]
        return hub.folder_of(self.weights, "text.weights", parts, config_only)

    def _towers(self, config_only: bool = False) -> list[tuple[Path, Path]]:
        """The folders of each encoder and of its tokenizer."""
        folder = self._folder(config_only)
        index = folder / "model_index.json"
        named = read_json(index).get("text_encoder_2") if index.is_file() else None
        both = (folder / "text_encoder_2").is_dir() or bool(named and named[0])
        return [
            (
                hub.part_of(folder, f"text_encoder{end}", "text.weights"),
                hub.part_of(folder, f"tokenizer{end}", "text.weights"),
            )
            for end in (ENDS if both else ENDS[:1])
        ]


def _length(towers: Sequence[tuple[Path, Path]]) -> int:
    """To how many tokens prompts are padded: what the first tokenizer and the encoders take."""
    said = read_json(towers[0][1] / "tokenizer_config.json").get("model_max_length", 77)
    most = [hub.config_of(encoder)["max_position_embeddings"] for encoder, _ in towers]
    return int(min(said, *most))
