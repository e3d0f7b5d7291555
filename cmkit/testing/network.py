"""The laws of the network that a backbone builds."""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cmkit.denoiser import Cond, Denoiser, Network
from cmkit.noise import Noise
from cmkit.rng import image_noise
from cmkit.testing.protocol import Says
from cmkit.testing.subjects import close, equal, image_shape
from cmkit.values import DataSpec


def check_network(
    say: Says,
    network: Network,
    twin: Network,
    data: DataSpec,
    conditions: frozenset[str],
    compile: bool,
) -> None:
    """The laws of a network for `data` that embeds `conditions`; `twin` was built alike."""
    _check_sites(say, network)
    given = network_input(data, conditions)
    _break_zeros(network)
    _check_forward(say, network, given, data, conditions)
    _check_gradient(say, network, given)
    _check_scales(say, network.eval(), given)
    _check_memory_format(say, network, given)
    _check_copies(say, network, twin, given)
    _check_consistency(say, network, given)
    if compile:
        _check_compile(say, network, given)


@torch.no_grad()
def _break_zeros(network: Network) -> None:
    """No weight is small: a fresh network is often deaf to most of its parts."""
    generator = torch.Generator().manual_seed(1)
    for parameter in network.parameters():
        parameter.normal_(std=0.1, generator=generator)


@dataclass(frozen=True)
class Input:
    """A batch that a network is tried on."""

    x: Tensor
    c_noise: Tensor
    cond: Cond

    def to(self, device: torch.device) -> Input:
        return Input(self.x.to(device), self.c_noise.to(device), self.cond.to(device))

    def others(self) -> Input:
        """The same first image among other ones."""
        x, c_noise = self.x.clone(), self.c_noise.clone()
        x[1:], c_noise[1:] = x[1:].flip(-1) + 0.5, c_noise[1:] - 0.3
        return Input(x, c_noise, self.cond)


def network_input(data: DataSpec, conditions: frozenset[str]) -> Input:
    """Three noisy images like `data`, each with its own noise level and conditions."""
    x = image_noise(0, "testing", range(3), 0, image_shape(data))
    label = torch.arange(3) % (data.num_classes or 1) if "label" in conditions else None
    levels = {name: torch.tensor([0.5, 1.0, 2.0]) for name in conditions & {"guidance", "sigma_to"}}
    return Input(x, torch.tensor([-1.5, 0.0, 1.1]), Cond(label=label, **levels))


def run(network: Network, given: Input, scales: Mapping[str, Tensor] = {}) -> Tensor:
    """F, (3, C, H, W)."""
    return network(given.x, given.c_noise, given.cond, scales)


def _check_sites(say: Says, network: Network) -> None:
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
    say: Says,
    network: Network,
    given: Input,
    data: DataSpec,
    conditions: frozenset[str],
) -> None:
    network.eval()
    with say.trying("a network takes (x, c_noise, cond, scales)", "compare cmkit.Network.forward"):
        with say.untouched("forward"):
            out = run(network, given)
        again = run(network, given)
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
            not torch.equal(run(network, other), out),
            "F depends on x, on c_noise and on each condition that it was built for",
            f"it is deaf to {name}",
            f"embed {name}, or drop it from `accepts`",
        )
    _check_batch_independence(say, network, given)
    with (
        say.trying("F can be computed under autocast", "let torch choose the types"),
        torch.autocast("cpu", torch.bfloat16),
    ):
        low = run(network, given)
    say.like(low, given.x, "F")


def _check_batch_independence(say: Says, network: Network, given: Input) -> None:
    held = {name: value.clone() for name, value in network.state_dict().items()}
    for training in (False, True):
        network.train(training)
        outs = []
        for batch in (given, given.others()):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                outs.append(run(network, batch))
        say.unless(
            close(outs[1][:1], outs[0][:1], 1e-4),
            "an image does not depend on the others of its batch, in training neither",
            f"image 0 changed when the others did, in {'training' if training else 'eval'} mode",
            "normalize each image alone: GroupNorm or LayerNorm, no BatchNorm",
        )
    network.eval()
    moved = [name for name, value in network.state_dict().items() if not equal(value, held[name])]
    say.unless(
        not moved,
        "a forward pass changes no state: averaged copies follow the parameters alone",
        f"{', '.join(moved[:3])} changed",
        "keep running statistics out of the network, and move weights in `settle`",
    )


def _check_gradient(say: Says, network: Network, given: Input) -> None:
    network.train().zero_grad(set_to_none=True)
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(0)
        out = run(network, given)
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
def _check_scales(say: Says, network: Network, given: Input) -> None:
    out = run(network, given)
    for rounded, one in itertools.product((False, True), (torch.tensor(1.0), torch.ones(3))):
        with torch.autocast("cpu", torch.bfloat16, enabled=rounded):
            same = run(network, given, dict.fromkeys(network.sites, one))
            say.unless(
                torch.equal(same, run(network, given)),
                "scale 1 at every site is the identity, bit for bit, under autocast as well",
                f"scales of shape {tuple(one.shape)} change the output",
                "multiply by the scale, and by nothing else",
            )
    for site in network.sites:
        half = run(network, given, {site: torch.tensor(0.5)})
        say.unless(
            not torch.equal(half, out),
            "every site changes the output",
            f"scale 0.5 at {site} changes nothing",
            "multiply by scales[site] where it is present, or drop the site",
        )
        apart = run(network, given, {site: torch.tensor([1.0, 0.5, 0.25])})
        say.unless(
            close(apart[:2], torch.cat([out[:1], half[1:2]]), 1e-4)
            and not torch.equal(apart[2], out[2]),
            "a scale of shape (B,) acts on each image by its own value",
            f"at {site} it does not",
            "view it as (B, 1, 1, 1) before you multiply",
        )
    _check_fine_scales(say, network, given)
    if network.late:
        _check_late(say, network, given)


def _check_fine_scales(say: Says, network: Network, given: Input) -> None:
    """1.02 is no bfloat16 number: rounded, it would be 1.0234375."""
    for family in sorted({site.partition(".")[0] for site in network.sites}):
        sites = [site for site in network.sites if site.partition(".")[0] == family]
        with torch.autocast("cpu", torch.bfloat16):
            near, far = (
                run(network, given, dict.fromkeys(sites, torch.tensor(value)))
                for value in (1.0234375, 1.02)
            )
        say.unless(
            not torch.equal(near, far),
            "a scale keeps its value under autocast, so that a search keeps its grid",
            f"at {family} 1.02 is taken for 1.0234375",
            "multiply in float32, and round the product",
        )


def _check_late(say: Says, network: Network, given: Input) -> None:
    half = dict.fromkeys(sorted(network.late), torch.tensor(0.5))
    with say.trying("a network with `late` sites has encode and decode", "write both"):
        encoded = network.encode(given.x, given.c_noise, given.cond, {})
        out = network.decode(encoded, half)
        again = network.decode(encoded, {})
    for found, scales in ((out, half), (again, {})):
        say.unless(
            close(found, run(network, given, scales), 1e-5),
            "decode(encode(..), scales) is forward, up to 1e-5 of its root mean square",
            "it is not, for other scales of the late sites than those that `encode` was given",
            "let `encode` read no late scale, and `decode` change nothing that it is given",
        )


@torch.no_grad()
def _check_memory_format(say: Says, network: Network, given: Input) -> None:
    turned = copy.deepcopy(network).to(memory_format=torch.channels_last)
    for x in (given.x, given.x.to(memory_format=torch.channels_last)):
        with say.trying("F can be computed in channels_last", "reshape where you view"):
            out = run(turned, replace(given, x=x))
        say.unless(
            close(out, run(network, given), 1e-4),
            "F does not depend on the memory format",
            "in channels_last it is another",
            "reshape where you view, and flatten what was permuted",
        )


def _check_copies(say: Says, network: Network, twin: Network, given: Input) -> None:
    with torch.no_grad():
        out = run(network, given)
        with say.trying(
            "weights survive state_dict, load_state_dict and copy.deepcopy",
            "register every tensor as a parameter or a buffer",
        ):
            twin.eval().load_state_dict(network.state_dict())
            copied = copy.deepcopy(network)
        for other, how in ((twin, "loaded from its state_dict"), (copied, "copied")):
            say.unless(
                torch.equal(run(other, given), out),
                "a network is its parameters and buffers",
                f"one {how} has another output",
                "register every tensor as a parameter or a buffer",
            )
        for tensor in (*twin.parameters(), *copied.parameters()):
            tensor.mul_(0.5)
        say.unless(
            torch.equal(run(copied, given), run(twin, given))
            and not torch.equal(run(copied, given), out)
            and torch.equal(run(network, given), out),
            "a deep copy shares nothing with the network, as targets and averages need",
            "one of the two changed with the other's weights, or did not with its own",
            "keep submodules in attributes, ModuleList or ModuleDict, and no closures over them",
        )


def _check_consistency(say: Says, network: Network, given: Input) -> None:
    denoiser = Denoiser(network, Noise())
    sigma = torch.full((len(given.x),), denoiser.noise.sigma_min)
    with torch.no_grad():
        say.unless(
            torch.equal(denoiser(given.x, sigma, given.cond), given.x),
            "a consistency model is the identity at sigma_min, bit for bit",
            "x0_hat is not x there",
            "keep F finite: 0 * F must be 0",
        )


def _check_compile(say: Says, network: Network, given: Input) -> None:
    torch._dynamo.reset()
    try:
        with (
            say.trying(
                "torch.compile takes the network whole (fullgraph=True), once for all scales",
                "branch on shapes and options, not on values, and call no .item(); print nothing",
            ),
            torch.no_grad(),
        ):
            compiled = torch.compile(network, fullgraph=True, backend="eager")
            outs = []
            for stance, value in (("default", 1.1), ("fail_on_recompile", 0.7)):
                scales = dict.fromkeys(network.sites, torch.tensor(value))
                with torch.compiler.set_stance(stance):
                    out = compiled(given.x, given.c_noise, given.cond, scales)
                outs.append((out, scales))
    finally:
        torch._dynamo.reset()
    with torch.no_grad():
        say.unless(
            all(close(out, run(network, given, scales), 1e-5) for out, scales in outs),
            "the compiled network computes the same, whatever the scales",
            "its output differs",
            "keep no Python state that forward changes",
        )
