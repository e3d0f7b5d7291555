"""The check of an adapter."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import cast

import torch

from cmkit.denoiser import NO_COND, Network
from cmkit.kinds import Adapter, Backbone
from cmkit.plugins import discover
from cmkit.testing.protocol import check_identity, report_on
from cmkit.testing.subjects import DIGITS


def check_adapter(adapter: Adapter, network: Network | None = None) -> None:
    """Check an adapter without `weights` on a network of images of digits; by default a small
    `dit`."""
    report = report_on(adapter)
    check_identity(report, adapter)
    network = copy.deepcopy(network) if network else _network()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, DIGITS.channels, DIGITS.resolution, DIGITS.resolution, generator=generator)
    given = (x, torch.tensor([0.1, 0.5]), NO_COND, {})
    other, names = copy.deepcopy(network), network.state_dict().keys()
    own = {id(parameter) for parameter in network.parameters()}
    with torch.no_grad():
        before = network(*given)
        adapter.attach(network)
        trained = [p for p in network.parameters() if p.requires_grad]
        report.require(
            bool(trained) and not own & {id(p) for p in trained},
            "after `attach` the adapter's parameters, and they alone, require gradients",
            f"{len(trained)} do, {len(own & {id(p) for p in trained})} of them the network's",
            "call network.requires_grad_(False) first",
        )
        report.require(
            torch.equal(network(*given), before),
            "a fresh adapter changes nothing",
            "the output is another",
            "let what is added begin as 0",
        )
        for parameter in trained:
            parameter.normal_(std=0.1, generator=generator)
        adapted, requires = network(*given), [p.requires_grad for p in network.parameters()]
        report.require(
            not torch.equal(adapted, before),
            "trained weights change the output",
            "it is the same for random ones",
            "let the network read what you attach",
        )
        with adapter.off(network):
            off = network(*given)
        report.require(
            torch.equal(off, before) and torch.equal(network(*given), adapted),
            "inside `off` a network is what it was, bit for bit, and after it adapted again",
            f"up to {(off - before).abs().max():.3g} between them",
            "leave the adapter out; do not subtract it",
        )
        report.require(
            [p.requires_grad for p in network.parameters()] == requires,
            "`off` leaves what requires gradients",
            "it is different afterwards",
            "restore `requires_grad`",
        )
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "adapter.safetensors"
            adapter.write(network, path)
            adapter.model_copy(update={"weights": str(path)}).attach(other)
        report.require(
            torch.equal(other(*given), adapted),
            "what is written and attached to another copy of the network is the same",
            "it computes otherwise",
            "write all that is trained, and what else its output depends on",
        )
        adapter.fold(network)
        report.require(
            network.state_dict().keys() == names,
            "after `fold` the network has its own names alone",
            f"{len(network.state_dict().keys() ^ names)} differ",
            "take out what was put in",
        )
        report.require(
            torch.allclose(network(*given), adapted, rtol=1e-3, atol=1e-4),
            "after `fold` the network computes what the adapted one did",
            f"up to {(network(*given) - adapted).abs().max():.3g} between them",
            "add the whole change to the weights",
        )


def _network() -> Network:
    """A network none of whose weights is 0."""
    dit = cast(type[Backbone], discover().load("backbone", "dit"))
    network = dit(width=16, depth=1, num_heads=2).build(DIGITS, frozenset())
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.1, generator=generator)
    return network.eval()
