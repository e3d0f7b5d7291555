"""How noise level, label, guidance weight and target level become an embedding, and that a film for
each block: the same for all backbones."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from cmkit import Cond, DataSpec, Network, Scales
from cmkit_std.backbones.fitting import Options
from cmkit_std.backbones.layers import MAX_PERIOD, full_precision, sinusoids, widened

GUIDANCE_WAVES = 256
"""Sinusoids of a guidance weight."""


class Conditioned(Network):
    """A network of `Filmed` blocks that read one embedding.

    Embeddings keep float32 under autocast. A subclass has the modules `label` and `guidance`, each
    None where the network was not built for it, and overrides `_label`, `_embed` and `_holding`
    where its embedding is another than ADM's.
    """

    paths: ClassVar[tuple[str, str]] = ("time", "time_s")
    """Modules that embed the noise level and CTM's target level; the latter may be None."""
    label_sigma_to: bool = True
    """Whether the target level's embedding contains the label."""
    act: ClassVar[Callable[[Tensor], Tensor]] = staticmethod(F.silu)
    """Activation between the embedding and a block's `film`."""

    def __init__(self, options: Options, data: DataSpec, conditions: frozenset[str]):
        super().__init__()
        self.num_classes = data.num_classes if "label" in conditions else None
        self.null_label = self.num_classes if options.null_class else None
        self.prompted = "text" in conditions
        self.text: PromptVector | None = None

    def _name_sites(self, skips: int) -> None:
        """Call last: site "skip.i" for each of `skips`, "emb.j" for each block."""
        # A tuple registers nothing a second time. Registration order is forward order.
        self._blocks = tuple(m for m in self.modules() if isinstance(m, Filmed))
        late = [f"skip.{i}" for i in range(skips)]
        self.late = frozenset(late)
        self.sites = (*late, *(f"emb.{j}" for j in range(len(self._blocks))))

    def _films(self, c_noise: Tensor, cond: Cond, scales: Scales, **given: Any) -> list[Tensor]:
        """The film (B, k) that each block, in forward order, makes of act(scale emb), its scale
        "emb.j" of shape () or (B,), and of act(emb_s); `given` goes to `_label`."""
        with full_precision(c_noise.device):
            emb, emb_s = self._embeddings(c_noise, cond, **given)
            active_s = None if emb_s is None else self.act(emb_s)
            last, active, made = None, self.act(emb), []
            for j, block in enumerate(self._blocks):
                scale = scales.get(f"emb.{j}")
                # Blocks in a row with the same tensor share an activation; to compare values would
                # make the host wait for the device.
                if scale is not last:
                    own = emb if scale is None else emb * scale.to(emb.dtype).view(-1, 1)
                    last, active = scale, self.act(own)
                made.append(block.project(active, active_s))
            return made

    def factors(self, scales: Mapping[str, float]) -> tuple[dict[str, float], dict[str, str]]:
        """See `Network.factors`. An activation follows each "emb.j", so that an embedding is scaled
        where it is made, for all blocks at once, or not at all."""
        every = {scales.get(f"emb.{j}", 1.0) for j in range(len(self._blocks))}
        found: dict[str, float] = {}
        left: dict[str, str] = {}
        for site, value in scales.items():
            if value == 1:
                continue
            held = self._holding(site)
            if site.startswith("emb.") and len(every) > 1 and not isinstance(held, str):
                held = "its block's activation follows it, and blocks differ in it"
            if isinstance(held, str):
                left[site] = held
            else:
                found |= dict.fromkeys(held, value)
        return found, left

    def _holding(self, site: str) -> tuple[str, ...] | str:
        """Names of the tensors in which the feature at `site` is linear, of "emb.j" that of all
        blocks; or why there are none."""
        if not site.startswith("emb."):
            return "a norm follows it, over groups of both halves or with an eps, and an activation"
        names = both_of(f"{self.paths[0]}.2")
        if self.label is None and self.text is None:
            return names
        if self.label_sigma_to and getattr(self, self.paths[1]) is not None:
            return "the target level's embedding has the same label or prompt, and is not scaled"
        label = () if self.label is None else ("label.weight",)
        return (*names, *label, *(() if self.text is None else both_of("text.out")))

    def _embeddings(
        self, c_noise: Tensor, cond: Cond, **given: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Embeddings (B, E) of the noise level and its conditions, and of the target level."""
        path, path_s = (getattr(self, name) for name in self.paths)
        label = self._label(cond, **given)
        if self.text is not None:
            if cond.text is None:
                raise ValueError("this network embeds prompts: cond.text must not be None")
            said = self.text(cond.text)
            label = said if label is None else label + said
        guidance = None
        if self.guidance is not None and cond.guidance is not None:
            guidance = guidance_waves(cond.guidance).to(self.guidance.weight.dtype)
        emb = self._embed(path, c_noise, label, guidance)
        if path_s is None or cond.sigma_to is None:
            return emb, None
        return emb, self._embed(path_s, cond.sigma_to, label if self.label_sigma_to else None)

    def _label(self, cond: Cond) -> Tensor | None:
        """The label's row of the table `label`, (B, E), or (1, E) for no class, or None."""
        if self.label is None:
            return None
        if cond.label is not None:
            return self.label(cond.label)
        if self.null_label is None:
            raise ValueError("this network embeds labels: cond.label must not be None")
        return self.label.weight[self.null_label :]

    def _embed(
        self, path: nn.Module, c_noise: Tensor, label: Tensor | None, guidance: Tensor | None = None
    ) -> Tensor:
        """Embedding (B, E) of c_noise (B,), a label's vector and the waves of a guidance weight."""
        waves = self._sinusoids(c_noise)
        if guidance is not None:
            waves = waves + self.guidance(guidance)
        emb = path(waves)
        return emb if label is None else emb + label

    def _sinusoids(self, c_noise: Tensor) -> Tensor:
        first = self.time[0]
        return sinusoids(c_noise * self.time_scale, first.in_features).to(first.weight.dtype)


class PromptVector(nn.Module):
    """A prompt as one vector: out(norm(mean of silu(token(x)) over the tokens x)).

    The mean is that of Deep Sets (Zaheer et al., 2017): order says nothing that features do not.
    """

    def __init__(self, given: int, width: int):
        super().__init__()
        self.token = nn.Linear(given, width)
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, width)

    def forward(self, text: Tensor) -> Tensor:
        """Vectors (B, width) of features (B, L, given)."""
        tokens = F.silu(self.token(text.to(self.token.weight.dtype)))
        return self.out(self.norm(tokens.mean(1)))


class Filmed(nn.Module):
    """A block steered by a layer `film` of the embedding, and `film_s` of that of CTM's target
    level; with `checkpointed` it is computed once more in the backward pass."""

    checkpointed: bool = False

    def project(self, active: Tensor, active_s: Tensor | None = None) -> Tensor:
        """Film (B, k) of activated embeddings (B, E)."""
        film = self.film(active)
        return film if active_s is None else film + self.film_s(active_s)

    def forward(self, *given: Tensor | None) -> Tensor:
        """`compute`, whose arguments see."""
        if self.checkpointed and torch.is_grad_enabled():
            return checkpoint(self.compute, *given, use_reentrant=False)
        return self.compute(*given)


def both_of(layer: str) -> tuple[str, str]:
    """Names of a layer's tensors."""
    return f"{layer}.weight", f"{layer}.bias"


def class_vectors(table: Tensor, label: Tensor | None, null_label: int | None) -> Tensor:
    """Rows (B, E) of `table` (classes, E); zeros for the null label, (1, E) zeros for None."""
    if label is None:
        return table.new_zeros(1, table.shape[1])
    if null_label is None:
        return F.embedding(label, table)
    return F.embedding(label.clamp(max=null_label - 1), table) * (label != null_label)[:, None]


def guidance_waves(w: Tensor, dim: int = GUIDANCE_WAVES) -> Tensor:
    """[sin | cos] of 1000 w (B,) at dim // 2 frequencies from 1 down to 1 / MAX_PERIOD, (B, dim)
    (Latent Consistency Models; luosiallen/latent-consistency-model).

    An odd `dim` ends in a zero. Computed in float64 for such w, in float32 for any other.
    """
    w = widened(w)
    half = dim // 2
    steps = torch.arange(half, dtype=w.dtype, device=w.device) / (half - 1)
    angles = 1000 * w[:, None] * torch.exp(-math.log(MAX_PERIOD) * steps)
    return F.pad(torch.cat([angles.sin(), angles.cos()], dim=1), (0, dim % 2))


def silent_guidance(width: int) -> nn.Linear:
    """A layer of guidance waves that returns zeros: added to trained weights it changes nothing at
    first."""
    layer = nn.Linear(GUIDANCE_WAVES, width, bias=False)
    nn.init.zeros_(layer.weight)
    return layer


def mlp(
    waves: int, width: int, start: Callable[[nn.Linear], nn.Linear] = lambda layer: layer
) -> nn.Sequential:
    """The perceptron that turns sinusoids (B, waves) into an embedding (B, width); `start` sets the
    weights of a fresh layer."""
    return nn.Sequential(start(nn.Linear(waves, width)), nn.SiLU(), start(nn.Linear(width, width)))
