"""Laws that every built-in backbone keeps, with its weights opened so that all parts are heard.

What each keeps besides is in tests/test_<backbone>.py, the laws of any backbone in `cmkit.testing`.
"""

from __future__ import annotations

import pytest
import torch

from tests import test_adm, test_dit, test_edm2, test_songunet

CASES = {
    "adm, film": (test_adm, test_adm.FILM),
    "adm, added": (test_adm, test_adm.ADDED),
    "ddpmpp": (test_songunet, test_songunet.DDPM),
    "ncsnpp": (test_songunet, test_songunet.NCSN),
    "pictures": (test_songunet, test_songunet.PICTURES),
    "edm2, small": (test_edm2, test_edm2.SMALL),
    "edm2, deep": (test_edm2, test_edm2.DEEP),
    "dit": (test_dit, test_dit.SMALL),
}
BACKBONES = pytest.mark.parametrize(("of", "options"), CASES.values(), ids=CASES)


@BACKBONES
@torch.no_grad()
def test_bfloat16_autocast_stays_close_and_returns_float32(of, options):
    network = of.network_of(options)
    out = network(*of.inputs(), {})
    with torch.autocast("cpu", torch.bfloat16):
        rounded = network(*of.inputs(), {})
    assert rounded.dtype == torch.float32
    assert 0 < (rounded - out).std() < 0.02 * out.std()


@BACKBONES
@torch.no_grad()
def test_embedding_is_not_rounded_under_autocast(of, options):
    """Neighbouring noise levels are 0.001 apart; bfloat16 has three digits."""
    network, seen = of.network_of(options), []
    for reader in (module for module in network.modules() if hasattr(module, "film")):
        reader.film.register_forward_hook(lambda _, args, film: seen.append((args[0], film)))
    network(*of.inputs(), {})
    with torch.autocast("cpu", torch.bfloat16):
        network(*of.inputs(), {})
    half = len(seen) // 2
    assert half > 0
    torch.testing.assert_close(seen[:half], seen[half:], rtol=0, atol=0)


@BACKBONES
@torch.no_grad()
def test_weights_rounded_once_give_the_images_of_weights_rounded_at_each_call(of, options):
    network = of.network_of(options)
    with torch.autocast("cpu", torch.bfloat16):
        out = network(*of.inputs(), {})
        network.lower(torch.bfloat16)
        torch.testing.assert_close(network(*of.inputs(), {}), out, rtol=0, atol=0)


@BACKBONES
def test_gradient_checkpointing_changes_no_gradient(of, options):
    grads, calls = [], []
    dropout = {} if of is test_dit else {"dropout": 0.3}
    for flag in (False, True):
        torch.manual_seed(0)
        network = of.network_of({**options, **dropout, "gradient_checkpointing": flag}).train()
        block = next(m for m in network.modules() if hasattr(m, "film"))
        inner = next(m for m in block.children() if m is not block.film)
        inner.register_forward_pre_hook(lambda *_, flag=flag: calls.append(flag))
        torch.manual_seed(1)
        network(*of.inputs(), {}).square().mean().backward()
        grads.append([parameter.grad for parameter in network.parameters()])
    torch.testing.assert_close(*grads, rtol=0, atol=0)
    assert calls.count(True) == 2 * calls.count(False) > 0
