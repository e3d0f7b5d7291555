"""A recipe's codec and prompt encoder on a device: latents as pictures, prompts as conditions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from cmkit.denoiser import NO_COND, Cond
from cmkit.errors import PluginError
from cmkit.kinds import Codec, Coder, Prompts, TextEncoder
from cmkit.latents import encode
from cmkit.latents.memo import Memo
from cmkit.values import DataSpec


@dataclass(frozen=True)
class Coding:
    """What turns prompts into conditions and latents into pictures; loaded when first used.

    Without a codec latents are pictures, without a prompt encoder there are no conditions of it.
    """

    data: DataSpec
    """Shape of the pictures."""
    codec: Codec | None = None
    text: TextEncoder | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    negative: str | None = None
    """What guidance leads away from, in place of the unconditional prompt."""

    @cached_property
    def coder(self) -> Coder | None:
        """The codec on the device."""
        return self.codec.load(self.device) if self.codec else None

    @cached_property
    def prompts(self) -> Prompts | None:
        """The prompt encoder on the device."""
        return self.text.load(self.device) if self.text else None

    @cached_property
    def null(self) -> Cond:
        """The unconditional prompt, or the negative one, as `Denoiser.null`."""
        if self.prompts is None:
            return NO_COND
        return self.prompts.null if self.negative is None else self.prompts([self.negative])

    @torch.no_grad()
    def pictures(self, x0: Tensor) -> Tensor:
        """Pictures (B, C, H, W), about [-1, 1], of samples x0 (B, c, h, w)."""
        if self.coder is None:
            return x0
        with torch.autocast(x0.device.type, enabled=False):
            pictures = self.coder.decode(x0.float())
        shape = (len(x0), self.data.channels, self.data.resolution, self.data.resolution)
        if pictures.shape != shape:
            raise PluginError(f"codec: decode returned {tuple(pictures.shape)}, not {shape}")
        return pictures

    @torch.no_grad()
    def conditions(self, prompts: Sequence[str], label: Tensor | None = None) -> Cond:
        """Conditions of these prompts, on the device, beside `label`."""
        if self.prompts is None:
            return Cond(label=label)
        with torch.autocast(self.device.type, enabled=False):
            rows = self._memo(prompts)
        size = None
        if self.text and self.text.spec().size:
            size = encode.whole(self.data.resolution, len(prompts), self.device)
        return Cond(label=label, size=size, **rows)

    @cached_property
    def _memo(self) -> Memo:
        assert self.prompts
        return Memo(self.prompts)
