"""Emoji of a free font with captions in six languages, shipped with cmkit."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from pydantic import Field, field_validator

from cmkit import DataError, DataSpec, Reference
from cmkit_std.datasets.on_disk import OnDisk, counted

if TYPE_CHECKING:
    from cmkit_std.datasets.pixels import Pixels

FOLDER = Path(__file__).with_name("emoji_data")
SHEET, TABLE = "pictures.webp", "captions.jsonl"
SHA256 = {
    SHEET: "b90d56fecbb742d27a56a924f04a9d421b595daa51314088c42272929aa905e8",
    TABLE: "858209b27b59e82e8c40e49f9ca4b48c075a62f0bc24ebfed266702364e6895e",
}
SIDE, COLUMNS = 32, 40
LANGUAGES = ("en", "de", "es", "fr", "ja", "zh")
GROUPS = (
    *("smileys & emotion", "people & body", "animals & nature", "food & drink"),
    *("travel & places", "activities", "objects", "symbols"),
)
HELD_OUT = 10


class Emoji(OnDisk):
    """1,579 emoji of Noto Color Emoji, 32x32 on white, with the names and keywords of Unicode.

    No flags, skin tones, or couples and families by gender. Their groups are the classes. Nothing
    is downloaded; the licences lie beside the files.

    In batches every picture is there `captions_each` times: once with its name ("red apple"), else
    with up to three of its keywords ("fruit, red"), or with the name and up to two of them ("red
    apple, food"), the same ones each time. So a keyword alone is a prompt, for which a network
    learns all pictures that have it. Metrics compare with every picture once, named.

    One in ten families, such as all that are cooks, chosen by a hash of its code points, is "test".
    """

    split: Literal["train", "test", "all"] = "train"
    """Which part of the pictures."""
    language: Literal["en", "de", "es", "fr", "ja", "zh"] = "en"
    """Of the captions."""
    groups: tuple[str, ...] = ()
    """Names of the groups to keep, such as "food & drink"; by default all."""
    captions_each: int = Field(4, ge=1, le=64)
    """Captions of each picture; 1 = its name alone."""
    labels: bool = True
    """Give the group as a class label."""
    flip: bool = False
    """Mirror half of the training pictures: digits, letters and arrows as well."""
    empty: float = Field(0.0, ge=0, le=1)
    """Probability with which a picture comes with the unconditional prompt in the place of its
    caption, drawn anew each time, so that guidance can be learned."""

    @field_validator("groups")
    @classmethod
    def _known(cls, groups: tuple[str, ...]) -> tuple[str, ...]:
        for group in groups:
            if group not in GROUPS:
                raise ValueError(f"no group {group!r}; there are {', '.join(GROUPS)}")
        if len(set(groups)) < len(groups):
            raise ValueError("a group twice; name each once")
        return groups

    def spec(self) -> DataSpec:
        """RGB, 32x32, a class for each group; DataError when the shipped files are damaged."""
        data, classes = self.declared(), len(self._kept)
        if not self.labels:
            return data
        return DataSpec(3, SIDE, classes, data.classes, counted(self._chosen()[1], classes))

    def declared(self) -> DataSpec:
        """The same without the files, but for the numbers of pictures."""
        if not self.labels:
            return DataSpec(3, SIDE)
        return DataSpec(3, SIDE, len(self._kept), self._kept)

    def smallest(self, data: DataSpec | None = None) -> Mapping[str, Any]:
        """Names alone, so that few captions are encoded; the pictures are at hand."""
        return {"captions_each": 1}

    def captions(self) -> list[str]:
        """The captions, each once, in the order in which pictures first have them."""
        return list(dict.fromkeys(self._said()))

    def heldout(self) -> Emoji | None:
        """Of "train" the test split."""
        return self.model_copy(update={"split": "test"}) if self.split == "train" else None

    def identity(self) -> dict[str, Any]:
        """How many pictures batches are drawn from, and digests of the pictures and captions."""
        digest = hashlib.sha256("\n".join(self._said()).encode()).hexdigest()
        return {**super().identity(), "captions": digest}

    def reference(self) -> Reference:
        """Every picture once, and its name, mixed: samples take their prompts from the first."""
        from cmkit_std.datasets.pixels import Pixels

        chosen, labels = self._chosen()
        order = sorted(range(len(chosen)), key=lambda n: _hashed(chosen[n].code))
        pictures = Pixels(pixels()[[chosen[n].number for n in order]], labels[order])
        names = [chosen[n].said[self.language][0] for n in order]
        return Reference(pictures, pictures.fingerprint(), captions=names)

    @property
    def _kept(self) -> tuple[str, ...]:
        return self.groups or GROUPS

    def _chosen(self) -> tuple[list[Glyph], np.ndarray]:
        """The pictures of the split and the groups, and their classes (N,)."""
        number = {GROUPS.index(group): label for label, group in enumerate(self._kept)}
        chosen = [
            glyph
            for glyph in glyphs()
            if glyph.group in number
            and self.split in ("all", "test" if glyph.held_out else "train")
        ]
        return chosen, np.array([number[glyph.group] for glyph in chosen], np.int64)

    def _said(self) -> list[str]:
        """The caption of each row: all pictures with their names, all with their second .."""
        columns = (glyph.texts(self.language, self.captions_each) for glyph in self._chosen()[0])
        return [text for row in zip(*columns, strict=True) for text in row]

    def _images(self) -> Pixels:
        from cmkit_std.datasets.pixels import Pixels

        chosen, labels = self._chosen()
        rows = np.tile([glyph.number for glyph in chosen], self.captions_each)
        every = np.tile(labels, self.captions_each) if self.labels else None
        made = Pixels(pixels()[rows], every, flip=self.flip)
        number = {text: n for n, text in enumerate(self.captions())}
        made.captions = np.array([number[text] for text in self._said()], np.int64)
        made.empty = self.empty
        return made


class Glyph(NamedTuple):
    """A picture by its place in the sheet, and what is known of it."""

    number: int
    code: str
    """Code points, such as "1F469-200D-1F373"."""
    group: int
    family: str
    said: Mapping[str, list[str]]
    """Name and keywords by language."""

    @property
    def held_out(self) -> bool:
        """Whether it is in the test split."""
        return _hashed(self.family) % HELD_OUT == 0

    def texts(self, language: str, count: int) -> Iterator[str]:
        """Its name, then other captions, `count` in all, always the same: in turns keywords alone
        and behind the name, each time those that were not said for longest."""
        name, *keywords = self.said[language]
        yield name
        waiting = sorted(keywords, key=lambda word: _hashed(self.code, word))
        for turn in range(1, count):
            most, before = (3, []) if turn % 2 else (2, [name])
            taken = 1 + _hashed(self.code, turn) % most
            yield ", ".join([*before, *waiting[:taken]]) or name
            waiting = waiting[taken:] + waiting[:taken]


def _hashed(*of: object) -> int:
    return int.from_bytes(hashlib.sha256("/".join(map(str, of)).encode()).digest()[:8])


@functools.lru_cache(maxsize=1)
def glyphs() -> list[Glyph]:
    """All that are shipped, in Unicode's order."""
    return [
        Glyph(n, row["code"], row["group"], row["family"], {key: row[key] for key in LANGUAGES})
        for n, row in enumerate(map(json.loads, _file(TABLE).decode().splitlines()))
    ]


@functools.lru_cache(maxsize=1)
def pixels() -> np.ndarray:
    """Their pictures, (N, 3, 32, 32) uint8."""
    import io

    from PIL import Image

    sheet = np.asarray(Image.open(io.BytesIO(_file(SHEET))).convert("RGB"))
    tiles = sheet.reshape(-1, SIDE, COLUMNS, SIDE, 3).transpose(0, 2, 4, 1, 3)
    return tiles.reshape(-1, 3, SIDE, SIDE)[: len(glyphs())].copy()


def groups_of(prompt: str) -> frozenset[int]:
    """The groups of the emoji that have the prompt, or each part of it between commas, as name or
    keyword in one language; none where no emoji has."""
    for known in _known_texts().values():
        whole = _plain(prompt)
        parts = [whole] if whole in known else list(filter(None, map(_plain, prompt.split(","))))
        if found := parts and frozenset.intersection(*(known.get(p, frozenset()) for p in parts)):
            return frozenset(glyphs()[number].group for number in found)
    return frozenset()


@functools.lru_cache(maxsize=1)
def _known_texts() -> dict[str, dict[str, frozenset[int]]]:
    """The pictures of each name and keyword, by language."""
    known: dict[str, dict[str, set[int]]] = {language: {} for language in LANGUAGES}
    for glyph in glyphs():
        for language, texts in glyph.said.items():
            for text in texts:
                known[language].setdefault(_plain(text), set()).add(glyph.number)
    return {
        language: {text: frozenset(numbers) for text, numbers in of.items()}
        for language, of in known.items()
    }


def _plain(text: str) -> str:
    return " ".join(text.replace("\u2019", "'").casefold().split())


def _file(name: str) -> bytes:
    """The bytes of a shipped file; DataError when they are not those that were shipped."""
    file = FOLDER / name
    try:
        data = file.read_bytes()
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror}); reinstall cmkit") from error
    if (found := hashlib.sha256(data).hexdigest()) != SHA256[name]:
        raise DataError(
            f"{file}: SHA-256 {found[:12]}.. is not {SHA256[name][:12]}..; reinstall cmkit"
        )
    return data
