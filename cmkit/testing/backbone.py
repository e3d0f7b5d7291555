"""The check of a backbone and of the network that it builds."""

from __future__ import annotations

import copy
import itertools
import re
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from cmkit.denoiser import Cond, Denoiser, Network
from cmkit.errors import CheckpointError
from cmkit.kinds import Backbone
from cmkit.noise import Noise
from cmkit.plan.record import CONDITIONS
from cmkit.testing.protocol import Report, report_on
from cmkit.testing.subjects import DIGITS, META, PROMPTS, close, draws, same, told
from cmkit.values import DataSpec


def check_backbone(backbone: Backbone, data: DataSpec = DIGITS, compile: bool = True) -> None:
    """Check a backbone and the network that it builds for `data`, with prompts of `data.text`, or
    where it has none and the backbone accepts text, invented ones with pooled features and sizes.

    `compile` = False leaves torch.compile out, which takes most of the time.
    """
    report = report_on(backbone)
    report.require(
        backbone.accepts <= CONDITIONS,
        "`accepts` names fields of cmkit.Cond",
        f"it has {sorted(backbone.accepts - CONDITIONS)}",
        f"choose among {', '.join(sorted(CONDITIONS))}",
    )
    if "text" in backbone.accepts and data.text is None:
        data = replace(data, text=PROMPTS)
    absent = PROMPTS.conditions - (data.text.conditions if data.text else frozenset())
    conditions = backbone.accepts - absent - ({"label"} if not data.num_classes else set())
    network, twin = (_built(report, backbone, data, conditions) for _ in range(2))
    report.require(
        same(network.state_dict(), twin.state_dict()),
        "fresh weights follow from the global seed, which cmkit sets before `build`",
        "two builds after torch.manual_seed(0) differ",
        "draw weights from torch's default generator only",
    )
    _check_sites(report, network)
    given = _input(data, conditions)
    generator = torch.Generator().manual_seed(1)
    # Fresh networks are often zero at the end, and then depend on nothing.
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    _check_forward(report, network.eval(), given)
    _check_batch_independence(report, network, given)
    _check_gradient(report, network.train(), given)
    _check_scales(report, network.eval(), given)
    _check_late(report, network, given)
    _check_factors(report, network, given)
    _check_memory_format(report, network, given)
    _check_copies(report, network, twin, given)
    if compile:
        _check_compile(report, network, given)
    with (
        report.trying(
            "a network can be built and run without memory, on the device `meta`",
            "make all tensors on x.device, and read no values",
        ),
        torch.no_grad(),
        META,
    ):
        empty = _Input(*(value.to(META) for value in given))
        out = backbone.build(data, conditions).eval()(*empty, {})
    report.like(out, empty.x, "F")
    _check_layouts(report, backbone, data, network)


class _Input(NamedTuple):
    """What a network is called with, before the scales."""

    x: Tensor
    c_noise: Tensor
    cond: Cond


def _input(data: DataSpec, conditions: frozenset[str]) -> _Input:
    """Three noisy images like `data`, each with its own noise level and conditions."""
    x = draws(data).noise(range(3), 0)
    label = draws(data).labels(range(3)) if "label" in conditions else None
    levels = {name: torch.tensor([0.5, 1.0, 2.0]) for name in conditions & {"guidance", "sigma_to"}}
    prompts = told(data.text, 3) if data.text else {}
    given = levels | {name: prompts[name] for name in conditions & prompts.keys()}
    return _Input(x, torch.tensor([-1.5, 0.0, 1.1]), Cond(label=label, **given))


def _built(
    report: Report, backbone: Backbone, data: DataSpec, conditions: frozenset[str]
) -> Network:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = backbone.build(data, conditions)
    report.require(
        isinstance(network, Network),
        "`build` returns a cmkit.Network",
        f"{type(network).__name__}",
        "let its class derive from cmkit.Network",
    )
    return network


def _check_layouts(report: Report, backbone: Backbone, data: DataSpec, network: Network) -> None:
    own = network.state_dict()
    for layout in backbone.layouts(data):
        report.require(
            not layout.matches(own),
            "no layout of another project matches the network's own names",
            f"{layout.name} does",
            "let `matches` look for a name that only that project has",
        )
        try:
            written = layout.write(own)
        except CheckpointError:
            continue  # the project has no name for these options
        report.require(
            layout.matches(written) and same(layout.read(written), own),
            "a layout matches what it wrote, and reads it back bit for bit",
            f"{layout.name} does not",
            "make `read` the inverse of `write`",
        )


def _check_sites(report: Report, network: Network) -> None:
    sites = network.sites
    report.require(
        isinstance(sites, tuple)
        and len(set(sites)) == len(sites)
        and all(isinstance(s, str) and re.fullmatch(r"[a-z_]+\.\d+", s) for s in sites),
        "`sites` is a tuple of different names such as 'skip.0'",
        f"{sites!r}",
        "name each place by its family and its number, counted from the input on",
    )
    report.require(
        network.late <= set(sites),
        "`late` names sites of the network",
        f"{sorted(network.late - set(sites))} are none",
        "take a subset of `sites`",
    )


@torch.no_grad()
def _check_forward(report: Report, network: Network, given: _Input) -> None:
    with report.trying(
        "a network takes (x, c_noise, cond, scales)", "compare cmkit.Network.forward"
    ):
        with report.untouched("forward"):
            out = network(*given, {})
        again = network(*given, {})
    report.like(out, given.x, "F")
    report.require(
        torch.equal(out, again),
        "in eval mode F follows from its arguments",
        "two calls differ",
        "draw nothing, and keep no state between calls",
    )
    changes = {
        "x": given._replace(x=given.x + 0.5),
        "c_noise": given._replace(c_noise=given.c_noise + 0.5),
    }
    for name, value in vars(given.cond).items():
        if value is not None and not torch.equal(value, value.flip(0)):  # more than one class
            turned = replace(given.cond, **{name: value.flip(0)})
            changes[f"cond.{name}"] = given._replace(cond=turned)
    for name, other in changes.items():
        report.require(
            not torch.equal(network(*other, {}), out),
            "F depends on x, on c_noise and on each condition that it was built for",
            f"it does not depend on {name}",
            f"embed {name}, or drop it from `accepts`",
        )
    denoiser = Denoiser(network, Noise())
    sigma = torch.full((len(given.x),), denoiser.noise.sigma_min)
    report.require(
        torch.equal(denoiser(given.x, sigma, given.cond), given.x),
        "a consistency model is the identity at sigma_min, bit for bit",
        "x0_hat is not x there",
        "keep F finite: 0 * F must be 0",
    )
    with (
        report.trying("F can be computed under autocast", "let torch choose the types"),
        torch.autocast("cpu", torch.bfloat16),
    ):
        low = network(*given, {})
    report.like(low, given.x, "F")


@torch.no_grad()
def _check_batch_independence(report: Report, network: Network, given: _Input) -> None:
    others = _Input(given.x.clone(), given.c_noise.clone(), given.cond)
    others.x[1:], others.c_noise[1:] = given.x[1:].flip(-1) + 0.5, given.c_noise[1:] - 0.3
    held = {name: value.clone() for name, value in network.state_dict().items()}
    for training in (False, True):
        network.train(training)
        outs = []
        for batch in (given, others):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                outs.append(network(*batch, {}))
        report.require(
            close(outs[1][:1], outs[0][:1], 1e-4),
            "an image does not depend on the others of its batch, in training neither",
            f"image 0 changed when the others did, in {'training' if training else 'eval'} mode",
            "normalize each image alone: GroupNorm or LayerNorm, no BatchNorm",
        )
    moved = [k for k, v in network.state_dict().items() if not torch.equal(v, held[k])]
    report.require(
        not moved,
        "a forward pass changes no state: averaged copies follow the parameters alone",
        f"{', '.join(moved[:3])} changed",
        "keep running statistics out of the network, and move weights in `settle`",
    )


def _check_gradient(report: Report, network: Network, given: _Input) -> None:
    network.zero_grad(set_to_none=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        out = network(*given, {})
        (out * torch.linspace(-1, 2, out.numel()).view_as(out)).sum().backward()
    unreached = [
        name
        for name, p in network.named_parameters()
        if p.requires_grad and (p.grad is None or not bool(p.grad.any()))
    ]
    network.zero_grad(set_to_none=True)
    report.require(
        not unreached,
        "a gradient reaches every parameter",
        f"none reaches {', '.join(unreached[:3])}{' ...' if len(unreached) > 3 else ''}",
        "use it in forward, drop it, or make it a buffer",
    )


@torch.no_grad()
def _check_scales(report: Report, network: Network, given: _Input) -> None:
    out = network(*given, {})
    for rounded, one in itertools.product((False, True), (torch.tensor(1.0), torch.ones(3))):
        with torch.autocast("cpu", torch.bfloat16, enabled=rounded):
            same = network(*given, dict.fromkeys(network.sites, one))
            report.require(
                torch.equal(same, network(*given, {})),
                "scale 1 at every site is the identity, bit for bit, under autocast as well",
                f"scales of shape {tuple(one.shape)} change the output",
                "multiply by the scale, and by nothing else",
            )
    for site in network.sites:
        half = network(*given, {site: torch.tensor(0.5)})
        report.require(
            not torch.equal(half, out),
            "every site changes the output",
            f"scale 0.5 at {site} changes nothing",
            "multiply by scales[site] where it is present, or drop the site",
        )
        apart = network(*given, {site: torch.tensor([1.0, 0.5, 0.25])})
        report.require(
            close(apart[:2], torch.cat([out[:1], half[1:2]]), 1e-4)
            and not torch.equal(apart[2], out[2]),
            "a scale of shape (B,) acts on each image by its own value",
            f"at {site} it does not",
            "view it as (B, 1, 1, 1) before you multiply",
        )
    for family, sites in itertools.groupby(sorted(network.sites), lambda s: s.partition(".")[0]):
        scaled, names = [], list(sites)
        for value in (1.0234375, 1.02):  # what bfloat16 makes of 1.02, and 1.02
            with torch.autocast("cpu", torch.bfloat16):
                scaled.append(network(*given, dict.fromkeys(names, torch.tensor(value))))
        report.require(
            not torch.equal(*scaled),
            "a scale keeps its value under autocast, so that a search keeps its grid",
            f"at {family} 1.02 is taken for 1.0234375",
            "multiply in float32, and round the product",
        )


@torch.no_grad()
def _check_late(report: Report, network: Network, given: _Input) -> None:
    if not network.late:
        return
    half = dict.fromkeys(sorted(network.late), torch.tensor(0.5))
    with report.trying("a network with `late` sites has encode and decode", "write both"):
        encoded = network.encode(*given, {})
        out = network.decode(encoded, half)
        again = network.decode(encoded, {})
    for found, scales in ((out, half), (again, {})):
        report.require(
            close(found, network(*given, scales), 1e-5),
            "decode(encode(..), scales) is forward, up to 1e-5 of its root mean square",
            "it is not, for other scales of the late sites than those that `encode` was given",
            "let `encode` read no late scale, and `decode` change nothing that it is given",
        )


@torch.no_grad()
def _check_factors(report: Report, network: Network, given: _Input) -> None:
    """Check that what `factors` folds is exact, for one number a family and for one a site."""
    families = dict.fromkeys(site.partition(".")[0] for site in network.sites)
    ratio = dict(zip(families, (0.75, 1.25, 0.875, 1.5), strict=False))
    by_family = {site: ratio.get(site.partition(".")[0], 1.125) for site in network.sites}
    by_site = {site: 0.75 + k / 64 for k, site in enumerate(network.sites)}
    for scales in (by_family, by_site):
        with report.trying("`factors` takes the numbers of sites", "compare Network.factors"):
            factors, left = network.factors(scales)
        state = network.state_dict()
        report.require(
            factors.keys() <= state.keys() and left.keys() <= scales.keys(),
            "`factors` names tensors of the state dict, and sites",
            f"it names {sorted({*factors} - {*state} | {*left} - {*scales})}",
            "return (factor of each tensor, why each other site cannot be folded)",
        )
        folded = copy.deepcopy(network)
        for name, factor in factors.items():
            folded.state_dict()[name].mul_(factor)
        tensors = {site: torch.tensor(value) for site, value in scales.items()}
        rest = {site: tensor for site, tensor in tensors.items() if site in left}
        report.require(
            close(folded(*given, rest), network(*given, tensors), 1e-5),
            "weights times `factors` compute what the scales did, up to rounding",
            f"with {', '.join(sorted({*scales} - {*left}))} folded they do not",
            "fold a scale only where all that follows up to the next weights is linear",
        )


@torch.no_grad()
def _check_memory_format(report: Report, network: Network, given: _Input) -> None:
    turned = copy.deepcopy(network).to(memory_format=torch.channels_last)
    for x in (given.x, given.x.to(memory_format=torch.channels_last)):
        with report.trying("F can be computed in channels_last", "reshape where you view"):
            out = turned(*given._replace(x=x), {})
        report.require(
            close(out, network(*given, {}), 1e-4),
            "F does not depend on the memory format",
            "in channels_last it is another",
            "reshape where you view, and flatten what was permuted",
        )


@torch.no_grad()
def _check_copies(report: Report, network: Network, twin: Network, given: _Input) -> None:
    out, cure = network(*given, {}), "register every tensor as a parameter or a buffer"
    with report.trying("weights survive state_dict, load_state_dict and copy.deepcopy", cure):
        twin.eval().load_state_dict(network.state_dict())
        copied = copy.deepcopy(network)
    for other, how in ((twin, "loaded from its state_dict"), (copied, "copied")):
        report.require(
            torch.equal(other(*given, {}), out),
            "a network is its parameters and buffers",
            f"one {how} has another output",
            cure,
        )
    for tensor in (*twin.parameters(), *copied.parameters()):
        tensor.mul_(0.5)
    report.require(
        torch.equal(copied(*given, {}), twin(*given, {}))
        and not torch.equal(copied(*given, {}), out)
        and torch.equal(network(*given, {}), out),
        "a deep copy shares nothing with the network, as targets and averages need",
        "one of the two changed with the other's weights, or did not with its own",
        "keep submodules in attributes, ModuleList or ModuleDict, and no closures over them",
    )


@torch.no_grad()
def _check_compile(report: Report, network: Network, given: _Input) -> None:
    outs = []
    with report.compiling(
        "the network whole (fullgraph=True), once for all scales",
        "branch on shapes and options, not on values, and call no .item(); print nothing",
    ):
        compiled = torch.compile(network, fullgraph=True, backend="eager")
        for stance, value in (("default", 1.1), ("fail_on_recompile", 0.7)):
            scales = dict.fromkeys(network.sites, torch.tensor(value))
            with torch.compiler.set_stance(stance):
                out = compiled(*given, scales)
            outs.append((out, scales))
    report.require(
        all(close(out, network(*given, scales), 1e-5) for out, scales in outs),
        "the compiled network computes the same, whatever the scales",
        "its output differs",
        "keep no Python state that forward changes",
    )
