"""Features of prompts, remembered."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from cmkit.kinds import Prompts
from cmkit.latents import encode

REMEMBERED = 2**28
"""Bytes of features that are remembered."""


class Memo:
    """Features of prompts, of which the latest are remembered. They depend on the prompt alone."""

    def __init__(self, prompts: Prompts, limit: int = REMEMBERED):
        self.prompts, self.limit, self.bytes = prompts, limit, 0
        self.known: OrderedDict[str | None, Mapping[str, Tensor]] = OrderedDict()

    def __call__(self, said: Sequence[str | None]) -> dict[str, Tensor]:
        """The fields of `Cond` that hold the features (B, ..) of prompts; None stands for the
        unconditional one."""
        here = {one: self.known[one] for one in said if one in self.known}
        new = [one for one in dict.fromkeys(said) if one not in here]
        if words := [one for one in new if one is not None]:
            found = encode.features(self.prompts, words)
            for k, one in enumerate(words):
                here[one] = {name: rows[k].clone() for name, rows in found.items()}
        if None in new:
            null = encode.rows_of(self.prompts.null)
            here[None] = {name: rows[0] for name, rows in null.items()}
        for name in here:
            if name not in self.known:
                self.known[name] = here[name]
                self.bytes += _bytes(here[name])
            self.known.move_to_end(name)
        while self.bytes > self.limit:
            self.bytes -= _bytes(self.known.popitem(last=False)[1])
        return {name: torch.stack([here[one][name] for one in said]) for name in here[said[0]]}


def _bytes(rows: Mapping[str, Tensor]) -> int:
    return sum(row.nbytes for row in rows.values())
