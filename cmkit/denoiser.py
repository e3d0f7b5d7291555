"""THE contract of the project: denoiser(x, sigma, cond) -> x0_hat."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from cmkit.noise import Noise

if TYPE_CHECKING:
    from cmkit.kinds import Phase, Rescaler

Scales = Mapping[str, Tensor]
"""Site -> scale of shape () or (B,); an absent site has scale 1."""


@dataclass(frozen=True)
class Cond:
    """What an embedding may see besides sigma; None = absent."""

    label: Tensor | None = None
    """Class, (B,) int64."""
    guidance: Tensor | None = None
    """Guidance weight w of LCM, (B,)."""
    sigma_to: Tensor | None = None
    """Target noise level s of CTM, (B,)."""
    text: Tensor | None = None
    """Text features, (B, L, D)."""

    def to(self, device: torch.device) -> Cond:
        """The same conditions on `device`."""
        moved = {
            name: value.to(device, non_blocking=True) if value is not None else None
            for name, value in vars(self).items()
        }
        return Cond(**moved)


NO_COND = Cond()


class Network(nn.Module):
    """What a backbone builds: F(x, c_noise). The recipe's precond says what c_noise is, such as
    ln(sigma) / 4 (EDM, table 1).

    `sites` names the places that can be rescaled: "skip.0" .. one per encoder-decoder connection,
    counted from the input on; "emb.0" .. one per block that reads the embedding.

    Under autocast the output is float32; conditions that the network was not built for are ignored.

    A network whose first part does not depend on the scales of some sites may name them in `late`
    and offer `decode(encode(..), scales)` for `forward`: a search then encodes once for all.

    `null_label` is the label that stands for no class, where the network was built with one; an
    absent label then means it as well.
    """

    null_label: int | None = None
    sites: tuple[str, ...] = ()
    late: frozenset[str] = frozenset()

    def forward(self, x: Tensor, c_noise: Tensor, cond: Cond, scales: Scales) -> Tensor:
        """F, (B, C, H, W), of preconditioned images x (B, C, H, W) and c_noise (B,)."""
        raise NotImplementedError

    def settle(self) -> None:
        """Bring the weights, in place, to the form in which a step of training starts.

        Training calls it before each step: here, not in `forward`, may a network move its own
        weights, as EDM2's does, which normalizes them. Averages are of the weights after a step.
        """

    def lower(self, dtype: torch.dtype) -> None:
        """Round for good the weights that autocast to `dtype` would round at every call.

        Outputs under that autocast stay the same, bit for bit. Not for training.
        """

    def encode(self, x: Tensor, c_noise: Tensor, cond: Cond, scales: Scales) -> Any:
        """What `decode` needs, whatever the scales of `late` sites; arguments as of `forward`."""
        raise NotImplementedError

    def decode(self, encoded: Any, scales: Scales) -> Tensor:
        """F as of `forward`, up to rounding: at most 1e-5 of its root mean square in float32."""
        raise NotImplementedError


class Encodings:
    """A network's `encode` of one batch x, for models that differ in `late` scales alone."""

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
    """Those of a diffusion model (EDM, table 1); sigma_min is not used."""
    variance = sigma**2 + sigma_data**2
    c_skip, c_out = sigma_data**2 / variance, sigma * sigma_data / variance.sqrt()
    return Scalings(c_skip, c_out, variance.rsqrt(), 0.25 * torch.log(sigma + 1e-44))


def consistency_scalings(sigma: Tensor, sigma_data: float, sigma_min: float) -> Scalings:
    """Those of a diffusion model, with f(x, sigma_min) = x (Consistency Models, appendix C)."""
    above, variance = sigma - sigma_min, sigma**2 + sigma_data**2
    c_skip = sigma_data**2 / (above**2 + sigma_data**2)
    c_out = sigma_data * above / variance.sqrt()
    return Scalings(c_skip, c_out, variance.rsqrt(), 0.25 * torch.log(sigma + 1e-44))


TRAITS = {
    "boundary": "D(x, sigma_min) follows from x alone: a consistency model",
    "diffusion": "D(x, sigma_min) does not: a diffusion model",
    "identity": "D(x, 0) is x",
    "continuous": "c_noise follows every change of sigma",
    "edm": "the scalings are EDM's",
}
"""What an objective may need of scalings."""


def traits(scaling: Scaling, noise: Noise, sigma_data: float) -> frozenset[str]:
    """Which of `TRAITS` hold on a noise axis, found by trying: nobody has to declare them."""
    low, high = noise.sigma_min, noise.sigma_max
    ends = torch.tensor([0.0, low], dtype=torch.float64, device="cpu")
    zero, first = zip(*(c.tolist() for c in scaling(ends, sigma_data, low)[:2]), strict=True)
    sigma = _spread(max(low, 1e-3 * high), high)
    here, above = (scaling(s, sigma_data, low) for s in (sigma, sigma * (1 + 1e-6)))
    known = edm_scalings(sigma, sigma_data, low)
    held = {
        "boundary": first[1] == 0,
        "diffusion": first[1] != 0,
        "identity": zero == (1, 0),
        "continuous": bool((here.c_noise != above.c_noise).all()),
        "edm": all(torch.allclose(a, b, rtol=1e-6) for a, b in zip(here, known, strict=True)),
    }
    return frozenset(name for name, holds in held.items() if holds)


def interchangeable(a: Scaling, b: Scaling) -> bool:
    """Whether a network trained under one is one for the other: its inputs are the same, and so is
    what its output means, but for a boundary condition near sigma_min."""
    sigma = _spread(0.1, 10.0)
    pairs = zip(*(scaling(sigma, 0.5, 1e-9)[1:] for scaling in (a, b)), strict=True)
    return all(torch.allclose(one, other, rtol=0.005) for one, other in pairs)


def _spread(low: float, high: float) -> Tensor:
    """Noise levels between two, evenly in their logarithm."""
    u = torch.linspace(0, 1, 50, dtype=torch.float64, device="cpu")
    return low * (high / low) ** u


class Denoiser(nn.Module):
    """x0_hat = c_skip x + c_out F(c_in x, c_noise), with the coefficients of `scalings`.

    With `consistency_scalings`, the default, it is x itself, bit for bit, at sigma_min. `passes` is
    what a call costs in network evaluations.
    """

    passes: int = 1

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
        given = (_per_image(c_in, x) * x, c_noise, cond, scales)
        if self._encodings and self._encodings.x is x and self.network.late:
            f = self._encodings.network(self.network, *given)
        else:
            f = self.network(*given)
        return _per_image(c_skip, x) * x + _per_image(c_out, x) * f.to(x.dtype)

    def rescaled(self, rescaler: Rescaler, encodings: Encodings | None = None) -> Denoiser:
        """The same weights with the scales of `rescaler`; training never sees it.

        Models that get the same `encodings` share what they can of the work on its x.
        """
        other = copy.copy(self)
        other._scales = rescaler.bind(self.network.sites)
        other._encodings = encodings
        return other


class Guided(Denoiser):
    """A denoiser under classifier-free guidance (Ho, Salimans, 2022, eq. 6):
    x0_hat + w (x0_hat - x0_hat without a label), which takes two evaluations.

    w is `cond.guidance` unless given. A network that embeds w is told it instead: one evaluation.
    """

    def __init__(self, inner: Denoiser, w: float | None = None, embedded: bool = False):
        super().__init__(inner.network, inner.noise, inner.scalings, inner.sigma_data)
        self.inner, self.w, self.embedded = inner, w, embedded
        self.passes = inner.passes * (1 if embedded else 2)

    def forward(self, x: Tensor, sigma: Tensor, cond: Cond = NO_COND) -> Tensor:
        """The guided x0_hat, (B, C, H, W); arguments as of `Denoiser`."""
        w = cond.guidance if self.w is None else torch.full_like(sigma, self.w)
        if w is None:
            raise ValueError("a guided denoiser needs cond.guidance, or a w of its own")
        if self.embedded:
            x0_hat: Tensor = self.inner(x, sigma, replace(cond, guidance=w))
            return x0_hat
        with_label: Tensor = self.inner(x, sigma, replace(cond, guidance=None))
        without: Tensor = self.inner(x, sigma, replace(cond, guidance=None, label=None))
        return with_label + _per_image(w, x) * (with_label - without)

    def rescaled(self, rescaler: Rescaler, encodings: Encodings | None = None) -> Denoiser:
        return Guided(self.inner.rescaled(rescaler, encodings), self.w, self.embedded)


def _per_image(c: Tensor, x: Tensor) -> Tensor:
    """(B,) as (B, 1, 1, 1), in the type of x."""
    return c.to(x.dtype).view(-1, *[1] * (x.ndim - 1))


@dataclass
class Models:
    """The copies of one denoiser that training holds; `ema` maps a decay to its copy.

    With `ema_warmup` a decay is capped by (1 + step) / (10 + step), so that the first, untrained
    weights are forgotten. `companions` are the further networks that the objective trains, by name.
    `terms` is what `total` has added up since the last log line: by name,
    the sum of means and their number, (2,) float32.
    """

    online: Denoiser
    target: Denoiser
    teacher: Denoiser | None = None
    ema: dict[float, Denoiser] = field(default_factory=dict)
    ema_warmup: bool = False
    companions: Mapping[str, nn.Module] = field(default_factory=dict)
    terms: dict[str, Tensor] = field(default_factory=dict, init=False)

    def total(self, **terms: Tensor) -> Tensor:
        """The sum, (B,), of an objective's terms (B,), whose means the training log shows by name.

        An error about a loss that is not finite names the term. Nothing leaves the device.
        """
        for name, term in terms.items():
            if name not in self.terms:
                self.terms[name] = torch.zeros(2, device=term.device)
            kept = self.terms[name]
            kept[0] += term.detach().mean()
            kept[1] += 1
        first, *others = terms.values()
        for term in others:
            first = first + term
        return first

    @torch.no_grad()
    def update(self, phase: Phase) -> None:
        """Move the target and every EMA towards the online weights, one fused call a copy.

        The target takes decay `phase.target_ema`; where the objective keeps no target of its own,
        it is the online network itself and is left alone.
        """
        if not phase.update:
            return
        online: list[Tensor] = list(self.online.parameters())
        if self.target is not self.online:
            torch._foreach_lerp_(list(self.target.parameters()), online, 1 - phase.target_ema)
        cap = (1 + phase.step) / (10 + phase.step) if self.ema_warmup else 1.0
        for decay, copied in self.ema.items():
            torch._foreach_lerp_(list(copied.parameters()), online, 1 - min(decay, cap))

    @torch.no_grad()
    def restart(self) -> None:
        """Make the online weights those of every other copy, the teacher among them."""
        for copied in (self.target, self.teacher, *self.ema.values()):
            if copied is not None:
                copied.network.load_state_dict(self.online.network.state_dict())
