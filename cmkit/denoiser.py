"""The denoiser that all parts share: denoiser(x, sigma, cond) -> x0_hat."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from cmkit.noise import Noise

Scales = Mapping[str, Tensor]
"""Site -> scale of shape () or (B,); an absent site has scale 1."""


class Rescaling(Protocol):
    """A policy of scales for a network's sites, such as `cmkit.Rescaler`."""

    def bind(self, sites: tuple[str, ...]) -> Callable[[Tensor], Scales]:
        """The map sigma (B,) -> scales."""


@dataclass(frozen=True)
class Cond:
    """What a network may be conditioned on besides sigma; None = absent."""

    label: Tensor | None = None
    """Class, (B,) int64."""
    guidance: Tensor | None = None
    """Guidance weight w of LCM, (B,)."""
    sigma_to: Tensor | None = None
    """Target noise level s of CTM, (B,); a network gets c_noise of it."""
    text: Tensor | None = None
    """Features of the prompt's tokens, (B, L, D)."""
    pooled: Tensor | None = None
    """Features of the whole prompt, (B, P)."""
    size: Tensor | None = None
    """Height and width of the picture before it was cropped, the top and left of the crop, and
    height and width after it, (B, 6), in pixels (SDXL)."""
    caption: Tensor | None = None
    """Number of the picture's caption in `Dataset.captions`, (B,) int64, -1 for the unconditional
    prompt. Data sets say it; networks get `text` in its place."""

    def to(self, device: torch.device) -> Cond:
        """The same conditions on `device`."""
        moved = {
            name: value.to(device, non_blocking=True) if value is not None else None
            for name, value in vars(self).items()
        }
        return Cond(**moved)


NO_COND = Cond()


class Network(nn.Module):
    """The raw network F(x, c_noise), built by a backbone. The precond says what c_noise is, such as
    ln(sigma) / 4 (EDM, table 1).

    `sites` names the places that can be rescaled: "skip.0" .. one per encoder-decoder connection,
    counted from the input on; "emb.0" .. one per block that reads the embedding.

    Under autocast the output is float32; conditions that the network was not built for are ignored.
    `cond.sigma_to` comes as c_noise too: that of the target noise level.

    `late` names the decoder-side sites, whose scales do not change what `encode` returns, of a
    network that offers `decode(encode(..), scales)` for `forward`: a search encodes only once.

    `null_label` is the label that stands for no class, where the network was built with one; an
    absent label then means it as well. `prompted` says whether it reads `cond.text`, and so can be
    guided away from the unconditional prompt. `guided_channels` is how many channels, from the
    first on, classifier-free guidance changes; None = all.
    """

    null_label: int | None = None
    prompted: bool = False
    guided_channels: int | None = None
    sites: tuple[str, ...] = ()
    late: frozenset[str] = frozenset()

    def forward(self, x: Tensor, c_noise: Tensor, cond: Cond, scales: Scales) -> Tensor:
        """F, (B, C, H, W), of preconditioned images x (B, C, H, W) and c_noise (B,)."""
        raise NotImplementedError

    def settle(self) -> None:
        """Normalize the weights in place (EDM2); training calls this before every step.

        `forward` must not change weights. Averages are of the weights after a step.
        """

    def factors(self, scales: Mapping[str, float]) -> tuple[dict[str, float], dict[str, str]]:
        """What puts numbers of sites into the weights, exactly: the factor of each tensor of the
        state dict that changes, and of each site that weights cannot hold why."""
        why = "this network does not say which weights hold it"
        return {}, {site: why for site, value in scales.items() if value != 1}

    def lower(self, dtype: torch.dtype) -> None:
        """Cast for inference the weights that autocast to `dtype` would cast at every call.

        Outputs under that autocast stay the same, bit for bit. Not for training.
        """

    def encode(self, x: Tensor, c_noise: Tensor, cond: Cond, scales: Scales) -> Any:
        """What `decode` needs, whatever the scales of `late` sites; arguments as in `forward`."""
        raise NotImplementedError

    def decode(self, encoded: Any, scales: Scales) -> Tensor:
        """F as `forward` returns it, up to 1e-5 of its root mean square in float32."""
        raise NotImplementedError


class Encodings:
    """Caches a network's `encode` of one batch x, for models that differ in `late` scales alone."""

    def __init__(self, x: Tensor):
        self.x = x
        self._held: tuple[Tensor, Cond, Scales, Any] | None = None

    def network(
        self, network: Network, x: Tensor, c_noise: Tensor, cond: Cond, scales: Scales
    ) -> Tensor:
        """F of the preconditioned x, encoded anew only where a condition or early scale differs."""
        early = {site: scale for site, scale in scales.items() if site not in network.late}
        if self._held is None or not _same(self._held, (c_noise, cond, early)):
            self._held = (c_noise, cond, early, network.encode(x, c_noise, cond, scales))
        return network.decode(self._held[3], scales)


def _same(held: tuple[Tensor, Cond, Scales, Any], now: tuple[Tensor, Cond, Scales]) -> bool:
    if held[2].keys() != now[2].keys():
        return False
    values = (
        (c_noise, *vars(cond).values(), *scales.values())
        for c_noise, cond, scales in (held[:3], now)
    )
    pairs = {(id(a), id(b)): (a, b) for a, b in zip(*values, strict=True) if a is not b}
    return all(a is not None and b is not None and torch.equal(a, b) for a, b in pairs.values())


class Scalings(NamedTuple):
    """Coefficients of D(x, sigma) = c_skip x + c_out F(c_in x, c_noise), (B,) each."""

    c_skip: Tensor
    c_out: Tensor
    c_in: Tensor
    c_noise: Tensor


Scaling = Callable[[Tensor, float, float], Scalings]
"""Noise levels sigma (B,), sigma_data and sigma_min -> the coefficients there."""


def edm_scalings(sigma: Tensor, sigma_data: float, sigma_min: float) -> Scalings:
    """Coefficients of a diffusion model (EDM, table 1); sigma_min is not used."""
    variance = sigma**2 + sigma_data**2
    c_skip, c_out = sigma_data**2 / variance, sigma * sigma_data / variance.sqrt()
    return Scalings(c_skip, c_out, variance.rsqrt(), 0.25 * torch.log(sigma + 1e-44))


def consistency_scalings(sigma: Tensor, sigma_data: float, sigma_min: float) -> Scalings:
    """Coefficients with D(x, sigma_min) = x (Consistency Models, appendix C)."""
    above, variance = sigma - sigma_min, sigma**2 + sigma_data**2
    c_skip = sigma_data**2 / (above**2 + sigma_data**2)
    c_out = sigma_data * above / variance.sqrt()
    return Scalings(c_skip, c_out, variance.rsqrt(), 0.25 * torch.log(sigma + 1e-44))


class Denoiser(nn.Module):
    """x0_hat = c_skip x + c_out F(c_in x, c_noise), with the coefficients of `scalings`.

    With `consistency_scalings`, the default, it is x itself, bit for bit, at sigma_min. `passes` is
    what a call costs in network evaluations. `null` is what "no condition" means: absent fields, or
    rows of one image such as the features of the unconditional prompt. `bounds` are those of clean
    images, which samplers may clamp estimates to; None in latent space, which has none. With a
    `dtype` the network runs under autocast to it.
    """

    passes: int = 1
    null: Cond = NO_COND
    bounds: tuple[float, float] | None = (-1.0, 1.0)
    dtype: torch.dtype | None = None

    def __init__(
        self,
        network: Network,
        noise: Noise | None = None,
        scalings: Scaling | None = None,
        sigma_data: float = 0.5,
    ):
        super().__init__()
        self.network = network
        self.noise = noise or Noise()
        self.scalings = scalings or consistency_scalings
        self.sigma_data = sigma_data
        self._scales: Callable[[Tensor], Scales] | None = None
        self._encodings: Encodings | None = None

    def forward(self, x: Tensor, sigma: Tensor, cond: Cond = NO_COND) -> Tensor:
        """x0_hat, (B, C, H, W), of noisy images x (B, C, H, W) with noise levels sigma (B,)."""
        scales = self._scales(sigma) if self._scales else {}
        c_skip, c_out, c_in, c_noise = self.scalings(sigma, self.sigma_data, self.noise.sigma_min)
        if cond.sigma_to is not None:
            target = self.scalings(cond.sigma_to, self.sigma_data, self.noise.sigma_min)
            cond = replace(cond, sigma_to=target.c_noise)
        given = (per_image(c_in, x) * x, c_noise, cond, scales)
        with torch.autocast(x.device.type, self.dtype) if self.dtype else nullcontext():
            if self._encodings and self._encodings.x is x and self.network.late:
                f = self._encodings.network(self.network, *given)
            else:
                f = self.network(*given)
        return per_image(c_skip, x) * x + per_image(c_out, x) * f.to(x.dtype)

    def unconditional(self, cond: Cond) -> Cond:
        """`cond` with `null` in the place of labels and prompts, and without a guidance weight."""
        rows = {
            name: None if own is None or given is None else own.expand(len(given), *own.shape[1:])
            for name in ("label", "text", "pooled")
            for own, given in [(getattr(self.null, name), getattr(cond, name))]
        }
        return replace(cond, guidance=None, **rows)

    def clamp(self, x0_hat: Tensor) -> Tensor:
        """x0_hat within `bounds`."""
        return x0_hat if self.bounds is None else x0_hat.clamp(*self.bounds)

    def rescaled(self, rescaler: Rescaling, encodings: Encodings | None = None) -> Denoiser:
        """The same weights with the scales of `rescaler`; training never sees it.

        Models that get the same `encodings` share what they can of the work on its x.
        """
        other = copy.copy(self)
        other._scales = rescaler.bind(self.network.sites)
        other._encodings = encodings
        return other


class Guided(Denoiser):
    """A denoiser under classifier-free guidance (Ho, Salimans, 2022, eq. 6):
    x0_hat + w (x0_hat - x0_hat of `inner.null`), which takes two evaluations, in the network's
    `guided_channels`.

    w is `cond.guidance` unless given. A network that embeds w is told it instead: one evaluation.
    """

    def __init__(self, inner: Denoiser, w: float | None = None, embedded: bool = False):
        super().__init__(inner.network, inner.noise, inner.scalings, inner.sigma_data)
        self.inner, self.w, self.embedded = inner, w, embedded
        self.null, self.bounds = inner.null, inner.bounds
        self.passes = inner.passes * (1 if embedded else 2)

    def forward(self, x: Tensor, sigma: Tensor, cond: Cond = NO_COND) -> Tensor:
        """The guided x0_hat, (B, C, H, W); arguments of `Denoiser.forward`."""
        w = cond.guidance if self.w is None else torch.full_like(sigma, self.w)
        if w is None:
            raise ValueError("a guided denoiser needs cond.guidance, or a w of its own")
        if self.embedded:
            x0_hat: Tensor = self.inner(x, sigma, replace(cond, guidance=w))
            return x0_hat
        conditional: Tensor = self.inner(x, sigma, replace(cond, guidance=None))
        without: Tensor = self.inner(x, sigma, self.inner.unconditional(cond))
        change = per_image(w, x) * (conditional - without)
        if (guided := self.network.guided_channels) is not None:
            change[:, guided:] = 0
        return conditional + change

    def rescaled(self, rescaler: Rescaling, encodings: Encodings | None = None) -> Denoiser:
        return Guided(self.inner.rescaled(rescaler, encodings), self.w, self.embedded)


def per_image(c: Tensor, x: Tensor) -> Tensor:
    """c (B,) as (B, 1, 1, 1), in the type of images x: a factor of each image."""
    return c.to(x.dtype).view(-1, *[1] * (x.ndim - 1))
