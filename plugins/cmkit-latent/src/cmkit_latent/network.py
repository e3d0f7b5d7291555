"""The network of backbone `sd_unet`: diffusers' UNet2DConditionModel with its places of rescaling
open, by hooks."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import diffusers
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from cmkit import Cond, Network, PluginError, Scales

MAX_PERIOD = 10_000
"""Longest period of sinusoids, over 2 pi."""


class UNet(Network):
    """F(x, t) of diffusers' UNet2DConditionModel; c_noise is the diffusion step t.

    Sites: "skip.i" a connection from the encoder to the decoder, the main path stays; "emb.j" the
    embedding as residual block j reads it, before its activation.
    """

    prompted = True

    def __init__(self, config: Mapping[str, Any], conditions: frozenset[str], checkpointed: bool):
        super().__init__()
        known = inspect.signature(UNet2DConditionModel.__init__).parameters
        # A later version may write options that it does not use.
        used = {k: value for k, value in config.items() if value is not None or k in known}
        self.unet = UNet2DConditionModel(**used)
        if (projection := self.unet.time_embedding.cond_proj) is not None:
            # Added to trained weights it changes nothing at first.
            nn.init.zeros_(projection.weight)
        self.adds = "pooled" in conditions
        self._hooked = _Hooks()
        if checkpointed:
            self.unet.enable_gradient_checkpointing(self._hooked.checkpointed)
        self._open_sites()

    def _open_sites(self) -> None:
        unet, hooked = self.unet, self._hooked
        left = skips = sum(len(block.resnets) for block in unet.up_blocks)
        for block in unet.up_blocks:
            left -= len(block.resnets)
            block.register_forward_pre_hook(partial(hooked.scale_skips, left), with_kwargs=True)
        down, up = (
            [m for block in blocks for m in block.modules() if isinstance(m, ResnetBlock2D)]
            for blocks in ([*unet.down_blocks, unet.mid_block or nn.Identity()], unet.up_blocks)
        )
        for j, resnet in enumerate((*down, *up)):
            resnet.register_forward_pre_hook(
                partial(hooked.scale_embedding, f"emb.{j}"), with_kwargs=True
            )
        embeddings = [f"emb.{j}" for j in range(len(down) + len(up))]
        self.sites = (*(f"skip.{i}" for i in range(skips)), *embeddings)
        self.late = frozenset(self.sites) - set(embeddings[: len(down)])

    def forward(self, x: Tensor, c_noise: Tensor, cond: Cond, scales: Scales) -> Tensor:
        """F, (B, C, H, W), of x (B, C, H, W) and steps c_noise (B,); float32 under autocast."""
        wanted = [site for site in self.sites if site in scales]
        self._hooked.begin(scales)
        try:
            out: Tensor = self._run(x, c_noise, cond)
        finally:
            met = self._hooked.end()
        _require_met(wanted, met)
        return _widened(out)

    def encode(self, x: Tensor, c_noise: Tensor, cond: Cond, scales: Scales) -> Encoded:
        """What `decode` needs: the run up to the first block of the decoder."""
        unet, skips = self.unet, []
        early = [site for site in self.sites if site in scales and site not in self.late]
        hooks = [unet.conv_in.register_forward_hook(lambda *call: skips.append(call[-1]))]
        hooks += [
            block.register_forward_hook(lambda *call: skips.extend(call[-1][1]))
            for block in unet.down_blocks
        ]
        hooks.append(
            unet.up_blocks[0].register_forward_pre_hook(_stop, with_kwargs=True, prepend=True)
        )
        self._hooked.begin(scales)
        try:
            self._run(x, c_noise, cond)
            raise _changed("the first block of the decoder was not called")
        except _ReachedDecoder as reached:
            given = reached.given
        finally:
            met = self._hooked.end()
            for hook in hooks:
                hook.remove()
        _require_met(early, met)
        last = given["res_hidden_states_tuple"]
        if len(skips) != sum(len(block.resnets) for block in unet.up_blocks) or any(
            a is not b for a, b in zip(skips[-len(last) :], last, strict=True)
        ):
            raise _changed("the skips are not what the blocks of the encoder returned")
        assert cond.text is not None
        text = cond.text.to(x.dtype)  # not of the call: a block without attention is given none
        return Encoded(given["hidden_states"], skips, given["temb"], text)

    def decode(self, encoded: Encoded, scales: Scales) -> Tensor:
        """F for any scales of the `late` sites."""
        unet, h, left = self.unet, encoded.h, list(encoded.skips)
        self._hooked.begin(scales)
        try:
            for block in unet.up_blocks:
                taken = len(left) - len(block.resnets)
                skips, left = tuple(left[taken:]), left[:taken]
                given = {"temb": encoded.emb, "res_hidden_states_tuple": skips}
                if getattr(block, "has_cross_attention", False):
                    given["encoder_hidden_states"] = encoded.text
                h = block(hidden_states=h, **given)
        finally:
            met = self._hooked.end()
        _require_met([site for site in self.late if site in scales], met)
        if unet.conv_norm_out is not None:
            h = unet.conv_act(unet.conv_norm_out(h))
        return _widened(unet.conv_out(h))

    def lower(self, dtype: torch.dtype) -> None:
        """Rounds convolutions and linear layers; see `Network.lower`."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                module.to(dtype)

    def _run(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        if cond.text is None or (self.adds and (cond.pooled is None or cond.size is None)):
            wanted = "text, pooled and size" if self.adds else "text"
            raise ValueError(f"this network reads prompts: cond needs {wanted}")
        added = {"text_embeds": cond.pooled, "time_ids": cond.size} if self.adds else None
        waves, projection = None, self.unet.time_embedding.cond_proj
        if projection is not None and cond.guidance is not None:
            waves = guidance_waves(cond.guidance, projection.in_features).to(x.dtype)
        text = cond.text.to(x.dtype)
        out: Tensor = self.unet(
            x, t, text, timestep_cond=waves, added_cond_kwargs=added, return_dict=False
        )[0]
        return out


@dataclass(frozen=True)
class Encoded:
    """What the encoder computes for one x, step, conditions and early scales."""

    h: Tensor
    """Features of the middle."""
    skips: list[Tensor]
    """From the input on."""
    emb: Tensor
    text: Tensor


def guidance_waves(w: Tensor, dim: int) -> Tensor:
    """[sin | cos] of 1000 w (B,) at dim // 2 frequencies from 1 down to 1 / MAX_PERIOD, (B, dim)
    (Latent Consistency Models; luosiallen/latent-consistency-model), w the guidance scale less 1.

    An odd `dim` ends in a zero. Computed in float64 for such w, in float32 for any other.
    """
    w = _widened(w)
    half = dim // 2
    steps = torch.arange(half, dtype=w.dtype, device=w.device) / (half - 1)
    angles = 1000 * w[:, None] * torch.exp(-math.log(MAX_PERIOD) * steps)
    return F.pad(torch.cat([angles.sin(), angles.cos()], dim=1), (0, dim % 2))


class _Hooks:
    """The scales of the call that is under way, and what blocks do with them."""

    def __init__(self) -> None:
        self.scales: Scales = {}
        self.met: set[str] = set()

    def begin(self, scales: Scales) -> None:
        self.scales, self.met = scales, set()

    def end(self) -> set[str]:
        """The sites that were met; blocks that are called from elsewhere are not rescaled."""
        self.scales, met = {}, self.met
        return met

    def scale_skips(
        self, first: int, block: nn.Module, args: tuple[Any, ...], given: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments of a block of the decoder, whose skips are those from number `first` on."""
        skips = given.get("res_hidden_states_tuple")
        if not isinstance(skips, tuple) or len(skips) != len(block.resnets):
            raise _changed("a block of the decoder is not given res_hidden_states_tuple, its skips")
        scaled = tuple(
            self._scaled(f"skip.{i}", skip, (-1, 1, 1, 1)) for i, skip in enumerate(skips, first)
        )
        return args, {**given, "res_hidden_states_tuple": scaled}

    def scale_embedding(
        self, site: str, block: nn.Module, args: tuple[Any, ...], given: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments of a residual block, the second of which is the embedding."""
        if len(args) != 2 or given or not isinstance(args[1], Tensor):
            raise _changed("a residual block is not called with features and an embedding")
        return (args[0], self._scaled(site, args[1], (-1, 1))), given

    def _scaled(self, site: str, feature: Tensor, shape: tuple[int, ...]) -> Tensor:
        """The feature, by its scale if it has one; the product is rounded, not the scale."""
        self.met.add(site)
        if (scale := self.scales.get(site)) is None:
            return feature
        return (feature * scale.view(shape)).to(feature.dtype)

    def checkpointed(self, block: nn.Module, *given: Any) -> Any:
        """Output of a block that is computed once more in the backward pass, with these scales."""
        held = self.scales

        def again(*given: Any) -> Any:
            now, self.scales = self.scales, held
            try:
                return block(*given)
            finally:
                self.scales = now

        return checkpoint(again, *given, use_reentrant=False)


class _ReachedDecoder(Exception):  # noqa: N818 - it ends a run on purpose
    """Where `encode` ends, with what the first block of the decoder is given."""

    def __init__(self, given: dict[str, Any]):
        super().__init__()
        self.given = given


def _stop(block: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> None:
    raise _ReachedDecoder(given)


def _require_met(wanted: list[str], met: set[str]) -> None:
    """PluginError where a site was not met that has a scale."""
    if missed := [site for site in wanted if site not in met]:
        raise _changed(f"nothing was called at {missed[0]}")


def _changed(what: str) -> PluginError:
    return PluginError(
        f"sd_unet: diffusers {diffusers.__version__} calls its blocks in another way: {what};"
        " install diffusers>=0.42,<0.44"
    )


def _widened(x: Tensor) -> Tensor:
    """x in float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
