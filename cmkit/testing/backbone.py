"""The laws of a backbone."""

from __future__ import annotations

import torch
from torch import nn

from cmkit.denoiser import Network
from cmkit.errors import CheckpointError
from cmkit.kinds import Backbone
from cmkit.testing.fields import check_fields
from cmkit.testing.network import check_network, network_input, run
from cmkit.testing.protocol import Says
from cmkit.testing.subjects import CONDITIONS, DIGITS, META, equal
from cmkit.values import DataSpec


def check_backbone(backbone: Backbone, data: DataSpec = DIGITS, compile: bool = True) -> None:
    """The laws of a backbone and of the network that it builds for `data`.

    `compile` = False leaves torch.compile out, which takes most of the time.
    """
    check_fields(backbone)
    say = Says(backbone)
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
    check_network(say, network, twin, data, conditions, compile)
    _check_meta(say, backbone, data, conditions)
    _check_layouts(say, backbone, data, network)


def _built(say: Says, backbone: Backbone, data: DataSpec, conditions: frozenset[str]) -> Network:
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
def _check_meta(say: Says, backbone: Backbone, data: DataSpec, conditions: frozenset[str]) -> None:
    with (
        say.trying(
            "a network can be built and run without memory, on the device `meta`",
            "make all tensors on x.device, and read no values",
        ),
        META,
    ):
        meta = backbone.build(data, conditions).eval()
        empty = network_input(data, conditions).to(META)
        flown = run(meta, empty)
    say.like(flown, empty.x, "F")


def _check_layouts(say: Says, backbone: Backbone, data: DataSpec, network: Network) -> None:
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
            and all(equal(back[name], own[name]) for name in own),
            "a layout matches what it wrote, and reads it back bit for bit",
            f"{layout.name} does not",
            "make `read` the inverse of `write`",
        )
