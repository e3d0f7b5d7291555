"""The check of a prompt encoder."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cmkit.denoiser import Cond
from cmkit.kinds import TextEncoder
from cmkit.testing.protocol import Report, check_identity, report_on, shown
from cmkit.testing.subjects import CPU, close
from cmkit.values import TextSpec

PROMPTS = (
    "a red apple",
    "a frog",
    "",
    "Zwölf Boxkämpfer jagen Viktor quer über den Deich",
)


def check_text(text: TextEncoder, prompts: Sequence[str] = PROMPTS) -> None:
    """Check a prompt encoder on different `prompts`, the first two of which differ to it."""
    report = report_on(text)
    spec = text.spec()
    report.require(
        isinstance(spec, TextSpec)
        and min(spec.length, spec.width, 1 if spec.pooled is None else spec.pooled) >= 1
        and spec == text.spec(),
        "`spec` returns a cmkit.TextSpec with positive numbers, the same each time",
        f"{spec!r}, then {text.spec()!r}",
        "return TextSpec(length, width)",
    )
    check_identity(report, text)
    _check_cut(report, text, prompts)
    _check_unknown(report, text, prompts)
    with report.trying("a prompt encoder can be loaded on a device", "compare cmkit.Prompts"):
        with report.untouched("load"):
            encode = text.load(CPU)
        again = text.load(CPU)
    _check_cond(
        report,
        getattr(encode, "null", None),
        1,
        spec,
        "the features of the unconditional prompt, `null`,",
    )
    prompts = [*prompts, " ".join(prompts) * 20]
    with report.trying("it takes a list of prompts of any length", "cut what is too long"):
        with report.untouched("encoding"):
            found = encode(prompts)
        alone = [encode([prompt]) for prompt in prompts]
        repeated, other = encode(prompts), again(prompts)
    _check_cond(report, found, len(prompts), spec, "the features of prompts")
    for name in ("text", "pooled"):
        value = getattr(found, name)
        if value is None:
            continue
        report.require(
            torch.equal(getattr(repeated, name), value)
            and torch.equal(getattr(other, name), value),
            "features follow from the prompt",
            f"two calls, or two loads, give another `{name}`",
            "draw nothing, and leave hash() alone, which differs from process to process",
        )
        for row, one in enumerate(alone):
            report.require(
                close(getattr(one, name)[0], value[row], 1e-5),
                "a prompt's features do not depend on the others of its batch",
                f"`{name}` of {prompts[row][:40]!r} alone is another",
                "pad every prompt to the length of spec(), not to that of the longest",
            )
        report.require(
            not torch.equal(value[0], value[1]),
            "features depend on the prompt",
            f"`{name}` is the same for {prompts[0]!r} and {prompts[1]!r}",
            "encode what you are given",
        )


def _check_cut(report: Report, text: TextEncoder, prompts: Sequence[str]) -> None:
    with report.trying("`cut` takes prompts", "return a number for each"):
        cuts, long = text.cut(list(prompts)), text.cut([prompts[0], prompts[0] * 200])
    report.require(
        all(isinstance(found, list) for found in (cuts, long))
        and (len(cuts), len(long)) == (len(prompts), 2)
        and all(type(number) is int and number >= 0 for number in (*cuts, *long))
        and long[1] >= long[0]
        and text.cut([]) == [],
        "`cut` returns how many tokens of each prompt are cut off, at least 0, more of longer ones",
        f"{cuts!r} of {len(prompts)} prompts, and {long!r}",
        "return [max(0, tokens - length) for each prompt]",
    )


def _check_unknown(report: Report, text: TextEncoder, prompts: Sequence[str]) -> None:
    with report.trying("`unknown` takes prompts", "return a tuple of words for each"):
        found = text.unknown([*prompts[:2], ""])
    report.require(
        len(found) == 3
        and all(isinstance(words, tuple) for words in found)
        and all(isinstance(word, str) for words in found for word in words)
        and found[2] == (),
        "`unknown` returns the words of each prompt that say nothing, of the empty one none",
        f"{found!r}",
        "return a tuple of words for each prompt",
    )


def _check_cond(report: Report, cond: object, rows: int, spec: TextSpec, what: str) -> None:
    report.require(
        isinstance(cond, Cond),
        f"{what} are a cmkit.Cond",
        f"{shown(cond)}",
        "return Cond(text=..)",
    )
    assert isinstance(cond, Cond)
    wanted = {"text": (rows, spec.length, spec.width)}
    if spec.pooled is not None:
        wanted["pooled"] = (rows, spec.pooled)
    given = {name: value for name, value in vars(cond).items() if value is not None}
    report.require(
        given.keys() == wanted.keys(),
        f"{what} are {' and '.join(wanted)}, as spec() says",
        f"{', '.join(given) or 'nothing'}",
        "make them agree; cmkit fills in the sizes of pictures",
    )
    for name, value in given.items():
        report.require(
            isinstance(value, Tensor)
            and tuple(value.shape) == wanted[name]
            and value.dtype == torch.float32
            and not value.requires_grad,
            f"{what} have `{name}`, float32 of shape {wanted[name]}, without a gradient",
            f"{shown(value)}",
            "pad to the length of spec(), end with .float(), and decorate with @torch.no_grad()",
        )
        report.require(
            bool(value.isfinite().all()),
            f"{what} are finite",
            f"{int((~value.isfinite()).sum())} numbers of `{name}` are not",
            "compute in fp32 or bf16, not in fp16",
        )
