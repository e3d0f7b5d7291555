"""Prompts as features, without weights."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pydantic import Field

from cmkit import TextEncoder, TextSpec

if TYPE_CHECKING:
    import torch

    from cmkit import Cond, Prompts


class Mine(TextEncoder):
    """A random vector for each word, the same wherever the word stands."""

    length: int = Field(8, ge=1, le=1000)
    """Words of a prompt; longer ones are cut."""
    width: int = Field(16, ge=1, le=4096)
    """Numbers a word."""

    def spec(self) -> TextSpec:
        return TextSpec(self.length, self.width)

    def cut(self, prompts: Sequence[str]) -> list[int]:
        return [max(0, len(prompt.split()) - self.length) for prompt in prompts]

    def load(self, device: torch.device) -> Prompts:
        """An encoder with weights loads them here, on `device`; none requires a gradient."""
        return _Words(self.length, self.width, device)


class _Words:
    def __init__(self, length: int, width: int, device: torch.device):
        self.length, self.width, self.device = length, width, device
        self.null = self([""])

    def __call__(self, prompts: Sequence[str]) -> Cond:
        """`text` (B, length, width): words, and zeros where there are none."""
        import torch

        from cmkit import Cond

        text = torch.zeros(len(prompts), self.length, self.width)
        for row, prompt in zip(text, prompts, strict=True):
            for place, word in enumerate(prompt.lower().split()[: self.length]):
                own = torch.Generator().manual_seed(zlib.crc32(word.encode()))
                row[place] = torch.randn(self.width, generator=own)
        return Cond(text=text.to(self.device))
