"""Prompts as the words of the shipped emoji's captions."""

from __future__ import annotations

import difflib
import functools
import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

from cmkit import RecipeError, TextEncoder, TextSpec

if TYPE_CHECKING:
    import torch

    from cmkit import Cond, Prompts

WIDTH = 256
"""Signs of a word: the bits of a SHA-256."""
ARTICLES = frozenset({"a", "an", "the"})
"""Said of every picture, and so of none."""


class EmojiWords(TextEncoder):
    """Words of the captions of data set `emoji`, all six languages, as vectors in closed form.

    Random indexing (Kanerva, Kristoferson, Holst, 2000): every word and every picture has 256 signs
    of its own, the bits of a hash; a word's vector is the sum of its signs and of those of all
    pictures of which it is said, both of one length. Words of the same pictures are alike,
    whatever the language. No weights, nothing to train or to download: what words mean to a
    network, the network learns (`adm` and `dit` read such features).

    The order of words says nothing, English articles are left out. Words between spaces: of
    Japanese and Chinese whole names and keywords alone. The unconditional prompt is zeros.
    """

    length: int = Field(12, ge=1, le=1000)
    """Words of a prompt; longer ones are cut."""

    def spec(self) -> TextSpec:
        return TextSpec(self.length, WIDTH)

    def smallest(self, data: Any) -> Mapping[str, Any]:
        """None: it is at hand."""
        return {}

    def identity(self) -> Mapping[str, Any]:
        from cmkit_std.datasets.emoji import SHA256, TABLE

        return {"words": SHA256[TABLE]}

    def cut(self, prompts: Sequence[str]) -> list[int]:
        return [max(0, len(_known(prompt)) - self.length) for prompt in prompts]

    def unknown(self, prompts: Sequence[str]) -> list[tuple[str, ...]]:
        found = [
            tuple(w for w in _words(prompt) if not _entry(w) and w not in ARTICLES)
            for prompt in prompts
        ]
        for prompt, words in zip(prompts, found, strict=True):
            if words and not _known(prompt):
                near = difflib.get_close_matches(words[0], _places(), 1, cutoff=0.5)
                cure = f"did you mean {near[0]!r}?" if near else "say others, such as 'red apple'"
                raise RecipeError(
                    f"prompt {prompt[:60]!r}: none of its words is in a caption of data set emoji;"
                    f" {cure}"
                )
        return found

    def load(self, device: torch.device) -> Prompts:
        return _WordPrompts(self.length, device)


class _WordPrompts:
    def __init__(self, length: int, device: torch.device):
        self.length, self.device = length, device
        self.null = self([""])

    def __call__(self, prompts: Sequence[str]) -> Cond:
        import torch

        from cmkit import Cond

        rows = np.zeros((len(prompts), self.length, WIDTH), np.float32)
        for row, prompt in zip(rows, prompts, strict=True):
            for place, word in enumerate(_known(prompt)[: self.length]):
                row[place] = vector(word)
        return Cond(text=torch.from_numpy(rows)).to(self.device)


@functools.cache
def vector(word: str) -> np.ndarray:
    """The vector (256,) float32 of a word of the captions, of mean square about 1."""
    pictures = _pictures()[_places()[word]].sum(0, np.float32)
    pictures *= WIDTH**0.5 / np.linalg.norm(pictures)
    return ((_signs(f"word {word}") + pictures) / 2**0.5).astype(np.float32)


def _signs(text: str) -> np.ndarray:
    bits = np.unpackbits(np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8))
    return 2.0 * bits - 1


@functools.lru_cache(maxsize=1)
def _pictures() -> np.ndarray:
    """The signs (N, 256) of all pictures."""
    from cmkit_std.datasets.emoji import glyphs

    return np.stack([_signs(f"picture {glyph.code}") for glyph in glyphs()])


def _known(prompt: str) -> list[str]:
    """The words of a prompt that are in captions, as they stand there."""
    found = (_entry(word) for word in _words(prompt) if word not in ARTICLES)
    return [word for word in found if word]


def _entry(word: str) -> str | None:
    """The word of the captions that `word` is: itself, or in the singular; None where none is."""
    forms = (word, word.removesuffix("s"), word.removesuffix("es"))
    return next((form for form in forms if form in _places()), None)


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


@functools.lru_cache(maxsize=1)
def _places() -> dict[str, list[int]]:
    """The numbers of the pictures of each word, rising, all languages together."""
    from cmkit_std.datasets.emoji import glyphs

    found: dict[str, dict[int, None]] = {}
    for glyph in glyphs():
        for texts in glyph.said.values():
            for text in texts:
                for word in _words(text):
                    found.setdefault(word, {})[glyph.number] = None
    return {word: list(numbers) for word, numbers in found.items()}
