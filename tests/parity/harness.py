"""Reads figures of official runs: formula-filled weights and inputs, expected numbers, tolerances.

CMKIT_PARITY_DIR names another folder of the same format, such as one with other constants, cases
or names of them. A file that it lacks is read from our own folder, so that every test runs.
"""

from __future__ import annotations

import json
import math
import os
import re
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cmkit import Cond

OWN_FIGURES = Path(__file__).parent / "figures"
FIGURES = Path(os.environ.get("CMKIT_PARITY_DIR", OWN_FIGURES))
FLOAT64 = 1e-7
"""Error allowed in float64, relative to rms."""
MARGIN, FLOAT32 = 5, 1e-5
"""Error allowed in float32: MARGIN err32 + FLOAT32 rms."""
EXACT, ROUNDED = 1e-9, 1e-4
"""Where err32 is below EXACT rms the official code computes in float64 in both runs, and nothing
says what rounding does to it: ROUNDED rms in place of FLOAT32 rms."""
ELEMENT64, ELEMENT32 = 1e-8, 5e-6
"""Errors allowed relative to each element, where an array spans decades."""


READ: dict[str, set[str]] = defaultdict(set)
"""The cases that some test reads, by file."""


class Figures:
    """One file of figures: its cases, and the formulas with its constants."""

    def __init__(self, name: str):
        assert any(FIGURES.glob("*.json")), f"CMKIT_PARITY_DIR={FIGURES}: no figures there"
        path = FIGURES / name
        path = path if path.is_file() else OWN_FIGURES / name
        content = json.loads(path.read_text("utf-8"))
        self.name = name
        assert content["format"] == 1, f"{name}: format {content['format']}"
        self.cases: dict[str, dict[str, Any]] = content["cases"]
        self._fill: dict[str, float] = content["fill"]

    def read_by(
        self, functions: Mapping[str, Any], also: Callable[[dict[str, Any]], bool] = lambda _: True
    ) -> list[str]:
        """Names of the cases that `functions` compute and whose config satisfies `also`."""
        known = {_numberless(name) for name in functions}
        found = [
            name
            for name, case in self.cases.items()
            if _numberless(case["function"]) in known and also(case["config"])
        ]
        READ[self.name].update(found)
        return found

    def compute(self, name: str, function: Callable[..., Any], *arguments: Any, **more: Any) -> Any:
        """What `function` makes of a case; AssertionError where it leaves a key of its config
        unread."""
        case = self.cases[name]
        config = Config(case["config"])
        actual = function({**case, "config": config, "figures": self}, *arguments, **more)
        assert not (unread := list(config.unread())), f"{name}: unknown options {unread}"
        return actual

    @property
    def constants(self) -> dict[str, float]:
        """Constants of the formulas, which formulas of inputs may name."""
        return dict(self._fill)

    def weights(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        dtype: torch.dtype,
        prefix: str = "",
        w_quad: float | None = None,
    ) -> dict[str, Tensor]:
        """Formula-filled weights under their official names."""
        quad = self._fill["w_quad"] if w_quad is None else w_quad
        return {key: self._weight(key, shapes[key], prefix, quad).to(dtype) for key in shapes}

    def _weight(self, key: str, shape: tuple[int, ...], prefix: str, quad: float) -> Tensor:
        n, last = math.prod(shape), key.split(".")[-1]
        phase = zlib.crc32((prefix + key).encode()) % 1000 + self._fill["w_phase"]
        s = wave(n, self._fill["w_freq"], quad, phase)
        if last in ("freqs", "phases"):
            s = 4 * s
        elif len(shape) >= 2:
            s = s / math.sqrt(n / shape[0])
        elif last.endswith("gain"):
            s = 1 + 0.1 * s
        else:
            s = {"weight": 1 + 0.1 * s, "bias": 0.1 * s}[last]
        return rounded(s, shape)

    def X(
        self, shape: list[int], a: float = 1.0, f: float | None = None, p: float | None = None
    ) -> Tensor:
        """a cos(f i + p)."""
        f = self._fill["x_freq"] if f is None else f
        p = self._fill["x_phase"] if p is None else p
        return rounded(a * np.cos(f * np.arange(math.prod(shape)) + p), shape)

    def Z(self, shape: list[int], c: int = 0) -> Tensor:
        """Stands for the c-th normal draw."""
        return rounded(self._draw(shape, c), shape)

    def U(self, shape: list[int], c: int = 0) -> Tensor:
        """Stands for the c-th uniform draw."""
        return rounded(0.5 + 0.49 / math.sqrt(2) * self._draw(shape, c), shape)

    def _draw(self, shape: list[int], c: int) -> np.ndarray:
        fill = self._fill
        phase = 1.1 * c + fill["z_phase"]
        return math.sqrt(2) * wave(math.prod(shape), fill["z_freq"], fill["z_quad"], phase)

    def tensor(self, spec: Any, dtype: torch.dtype, **names: Any) -> Tensor:
        """A described input: {"X": ..}, {"Z": ..}, a formula of X, Z and U, or numbers."""
        if isinstance(spec, dict):
            ((formula, arguments),) = spec.items()
            return {"X": self.X, "Z": self.Z, "U": self.U}[formula](**arguments).to(dtype)
        if isinstance(spec, str):
            return eval(spec, {"X": self.X, "Z": self.Z, "U": self.U, **names}).to(dtype)
        return torch.tensor(spec, dtype=torch.float32).to(dtype)


class Config(Mapping[str, Any]):
    """A config that knows which of its keys were asked for."""

    def __init__(self, content: Mapping[str, Any]):
        self.content = {
            key: Config(value) if isinstance(value, dict) else value
            for key, value in content.items()
        }
        self.asked: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        value = self.content[key]
        self.asked.add(key)
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self.content)

    def __len__(self) -> int:
        return len(self.content)

    def ignore(self, *names: str) -> None:
        """Count `names` as read: they change nothing of what is compared."""
        self.asked.update(names)

    def unread(self) -> Iterator[str]:
        for key, value in self.content.items():
            if key not in self.asked:
                yield key
            elif isinstance(value, Config):
                yield from (f"{key}.{inner}" for inner in value.unread())


def function_of(case: Mapping[str, Any], functions: Mapping[str, Any]) -> Any:
    """The entry of `functions` for the official function of a case."""
    named = {_numberless(name): function for name, function in functions.items()}
    return named[_numberless(case["function"])]


def _numberless(function: str) -> str:
    """The name of an official function without its arguments' values, which the config has."""
    return re.sub(r"(?<![\w.])\d+(\.\d+)?", "#", function)


def cond_of(case: Mapping[str, Any]) -> Cond:
    """The labels of a case, if it has any."""
    label = case["inputs"].get("y")
    return Cond(label=None if label is None else torch.tensor(label))


def key_files(pattern: str = "*.json") -> list[Path]:
    """Lists of the names and shapes of published weights."""
    found = {
        path.name: path
        for folder in (OWN_FIGURES, FIGURES)
        for path in (folder / "keys").glob(pattern)
    }
    return [found[name] for name in sorted(found)]


def wave(n: int, freq: float, quad: float, phase: float) -> np.ndarray:
    i = np.arange(n, dtype=np.int64)
    return np.sin(freq * i.astype(np.float64) + quad * ((i * i) % 997).astype(np.float64) + phase)


def rounded(values: np.ndarray, shape: Any) -> Tensor:
    """`values` rounded to float32, held in float64."""
    return torch.from_numpy(values.reshape(tuple(shape)).astype(np.float32).astype(np.float64))


def compare(
    actual: Any,
    expected: Any,
    dtype: torch.dtype,
    float16: float = 0.0,
    elementwise: bool = False,
) -> float:
    """The worst error / tolerance; AssertionError where it exceeds 1 or the trees differ.

    `float16` is the error allowed, relative to rms, where the official code computed in float16;
    `elementwise` compares each element by its own size, for arrays that span decades.
    """
    ratios = dict(_ratios(actual, expected, dtype, float16, elementwise, ""))
    bad = {place: ratio for place, ratio in ratios.items() if not ratio <= 1}
    assert not bad, "error / tolerance: " + ", ".join(f"{k} {v:.3g}" for k, v in bad.items())
    return float(max(ratios.values(), default=0.0))


def _ratios(
    actual: Any, expected: Any, dtype: torch.dtype, float16: float, elementwise: bool, place: str
):
    if isinstance(expected, dict) and "shape" in expected:
        yield from _leaf_ratios(actual, expected, dtype, float16, elementwise, place)
    elif isinstance(expected, dict):
        assert isinstance(actual, dict), place
        assert actual.keys() == expected.keys(), f"{place}: {set(actual) ^ set(expected)}"
        for key, inner in expected.items():
            yield from _ratios(actual[key], inner, dtype, float16, elementwise, f"{place}/{key}")
    else:
        assert actual == expected, f"{place}: {actual} is not {expected}"
        yield place, 0.0


def _leaf_ratios(
    actual: Tensor, leaf: Any, dtype: torch.dtype, float16: float, elementwise: bool, place: str
):
    assert list(actual.shape) == leaf["shape"], f"{place}: shape {list(actual.shape)}"
    if "int" in leaf:
        assert actual.flatten().tolist() == leaf["int"], place
        yield place, 0.0
        return
    assert actual.dtype == dtype, f"{place}: {actual.dtype}"
    assert leaf.keys() <= {"shape", "k", "f32", "f64", "stats", "err32"}, f"{place}: {set(leaf)}"
    a = actual.detach().double().flatten().numpy()
    n, known = a.size, np.array(leaf.get("f64", []))
    stats = leaf.get("stats")
    rms = stats["l2"] / math.sqrt(n) if stats else math.sqrt(np.mean(known**2))
    err32 = leaf.get("err32", 0.0)
    exact = err32 <= EXACT * rms
    if dtype == torch.float64:
        tolerance = FLOAT64 * rms
    elif float16:
        tolerance = float16 * rms
    else:
        tolerance = MARGIN * err32 + (ROUNDED if exact else FLOAT32) * rms
    if len(known):
        taken = a[:: leaf["k"]]
        assert taken.shape == known.shape, f"{place}: {taken.shape} elements"
        allowed = tolerance
        if elementwise and dtype == torch.float64:
            allowed = ELEMENT64 * np.abs(known)
        elif elementwise:
            rounding = np.abs(np.array(leaf.get("f32", known)) - known)
            element = ELEMENT32 * (ROUNDED / FLOAT32 if exact else 1)
            allowed = MARGIN * rounding + element * np.abs(known)
        error = np.abs(taken - known)
        with np.errstate(divide="ignore", invalid="ignore"):
            # Where nothing is allowed, as at sigma = 0, nothing may differ.
            yield place, float(np.where(error == 0, 0.0, error / allowed).max())
    for name, value in _stats(a).items() if stats else ():
        allowed = tolerance * (math.sqrt(n) if name in ("l2", "proj") else 1)
        yield f"{place}.{name}", abs(value - stats[name]) / allowed
    assert len(known) or stats, f"{place}: nothing to compare with"


def _stats(a: np.ndarray) -> dict[str, float]:
    i = np.arange(a.size)
    return {
        "mean": a.mean(),
        "std": a.std(),
        "l2": math.sqrt((a**2).sum()),
        "min": a.min(),
        "max": a.max(),
        "proj": float((a * np.cos(0.11 * i + 0.5)).sum()) / math.sqrt(a.size),
    }
