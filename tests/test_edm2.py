"""Laws of EDM2's U-Net: magnitudes, stored weights, sites, conditions, options."""

from __future__ import annotations

import re

import pytest
import torch
from cmkit_std.backbones.edm2 import EDM2
from cmkit_std.backbones.edm2 import magnitude as mp
from cmkit_std.backbones.edm2.magnitude import Conv, Fourier, Linear, Weighted, normalized
from cmkit_std.backbones.edm2.network import CLIP, Block, EDM2UNet

from cmkit import Cond, DataSpec, RecipeError, discover
from cmkit.denoiser import NO_COND
from cmkit.plan import plan
from cmkit.recipe import load
from cmkit.testing import check_backbone
from cmkit.train import start, train

LABEL = frozenset({"label"})
SMALL = {"channels": 16, "channel_mult": [1, 2], "num_res_blocks": 1, "num_head_channels": 8}
DEEP = SMALL | {"channel_mult": [2, 1, 3], "attention_resolutions": [4], "null_class": True}
KINDS = pytest.mark.parametrize("options", [SMALL, DEEP], ids=["small", "deep"])


def network_of(options, conditions=LABEL) -> EDM2UNet:
    """A network whose gains are open: a fresh one is silent."""
    torch.manual_seed(3)
    network = EDM2(**options).build(DataSpec(3, 8, 10), conditions).eval()
    for name, parameter in network.named_parameters():
        if name.endswith("gain"):
            torch.nn.init.constant_(parameter, 0.5)
    return network


def inputs(n=3):
    g = torch.Generator().manual_seed(1)
    x = torch.randn(n, 3, 8, 8, generator=g)
    levels = {"sigma_to": torch.rand(n, generator=g) + 0.1, "guidance": torch.arange(n) / 2}
    return x, torch.linspace(-1.5, 1, n), Cond(label=torch.arange(n), **levels)


def rms(x) -> float:
    return x.square().mean().sqrt().item()


def filter_lengths(network) -> torch.Tensor:
    """Root mean square of every stored filter."""
    layers = [m for m in network.modules() if isinstance(m, Weighted)]
    rows = [layer.weight.detach().flatten(1) for layer in layers]
    return torch.cat([row.square().mean(1).sqrt() for row in rows])


@pytest.mark.parametrize(
    "options",
    [SMALL, pytest.param(DEEP, marks=pytest.mark.compile)],
    ids=["small", "deep"],
)
def test_it_keeps_the_laws_of_a_backbone(options):
    check_backbone(EDM2(**options), DataSpec(3, 8, 10), compile=options is DEEP)


@torch.no_grad()
def test_every_operation_keeps_the_magnitude_of_independent_normal_features():
    torch.manual_seed(0)
    a, b = torch.randn(64, 32, 16, 16), torch.randn(64, 96, 16, 16)
    kept = {
        "conv": Conv(32, 48, 3)(a)[..., 1:-1, 1:-1],
        "linear": Linear(96, 4096)(b[..., 0, 0]),
        "silu": mp.silu(a),
        "sum": mp.sum(a, b[:, :32], 0.3),
        "cat": mp.cat(a, b),
        "pixel norm": normalized(5 * a, (1,)),
        "waves": Fourier(4096)(torch.linspace(-1.6, 1.1, 64)),
    }
    assert {name: round(rms(x), 1) for name, x in kept.items()} == dict.fromkeys(kept, 1.0)


@torch.no_grad()
def test_both_sides_of_a_concatenation_weigh_alike():
    both = mp.cat(torch.ones(1, 4, 2, 2), torch.ones(1, 12, 2, 2))
    first, second = both.split([4, 12], dim=1)
    torch.testing.assert_close(first.square().sum(), second.square().sum())


@torch.no_grad()
def test_features_of_a_fresh_network_keep_their_magnitude_down_to_the_last_block():
    network = EDM2(channels=32, channel_mult=[1, 2], num_head_channels=16).build(
        DataSpec(3, 16, 10), LABEL
    )
    seen = []
    for block in network._blocks:
        block.register_forward_hook(lambda _module, _args, out: seen.append(rms(out)))
    x, c_noise, cond = inputs()
    out = network(x.repeat(1, 1, 2, 2), c_noise, cond, {})
    assert len(seen) == len(network._blocks)
    assert 0.7 < min(seen) <= max(seen) < 1.4
    assert not out.any(), "its last gain is 0"


@KINDS
@torch.no_grad()
def test_the_length_of_a_stored_filter_has_no_effect(options):
    network, other = network_of(options), network_of(options)
    for layer in other.modules():
        if isinstance(layer, Weighted):
            layer.weight *= torch.linspace(1, 7, len(layer.weight)).view(
                -1, *[1] * (layer.weight.ndim - 1)
            )
    out = network(*inputs(), {})
    assert rms(other(*inputs(), {}) - out) < 2e-3 * rms(out)


@KINDS
@torch.no_grad()
def test_settling_stores_filters_at_length_1_and_leaves_the_output(options):
    network = network_of(options)
    out = network(*inputs(), {})
    network.settle()
    torch.testing.assert_close(
        filter_lengths(network), torch.ones(len(filter_lengths(network))), rtol=0, atol=1e-3
    )
    assert rms(network(*inputs(), {}) - out) < 2e-3 * rms(out)


RECIPE = """
name = "tiny"
dataset = { use = "digits" }
denoiser = { precond = "edm" }
objective = { use = "edm" }
[backbone]
use = "edm2"
channels = 16
channel_mult = [1, 2]
num_res_blocks = 1
num_head_channels = 16
[train]
steps = 3
batch = 8
accumulate = 2
lr = 0.3
optimizer = "adamw"
ema = [0.5]
ema_warmup = false
"""


def test_training_settles_before_each_step_and_averages_what_the_step_made(tmp_path):
    (tmp_path / "tiny.toml").write_text(RECIPE)
    training = start(plan(load(tmp_path / "tiny.toml", [], discover())), torch.device("cpu"))
    network, averaged = (
        denoiser.network for denoiser in (training.models.online, training.models.ema[0.5])
    )
    at_work = []
    network.register_forward_pre_hook(lambda *_: at_work.append(filter_lengths(network)))
    average = averaged.noise.weight.clone()
    for _ in train(training):
        average.lerp_(network.noise.weight.detach(), 0.5)
        torch.testing.assert_close(averaged.noise.weight, average)
    assert len(at_work) == 6
    for lengths in at_work:
        torch.testing.assert_close(lengths, torch.ones_like(lengths), rtol=0, atol=1e-3)
    assert filter_lengths(network).max() > 1.01, "a step makes filters longer"


@torch.no_grad()
def test_emb_scales_act_before_the_activation_and_each_on_its_own_block():
    network, seen, embedded = network_of(SMALL), [], []
    network._blocks[1].film.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    network.noise.register_forward_hook(lambda *args: embedded.append(args[-1]))
    x, c_noise, cond = inputs()
    for scales in ({}, {"emb.1": torch.tensor(0.3)}, {"emb.0": torch.tensor(0.3)}):
        network(x, c_noise, cond, scales)
    emb = mp.sum(embedded[0], network._label(cond), 0.5)
    torch.testing.assert_close(seen, [mp.silu(emb), mp.silu(0.3 * emb), mp.silu(emb)])


@KINDS
@torch.no_grad()
def test_skip_scales_act_on_the_copy_before_the_concatenation_alone(options):
    network, seen = network_of(options), {}
    coarse = next(iter(network.decoder.values()))
    coarse["middle"][0].register_forward_pre_hook(lambda _, args: seen.update(start=args[0]))
    coarse["middle"][1].register_forward_hook(lambda *args: seen.update(middle=args[-1]))
    coarse["blocks"][0].register_forward_pre_hook(lambda _, args: seen.update(first=args[0]))
    last = [site for site in network.sites if site.startswith("skip")][-1]
    network(*inputs(), {last: torch.tensor(0.3)})
    torch.testing.assert_close(seen["first"], mp.cat(seen["middle"], 0.3 * seen["start"]))


@torch.no_grad()
def test_guidance_and_target_level_change_nothing_of_trained_weights_at_first():
    trained = network_of(SMALL)
    network = EDM2(**SMALL).build(DataSpec(3, 8, 10), LABEL | {"guidance", "sigma_to"}).eval()
    missing, unexpected = network.load_state_dict(trained.state_dict(), strict=False)
    assert missing
    assert not unexpected
    x, c_noise, cond = inputs()
    out = trained(x, c_noise, cond, {})
    assert torch.equal(network(x, c_noise, cond, {}), out)
    for name, gain in network.named_parameters():
        if name in missing and name.endswith("gain"):
            gain.fill_(0.5)
            assert not torch.equal(network(x, c_noise, cond, {}), out), f"{name} has no effect"
            gain.fill_(0.0)


@torch.no_grad()
def test_label_chooses_a_row_and_no_label_is_the_vector_of_zeros():
    network, plain = network_of(DEEP), network_of(DEEP | {"null_class": False})
    assert (network.null_label, plain.null_label) == (10, None)
    plain.load_state_dict(network.state_dict())
    x, c_noise, cond = inputs()
    one_hot = torch.eye(10)[cond.label] * 10**0.5
    torch.testing.assert_close(network._label(cond), network.label(one_hot))
    assert not network._label(NO_COND).any()
    mixed = Cond(label=torch.tensor([4, 10, 0]))
    out, absent = network(x, c_noise, mixed, {}), plain(x, c_noise, Cond(), {})
    assert torch.equal(network(x, c_noise, Cond(), {}), absent)
    torch.testing.assert_close(out[1], absent[1])
    given = plain(x, c_noise, Cond(label=torch.tensor([4, 4, 0])), {})
    torch.testing.assert_close(out[::2], given[::2])
    assert not torch.allclose(given[1], absent[1])


def test_dropout_is_that_of_levels_no_finer_than_its_resolution():
    network = network_of(DEEP | {"dropout": 0.4, "dropout_resolution": 4})
    for part in (network.encoder, network.decoder):
        for side, level in part.items():
            found = {m.p for m in level.modules() if isinstance(m, torch.nn.Dropout)}
            assert found == {0.4 if int(side) <= 4 else 0.0}
    everywhere = network_of(SMALL | {"dropout": 0.2}).modules()
    assert {m.p for m in everywhere if isinstance(m, torch.nn.Dropout)} == {0.2}


@torch.no_grad()
def test_activations_are_clipped_behind_each_block():
    block = Block(16, 16, 16)
    x = 1e4 * torch.randn(2, 16, 4, 4)
    assert block(x, torch.ones(2, 16)).abs().max() == CLIP


COUNTS = {"xs": 124710949, "s": 280209381, "m": 497803173, "l": 777492325, "xl": 1119276837}
"""Parameters that the official code builds, 128 of which are of its uncertainty."""


@pytest.mark.parametrize("size", COUNTS)
def test_presets_have_the_published_numbers_of_parameters(size):
    with torch.device("meta"):
        network = EDM2(preset=size).build(DataSpec(3, 64, 1000), LABEL)
    assert sum(p.numel() for p in network.parameters()) == COUNTS[size] - 128


def test_published_names_are_of_known_sizes():
    sizes = {options.preset for options, _, _ in EDM2.known()}
    for name, url in EDM2.published.items():
        size = re.fullmatch(r"edm2:img64-([a-z]+)-\d{7}-0\.\d{3}", name)[1]
        assert size in sizes
        assert url.endswith(f"/posthoc-reconstructions/edm2-{name.removeprefix('edm2:')}.pkl")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num_head_channels": 24}, "num_head_channels = 24: does not divide the 16 channels"),
        ({"attention_resolutions": [5]}, "no level has 5 pixels"),
        ({"channel_mult": [1] * 5}, "5 levels need pictures divisible by 16"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, said):
    with pytest.raises(RecipeError, match=re.escape(said)):
        EDM2(**SMALL | options).build(DataSpec(3, 8, 10), LABEL)


def test_an_unknown_condition_is_refused():
    with pytest.raises(RecipeError, match="edm2 cannot embed text"):
        EDM2(**SMALL).build(DataSpec(3, 8, 10), frozenset({"text"}))
