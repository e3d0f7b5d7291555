"""The check of a sampler."""

from __future__ import annotations

import torch
from torch import Tensor

from cmkit.denoiser import NO_COND, Cond, Denoiser
from cmkit.kinds import Sampler
from cmkit.noise import Noise
from cmkit.testing.protocol import Report, report_on, shown
from cmkit.testing.subjects import CPU, DIGITS, META, PROMPTS, Small, close, draws, told
from cmkit.traits import TRAITS
from cmkit.values import DataSpec


def check_sampler(sampler: Sampler, data: DataSpec = DIGITS) -> None:
    """Check a sampler on images like `data`, with a small denoiser that checks what it is given."""
    report = report_on(sampler)
    report.require(
        sampler.needs <= TRAITS.keys(),
        "`needs` holds traits of scalings",
        f"it has {sorted(sampler.needs - TRAITS.keys())}",
        f"choose among {', '.join(TRAITS)}",
    )
    walk = _Walk(report, data)
    out = walk.sample(sampler)
    report.require(
        isinstance(sampler.nfe, int) and walk.calls == sampler.nfe,
        "`nfe` is the number of times that the denoiser is called",
        f"nfe = {sampler.nfe!r}, and it was called {walk.calls} times",
        "count the calls in `sample` again",
    )
    report.like(out, walk.x, "the images", dtype=False)
    report.require(
        out.is_floating_point() and bool(out.isfinite().all()),
        "images are finite floating-point numbers",
        f"{out.dtype}, {int((~out.isfinite()).sum())} of them not finite",
        "look for a division by a sigma that reaches 0",
    )
    report.require(
        torch.equal(out, _Walk(report, data).sample(sampler)),
        "samples follow from x and noise(k) alone",
        "two calls with the same x and noise differ",
        "draw from noise(k) only, and keep no state between calls",
    )
    others = _Walk(report, data, swap=True).sample(sampler)
    report.require(
        close(others[:1], out[:1], 1e-5),
        "an image does not depend on the others of its batch",
        "image 0 changed when the others did",
        "take no statistics over the batch",
    )
    with report.trying(
        "it runs on tensors without data, as `cmkit check` does",
        "make tensors on x.device and read no values (.item(), if on a tensor)",
    ):
        meta = _Walk(report, data, device=META).sample(sampler)
    report.like(meta, walk.x.to(META), "the images", dtype=False)


class _Walk(Denoiser):
    """A run of a sampler on four images, of which `swap` replaces all but the first, and the
    denoiser that it is given, which checks each call."""

    def __init__(
        self, report: Report, data: DataSpec, device: torch.device = CPU, swap: bool = False
    ):
        super().__init__(Small(data), Noise())
        self.eval().to(device)
        self.report, self.device, self.draws = report, device, draws(data)
        self.rows = [0, 11, 12, 13] if swap else [0, 1, 2, 3]
        text = told(data.text or PROMPTS, len(self.rows))["text"]
        self.cond = Cond(label=self.draws.labels(self.rows), text=text).to(device)
        self.x = 80.0 * self.draws.noise(self.rows, 0).to(device)
        self.calls = 0
        self.drawn: set[int] = set()

    def sample(self, sampler: Sampler) -> Tensor:
        before = self.x.clone()
        with torch.inference_mode(), self.report.untouched("sample"):
            out = sampler.sample(self, self.x, self.cond, self.draw)
        self.report.require(
            self.device is META or torch.equal(before, self.x),
            "x is left alone",
            "`sample` wrote into it",
            "work on a new tensor",
        )
        return out

    def draw(self, k: int) -> Tensor:
        self.report.require(
            isinstance(k, int) and k >= 1 and k not in self.drawn,
            "noise(k) is asked for once for each k = 1, 2, ..",
            f"noise({k!r}) after {sorted(self.drawn)}",
            "count the draws; draw 0 is x itself",
        )
        self.drawn.add(k)
        return self.draws.noise(self.rows, k).to(self.device)

    def forward(self, x: Tensor, sigma: Tensor, cond: Cond = NO_COND) -> Tensor:
        self.calls += 1
        self.report.like(x, self.x, "the noisy images", dtype=False)
        self.report.require(
            isinstance(sigma, Tensor)
            and sigma.shape == x.shape[:1]
            and sigma.device == x.device
            and sigma.is_floating_point(),
            "the denoiser is given sigma (B,) on x.device",
            f"{shown(sigma)}",
            "x.new_full((len(x),), sigma)",
        )
        self.report.require(
            sigma.is_meta or bool((sigma > 0).all()),
            "the denoiser is called at noise levels above 0",
            f"sigma = {sigma.tolist() if not sigma.is_meta else ''}",
            "end the walk at sigma_min, or take the last estimate as it is",
        )
        for name in ("label", "text"):
            self.report.require(
                getattr(self.cond, name) is None or getattr(cond, name) is not None,
                "the denoiser sees the conditions",
                f"it was called without the {name}",
                "pass cond on: denoiser(x, sigma, cond)",
            )
        return super().forward(x, sigma, cond)
