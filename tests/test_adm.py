"""Laws of the U-Net: its sites, its types, its options."""

from __future__ import annotations

import json

import pytest
import torch
from cmkit_std.backbones.adm import ADM
from cmkit_std.backbones.cpu import bfloat16_attention, conv1x1, upsampled

from cmkit import Cond, DataSpec, RecipeError
from cmkit.testing import check_backbone

LABEL = frozenset({"label"})
FILM = {"channels": 32, "channel_mult": [1, 2], "num_res_blocks": 1, "resblock_updown": True}
ADDED = {
    "channels": 24,
    "channel_mult": [1, 2],
    "num_res_blocks": 1,
    "norm_groups": 12,
    "use_scale_shift_norm": False,
}
KINDS = pytest.mark.parametrize("options", [FILM, ADDED], ids=["film", "added"])


def network_of(options, conditions=LABEL, scale=0.1):
    """A network none of whose weights is zero: a fresh one is deaf to most of its parts."""
    network = ADM(**options).build(DataSpec(3, 8, 10), conditions).eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=scale)
    return network


def inputs(n=3):
    g = torch.Generator().manual_seed(1)
    x = torch.randn(n, 3, 8, 8, generator=g)
    return x, torch.linspace(-1.5, 1, n), Cond(label=torch.arange(n), sigma_to=torch.rand(n) + 0.1)


@KINDS
def test_it_keeps_the_laws_of_a_backbone(options):
    check_backbone(ADM(**options), DataSpec(3, 8, 10), compile=False)


@torch.no_grad()
def test_emb_scales_act_before_the_activation_and_leave_the_main_path_alone():
    network = network_of(FILM)
    seen = []
    network._blocks[1].film.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    x, c_noise, cond = inputs()
    network(x, c_noise, cond, {})
    network(x, c_noise, cond, {"emb.1": torch.tensor(0.3)})
    network(x, c_noise, cond, {"emb.0": torch.tensor(0.3)})
    emb = network.time(network._sinusoids(c_noise)) + network.label(cond.label)
    silu = torch.nn.functional.silu
    torch.testing.assert_close(seen, [silu(emb), silu(0.3 * emb), silu(emb)])


@torch.no_grad()
def test_skip_scales_act_on_the_copy_at_the_concatenation_alone():
    network = network_of(FILM)
    seen = {}
    for name, stage in (("middle", network.middle), ("first", network.decoder[0][0])):
        stage.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0]}))
    last = [site for site in network.sites if site.startswith("skip")][-1]
    network(*inputs(), {last: torch.tensor(0.3)})
    copied = seen["first"].chunk(2, dim=1)[1]
    torch.testing.assert_close(copied, 0.3 * seen["middle"])


@pytest.mark.compile
@torch.no_grad()
def test_sampling_in_bfloat16_compiles_to_one_graph():
    network = network_of(FILM)
    compiled = torch.compile(network, fullgraph=True, backend="eager")
    with torch.autocast("cpu", torch.bfloat16):
        rounded, out = compiled(*inputs(), {}), network(*inputs(), {})
    assert (rounded - out).std() < 0.01 * out.std()


@torch.no_grad()
def test_attention_by_bfloat16_products_is_the_fused_one_up_to_rounding():
    q, k, v = torch.randn(3, 2, 4, 96, 32)
    exact = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    rounded = bfloat16_attention(
        *(t.transpose(1, 2).contiguous().transpose(1, 2).bfloat16() for t in (q, k, v))
    )
    assert (rounded.float() - exact).std() < 0.01 * exact.std()


def test_upsampling_convolution_in_one_pass_is_the_one_in_two():
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(6, 10, 3, padding=1).double()
    x = torch.randn(2, 6, 3, 5, dtype=torch.float64, requires_grad=True)
    two = conv(torch.nn.functional.interpolate(x, scale_factor=2.0, mode="nearest"))
    one = upsampled(x, conv)
    torch.testing.assert_close(one, two, rtol=0, atol=1e-12)
    leaves, upstream = (x, *conv.parameters()), torch.randn_like(two)
    gradients = (torch.autograd.grad(y, leaves, upstream) for y in (one, two))
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_pointwise_convolution_is_a_matrix_product_in_every_type(dtype):
    x, weight, bias = torch.randn(2, 8, 4, 4), torch.randn(6, 8, 1, 1), torch.randn(6)
    exact = torch.einsum("bchw,oc->bohw", x.double(), weight[:, :, 0, 0].double())
    exact += bias.view(-1, 1, 1).double()
    found = conv1x1(*(each.to(dtype) for each in (x, weight, bias)))
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=16 * torch.finfo(dtype).eps)


@torch.no_grad()
def test_target_level_adds_a_path_that_emb_scales_leave_alone():
    network = network_of(FILM, LABEL | {"sigma_to"})
    x, c_noise, cond = inputs()
    out = network(x, c_noise, cond, {})
    without = network(x, c_noise, Cond(label=cond.label), {})
    assert not torch.allclose(out, without)
    silent = {site: torch.tensor(0.0) for site in network.sites if site.startswith("emb")}
    other = Cond(label=9 - cond.label, sigma_to=cond.sigma_to)
    assert torch.equal(network(x, c_noise, cond, silent), network(x, c_noise + 1, other, silent))
    assert not torch.allclose(
        network(x, c_noise, cond, silent), network(x, c_noise, Cond(label=cond.label), silent)
    )


@torch.no_grad()
def test_target_level_speaks_through_its_own_weights_alone():
    network = network_of(FILM, LABEL | {"sigma_to"})
    x, c_noise, cond = inputs()
    seen = []
    network._blocks[2].film_s.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    network(x, c_noise, cond, {})
    silu, s = torch.nn.functional.silu, cond.sigma_to
    torch.testing.assert_close(seen, [silu(network.time_s(network._sinusoids(s)))])
    for block in network._blocks:
        torch.nn.init.zeros_(block.film_s.weight)
        torch.nn.init.zeros_(block.film_s.bias)
    without = network(x, c_noise, Cond(label=cond.label), {})
    assert torch.equal(network(x, c_noise, cond, {}), without)


def test_fresh_network_returns_zero_and_missing_label_is_named():
    network = ADM(**FILM).build(DataSpec(3, 8, 10), LABEL)
    x, c_noise, cond = inputs()
    assert network(x, c_noise, cond, {}).abs().max() == 0
    with pytest.raises(ValueError, match=r"cond\.label"):
        network(x, c_noise, Cond(), {})


@pytest.mark.parametrize(
    ("preset", "data", "conditions", "skips", "blocks", "attentions"),
    [
        ("openai-imagenet64", DataSpec(3, 64, 1000), LABEL, 16, 36, 22),
        ("openai-lsun256", DataSpec(3, 256), frozenset(), 18, 42, 16),
    ],
)
def test_published_networks_have_the_known_number_of_sites(
    preset, data, conditions, skips, blocks, attentions
):
    with torch.device("meta"):
        network = ADM(preset=preset).build(data, conditions)
    expected = [f"skip.{i}" for i in range(skips)] + [f"emb.{j}" for j in range(blocks)]
    assert list(network.sites) == expected
    kinds = [type(module).__name__ for module in network.modules()]
    assert (kinds.count("ResBlock"), kinds.count("Attention")) == (blocks, attentions)


def test_fields_beside_a_preset_win_and_the_resolved_form_is_stable():
    options = ADM.model_validate_json('{"preset": "openai-imagenet64", "channels": 64}')
    assert (options.channels, options.num_res_blocks, options.num_head_channels) == (64, 3, 64)
    assert options.channel_mult == (1, 2, 3, 4)
    plain = json.dumps(options.model_dump(mode="json", exclude_none=True))
    assert ADM.model_validate_json(plain) == options


@pytest.mark.parametrize("resolution", [8, 28, 32, 64])
def test_default_options_fit_common_pictures(resolution):
    with torch.device("meta"):
        ADM().build(DataSpec(1, resolution), frozenset())


@pytest.mark.parametrize(
    ("options", "data", "conditions", "message"),
    [
        (
            {"channels": 48},
            DataSpec(1, 8),
            (),
            r"backbone\.channels = 48: .*norm_groups = 32; give channels = 64, or norm_groups = 24",
        ),
        (
            {"channels": 32, "use_scale_shift_norm": False},
            DataSpec(1, 8),
            (),
            r"backbone\.norm_groups = 32: .*give use_scale_shift_norm = true, or fewer",
        ),
        (
            {"channels": 32, "norm_channels": 5},
            DataSpec(1, 8),
            (),
            r"backbone\.norm_channels = 5: .* 32 channels of a level; give a divisor of 32",
        ),
        (
            {"channels": 32, "num_head_channels": 48},
            DataSpec(1, 8),
            (),
            r"backbone\.num_head_channels = 48: .* 32 channels .*; give a divisor of 32",
        ),
        (
            {"channels": 64, "num_heads": 6},
            DataSpec(1, 8),
            (),
            r"backbone\.num_heads = 6: .* 64 channels .*; give a divisor of 64",
        ),
        (
            {"channels": 64, "num_heads_upsample": 6},
            DataSpec(1, 8),
            (),
            r"backbone\.num_heads_upsample = 6: .*; give a divisor of 64",
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
            ("size",),
            r"cannot embed size; it accepts guidance, label, sigma_to, text",
        ),
    ],
)
def test_options_that_do_not_fit_are_refused_with_a_cure(options, data, conditions, message):
    with pytest.raises(RecipeError, match=message):
        ADM(**options).build(data, frozenset(conditions))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("channels", 10**6),
        ("channel_mult", []),
        ("channel_mult", [0]),
        ("num_res_blocks", 0),
        ("dropout", 1.0),
        ("time_scale", 0.0),
        ("preset", "openai-cifar10"),
    ],
)
def test_absurd_values_are_refused(field, value):
    with pytest.raises(ValueError, match=field):
        ADM(**{field: value})
