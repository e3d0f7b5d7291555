"""Prompts as features without weights, for tests and smoke runs."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import Field

from cmkit import CmkitError, TextEncoder, TextSpec

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from cmkit import Cond, Prompts


class Words(TextEncoder):
    """A random vector for each word, the same wherever the word stands: no weights, no training, no
    meaning. For tests and smoke runs, which it serves in the place of any other encoder."""

    length: int = Field(8, ge=1, le=1000)
    """Words of a prompt; longer ones are cut."""
    width: int = Field(16, ge=1, le=4096)
    """Numbers a word."""
    pooled: int | None = Field(None, ge=1, le=4096)
    """Numbers of the whole prompt; absent = there are none."""
    size: bool = False
    """Whether its networks are told the sizes of pictures."""

    def spec(self) -> TextSpec:
        return TextSpec(self.length, self.width, self.pooled, self.size)

    def cut(self, prompts: Sequence[str]) -> list[int]:
        return [max(0, len(prompt.split()) - self.length) for prompt in prompts]

    def load(self, device: torch.device) -> Prompts:
        return _WordPrompts(self, device)


class _WordPrompts:
    def __init__(self, text: Words, device: torch.device):
        self.text, self.device = text, device
        self.null = self([""])

    def __call__(self, prompts: Sequence[str]) -> Cond:
        import torch

        from cmkit import Cond

        text = torch.zeros(len(prompts), self.text.length, self.text.width)
        for row, prompt in zip(text, prompts, strict=True):
            for place, word in enumerate(prompt.lower().split()[: self.text.length]):
                row[place] = _drawn(word, self.text.width)
        pooled = None
        if self.text.pooled:
            pooled = torch.stack([_drawn(prompt, self.text.pooled) for prompt in prompts])
        return Cond(text=text, pooled=pooled).to(self.device)


def _drawn(word: str, width: int) -> Tensor:
    import torch

    own = torch.Generator().manual_seed(zlib.crc32(word.encode()))
    return torch.randn(width, generator=own)


def in_place_of(text: TextEncoder) -> Mapping[str, Any]:
    """The table of `Words` for a smoke run of another encoder, with its kinds of features where
    they are known without a download."""
    try:
        spec = text.spec()
    except CmkitError:
        return {"use": "words"}
    return {"use": "words", "size": True, "pooled": 12} if spec.size else {"use": "words"}
