"""The check of a codec."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from cmkit.errors import RecipeError
from cmkit.kinds import Codec, Coder
from cmkit.testing.protocol import Report, check_identity, report_on, shown
from cmkit.testing.subjects import CPU, DIGITS, close, draws
from cmkit.values import DataSpec, TextSpec


def check_codec(codec: Codec, data: DataSpec = DIGITS, loss: float | None = None) -> None:
    """Check a codec on images like `data`.

    `loss` is the largest share of the root mean square of smooth images that is lost by encoding
    and decoding, None = any.
    """
    report = report_on(codec)
    latents = _check_spec(report, codec, data)
    check_identity(report, codec)
    with report.trying("a codec can be loaded on a device", "compare cmkit.Coder"):
        with report.untouched("load"):
            coder = codec.load(CPU)
        again = codec.load(CPU)
    images = _smooth(data)
    mean, std = _check_encode(report, coder, images, latents)
    report.require(
        torch.equal(again.encode(images)[0], mean),
        "two loads of a codec encode alike",
        "they do not",
        "load weights, or make them from the options alone",
    )
    z = mean if std is None else mean + std * draws(latents).noise(range(len(mean)), 1)
    decoded = _tensor(report, coder.decode, z, images.shape, "decode")
    report.require(
        not torch.equal(coder.decode(z.flip(0)), decoded),
        "pictures depend on their latents",
        "decoded latents in another order are the same pictures",
        "decode what you are given",
    )
    lost = (coder.decode(mean) - images).square().mean().sqrt() / images.square().mean().sqrt()
    report.require(
        loss is None or lost.item() <= loss,
        f"at most {loss} of smooth images is lost by encoding and decoding",
        f"{lost.item():.4g} is",
        "let `decode` undo what `encode` does: the scaling of latents, the range of pixels",
    )
    _check_other_sizes(report, codec, coder, data)


def _smooth(data: DataSpec) -> Tensor:
    """Four smooth images like `data` in [-1, 1], each another."""
    noise = draws(data).noise(range(4), 0)
    small = torch.nn.functional.adaptive_avg_pool2d(noise, max(1, data.resolution // 4))
    size = (data.resolution, data.resolution)
    images = torch.nn.functional.interpolate(small, size, mode="bilinear", align_corners=False)
    return images / images.abs().amax(dim=(1, 2, 3), keepdim=True)


def _check_spec(report: Report, codec: Codec, data: DataSpec) -> DataSpec:
    """The shape of the latents."""
    told = replace(data, num_classes=3, classes=("a", "b", "c"), counts=(1, 2, 3))
    told = replace(told, text=TextSpec(4, 8))
    latents, kept = codec.spec(data), codec.spec(told)
    report.require(
        isinstance(latents, DataSpec) and latents == codec.spec(data),
        "`spec` returns a cmkit.DataSpec, the same each time",
        f"{latents!r}, then {codec.spec(data)!r}",
        "return dataclasses.replace(data, channels=.., resolution=..)",
    )
    report.require(
        kept == replace(told, channels=latents.channels, resolution=latents.resolution),
        "`spec` changes channels and resolution alone, and each by them alone",
        f"{kept!r} of {told!r}",
        "return dataclasses.replace(data, channels=.., resolution=..)",
    )
    return latents


def _tensor(
    report: Report,
    function: Callable[[Tensor], Any],
    given: Tensor,
    shape: tuple[int, ...],
    what: str,
) -> Tensor:
    """What `function` returns, or its first tensor, held to the laws of both directions."""

    def call(x: Tensor) -> Any:
        out = function(x)
        return out[0] if isinstance(out, tuple) else out

    before = given.clone()
    with report.trying(f"`{what}` takes a batch", "compare cmkit.Coder"):
        with report.untouched(what):
            out = call(given)
        again, alone = call(given), call(given[:1])
    report.require(
        isinstance(out, Tensor) and out.shape == shape and out.dtype == torch.float32,
        f"`{what}` returns float32 of shape {tuple(shape)}, as spec() says",
        f"{shown(out)}",
        "make `spec` and the codec agree, and end with .float()",
    )
    report.require(
        not out.requires_grad,
        f"`{what}` has no gradient",
        "its result requires one",
        "decorate it with @torch.no_grad(), and let no parameter require a gradient",
    )
    report.require(
        bool(out.isfinite().all()),
        f"`{what}` returns finite numbers",
        f"{int((~out.isfinite()).sum())} of {out.numel()} are not",
        "compute in fp32 or bf16, not in fp16",
    )
    report.require(
        torch.equal(before, given),
        f"`{what}` leaves what it is given alone",
        "it wrote into it",
        "work on a new tensor",
    )
    report.require(
        torch.equal(again, out),
        f"`{what}` follows from its argument",
        "two calls differ",
        "draw nothing: return mean and std, and let cmkit draw",
    )
    report.require(
        close(alone, out[:1], 1e-4),
        f"`{what}` takes each image of a batch alone",
        "image 0 alone is another",
        "take no statistics over the batch",
    )
    return out


def _check_encode(
    report: Report, coder: Coder, images: Tensor, latents: DataSpec
) -> tuple[Tensor, Tensor | None]:
    with report.trying("`encode` takes images", "compare cmkit.Coder"):
        found = coder.encode(images)
    report.require(
        isinstance(found, tuple) and len(found) == 2,
        "`encode` returns (mean, std), std None where latents are not drawn",
        f"{shown(found)}",
        "return mean, None",
    )
    shape = (len(images), *draws(latents).shape)
    mean = _tensor(report, coder.encode, images, shape, "encode")
    std = found[1]
    if std is not None:
        std = _tensor(report, lambda x: coder.encode(x)[1], images, shape, "encode")
        report.require(
            bool((std >= 0).all()),
            "standard deviations are at least 0",
            f"the smallest is {std.min().item():g}",
            "return the standard deviation, not its logarithm",
        )
    report.require(
        not torch.equal(mean[0], mean[1]),
        "latents depend on the image",
        "those of two images are the same",
        "encode what you are given",
    )
    return mean, std


def _check_other_sizes(report: Report, codec: Codec, coder: Coder, data: DataSpec) -> None:
    """Check that images are refused by `spec`, or encoded to what it says."""
    for other in (
        replace(data, resolution=data.resolution + 1),
        replace(data, channels=data.channels + 1),
    ):
        try:
            said = codec.spec(other)
        except RecipeError:
            continue
        with report.trying(
            "`spec` refuses images that the codec cannot take",
            "raise cmkit.RecipeError, with the nearest number that fits",
        ):
            mean = coder.encode(_smooth(other))[0]
            back = coder.decode(mean)
        shapes = (4, *draws(said).shape), (4, *draws(other).shape)
        report.require(
            (tuple(mean.shape), tuple(back.shape)) == shapes,
            "`spec` refuses images that the codec cannot take",
            f"{other.channels} channels of {other.resolution} pixels become {tuple(mean.shape)},"
            f" and {tuple(back.shape)} decoded",
            "raise cmkit.RecipeError, with the nearest number that fits",
        )
