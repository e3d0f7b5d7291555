"""The check of a backbone."""

from __future__ import annotations

import torch

from cmkit.denoiser import Network
from cmkit.errors import CheckpointError
from cmkit.kinds import Backbone
from cmkit.plan.record import CONDITIONS
from cmkit.testing.network import check_network, network_input, run
from cmkit.testing.protocol import Report, report_on
from cmkit.testing.subjects import DIGITS, META, equal
from cmkit.values import DataSpec


def check_backbone(backbone: Backbone, data: DataSpec = DIGITS, compile: bool = True) -> None:
    """Check a backbone and the network that it builds for `data`.

    `compile` = False leaves torch.compile out, which takes most of the time.
    """
    report = report_on(backbone)
    report.require(
        backbone.accepts <= CONDITIONS,
        "`accepts` names fields of cmkit.Cond",
        f"it has {sorted(backbone.accepts - CONDITIONS)}",
        f"choose among {', '.join(sorted(CONDITIONS))}",
    )
    # The contract leaves the width of text features to the data, which a DataSpec does not name.
    conditions = backbone.accepts - {"text"} - ({"label"} if not data.num_classes else set())
    network, twin = (_built(report, backbone, data, conditions) for _ in range(2))
    ours, theirs = network.state_dict(), twin.state_dict()
    report.require(
        ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours),
        "fresh weights follow from the global seed, which cmkit sets before `build`",
        "two builds after torch.manual_seed(0) differ",
        "draw weights from torch's default generator only",
    )
    check_network(report, network, twin, data, conditions, compile)
    with (
        report.trying(
            "a network can be built and run without memory, on the device `meta`",
            "make all tensors on x.device, and read no values",
        ),
        torch.no_grad(),
        META,
    ):
        empty = network_input(data, conditions).to(META)
        out = run(backbone.build(data, conditions).eval(), empty)
    report.like(out, empty.x, "F")
    _check_layouts(report, backbone, data, network)


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
        back = layout.read(written)
        report.require(
            layout.matches(written)
            and back.keys() == own.keys()
            and all(equal(back[name], own[name]) for name in own),
            "a layout matches what it wrote, and reads it back bit for bit",
            f"{layout.name} does not",
            "make `read` the inverse of `write`",
        )
