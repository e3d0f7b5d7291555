"""The check of a precond."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from cmkit.denoiser import Scalings
from cmkit.kinds import Precond
from cmkit.noise import Noise
from cmkit.testing.protocol import Report, report_on, shown
from cmkit.testing.subjects import CPU, META, close

DATA = 0.5
"""sigma_data."""


def check_precond(precond: Precond, compile: bool = True) -> None:
    """Check a precond at its own noise levels.

    `compile` = False leaves torch.compile out.
    """
    report = report_on(precond)
    noise = _axis(report, precond)
    u = torch.linspace(0, 1, 40, dtype=torch.float64)
    sigma = noise.sigma_min * (noise.sigma_max / noise.sigma_min) ** u
    sigma[0], sigma[-1] = noise.sigma_min, noise.sigma_max
    for dtype, device in itertools.product((torch.float64, torch.float32), (CPU, META)):
        _scaled(report, precond, sigma.to(device, dtype), noise)
    found = _scaled(report, precond, sigma, noise)
    _check_numbers(report, found, sigma)
    _check_images(report, precond, sigma, noise)
    if compile:
        _check_compile(report, precond, sigma, noise)


def _axis(report: Report, precond: Precond) -> Noise:
    """The noise axis of a precond, with its own levels."""
    low, high = precond.levels
    known = precond.known
    report.require(
        0 <= known[0] <= low < high <= known[1] and low > 0 and high < float("inf"),
        "`levels` are two finite noise levels above 0, the lower first, within what is `known`",
        f"levels = {precond.levels}, known = {known}",
        "return (lowest, highest) of both",
    )
    with report.trying("`noise` gives an axis or None", "compare cmkit.Precond.noise"):
        noise = precond.noise(low, high, 7.0) or Noise(low, high)
        grid = noise.sigmas(5, dtype=torch.float64)
        middle = noise.sigma_at(torch.linspace(0, 1, 5, dtype=torch.float64))
    for name, levels in (("sigmas(5)", grid), ("sigma_at of five fractions", middle)):
        report.require(
            (noise.sigma_min, noise.sigma_max) == (low, high)
            and levels.shape == (5,)
            and bool((levels.diff() > 0).all())
            and abs(levels[0].item() / low - 1) < 1e-6
            and abs(levels[-1].item() / high - 1) < 1e-6,
            "the noise axis rises from sigma_min to sigma_max",
            f"{name} is {levels.tolist()} for {low:g} to {high:g}",
            "return a cmkit.Noise with these ends, or None",
        )
    return noise


def _scaled(report: Report, precond: Precond, sigma: Tensor, noise: Noise) -> Scalings:
    with (
        report.trying(
            "scalings follow from sigma (B,), also on tensors without data",
            "make tensors on sigma.device, and read no values (.item(), if on a tensor)",
        ),
        report.untouched("scalings"),
    ):
        found = Scalings(*precond.scalings(sigma, DATA, noise.sigma_min))
    for name, value in found._asdict().items():
        report.require(
            isinstance(value, Tensor)
            and (value.shape, value.dtype, value.device)
            == (sigma.shape, sigma.dtype, sigma.device),
            "each scaling is like sigma: (B,), of its type and on its device",
            f"{name} is {shown(value)} for {shown(sigma)}",
            "compute with sigma, and make tables on its device: sigma.new_ones(sigma.shape)",
        )
    return found


def _check_numbers(report: Report, found: Scalings, sigma: Tensor) -> None:
    for name, value in found._asdict().items():
        report.require(
            bool(value.isfinite().all()),
            "scalings are finite between sigma_min and sigma_max",
            f"{name} is {value[~value.isfinite()][:1].tolist()} at sigma ="
            f" {sigma[~value.isfinite()][:1].tolist()}",
            "look for a division by 0, or the logarithm of 0, at the ends",
        )
    rise = found.c_noise.diff()
    report.require(
        bool((rise >= 0).all() or (rise <= 0).all()) and bool(rise.any()),
        "c_noise tells noise levels apart: it rises with sigma, or falls",
        f"{found.c_noise.tolist()[:6]} ..",
        "let it be a monotonous function of sigma",
    )
    above = found.c_noise != found.c_noise[0]
    report.require(
        bool((found.c_in > 0).all() and (found.c_out[above] != 0).all()),
        "above sigma_min the network sees the image, and its output counts",
        f"c_in is {found.c_in.min():g}, c_out {found.c_out[above].abs().min():g} at least",
        "only at sigma_min may c_out be 0",
    )
    # Data N(0, s^2) have the denoiser x s^2 / (s^2 + sigma^2), and x the variance s^2 + sigma^2.
    variance = DATA**2 + sigma**2
    outputs = ((DATA**2 / variance - found.c_skip) / found.c_out * variance.sqrt())[above].abs()
    most = outputs.max().item()
    report.require(
        most < 5,
        "an exact denoiser asks for moderate outputs of the network: (x0_hat - c_skip x) / c_out of"
        " data of deviation 0.5 has a root mean square below 5",
        f"{most:.3g} at sigma = {sigma[above][outputs.argmax()].item():.3g}",
        "compare c_skip and c_out: the noise that c_skip lets pass, c_out F has to take away",
    )


def _check_images(report: Report, precond: Precond, sigma: Tensor, noise: Noise) -> None:
    inputs = (sigma, sigma, sigma.flip(0), sigma.float())
    every = (precond.scalings(given, DATA, noise.sigma_min) for given in inputs)
    for name, value, same, turned, rounded in zip(Scalings._fields, *every, strict=True):
        report.require(
            torch.equal(same, value) and torch.equal(turned.flip(0), value),
            "the scalings of an image follow from its own sigma",
            f"{name} changes with the others, or from call to call",
            "keep no state, and take no statistics over the batch",
        )
        report.require(
            close(rounded[1:], value[1:], 1e-3),
            "scalings in float32 are those in float64 to one part in a thousand",
            f"{name} differs by {(rounded - value).abs().max():g}",
            "look for a difference of near numbers: torch.expm1, torch.log1p",
        )


def _check_compile(report: Report, precond: Precond, sigma: Tensor, noise: Noise) -> None:
    with report.compiling(
        "the scalings whole (fullgraph=True)",
        "branch on options alone, and keep tables in a dictionary, not in functools.cache",
    ):
        compiled = torch.compile(precond.scalings, fullgraph=True, backend="eager")
        found = compiled(sigma, DATA, noise.sigma_min)
    known = precond.scalings(sigma, DATA, noise.sigma_min)
    report.require(
        all(close(a, b, 1e-6) for a, b in zip(found, known, strict=True)),
        "compiled scalings are the same",
        "they differ",
        "keep no Python state that a call changes",
    )
