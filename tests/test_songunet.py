"""Laws of DDPM++ and NCSN++: their sites, types, options and parts."""

from __future__ import annotations

import json

import pytest
import torch
from cmkit_std.backbones.songunet import SongUNet
from cmkit_std.backbones.songunet.layers import Conv, Resample
from safetensors.torch import load, save
from torch.nn import functional as F

from cmkit import Cond, DataSpec, RecipeError
from cmkit.testing import check_backbone

LABEL = frozenset({"label"})
SMALL = {"channels": 16, "channel_mult": [1, 2], "num_res_blocks": 1, "attention_resolutions": [4]}
DDPM = SMALL
DEEP = SMALL | {"channel_mult": [1, 2, 2]}
NCSN = DEEP | {
    "embedding_type": "fourier",
    "channel_mult_noise": 2,
    "encoder_type": "residual",
    "resample_filter": [1, 3, 3, 1],
}
PICTURES = DEEP | {"encoder_type": "skip", "decoder_type": "skip", "resample_filter": [1, 3, 3, 1]}
KINDS = pytest.mark.parametrize(
    "options", [DDPM, NCSN, PICTURES], ids=["ddpmpp", "ncsnpp", "pictures"]
)


def network_of(options, conditions=LABEL):
    """A network none of whose weights is small: a fresh one is deaf to most of its parts."""
    network = SongUNet(**options).build(DataSpec(3, 8, 10), conditions).eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return network


def inputs(n=3):
    g = torch.Generator().manual_seed(1)
    x = torch.randn(n, 3, 8, 8, generator=g)
    return x, torch.linspace(-1.5, 1, n), Cond(label=torch.arange(n), sigma_to=torch.rand(n) + 0.1)


@pytest.mark.parametrize(
    "options",
    [DDPM, NCSN, pytest.param(PICTURES, marks=pytest.mark.slow)],
    ids=["ddpmpp", "ncsnpp", "pictures"],
)
def test_it_keeps_the_laws_of_a_backbone(options):
    check_backbone(SongUNet(**options), DataSpec(3, 8, 10), compile=options is PICTURES)


@torch.no_grad()
def test_emb_scales_act_before_the_activation_and_each_on_its_own_block():
    network = network_of(DDPM)
    seen, embedded = [], []
    network._blocks[1].film.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    network.time.register_forward_hook(lambda *args: embedded.append(args[-1]))
    network(*inputs(), {})
    network(*inputs(), {"emb.1": torch.tensor(0.3)})
    network(*inputs(), {"emb.0": torch.tensor(0.3)})
    emb = embedded[0]
    torch.testing.assert_close(seen, [F.silu(emb), F.silu(0.3 * emb), F.silu(emb)])


@KINDS
@torch.no_grad()
def test_skip_scales_act_on_the_copy_at_the_concatenation_alone(options):
    network = network_of(options)
    seen = {}
    coarse = next(iter(network.decoder.values()))
    coarse.middle[0].register_forward_pre_hook(lambda _, args: seen.update(start=args[0]))
    coarse.middle[1].register_forward_hook(lambda *args: seen.update(middle=args[-1]))
    coarse.blocks[0].register_forward_pre_hook(lambda _, args: seen.update(first=args[0]))
    last = [site for site in network.sites if site.startswith("skip")][-1]
    network(*inputs(), {last: torch.tensor(0.3)})
    main, copied = seen["first"].split([seen["middle"].shape[1], seen["start"].shape[1]], dim=1)
    torch.testing.assert_close(main, seen["middle"])
    torch.testing.assert_close(copied, 0.3 * seen["start"])


@torch.no_grad()
def test_output_pictures_of_coarse_levels_are_not_rounded_under_autocast():
    network, seen = network_of(PICTURES), []
    network.decoder["8"].picture_up.register_forward_hook(lambda _, args, out: seen.append(out))
    with torch.autocast("cpu", torch.bfloat16):
        network(*inputs(), {})
    assert seen[0].dtype == torch.float32
    assert not torch.equal(seen[0], seen[0].bfloat16().float())


@KINDS
@torch.no_grad()
def test_target_level_adds_a_path_that_emb_scales_leave_alone(options):
    network = network_of(options, LABEL | {"sigma_to"})
    x, c_noise, cond = inputs()
    out = network(x, c_noise, cond, {})
    without = network(x, c_noise, Cond(label=cond.label), {})
    assert not torch.allclose(out, without)
    silent = {site: torch.tensor(0.0) for site in network.sites if site.startswith("emb")}
    assert torch.equal(network(x, c_noise, cond, silent), network(x, c_noise + 1, cond, silent))
    other = Cond(label=9 - cond.label, sigma_to=cond.sigma_to)
    assert not torch.allclose(
        network(x, c_noise, cond, silent), network(x, c_noise, other, silent)
    ), "the label speaks to the target's path too"


@torch.no_grad()
def test_target_level_speaks_through_its_own_weights_alone():
    network = network_of(DDPM, LABEL | {"sigma_to"})
    x, c_noise, cond = inputs()
    for block in network._blocks:
        torch.nn.init.zeros_(block.film_s.weight)
        torch.nn.init.zeros_(block.film_s.bias)
    without = network(x, c_noise, Cond(label=cond.label), {})
    assert torch.equal(network(x, c_noise, cond, {}), without)


@KINDS
def test_gradients_reach_every_weight_and_fresh_output_is_small(options):
    network = SongUNet(**options).build(DataSpec(3, 8, 10), LABEL | {"sigma_to"}).train()
    out = network(*inputs(), {})
    assert 0 < out.std() < 1e-3
    out.square().mean().backward()
    unreached = [name for name, p in network.named_parameters() if not p.grad.abs().max() > 0]
    assert not unreached


@torch.no_grad()
def test_fresh_blocks_nearly_pass_their_input_on():
    """Each of the two sums halves the variance."""
    network = SongUNet(**DDPM).build(DataSpec(3, 8, 10), LABEL)
    h = torch.randn(2, 32, 4, 4)
    block = network.decoder["4"].middle[0]
    out = block(h, block.project(torch.randn(2, 64)))
    torch.testing.assert_close(out, h / 2, atol=1e-3, rtol=0)


@torch.no_grad()
def test_label_chooses_a_column_and_absent_is_the_zero_vector():
    network = network_of(DDPM)
    x, c_noise, cond = inputs()
    one_hot = F.one_hot(cond.label, 10).float()
    expected = network.label(10**0.5 * one_hot)
    torch.testing.assert_close(network._label(cond), expected)
    out = network(x, c_noise, cond, {})
    absent = network(x, c_noise, Cond(), {})
    assert not torch.allclose(out, absent)
    torch.nn.init.zeros_(network.label.weight)
    torch.testing.assert_close(network(x, c_noise, cond, {}), absent)


@torch.no_grad()
def test_null_class_is_the_vector_of_zeros_and_takes_no_weights():
    """What EDM's label_dropout leaves of a label."""
    network = network_of(DDPM | {"null_class": True})
    plain = network_of(DDPM)
    assert (network.null_label, plain.null_label) == (10, None)
    plain.load_state_dict(network.state_dict())
    x, c_noise, _ = inputs()
    cond = Cond(label=torch.tensor([4, 10, 0]))
    out, absent = network(x, c_noise, cond, {}), plain(x, c_noise, Cond(), {})
    assert torch.equal(network(x, c_noise, Cond(), {}), absent)
    torch.testing.assert_close(out[1], absent[1])
    given = plain(x, c_noise, Cond(label=torch.tensor([4, 4, 0])), {})
    torch.testing.assert_close(out[::2], given[::2])
    assert not torch.allclose(given[1], absent[1])
    with pytest.raises(IndexError):
        plain(x, c_noise, cond, {})


@torch.no_grad()
def test_zero_augmentation_labels_are_absent_ones():
    network = network_of(DDPM | {"augment_dim": 9})
    out = network(*inputs(), {})
    torch.testing.assert_close(network(*inputs(), {}, augment=torch.zeros(3, 9)), out)
    assert not torch.allclose(network(*inputs(), {}, augment=torch.ones(3, 9)), out)


@torch.no_grad()
def test_random_frequencies_are_saved_with_the_weights_and_never_trained():
    network, other = network_of(NCSN), network_of(NCSN)
    assert not any("frequencies" in name for name, _ in network.named_parameters())
    assert not torch.equal(network.noise.frequencies, other.noise.frequencies)
    other.load_state_dict(load(save(network.state_dict())))
    assert torch.equal(other(*inputs(), {}), network(*inputs(), {}))


@pytest.mark.parametrize("scale", [16.0, 0.02])
def test_fourier_scale_is_the_spread_of_the_frequencies(scale):
    options = NCSN | {"channel_mult_noise": 64, "fourier_scale": scale}
    frequencies = network_of(options).noise.frequencies
    assert 0.85 < frequencies.std() / scale < 1.15


@pytest.mark.parametrize("taps", [(1, 1), (1, 3, 3, 1), (1, 2, 5, 5, 2, 1)])
@pytest.mark.parametrize("direction", ["up", "down"])
def test_resampling_keeps_flat_pictures_inside_the_border(direction, taps):
    out = Resample(direction, taps)(torch.full((1, 2, 16, 16), 0.7))
    side = {"up": 32, "down": 8}[direction]
    assert out.shape == (1, 2, side, side)
    inside = out[..., 3:-3, 3:-3]
    torch.testing.assert_close(inside, torch.full_like(inside, 0.7))


@pytest.mark.parametrize("direction", ["up", "down"])
@torch.no_grad()
def test_fused_resampling_differs_at_the_border_alone(direction):
    plain = Conv(2, 3, 3, direction, (1, 3, 3, 1))
    fused = Conv(2, 3, 3, direction, (1, 3, 3, 1), fused=True)
    fused.load_state_dict(plain.state_dict())
    # Plain filters before it convolves, fused after: only upsampling is in the same order.
    x = torch.randn(1, 2, 16, 16)
    a, b = plain(x), fused(x)
    assert a.shape == b.shape
    if direction == "up":
        torch.testing.assert_close(a[..., 2:-2, 2:-2], b[..., 2:-2, 2:-2])
        assert not torch.allclose(a, b)
    else:
        assert not torch.allclose(a, b)


@pytest.mark.parametrize("preset", ["ddpmpp", "ncsnpp"])
def test_published_networks_have_the_known_number_of_sites(preset):
    with torch.device("meta"):
        network = SongUNet(preset=preset).build(DataSpec(3, 32, 10), LABEL)
        out = network(torch.empty(2, 3, 32, 32), torch.empty(2), Cond(), {})
    expected = [f"skip.{i}" for i in range(15)] + [f"emb.{j}" for j in range(33)]
    assert list(network.sites) == expected
    assert out.shape == (2, 3, 32, 32)
    kinds = [type(module).__name__ for module in network.modules()]
    assert (kinds.count("Block"), kinds.count("Attention")) == (33, 6)


def test_fields_beside_a_preset_win_and_the_resolved_form_is_stable():
    options = SongUNet.model_validate_json('{"preset": "ncsnpp", "channels": 64}')
    assert (options.channels, options.num_res_blocks, options.channel_mult_noise) == (64, 4, 2)
    assert options.resample_filter == (1, 3, 3, 1)
    plain = json.dumps(options.model_dump(mode="json", exclude_none=True))
    assert SongUNet.model_validate_json(plain) == options


@pytest.mark.parametrize("resolution", [8, 28, 32, 64])
def test_default_options_fit_common_pictures(resolution):
    with torch.device("meta"):
        network = SongUNet().build(DataSpec(1, resolution), frozenset())
    attending = [name for name, m in network.named_modules() if name.endswith("attention.qkv")]
    assert all(name.startswith(("encoder.16.", "decoder.")) for name in attending)
    assert any(name.startswith("encoder.16.") for name in attending) == (resolution in (32, 64))


@pytest.mark.parametrize(
    ("options", "data", "conditions", "message"),
    [
        (
            {"channels": 48, "channel_mult": [1, 3]},
            DataSpec(1, 8),
            (),
            r"backbone\.channels = 48: 144 channels in a norm .* 32 groups; give channels = 64",
        ),
        (
            {"channels": 30},
            DataSpec(1, 8),
            (),
            r"backbone\.channels = 30: 30 channels in a norm .* 7 groups; give channels = 32",
        ),
        (
            {"channel_mult": [1, 2, 2, 2]},
            DataSpec(1, 28),
            (),
            r"backbone\.channel_mult = \[1, 2, 2, 2\]: .* divisible by 8, not of 28 pixels;"
            r" give at most 3 levels",
        ),
        (
            {"attention_resolutions": [14, 8]},
            DataSpec(1, 28),
            (),
            r"backbone\.attention_resolutions = \[14, 8\]: no level has 8 pixels; choose among"
            r" 28, 14, 7",
        ),
        ({}, DataSpec(1, 8), ("label",), r"cannot embed labels, num_classes .* is None; choose"),
        (
            {},
            DataSpec(1, 8, 10),
            ("text",),
            "cannot embed text; it accepts guidance, label",
        ),
    ],
)
def test_options_that_do_not_fit_are_refused_with_a_cure(options, data, conditions, message):
    with pytest.raises(RecipeError, match=message):
        SongUNet(**options).build(data, frozenset(conditions))


@pytest.mark.parametrize("channels", range(4, 200, 4))
def test_widths_that_pass_the_check_can_be_built(channels):
    options = {"channels": channels, "channel_mult": [1, 2, 3], "num_res_blocks": 2}
    try:
        SongUNet(**options).check(DataSpec(1, 8))
    except RecipeError:
        cause = "does not divide"
    else:
        cause = None
    from cmkit_std.backbones.songunet.network import SongUNet as Network

    with torch.device("meta"):
        if cause is None:
            Network(SongUNet(**options), DataSpec(1, 8), frozenset())
        else:
            with pytest.raises(ValueError, match="divisible"):
                Network(SongUNet(**options), DataSpec(1, 8), frozenset())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("channels", 10**6),
        ("channel_mult", []),
        ("channel_mult", [0]),
        ("num_res_blocks", 0),
        ("dropout", 1.0),
        ("resample_filter", [1, 2, 1]),
        ("resample_filter", [0, 0]),
        ("fourier_scale", 0.0),
        ("augment_dim", -1),
        ("encoder_type", "dense"),
        ("preset", "adm"),
    ],
)
def test_absurd_values_are_refused(field, value):
    with pytest.raises(ValueError, match=field):
        SongUNet(**{field: value})
