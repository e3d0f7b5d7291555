"""The laws of every kind of part, as checks that plugin authors call in their own tests.

`check_sampler(MySampler(steps=4))` returns None, or raises ProtocolError, which says the law, what
was seen, and what to change. All run on the CPU on tiny tensors, within seconds.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import inspect
import itertools
import json
import math
import random
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import entry_points
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.data import Dataset as TorchDataset

from cmkit.denoiser import Cond, Denoiser, Models, Network
from cmkit.errors import (
    CheckpointError,
    CmkitError,
    DataError,
    DownloadError,
    PluginError,
    RecipeError,
    ResourceError,
)
from cmkit.kinds import (
    CLASSES,
    Backbone,
    Dataset,
    DataSpec,
    Metric,
    Objective,
    Part,
    Phase,
    Reference,
    Rescaler,
    Sampler,
)
from cmkit.noise import Noise, Rng, image_noise
from cmkit.plugins import Plugin, Row, api_version, discover
from cmkit.recipe import NAME, fields

CPU, META = torch.device("cpu"), torch.device("meta")
DIGITS = DataSpec(channels=1, resolution=8, num_classes=10)
SITES = ("skip.0", "skip.1", "emb.0", "emb.1")
CONDITIONS = ("label", "guidance", "sigma_to", "text")
MANIFEST_SECONDS = 1.0


class ProtocolError(PluginError, AssertionError):
    """A part breaks a law of its kind: the law, what was seen, what to change."""


def check_part(part: Part, **options: Any) -> None:
    """The check of the part's kind; `options` are that check's."""
    for kind, cls in CLASSES.items():
        if isinstance(part, cls):
            CHECKS[kind](part, **options)
            return
    raise ProtocolError(
        f"{type(part).__name__}: a part is an instance of one of the six kinds; its bases are"
        f" {', '.join(base.__name__ for base in type(part).__mro__[1:-1])}; subclass one of"
        f" {', '.join('cmkit.' + cls.__name__ for cls in CLASSES.values())}"
    )


def check_fields(part: Part) -> None:
    """A part is a frozen record whose every field is explained, and survives a recipe."""
    say = _Says(part)
    model = type(part)
    say.unless(
        bool((model.__doc__ or "").strip()) and model.__doc__ != model.__mro__[1].__doc__,
        "a part's docstring is its help",
        "there is none",
        "write one below the class line",
    )
    for option, wanted in (("frozen", True), ("extra", "forbid"), ("strict", True)):
        say.unless(
            model.model_config.get(option) == wanted,
            f"a part has {option} = {wanted!r}, so that a recipe means what it says",
            f"model_config has {option} = {model.model_config.get(option)!r}",
            "drop that entry of model_config",
        )
    with say.trying("its fields have a JSON schema", "use types that TOML can hold"):
        described = list(fields(model))
    for entry in described:
        say.unless(
            bool(entry["meaning"]),
            "every field has a docstring, its help in `cmkit plugins show` and in editors",
            f"{entry['key']} has none",
            'write """...""" on the line below the field',
        )
    with say.trying("its values survive JSON", "use types that TOML can hold"):
        again = model.model_validate_json(json.dumps(part.model_dump(mode="json")))
    say.unless(
        again == part,
        "a part read from the resolved recipe is the same part",
        f"{part!r} came back as {again!r}",
        "let no validator change a value that is already resolved",
    )


def check_backbone(backbone: Backbone, data: DataSpec = DIGITS, compile: bool = True) -> None:
    """The laws of a backbone and of the network that it builds for `data`.

    `compile` = False leaves torch.compile out, which takes most of the time.
    """
    check_fields(backbone)
    say = _Says(backbone)
    say.unless(
        backbone.accepts <= set(CONDITIONS),
        "`accepts` names fields of cmkit.Cond",
        f"it has {sorted(backbone.accepts - set(CONDITIONS))}",
        f"choose among {', '.join(CONDITIONS)}",
    )
    # The contract leaves the width of text features to the data, which a DataSpec does not name.
    conditions = backbone.accepts - {"text"} - ({"label"} if not data.num_classes else set())
    network, twin = (_built(say, backbone, data, conditions) for _ in range(2))
    say.unless(
        _same_state(network, twin),
        "fresh weights follow from the global seed, which cmkit sets before `build`",
        "two builds after torch.manual_seed(0) differ",
        "draw weights from torch's default generator only",
    )
    _check_sites(say, network)
    _check_layouts(say, backbone, data, network)
    given = _network_input(data, conditions)
    _break_zeros(network)
    _check_forward(say, backbone, network, given, data, conditions)
    _check_gradient(say, network, given)
    _check_scales(say, network.eval(), given)
    _check_copies(say, network, twin, given)
    _check_consistency(say, network, given)
    if compile:
        _check_compile(say, network, given)


def check_objective(objective: Objective, data: DataSpec = DIGITS) -> None:
    """The laws of an objective, on images like `data` and small networks with dropout."""
    check_fields(objective)
    say = _Says(objective)
    known = {"target", "teacher", "edm", *CONDITIONS}
    say.unless(
        objective.needs <= known,
        '`needs` holds "target", "teacher", "edm" and fields of cmkit.Cond',
        f"it has {sorted(objective.needs - known)}",
        f"choose among {', '.join(sorted(known))}",
    )
    objective.check(data)
    _check_phase(say, objective)
    x0 = image_noise(0, "testing", range(4), 0, _shape(data)).clamp(-1, 1)
    for step in (0, 60, 99):
        _check_loss(say, objective, x0, data, objective.phase(step, 100))


def check_sampler(sampler: Sampler, data: DataSpec = DIGITS) -> None:
    """The laws of a sampler, on images like `data` and a small denoiser that looks on."""
    check_fields(sampler)
    say = _Says(sampler)
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
        _close(others[:1], out[:1], 1e-5),
        "an image does not depend on the others of its batch",
        "image 0 changed when the others did",
        "take no statistics over the batch",
    )
    with say.trying(
        "it runs on tensors without data, as `cmkit check` does",
        "make tensors on x.device and read no values (.item(), if on a tensor)",
    ):
        meta = _Walk(say, data, device=META).sample(sampler)
    say.like(meta, torch.empty(4, *_shape(data), device=META), "the images", dtype=False)


def check_rescaler(rescaler: Rescaler, sites: Sequence[str] = SITES) -> None:
    """The laws of a rescaler, for a network with `sites`."""
    check_fields(rescaler)
    say = _Says(rescaler)
    sites = tuple(sites)
    with say.trying("it binds to the sites of a network", "accept any tuple of site names"):
        scales = rescaler.bind(sites)
    neutral = True
    for device, sigma in itertools.product((CPU, META), (0.002, 1.0, 80.0)):
        levels = torch.full((3,), sigma, device=device)
        with say.trying("it maps sigma (B,) to scales", "return a function of one tensor"):
            found = scales(levels)
        unknown = sorted(set(found) - set(sites))
        say.unless(
            not unknown,
            "scales belong to sites of the network",
            f"{unknown} are none",
            "iterate over the sites that `bind` is given",
        )
        for site, value in found.items():
            say.unless(
                isinstance(value, Tensor) and value.shape in ((), (3,)),
                "a scale is a tensor of shape () or (B,), so that a new value is no new graph",
                f"{site} has {_told(value)}",
                "wrap it: torch.tensor(value, device=sigma.device)",
            )
            say.unless(
                value.device.type == device.type and value.is_floating_point(),
                "a scale is a floating-point tensor on sigma.device",
                f"{site} is {_told(value)} for sigma on {device}",
                "pass device=sigma.device, dtype=sigma.dtype",
            )
            if device is CPU:
                neutral &= bool((value == 1).all())
                again = scales(levels)[site]
                say.unless(
                    torch.equal(again, value),
                    "scales follow from sigma alone",
                    f"{site} was {value.tolist()} and then {again.tolist()}",
                    "keep no state and draw nothing",
                )
    if not neutral:
        try:
            rescaler.bind(())
        except RecipeError:
            return
        except Exception as error:
            seen = f"{type(error).__name__} was raised"
        else:
            seen = "it was accepted"
        raise say.broken(
            "a scale other than 1 for a site that the network lacks is refused by `bind`",
            f"{seen} for a network without sites",
            "raise cmkit.RecipeError, with the sites that there are",
        )


def check_dataset(dataset: Dataset) -> None:
    """The laws of a data set, on its first batches and images."""
    check_fields(dataset)
    say = _Says(dataset)
    data = dataset.spec()
    say.unless(
        isinstance(data, DataSpec) and data == dataset.spec(),
        "`spec` returns a cmkit.DataSpec, the same each time",
        f"{data!r}, then {dataset.spec()!r}",
        "return DataSpec(channels, resolution, num_classes)",
    )

    def draw(seed: int = 0, start: int = 0, count: int = 3, size: int = 4) -> list[Any]:
        with say.untouched("batches"):
            return list(itertools.islice(dataset.batches(size, seed, CPU, start), count))

    first = draw()
    for batch in first:
        _check_batch(say, batch, data)
    for name, batches, like in (
        ("two streams of one seed differ", draw(), first),
        ("batch 1 of a stream from start = 1 is another", draw(start=1, count=2), first[1:]),
    ):
        say.unless(
            _same_batches(batches, like),
            "a batch is a function of (seed, batch number), so that a run resumes to the same bits",
            name,
            "order by cmkit.permutation(seed, purpose, epoch, n), and count from `start`",
        )
    reference = dataset.reference()
    _check_reference(say, dataset, reference, data)
    count = len(reference.images)  # type: ignore[arg-type]
    if count > 4:
        say.unless(
            not _same_batches(first, draw(seed=1)),
            "another seed is another order",
            "seeds 0 and 1 give the same batches",
            "let the order depend on `seed`",
        )
    if count <= 64:
        for batch in draw(count=count // 4 + 3):
            _check_batch(say, batch, data)


def check_metric(
    metric: Metric,
    data: DataSpec = DIGITS,
    images: Tensor | None = None,
    reference: Tensor | None = None,
) -> None:
    """The laws of a metric, on uint8 images (N, C, H, W), by default 32 random ones like `data`."""
    check_fields(metric)
    say = _Says(metric)
    ours = _Images(images if images is not None else _pictures(0, data))
    real = Reference(
        _Images(reference if reference is not None else _pictures(1, data)), "cmkit-testing"
    )
    names = metric.keys()
    say.unless(
        isinstance(names, tuple) and 0 < len(set(names)) == len(names),
        "`keys` is a tuple of different names",
        f"{names!r}",
        "return a tuple such as ('score',)",
    )
    metric.check(data, len(ours))
    with say.untouched("measure"):
        found = metric.measure(ours, real, CPU)
    say.unless(
        set(found) == set(names),
        "`measure` returns the numbers that `keys` names",
        f"keys {sorted(names)}, numbers {sorted(found)}",
        "make the two agree",
    )
    say.unless(
        all(type(value) in (int, float) and math.isfinite(value) for value in found.values()),
        "numbers are finite Python floats",
        f"{found}",
        "call .item() on a tensor; raise cmkit.NonFiniteError for a number that is none",
    )
    again = metric.measure(ours, real, CPU)
    say.unless(
        again == found,
        "the same images have the same numbers",
        f"{found}, then {again}",
        "seed what you draw: cmkit.Rng(0, 'my-metric', 0, device)",
    )
    for name in names:
        one = metric.only(name)
        say.unless(
            name in one.keys(),  # noqa: SIM118 - a method of Metric, not of a mapping
            "only(key) still returns the key",
            f"only({name!r}).keys() is {one.keys()}",
            "keep that number switched on",
        )
        value = one.measure(ours, real, CPU)[name]
        say.unless(
            math.isclose(value, found[name], rel_tol=1e-6, abs_tol=1e-12),
            "only(key) returns the same number",
            f"{name} = {value} alone and {found[name]} among all",
            "let the numbers not depend on each other",
        )
    with say.trying("`provenance` can be written as JSON", "return plain numbers and strings"):
        json.dumps(metric.provenance(), allow_nan=False)


def check_manifest(manifest: str | Sequence[Plugin], seconds: float = MANIFEST_SECONDS) -> None:
    """The laws of a manifest, a module's name or what its `cmkit_register` returns.

    A fresh Python imports the module, then every target: no torch, and at most `seconds` for the
    module itself, of processor time, beyond cmkit's own.
    """
    say = _Says(manifest if isinstance(manifest, str) else "manifest")
    plugins = list(_registered(say, manifest) if isinstance(manifest, str) else manifest)
    seen: set[tuple[str, str]] = set()
    for plugin in plugins:
        _check_plugin(say, plugin, seen)
    module = manifest if isinstance(manifest, str) else "cmkit.plugins"
    targets = [plugin.target.partition(":")[0] for plugin in plugins]
    told = _fresh_imports(say, module, list(dict.fromkeys(targets)))
    say.unless(
        told["seconds"] <= seconds,
        f"a manifest is imported by every command, within {seconds:g} s",
        f"{module} took {told['seconds']:.2f} s",
        "import in it nothing but cmkit",
    )
    say.unless(
        not told["torch"],
        "neither a manifest nor a module that it names imports torch, so that listing is instant",
        f"importing {told['torch']} imports it",
        "import torch inside functions, or put that code in a sibling module",
    )


CHECKS: dict[str, Callable[..., None]] = {
    "backbone": check_backbone,
    "objective": check_objective,
    "sampler": check_sampler,
    "rescaler": check_rescaler,
    "dataset": check_dataset,
    "metric": check_metric,
}


@dataclass(frozen=True)
class Verdict:
    """What `cmkit plugins check` says of one part: "pass", "fail", or "not checked" and why."""

    kind: str
    name: str
    outcome: str
    detail: str = ""


def check_package(dist: str) -> Iterator[Verdict]:
    """A verdict on each manifest of an installed package, and on each of its parts.

    A part is made from its defaults, or from the table `examples["kind.name"]` of its manifest. One
    that lacks a required key, files, weights or memory is "not checked". PluginError when no
    package of that name has an entry point in the group `cmkit`.
    """
    entries = [e for e in entry_points(group="cmkit") if e.dist and _named(e.dist.name, dist)]
    if not entries:
        known = sorted({row.dist for row in discover().rows})
        raise PluginError(f"no installed package {dist!r} offers parts; known: {', '.join(known)}")
    examples: dict[str, dict[str, Any]] = {}
    for entry in entries:
        try:
            check_manifest(entry.module)
            examples |= getattr(importlib.import_module(entry.module), "examples", {})
        except CmkitError as error:
            yield Verdict("manifest", entry.module, "fail", str(error))
        else:
            yield Verdict("manifest", entry.module, "pass")
    for row in discover().rows:
        if _named(row.dist, dist) and row.plugin:
            yield _verdict(row, examples.get(f"{row.kind}.{row.name}"))
        elif _named(row.dist, dist):
            yield Verdict(row.kind, row.name, "fail", row.broken or "")


def _verdict(row: Row, example: Mapping[str, Any] | None) -> Verdict:
    try:
        model = discover().load(row.kind, row.qualified)
        part = model.model_validate_json(json.dumps(example or {}))
        check_part(part)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        place = f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}"
        if example is None and fault["type"] == "missing":
            cure = f'examples = {{"{row.kind}.{row.name}": {{...}}}} in the manifest'
            return Verdict(row.kind, row.name, "not checked", f"{place}; name {cure}")
        return Verdict(row.kind, row.name, "fail", f"its example is refused: {place}")
    except (DataError, CheckpointError, DownloadError, ResourceError) as error:
        return Verdict(row.kind, row.name, "not checked", str(error))
    except CmkitError as error:
        return Verdict(row.kind, row.name, "fail", str(error))
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        return Verdict(row.kind, row.name, "fail", f"{type(error).__name__}: {reason}")
    return Verdict(row.kind, row.name, "pass")


def _named(name: str, dist: str) -> bool:
    """Whether two spellings of a distribution are one (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower() == re.sub(r"[-_.]+", "-", dist).lower()


class _Says:
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
            f"{_told(out)} for {_told(x)}",
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


def _told(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} {value.dtype} on {value.device}"
    return f"{type(value).__name__} {str(value)[:60]}"


def _shape(data: DataSpec) -> tuple[int, int, int]:
    return data.channels, data.resolution, data.resolution


def _close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    """Whether a is b up to `tolerance` of the root mean square of b."""
    return bool((a.double() - b.double()).square().mean().sqrt() <= tolerance * _rms(b))


def _rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item()


def _built(say: _Says, backbone: Backbone, data: DataSpec, conditions: frozenset[str]) -> Network:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = backbone.build(data, conditions)
    say.unless(
        isinstance(network, Network),
        "`build` returns a cmkit.Network",
        f"{type(network).__name__}",
        "let its class derive from cmkit.Network",
    )
    return network


def _same_state(a: nn.Module, b: nn.Module) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


@torch.no_grad()
def _break_zeros(network: Network) -> None:
    """No weight is small: a fresh network is often deaf to most of its parts."""
    generator = torch.Generator().manual_seed(1)
    for parameter in network.parameters():
        parameter.normal_(std=0.1, generator=generator)


@dataclass(frozen=True)
class _Input:
    x: Tensor
    c_noise: Tensor
    cond: Cond

    def to(self, device: torch.device) -> _Input:
        return _Input(self.x.to(device), self.c_noise.to(device), self.cond.to(device))

    def others(self) -> _Input:
        """The same first image among other ones."""
        x, c_noise = self.x.clone(), self.c_noise.clone()
        x[1:], c_noise[1:] = x[1:].flip(-1) + 0.5, c_noise[1:] - 0.3
        return _Input(x, c_noise, self.cond)


def _network_input(data: DataSpec, conditions: frozenset[str]) -> _Input:
    x = image_noise(0, "testing", range(3), 0, _shape(data))
    label = torch.arange(3) % (data.num_classes or 1) if "label" in conditions else None
    levels = {name: torch.tensor([0.5, 1.0, 2.0]) for name in conditions & {"guidance", "sigma_to"}}
    return _Input(x, torch.tensor([-1.5, 0.0, 1.1]), Cond(label=label, **levels))


def _run(network: Network, given: _Input, scales: Mapping[str, Tensor] = {}) -> Tensor:
    return network(given.x, given.c_noise, given.cond, scales)


def _check_sites(say: _Says, network: Network) -> None:
    sites = network.sites
    say.unless(
        isinstance(sites, tuple)
        and len(set(sites)) == len(sites)
        and all(isinstance(s, str) and re.fullmatch(r"[a-z_]+\.\d+", s) for s in sites),
        "`sites` is a tuple of different names such as 'skip.0'",
        f"{sites!r}",
        "name each place by its family and its number, counted from the input on",
    )
    say.unless(
        network.late <= set(sites),
        "`late` names sites of the network",
        f"{sorted(network.late - set(sites))} are none",
        "take a subset of `sites`",
    )


@torch.no_grad()
def _check_forward(
    say: _Says,
    backbone: Backbone,
    network: Network,
    given: _Input,
    data: DataSpec,
    conditions: frozenset[str],
) -> None:
    network.eval()
    with say.trying("a network takes (x, c_noise, cond, scales)", "compare cmkit.Network.forward"):
        with say.untouched("forward"):
            out = _run(network, given)
        again = _run(network, given)
    say.like(out, given.x, "F")
    say.unless(
        torch.equal(out, again),
        "in eval mode F follows from its arguments",
        "two calls differ",
        "draw nothing, and keep no state between calls",
    )
    changes = {
        "x": replace(given, x=given.x + 0.5),
        "c_noise": replace(given, c_noise=given.c_noise + 0.5),
    }
    for name in sorted(conditions):
        value = getattr(given.cond, name)
        changes[f"cond.{name}"] = replace(given, cond=replace(given.cond, **{name: value.flip(0)}))
    for name, other in changes.items():
        if name == "cond.label" and (data.num_classes or 0) < 2:
            continue
        say.unless(
            not torch.equal(_run(network, other), out),
            "F depends on x, on c_noise and on each condition that it was built for",
            f"it is deaf to {name}",
            f"embed {name}, or drop it from `accepts`",
        )
    _check_batch_independence(say, network, given)
    with (
        say.trying("F can be computed under autocast", "let torch choose the types"),
        torch.autocast("cpu", torch.bfloat16),
    ):
        low = _run(network, given)
    say.like(low, given.x, "F")
    with (
        say.trying(
            "a network can be built and run without memory, on the device `meta`",
            "make all tensors on x.device, and read no values",
        ),
        META,
    ):
        meta = backbone.build(data, conditions).eval()
        empty = given.to(META)
        flown = _run(meta, empty)
    say.like(flown, empty.x, "F")


def _check_batch_independence(say: _Says, network: Network, given: _Input) -> None:
    held = {name: value.clone() for name, value in network.state_dict().items()}
    for training in (False, True):
        network.train(training)
        outs = []
        for batch in (given, given.others()):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                outs.append(_run(network, batch))
        say.unless(
            _close(outs[1][:1], outs[0][:1], 1e-4),
            "an image does not depend on the others of its batch, in training neither",
            f"image 0 changed when the others did, in {'training' if training else 'eval'} mode",
            "normalize each image alone: GroupNorm or LayerNorm, no BatchNorm",
        )
    network.eval()
    moved = [name for name, value in network.state_dict().items() if not _equal(value, held[name])]
    say.unless(
        not moved,
        "a forward pass changes no state: averaged copies follow the parameters alone",
        f"{', '.join(moved[:3])} changed",
        "keep running statistics out of the network",
    )


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a, b)


def _check_gradient(say: _Says, network: Network, given: _Input) -> None:
    network.train().zero_grad(set_to_none=True)
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(0)
        out = _run(network, given)
        (out * torch.linspace(-1, 2, out.numel()).view_as(out)).sum().backward()
    deaf = [
        name
        for name, p in network.named_parameters()
        if p.requires_grad and (p.grad is None or not bool(p.grad.any()))
    ]
    network.zero_grad(set_to_none=True)
    say.unless(
        not deaf,
        "a gradient reaches every parameter",
        f"none reaches {', '.join(deaf[:3])}{' ...' if len(deaf) > 3 else ''}",
        "use it in forward, drop it, or make it a buffer",
    )


@torch.no_grad()
def _check_scales(say: _Says, network: Network, given: _Input) -> None:
    out = _run(network, given)
    for one in (torch.tensor(1.0), torch.ones(len(given.x))):
        say.unless(
            torch.equal(_run(network, given, dict.fromkeys(network.sites, one)), out),
            "scale 1 at every site is the identity, bit for bit",
            f"scales of shape {tuple(one.shape)} change the output",
            "multiply by the scale, and by nothing else",
        )
    for site in network.sites:
        say.unless(
            not torch.equal(_run(network, given, {site: torch.tensor(0.5)}), out),
            "every site changes the output",
            f"scale 0.5 at {site} changes nothing",
            "multiply by scales[site] where it is present, or drop the site",
        )
        apart = _run(network, given, {site: torch.tensor([1.0, 0.5, 0.25])})
        say.unless(
            _close(apart[:1], out[:1], 1e-4) and not _close(apart[1:], out[1:], 0),
            "a scale of shape (B,) acts on each image by its own value",
            f"at {site} it does not",
            "view it as (B, 1, 1, 1) before you multiply",
        )
    if network.late:
        _check_late(say, network, given)


def _check_late(say: _Says, network: Network, given: _Input) -> None:
    half = dict.fromkeys(sorted(network.late), torch.tensor(0.5))
    with say.trying("a network with `late` sites has encode and decode", "write both"):
        encoded = network.encode(given.x, given.c_noise, given.cond, {})
        out = network.decode(encoded, half)
        again = network.decode(encoded, {})
    for found, scales in ((out, half), (again, {})):
        say.unless(
            _close(found, _run(network, given, scales), 1e-5),
            "decode(encode(..), scales) is forward, up to 1e-5 of its root mean square",
            "it is not, for other scales of the late sites than those that `encode` was given",
            "let `encode` read no late scale, and `decode` change nothing that it is given",
        )


def _check_copies(say: _Says, network: Network, twin: Network, given: _Input) -> None:
    with torch.no_grad():
        out = _run(network, given)
        with say.trying(
            "weights survive state_dict, load_state_dict and copy.deepcopy",
            "register every tensor as a parameter or a buffer",
        ):
            twin.eval().load_state_dict(network.state_dict())
            copied = copy.deepcopy(network)
        for other, how in ((twin, "loaded from its state_dict"), (copied, "copied")):
            say.unless(
                torch.equal(_run(other, given), out),
                "a network is its parameters and buffers",
                f"one {how} has another output",
                "register every tensor as a parameter or a buffer",
            )


def _check_consistency(say: _Says, network: Network, given: _Input) -> None:
    denoiser = Denoiser(network, Noise())
    sigma = torch.full((len(given.x),), denoiser.noise.sigma_min)
    with torch.no_grad():
        say.unless(
            torch.equal(denoiser(given.x, sigma, given.cond), given.x),
            "a consistency model is the identity at sigma_min, bit for bit",
            "x0_hat is not x there",
            "keep F finite: 0 * F must be 0",
        )


def _check_compile(say: _Says, network: Network, given: _Input) -> None:
    torch._dynamo.reset()
    try:
        with (
            say.trying(
                "torch.compile takes the network whole (fullgraph=True)",
                "branch on shapes and options, not on values; print nothing",
            ),
            torch.no_grad(),
        ):
            compiled = torch.compile(network, fullgraph=True, backend="eager")
            out = compiled(given.x, given.c_noise, given.cond, {})
    finally:
        torch._dynamo.reset()
    with torch.no_grad():
        say.unless(
            _close(out, _run(network, given), 1e-5),
            "the compiled network computes the same",
            "its output differs",
            "keep no Python state that forward changes",
        )


def _check_layouts(say: _Says, backbone: Backbone, data: DataSpec, network: Network) -> None:
    own = network.state_dict()
    for layout in backbone.layouts(data):
        say.unless(
            not layout.matches(own),
            "no layout of another project matches the network's own names",
            f"{layout.name} does",
            "let `matches` look for a name that only that project has",
        )
        try:
            written = layout.write(own)
        except CheckpointError:
            continue  # the project has no name for these options
        back = layout.read(written)
        say.unless(
            layout.matches(written)
            and back.keys() == own.keys()
            and all(_equal(back[name], own[name]) for name in own),
            "a layout matches what it wrote, and reads it back bit for bit",
            f"{layout.name} does not",
            "make `read` the inverse of `write`",
        )


class _Small(Network):
    """A network with dropout that embeds whatever it is given."""

    sites = ("skip.0", "emb.0")

    def __init__(self, data: DataSpec):
        super().__init__()
        generator = torch.Generator().manual_seed(2)
        self.first = nn.Conv2d(data.channels, 8, 3, padding=1)
        self.label = nn.Embedding(data.num_classes or 1, 8)
        self.dropout = nn.Dropout(0.3)
        self.second = nn.Conv2d(8, data.channels, 3, padding=1)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.normal_(std=0.3, generator=generator)

    def forward(
        self, x: Tensor, c_noise: Tensor, cond: Cond, scales: Mapping[str, Tensor]
    ) -> Tensor:
        emb = torch.sin(c_noise)[:, None]
        if cond.label is not None:
            emb = emb + self.label(cond.label)
        for level in (cond.guidance, cond.sigma_to):
            if level is not None:
                emb = emb + torch.cos(level.float())[:, None]
        h = self.dropout(torch.tanh(self.first(x) + emb[:, :, None, None]))
        return self.second(h).float()


class _Watched(Denoiser):
    """A denoiser that remembers whether it saw the labels that it was given."""

    def __init__(self, data: DataSpec, precond: str):
        super().__init__(_Small(data), Noise(), precond)
        self.calls = 0
        self.labelled = False

    def forward(self, x: Tensor, sigma: Tensor, cond: Cond = Cond()) -> Tensor:  # noqa: B008
        self.calls += 1
        self.labelled |= cond.label is not None
        return super().forward(x, sigma, cond)


class _NoTorch(TorchFunctionMode):
    """Inside, a call of torch is an error."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise TypeError(f"torch.{getattr(func, '__name__', func)} was called")


def _check_phase(say: _Says, objective: Objective) -> None:
    steps = (0, 1, 50, 99, 1, 0)
    with (
        say.trying("`phase` is pure Python", "use the math module"),
        say.untouched("phase"),
        _NoTorch(),
    ):
        phases = [objective.phase(step, 100) for step in steps]
    for step, phase in zip(steps, phases, strict=True):
        say.unless(
            isinstance(phase, Phase) and phase.step == step,
            "`phase` returns a cmkit.Phase of that step",
            f"{phase!r} at step {step}",
            "return Phase(step, ...)",
        )
        numbers = [phase.target_ema, *phase.log.values()]
        say.unless(
            all(type(number) in (int, float) for number in numbers)
            and type(phase.num_sigmas) in (int, type(None)),
            "a phase holds plain Python numbers",
            f"{phase!r}",
            "convert with int() or float()",
        )
        say.unless(
            0 <= phase.target_ema <= 1 and (phase.num_sigmas is None or phase.num_sigmas >= 2),
            "target_ema lies in [0, 1], and a grid has at least two points",
            f"{phase!r}",
            "clip the schedule at its ends",
        )
    say.unless(
        phases[0] == phases[5] and phases[1] == phases[4],
        "a phase follows from (step, total) alone, so that a run resumes to the same bits",
        "step 1 after step 99 has another phase",
        "keep no state between calls",
    )


def _models(objective: Objective, data: DataSpec) -> Models:
    """The copies that training would hold, a teacher unlike the student among them."""
    precond = "edm" if "edm" in objective.needs else "consistency"
    online = _Watched(data, precond).train()
    target, teacher = online, None
    if "target" in objective.needs:
        target = copy.deepcopy(online).requires_grad_(False)
    if "teacher" in objective.needs:
        teacher = _Watched(data, "edm").eval().requires_grad_(False)
        for parameter in teacher.parameters():
            parameter.mul_(0.9)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = objective.companions(data)
    companions = {name: companion.network.train() for name, companion in made.items()}
    return Models(online, target, teacher, companions=companions)


def _check_loss(say: _Says, objective: Objective, x0: Tensor, data: DataSpec, phase: Phase) -> None:
    label = torch.arange(len(x0)) % data.num_classes if data.num_classes else None
    given = x0.clone()

    def lose(index: int = 0, seed: int = 0) -> tuple[Tensor, Models]:
        models = _models(objective, data)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            rng = Rng(0, "testing", index, CPU)
            with say.untouched("loss"):
                return objective.loss(models, x0, Cond(label=label), phase, rng), models

    loss, models = lose()
    say.unless(
        isinstance(loss, Tensor) and loss.shape == (len(x0),) and loss.dtype == torch.float32,
        "`loss` returns one float32 number an image, (B,), unreduced",
        f"{_told(loss)}",
        "average over pixels: .flatten(1).mean(1)",
    )
    say.unless(
        bool(loss.isfinite().all()),
        "a loss is finite",
        f"{loss.tolist()} at step {phase.step}",
        "look for a division by 0 at the ends of the grid",
    )
    say.unless(
        torch.equal(x0, given), "x0 is left alone", "`loss` wrote into it", "work on a new tensor"
    )
    say.unless(
        torch.equal(loss, lose()[0]) and torch.equal(loss, lose(seed=1)[0]),
        "a loss follows from its arguments: rng is where all draws come from",
        "two calls with equal rng differ",
        "use rng, and call the models inside `with cmkit.shared_dropout(rng)`",
    )
    say.unless(
        not torch.equal(loss, lose(index=1)[0]),
        "another step draws other noise",
        "rng of another step gives the same loss",
        "draw from rng: rng.normal_like(x0)",
    )
    say.unless(
        label is None or models.online.labelled,  # type: ignore[attr-defined]
        "the online network sees the conditions",
        "it was called without the label",
        "pass cond on: models.online(x, sigma, cond)",
    )
    _check_loss_gradient(say, loss, models)
    with torch.autocast("cpu", torch.bfloat16):
        low, _ = lose()
    say.unless(
        low.dtype == torch.float32 and bool(low.isfinite().all()),
        "a loss under autocast is finite float32",
        f"{low.dtype} {low.tolist()}",
        "sum squares in float32",
    )


def _check_loss_gradient(say: _Says, loss: Tensor, models: Models) -> None:
    with say.trying("a loss has a gradient", "call models.online outside torch.no_grad()"):
        loss.mean().backward()
    say.unless(
        any(p.grad is not None and bool(p.grad.any()) for p in models.online.parameters()),
        "the gradient reaches the online network",
        "it is zero everywhere",
        "call models.online outside torch.no_grad(), and do not detach it",
    )


class _Walk:
    """One run of a sampler on four images, watched; with `swap` all but the first are others."""

    def __init__(self, say: _Says, data: DataSpec, device: torch.device = CPU, swap: bool = False):
        self.say = say
        self.rows = [0, 11, 12, 13] if swap else [0, 1, 2, 3]
        self.shape = _shape(data)
        self.device = device
        self.calls = 0
        self.inner = Denoiser(_Small(data), Noise()).eval().to(device)
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
            f"{_told(sigma)}",
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


class _Images(TorchDataset[Tensor]):
    def __init__(self, images: Tensor):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.images[index]


def _pictures(seed: int, data: DataSpec) -> Tensor:
    noise = image_noise(seed, "testing", range(32), 0, _shape(data))
    return (noise * 60 + 128).clamp(0, 255).to(torch.uint8)


def _check_batch(say: _Says, batch: Any, data: DataSpec) -> None:
    say.unless(
        isinstance(batch, tuple) and len(batch) == 2 and isinstance(batch[1], Cond),
        "a batch is (x0, cmkit.Cond)",
        f"{type(batch).__name__}",
        "yield x0, Cond(label=...)",
    )
    x0, cond = batch
    shape = (4, *_shape(data))
    say.unless(
        isinstance(x0, Tensor) and tuple(x0.shape) == shape and x0.dtype == torch.float32,
        f"x0 is float32 of shape {shape}, every batch full",
        f"{_told(x0)}",
        "go on into the next epoch when one ends",
    )
    say.unless(
        bool((x0.abs() <= 1).all()),
        "x0 lies in [-1, 1]",
        f"from {x0.min().item():g} to {x0.max().item():g}",
        "x0 = pixels / 127.5 - 1",
    )
    if data.num_classes is None:
        say.unless(
            cond.label is None,
            "labels are absent where spec().num_classes is None",
            f"{_told(cond.label)}",
            "set num_classes, or give no label",
        )
        return
    say.unless(
        isinstance(cond.label, Tensor)
        and cond.label.shape == (4,)
        and cond.label.dtype == torch.int64
        and bool(((cond.label >= 0) & (cond.label < data.num_classes)).all()),
        f"labels are int64 (B,), from 0 to {data.num_classes - 1}",
        f"{cond.label.tolist() if isinstance(cond.label, Tensor) else cond.label!r}",
        "number the classes from 0, and count them in spec()",
    )


def _same_batches(a: list[Any], b: list[Any]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x, y)
        and (c.label is d.label or (c.label is not None and torch.equal(c.label, d.label)))
        for (x, c), (y, d) in zip(a, b, strict=True)
    )


def _check_reference(say: _Says, dataset: Dataset, reference: Reference, data: DataSpec) -> None:
    say.unless(
        isinstance(reference, Reference) and len(reference.images) > 0,  # type: ignore[arg-type]
        "`reference` returns a cmkit.Reference with images",
        f"{_told(reference)}",
        "return Reference(images, fingerprint)",
    )
    image = reference.images[0]
    say.unless(
        isinstance(image, Tensor)
        and image.dtype == torch.uint8
        and tuple(image.shape) == _shape(data),
        f"reference images are uint8 of shape {_shape(data)}, as spec() says",
        f"{_told(image)}",
        "give the pixels before they become x0",
    )
    again = dataset.reference()
    say.unless(
        isinstance(reference.fingerprint, str)
        and bool(reference.fingerprint)
        and again.fingerprint == reference.fingerprint
        and torch.equal(again.images[0], image),
        "a fingerprint is a string that follows from the pixels",
        f"{reference.fingerprint!r}, then {again.fingerprint!r}",
        "hash the files or their names, sizes and times",
    )


def _registered(say: _Says, module: str) -> list[Plugin]:
    with say.trying("a manifest can be imported", "try `python -c 'import ...'`"):
        found = importlib.import_module(module)
    register = getattr(found, "cmkit_register", None)
    say.unless(
        inspect.isfunction(register) and hasattr(register, "cmkit_impl"),
        "a manifest has a function cmkit_register with @cmkit.hookimpl",
        "there is none",
        "write one, decorated, that returns a list of cmkit.Plugin",
    )
    assert register is not None
    with say.trying("cmkit_register takes nothing", "compare docs/plugins.md"):
        plugins = register()
    say.unless(
        isinstance(plugins, list) and len(plugins) > 0,
        "cmkit_register returns a list of cmkit.Plugin",
        f"{_told(plugins)}",
        "return [cmkit.Plugin(kind, name, target, summary)]",
    )
    return plugins


def _check_plugin(say: _Says, plugin: Plugin, seen: set[tuple[str, str]]) -> None:
    say.unless(
        isinstance(plugin, Plugin),
        "cmkit_register returns a list of cmkit.Plugin",
        f"{plugin!r} in it",
        "cmkit.Plugin(kind, name, target, summary)",
    )
    key = (plugin.kind, plugin.name)
    say.unless(
        key not in seen,
        "a package offers a name of a kind once",
        f"{plugin.kind} {plugin.name!r} twice",
        "rename one",
    )
    seen.add(key)
    say.unless(
        plugin.kind in CLASSES and plugin.api == api_version,
        f"a part is of a known kind, for cmkit API {api_version}",
        f"kind {plugin.kind!r}, API {plugin.api}",
        f"choose among {', '.join(CLASSES)}",
    )
    say.unless(
        NAME.fullmatch(plugin.name) is not None and plugin.name == plugin.name.lower(),
        "a name is of lower-case letters, digits, '_', '-' and '.'",
        f"{plugin.name!r}",
        "take the lower-case acronym of its paper",
    )
    say.unless(
        bool(plugin.summary.strip()) and len(plugin.summary.splitlines()) == 1,
        "a summary is one line, shown by `cmkit plugins`",
        f"{plugin.summary!r} for {plugin.name}",
        "say what it is in a few words",
    )
    module, _, attribute = plugin.target.partition(":")
    with say.trying(f"target {plugin.target!r} can be imported", "name 'module:Class'"):
        found = getattr(importlib.import_module(module), attribute)
    wanted = CLASSES[plugin.kind]
    say.unless(
        isinstance(found, type)
        and issubclass(found, wanted)
        and not getattr(found, "__abstractmethods__", None),
        f"the target of a {plugin.kind} is a cmkit.{wanted.__name__} with all its methods",
        f"{plugin.target} is {found!r}"
        f" without {', '.join(sorted(getattr(found, '__abstractmethods__', ()))) or 'that base'}",
        f"derive it from cmkit.{wanted.__name__} and write what it lacks",
    )


def _fresh_imports(say: _Says, module: str, targets: list[str]) -> dict[str, Any]:
    """{"seconds": of the manifest's import, "torch": the first module that brings torch}."""
    code = (
        "import json, sys, time\n"
        f"sys.path[:] = {sys.path!r}\n"
        "import cmkit.plugins, cmkit.kinds\n"
        "start, first = time.process_time(), ''\n"
        f"for name in {[module, *targets]!r}:\n"
        "    __import__(name)\n"
        "    if name == " + repr(module) + ":\n"
        "        seconds = time.process_time() - start\n"
        "    if 'torch' in sys.modules and not first:\n"
        "        first = name\n"
        "print(json.dumps({'seconds': seconds, 'torch': first}))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    say.unless(
        done.returncode == 0,
        "a fresh Python can import a manifest and its targets",
        (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1],
        "look at what importing them does",
    )
    return dict(json.loads(done.stdout.splitlines()[-1]))
