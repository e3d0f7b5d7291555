"""What the prompt encoders compute, in a module of its own because it imports torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cmkit import CheckpointError, Cond


@dataclass(frozen=True)
class Tower:
    """A tokenizer and its encoder of transformers, for prompts padded to `length` tokens.

    `layer` is the number of the hidden states that are the features, as -2 for those before the
    last layer; None = what the encoder returns, after its last normalization. Padding is hidden
    from the encoder only where its configuration says use_attention_mask, as the pipelines of
    diffusers do; its features are kept as they come.
    """

    tokenizer: Any
    encoder: Any
    length: int
    layer: int | None = None

    def __post_init__(self) -> None:
        if (known := len(self.tokenizer)) > (most := self.encoder.config.vocab_size):
            raise CheckpointError(
                f"{self.encoder.name_or_path}: its tokenizer knows {known} tokens, and the encoder"
                f" {most}; fetch or save both again"
            )

    def __call__(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor | None]:
        """Features (B, L, D), and those of whole prompts (B, P) of an encoder that projects."""
        said = tokens(self.tokenizer, prompts, self.length)
        device = self.encoder.device
        masked = getattr(self.encoder.config, "use_attention_mask", False)
        out = self.encoder(
            said["input_ids"].to(device),
            attention_mask=said["attention_mask"].to(device) if masked else None,
            output_hidden_states=self.layer is not None,
        )
        features = out[0] if self.layer is None else out.hidden_states[self.layer]
        return features.float(), out[0].float() if out[0].ndim == 2 else None


class EncodedPrompts:
    """Features of prompts by one or two towers, side by side, `batch` prompts at once.

    The unconditional prompt is the empty one, or zeros where `zeros`.
    """

    def __init__(self, towers: Sequence[Tower], batch: int, zeros: bool = False):
        self.towers, self.batch = tuple(towers), batch
        null = self([""])
        if zeros:
            pooled = None if null.pooled is None else torch.zeros_like(null.pooled)
            null = Cond(text=torch.zeros_like(null.text), pooled=pooled)
        self.null = null

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str]) -> Cond:
        texts, pools = [], []
        for start in range(0, len(prompts), self.batch):
            part = list(prompts[start : start + self.batch])
            features, pooled = zip(*(tower(part) for tower in self.towers), strict=True)
            texts.append(torch.cat(features, -1))
            pools += [found for found in pooled if found is not None]
        return Cond(text=torch.cat(texts), pooled=torch.cat(pools) if pools else None)


def tokens(tokenizer: Any, prompts: Sequence[str], length: int) -> Any:
    """The numbers of the tokens of prompts, (B, length) int64, and their attention mask."""
    return tokenizer(
        list(prompts),
        padding="max_length",
        max_length=length,
        truncation=True,
        return_tensors="pt",
    )


def components_of(prompts: Any) -> dict[str, Any]:
    """The tokenizers and encoders of an `EncodedPrompts` by their names in a pipeline."""
    return {
        f"{name}{end}": getattr(tower, name.rpartition("text_")[2])
        for tower, end in zip(prompts.towers, ("", "_2"), strict=False)
        for name in ("tokenizer", "text_encoder")
    }
