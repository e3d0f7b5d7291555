"""The laws of a sampler."""

from __future__ import annotations

import torch
from torch import Tensor

from cmkit.denoiser import Cond, Denoiser
from cmkit.kinds import Sampler
from cmkit.noise import Noise
from cmkit.rng import image_noise
from cmkit.testing.fields import check_fields
from cmkit.testing.protocol import Says, told
from cmkit.testing.subjects import CPU, DIGITS, META, Small, close, image_shape
from cmkit.values import DataSpec


def check_sampler(sampler: Sampler, data: DataSpec = DIGITS) -> None:
    """The laws of a sampler, on images like `data` and a small denoiser that looks on."""
    check_fields(sampler)
    say = Says(sampler)
    walk = _Walk(say, data)
    out = walk.sample(sampler)
    say.unless(
        isinstance(sampler.nfe, int) and walk.calls == sampler.nfe,
        "`nfe` is the number of times that the denoiser is called",
        f"nfe = {sampler.nfe!r}, and it was called {walk.calls} times",
        "count the calls in `sample` again",
    )
    say.like(out, walk.x, "the images", dtype=False)
    say.unless(
        out.is_floating_point() and bool(out.isfinite().all()),
        "images are finite floating-point numbers",
        f"{out.dtype}, {int((~out.isfinite()).sum())} of them not finite",
        "look for a division by a sigma that reaches 0",
    )
    again = _Walk(say, data).sample(sampler)
    say.unless(
        torch.equal(out, again),
        "samples follow from x and noise(k) alone",
        "two calls with the same x and noise differ",
        "draw from noise(k) only, and keep no state between calls",
    )
    others = _Walk(say, data, swap=True).sample(sampler)
    say.unless(
        close(others[:1], out[:1], 1e-5),
        "an image does not depend on the others of its batch",
        "image 0 changed when the others did",
        "take no statistics over the batch",
    )
    with say.trying(
        "it runs on tensors without data, as `cmkit check` does",
        "make tensors on x.device and read no values (.item(), if on a tensor)",
    ):
        meta = _Walk(say, data, device=META).sample(sampler)
    say.like(meta, torch.empty(4, *image_shape(data), device=META), "the images", dtype=False)


class _Walk:
    """One run of a sampler on four images, watched; with `swap` all but the first are others."""

    def __init__(self, say: Says, data: DataSpec, device: torch.device = CPU, swap: bool = False):
        self.say = say
        self.rows = [0, 11, 12, 13] if swap else [0, 1, 2, 3]
        self.shape = image_shape(data)
        self.device = device
        self.calls = 0
        self.inner = Denoiser(Small(data), Noise()).eval().to(device)
        labels = (
            torch.tensor([row % data.num_classes for row in self.rows], device=device)
            if (data.num_classes)
            else None
        )
        self.cond = Cond(label=labels)
        self.drawn: set[int] = set()
        self.x = 80.0 * image_noise(0, "testing", self.rows, 0, self.shape).to(device)

    def sample(self, sampler: Sampler) -> Tensor:
        before = self.x.clone()
        with torch.inference_mode(), self.say.untouched("sample"):
            out = sampler.sample(_Watcher(self), self.x, self.cond, self._noise)
        self.say.unless(
            self.device is META or torch.equal(before, self.x),
            "x is left alone",
            "`sample` wrote into it",
            "work on a new tensor",
        )
        return out

    def _noise(self, k: int) -> Tensor:
        self.say.unless(
            isinstance(k, int) and k >= 1 and k not in self.drawn,
            "noise(k) is asked for once for each k = 1, 2, ..",
            f"noise({k!r}) after {sorted(self.drawn)}",
            "count the draws; draw 0 is x itself",
        )
        self.drawn.add(k)
        return image_noise(0, "testing", self.rows, k, self.shape).to(self.device)


class _Watcher(Denoiser):
    """The denoiser of a walk, which counts and looks at what it is given."""

    def __init__(self, walk: _Walk):
        super().__init__(walk.inner.network, walk.inner.noise)
        self.walk = walk
        self.eval()

    def forward(self, x: Tensor, sigma: Tensor, cond: Cond = Cond()) -> Tensor:  # noqa: B008
        walk, say = self.walk, self.walk.say
        walk.calls += 1
        say.like(x, walk.x, "the noisy images", dtype=False)
        say.unless(
            isinstance(sigma, Tensor)
            and sigma.shape == x.shape[:1]
            and sigma.device == x.device
            and sigma.is_floating_point(),
            "the denoiser is given sigma (B,) on x.device",
            f"{told(sigma)}",
            "x.new_full((len(x),), sigma)",
        )
        say.unless(
            sigma.is_meta or bool((sigma > 0).all()),
            "the denoiser is called at noise levels above 0",
            f"sigma = {sigma.tolist() if not sigma.is_meta else ''}",
            "end the walk at sigma_min, or take the last estimate as it is",
        )
        say.unless(
            walk.cond.label is None or cond.label is not None,
            "the denoiser sees the conditions",
            "it was called without the label",
            "pass cond on: denoiser(x, sigma, cond)",
        )
        return walk.inner(x, sigma, cond)
