"""How a broken law is worded, and what a part must leave alone."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cmkit.errors import CmkitError, PluginError
from cmkit.kinds import Part


class ProtocolError(PluginError, AssertionError):
    """A part breaks a law of its kind: the law, what was seen, what to change."""


class Says:
    """Words a broken law for one part."""

    def __init__(self, part: Part | str):
        self.name = part if isinstance(part, str) else type(part).__name__

    def broken(self, law: str, seen: str, cure: str) -> ProtocolError:
        return ProtocolError(f"{self.name}: {law}; seen: {seen}; cure: {cure}")

    def unless(self, holds: bool, law: str, seen: str, cure: str) -> None:
        if not holds:
            raise self.broken(law, seen, cure)

    @contextlib.contextmanager
    def trying(self, law: str, cure: str) -> Iterator[None]:
        """Whatever is raised inside breaks the law; errors of cmkit pass, they have a cure."""
        try:
            yield
        except CmkitError:
            raise
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            raise self.broken(law, f"{type(error).__name__}: {reason}", cure) from error

    @contextlib.contextmanager
    def untouched(self, what: str) -> Iterator[None]:
        """Nothing inside draws from a global generator of torch, numpy or Python."""
        before = _global_state()
        yield
        drawn = [name for name, state in _global_state().items() if state != before[name]]
        self.unless(
            not drawn,
            f"`{what}` leaves the global generators alone, so that a run resumes to the same bits",
            f"that of {', '.join(drawn)} moved",
            "draw from the `rng` or `noise` that you are given, or from cmkit.Rng(seed, ...), and"
            " call models in training inside `with cmkit.shared_dropout(rng)`",
        )

    def like(self, out: Any, x: Tensor, what: str, dtype: bool = True) -> None:
        """A tensor of the shape, the device, and with `dtype` the type of x."""
        self.unless(
            isinstance(out, Tensor) and out.shape == x.shape and out.device == x.device,
            f"{what} have the shape and the device of x",
            f"{told(out)} for {told(x)}",
            "return one tensor, and make all tensors on x.device",
        )
        self.unless(
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


def told(value: Any) -> str:
    """A value in a few words."""
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} {value.dtype} on {value.device}"
    return f"{type(value).__name__} {str(value)[:60]}"
