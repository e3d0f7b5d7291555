"""How a broken law is reported, and the laws that parts of every kind keep."""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cmkit.errors import CmkitError, PluginError
from cmkit.kinds import Part
from cmkit.recipe import fields


class ProtocolError(PluginError, AssertionError):
    """A part breaks a law of its kind: the law, what was seen, what to change."""


class Report:
    """Reports the broken laws of one part as ProtocolError."""

    def __init__(self, part: Part | str):
        self.name = part if isinstance(part, str) else type(part).__name__

    def broken(self, law: str, seen: str, cure: str) -> ProtocolError:
        return ProtocolError(f"{self.name}: {law}; seen: {seen}; cure: {cure}")

    def require(self, holds: bool, law: str, seen: str, cure: str) -> None:
        if not holds:
            raise self.broken(law, seen, cure)

    @contextlib.contextmanager
    def trying(self, law: str, cure: str) -> Iterator[None]:
        """Report any error inside as a broken law."""
        try:
            yield
        except CmkitError:  # it names a cure of its own
            raise
        except Exception as error:
            raise self.broken(law, f"{type(error).__name__}: {str(error)[:200]}", cure) from error

    @contextlib.contextmanager
    def compiling(self, what: str, cure: str) -> Iterator[None]:
        """`trying` for torch.compile, whose caches are emptied before and after."""
        torch._dynamo.reset()
        try:
            with self.trying(f"torch.compile takes {what}", cure), torch.no_grad():
                yield
        finally:
            torch._dynamo.reset()

    @contextlib.contextmanager
    def untouched(self, what: str) -> Iterator[None]:
        """Require that nothing inside draws from a global generator of torch, numpy or Python."""
        before = _global_state()
        yield
        drawn = [name for name, state in _global_state().items() if state != before[name]]
        self.require(
            not drawn,
            f"`{what}` leaves the global generators alone, so that a run resumes to the same bits",
            f"that of {', '.join(drawn)} moved",
            "draw from the `rng` or `noise` that you are given, or from cmkit.Rng(seed, ...), and"
            " call models in training inside `with cmkit.shared_dropout(rng)`",
        )

    def like(self, out: Any, x: Tensor, what: str, dtype: bool = True) -> None:
        """Require a tensor of the shape, the device, and with `dtype` the type of x."""
        self.require(
            isinstance(out, Tensor) and out.shape == x.shape and out.device == x.device,
            f"{what} have the shape and the device of x",
            f"{shown(out)} for {shown(x)}",
            "return one tensor, and make all tensors on x.device",
        )
        self.require(
            not dtype or out.dtype == x.dtype,
            f"{what} are {x.dtype}, under autocast as well",
            f"{out.dtype}",
            "end with .float()",
        )


def _global_state() -> dict[str, Any]:
    return {
        "torch": torch.get_rng_state().numpy().tobytes(),
        "numpy": str(np.random.get_state(legacy=False)),  # noqa: NPY002 - it is the one to watch
        "Python": random.getstate(),
    }


def shown(value: Any) -> str:
    """A value in a few words."""
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} {value.dtype} on {value.device}"
    return f"{type(value).__name__} {str(value)[:60]}"


def check_fields(part: Part) -> None:
    """Check that a part is a frozen record, that every field of it has a docstring, and that a
    resolved recipe gives the same part again."""
    report_on(part)


def check_identity(report: Report, part: Part) -> None:
    """Check that what a part says of its files can be recorded and compared."""
    with report.trying("`identity` can be written as JSON", "use strings, numbers and lists"):
        about = json.dumps(part.identity(), allow_nan=False)
        again = json.dumps(part.identity(), allow_nan=False)
    report.require(
        about == again,
        "`identity` stays the same while the files do",
        f"{about[:80]}, then {again[:80]}",
        "let it follow from contents: digests of files",
    )


def report_on(part: Part) -> Report:
    """A report on a part whose fields have been checked."""
    report = Report(part)
    model = type(part)
    report.require(
        bool((model.__doc__ or "").strip()) and model.__doc__ != model.__mro__[1].__doc__,
        "a part's docstring is its help",
        "there is none",
        "write one below the class line",
    )
    for option, wanted in (("frozen", True), ("extra", "forbid"), ("strict", True)):
        report.require(
            model.model_config.get(option) == wanted,
            f"a part has {option} = {wanted!r}, so that a recipe means what it says",
            f"model_config has {option} = {model.model_config.get(option)!r}",
            "drop that entry of model_config",
        )
    with report.trying("its fields have a JSON schema", "use types that TOML can hold"):
        described = list(fields(model))
    for entry in described:
        report.require(
            bool(entry["meaning"]),
            "every field has a docstring, its help in `cmkit plugins show` and in editors",
            f"{entry['key']} has none",
            'write """...""" on the line below the field',
        )
    with report.trying("its values survive JSON", "use types that TOML can hold"):
        again = model.model_validate_json(json.dumps(part.model_dump(mode="json")))
    report.require(
        again == part,
        "a part read from the resolved recipe is the same part",
        f"{part!r} came back as {again!r}",
        "let no validator change a value that is already resolved",
    )
    return report
