"""Laws of the transformer: its sites, its conditions, its types, its options."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from cmkit_std.backbones.dit import DiT
from cmkit_std.backbones.dit.layouts import read, write
from cmkit_std.backbones.dit.options import PRESETS
from cmkit_std.backbones.embedding import guidance_waves
from torch.nn.functional import silu

from cmkit import Cond, DataSpec, Denoiser, Guided, RecipeError, edm_scalings
from cmkit.testing import check_backbone

LABEL = frozenset({"label"})
ALL = LABEL | {"guidance", "sigma_to"}
SMALL = {"patch_size": 2, "width": 32, "depth": 2, "num_heads": 4}
GUIDABLE = {**SMALL, "null_class": True}


def fresh(options=SMALL, conditions=LABEL):
    return DiT(**options).build(DataSpec(3, 8, 10), frozenset(conditions)).eval()


def network_of(options=SMALL, conditions=LABEL):
    """A network none of whose weights is zero: a fresh one is deaf to all of its parts."""
    network = fresh(options, conditions)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return network


def inputs(n=3, dtype=torch.float32):
    g = torch.Generator().manual_seed(1)
    x, w, s = (torch.randn(*shape, generator=g, dtype=dtype) for shape in [(n, 3, 8, 8), [n], [n]])
    cond = Cond(label=torch.arange(n), guidance=w.abs(), sigma_to=s.abs() + 0.1)
    return x, torch.linspace(-1.5, 1, n, dtype=dtype), cond


def scales_of(network, value):
    return {site: torch.as_tensor(value) for site in network.sites}


def test_network_has_a_site_for_each_reader_of_the_embedding_and_each_residual_branch():
    assert fresh().sites == (
        *("emb.0", "emb.1", "emb.2"),
        *("attn.0", "attn.1"),
        *("mlp.0", "mlp.1"),
    )


def test_it_keeps_the_laws_of_a_backbone():
    check_backbone(DiT(**GUIDABLE), DataSpec(3, 8, 10))


@torch.no_grad()
def test_emb_scales_act_before_the_activation_of_their_reader_alone():
    network = network_of()
    seen = []
    for reader in (network.blocks[1], network.final):
        reader.film.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    x, c_noise, cond = inputs()
    for scales in ({}, {"emb.1": torch.tensor(0.3)}, {"emb.2": torch.tensor(0.3)}):
        network(x, c_noise, cond, scales)
    emb = network.time(network._sinusoids(c_noise)) + network.label(cond.label)
    plain, scaled = silu(emb), silu(0.3 * emb)
    torch.testing.assert_close(seen, [plain, plain, scaled, plain, plain, scaled])


@pytest.mark.parametrize("family", ["attn", "mlp"])
@torch.no_grad()
def test_branch_scales_multiply_what_a_residual_branch_adds(family):
    """A branch that ends in 0.3 times its weights says the same as one scaled by 0.3."""
    network = network_of().double()
    args, scale = inputs(dtype=torch.float64), torch.tensor(0.3, dtype=torch.float64)
    scaled = network(*args, {f"{family}.1": scale})
    block = network.blocks[1]
    last = {"attn": block.attn.proj, "mlp": block.mlp.fc2}[family]
    for parameter in last.parameters():
        parameter.mul_(0.3)
    torch.testing.assert_close(network(*args, {}), scaled)


def test_a_training_step_compiles_to_one_graph():
    network = network_of({**GUIDABLE, "depth": 1, "gradient_checkpointing": True}, ALL).train()
    compiled = torch.compile(network, fullgraph=True, backend="eager")
    grads = []
    for run in (compiled, network):
        torch.manual_seed(0)
        network.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16):
            run(*inputs(), {}).square().mean().backward()
        grads.append([p.grad for p in network.parameters()])
    torch.testing.assert_close(*grads, rtol=0, atol=0)


@torch.no_grad()
def test_patches_keep_their_place():
    """With silent blocks F of a pixel depends on the pixels of its own patch alone."""
    network = network_of().double()
    for block in network.blocks:
        torch.nn.init.zeros_(block.film.weight)
        torch.nn.init.zeros_(block.film.bias)
    x, c_noise, cond = inputs(dtype=torch.float64)
    out = network(x, c_noise, cond, {})
    x[..., 2:4, 4:6] += 1
    changed = (network(x, c_noise, cond, {}) != out).nonzero()[:, 2:]
    assert {tuple(at) for at in changed.tolist()} == {(2, 4), (2, 5), (3, 4), (3, 5)}


@torch.no_grad()
def test_labels_guidance_and_target_level_are_heard():
    network = network_of(conditions=ALL)
    x, c_noise, cond = inputs()
    out = network(x, c_noise, cond, {})
    for changed in (
        replace(cond, label=cond.label + 1),
        replace(cond, guidance=cond.guidance + 1),
        replace(cond, guidance=None),
        replace(cond, sigma_to=cond.sigma_to + 1),
        replace(cond, sigma_to=None),
    ):
        assert not torch.allclose(network(x, c_noise, changed, {}), out)


@torch.no_grad()
def test_conditions_that_it_was_not_built_for_are_ignored():
    network = network_of(conditions=())
    x, c_noise, cond = inputs()
    assert network.label is None
    assert torch.equal(network(x, c_noise, cond, {}), network(x, c_noise, Cond(), {}))


@torch.no_grad()
def test_conditions_added_to_trained_weights_change_nothing_at_first():
    trained, more = network_of(), fresh(conditions=ALL)
    added = more.load_state_dict(trained.state_dict(), strict=False).missing_keys
    assert {key.split(".")[0] for key in added} == {"guidance", "time_s"}
    assert torch.equal(more(*inputs(), {}), trained(*inputs(), {}))


def test_added_conditions_learn_from_the_first_step():
    network = network_of(conditions=ALL)
    more = fresh(conditions=ALL)
    state = network.state_dict()
    own = {k: t for k, t in state.items() if k.split(".")[0] not in {"guidance", "time_s"}}
    more.load_state_dict(own, strict=False)
    more(*inputs(), {}).square().mean().backward()
    assert more.guidance.weight.grad.abs().min() > 0
    assert more.time_s[2].weight.grad.abs().min() > 0


@torch.no_grad()
def test_guidance_is_added_to_the_sinusoids_and_the_target_level_to_the_embedding():
    network, seen = network_of(conditions=ALL), []
    network.final.film.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    x, c_noise, cond = inputs()
    network(x, c_noise, cond, {})
    waves = network._sinusoids(c_noise) + network.guidance(guidance_waves(cond.guidance))
    waves_s = network._sinusoids(cond.sigma_to)
    emb = network.time(waves) + network.label(cond.label) + network.time_s(waves_s)
    torch.testing.assert_close(seen, [silu(emb)])


def test_guidance_waves_are_those_of_latent_consistency_models():
    w = 1.7
    frequencies = [math.exp(-math.log(10_000) * i / 127) for i in range(128)]
    angles = [1000 * w * frequency for frequency in frequencies]
    expected = [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
    actual = guidance_waves(torch.tensor([w], dtype=torch.float64))
    torch.testing.assert_close(actual, torch.tensor([expected], dtype=torch.float64))


@torch.no_grad()
def test_absent_label_means_the_null_class_where_there_is_one():
    network = network_of(GUIDABLE)
    x, c_noise, _ = inputs()
    null = Cond(label=torch.full((3,), 10))
    assert torch.equal(network(x, c_noise, Cond(), {}), network(x, c_noise, null, {}))
    assert network.label.num_embeddings == 11
    with pytest.raises(ValueError, match=r"cond\.label"):
        network_of()(x, c_noise, Cond(), {})


@torch.no_grad()
@torch.no_grad()
def test_predicted_variances_are_dropped():
    network = network_of({**SMALL, "learn_sigma": True})
    both = network.outputs(*inputs(), {})
    assert both.shape == (3, 6, 8, 8)
    assert torch.equal(network(*inputs(), {}), both[:, :3])


def test_fresh_network_returns_zero_and_its_blocks_are_the_identity():
    network = fresh(conditions=ALL)
    assert network(*inputs(), {}).abs().max() == 0
    h = torch.randn(3, 16, 32)
    for block in network.blocks:
        assert torch.equal(block(h, block.film(torch.randn(3, 32))), h)


def test_fresh_weights_have_the_spread_of_the_official_code():
    """Linear layers by Xavier's rule, the patches' too, except those of the embeddings: 0.02."""
    network = fresh({**SMALL, "width": 128}, ALL)
    state = network.state_dict()
    assert all(not t.any() for key, t in state.items() if key.endswith("bias"))
    for key in ("label.weight", "time.0.weight", "time.2.weight", "time_s.0.weight"):
        assert state[key].std().item() == pytest.approx(0.02, rel=0.1), key
    for key in ("patch.proj.weight", "blocks.1.attn.qkv.weight", "blocks.0.mlp.fc2.weight"):
        xavier = math.sqrt(2 / sum(state[key].flatten(1).shape))
        assert state[key].std().item() == pytest.approx(xavier, rel=0.1), key


@torch.no_grad()
def test_time_scale_multiplies_the_noise_level_and_the_target_level():
    """With scale 1 the input is the official step, 1000 times what a denoiser passes."""
    network = network_of(conditions=ALL).double()
    steps = network_of({**SMALL, "time_scale": 1.0}, ALL).double()
    steps.load_state_dict(network.state_dict())
    x, c_noise, cond = inputs(dtype=torch.float64)
    same = replace(cond, sigma_to=c_noise.flip(0))
    other = replace(cond, sigma_to=1000 * c_noise.flip(0))
    torch.testing.assert_close(steps(x, 1000 * c_noise, other, {}), network(x, c_noise, same, {}))
    assert not torch.allclose(steps(x, c_noise, other, {}), network(x, c_noise, same, {}))


def test_positions_are_saved_but_not_trained():
    network = fresh()
    assert "pos_embed" in network.state_dict()
    assert "pos_embed" not in dict(network.named_parameters())


def test_saved_weights_give_the_same_network_under_both_names():
    network = network_of(GUIDABLE, ALL)
    other = fresh(GUIDABLE, ALL)
    other.load_state_dict(read(write(network.state_dict())))
    assert torch.equal(other(*inputs(), {}), network(*inputs(), {}))


@pytest.mark.parametrize(
    ("preset", "millions", "depth", "heads"),
    [
        ("dit-s-2", 33, 12, 6),
        ("dit-b-2", 130, 12, 12),
        ("dit-l-2", 458, 24, 16),
        ("dit-xl-2", 675, 28, 16),
    ],
)
def test_presets_have_the_sizes_of_the_paper(preset, millions, depth, heads):
    with torch.device("meta"):
        network = DiT(preset=preset).build(DataSpec(4, 32, 1000), LABEL)
    assert round(sum(p.numel() for p in network.parameters()) / 1e6) == millions
    assert [block.attn.num_heads for block in network.blocks] == [heads] * depth


def test_fields_beside_a_preset_win_and_the_resolved_form_is_stable():
    options = DiT.model_validate_json('{"preset": "dit-xl-2", "depth": 3}')
    assert (options.width, options.depth, options.learn_sigma) == (1152, 3, True)
    plain = json.dumps(options.model_dump(mode="json", exclude_none=True))
    assert DiT.model_validate_json(plain) == options


def test_every_size_of_the_family_is_a_preset():
    assert len(PRESETS) == 12
    for preset, sizes in PRESETS.items():
        assert DiT(preset=preset).model_dump(include=set(sizes)) == sizes


@pytest.mark.parametrize("resolution", [8, 28, 32, 64])
def test_default_options_fit_common_pictures(resolution):
    with torch.device("meta"):
        DiT().build(DataSpec(1, resolution), frozenset())


@pytest.mark.parametrize(
    ("options", "data", "conditions", "message"),
    [
        (
            {"patch_size": 8},
            DataSpec(1, 28),
            (),
            r"backbone\.patch_size = 8: .* pictures of 28 pixels; give 7 or 14, or another",
        ),
        (
            {"patch_size": 16},
            DataSpec(1, 8),
            (),
            r"backbone\.patch_size = 16: .* pictures of 8 pixels; give 8, or another",
        ),
        (
            {"width": 96, "num_heads": 5},
            DataSpec(1, 8),
            (),
            r"backbone\.num_heads = 5: .* width = 96; give 4 or 6, or another width",
        ),
        (
            {"width": 30, "num_heads": 6},
            DataSpec(1, 8),
            (),
            r"backbone\.width = 30: .*; give a multiple of 4, such as 32",
        ),
        ({}, DataSpec(1, 8), ("label",), r"cannot embed labels, num_classes .* is None; choose"),
        ({}, DataSpec(1, 8, 10), ("size",), r"cannot embed size; it accepts guidance, label, sig"),
    ],
)
def test_options_that_do_not_fit_are_refused_with_a_cure(options, data, conditions, message):
    with pytest.raises(RecipeError, match=message) as caught:
        DiT(**options).build(data, frozenset(conditions))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("patch_size", 0),
        ("width", 10**6),
        ("depth", 0),
        ("num_heads", 0),
        ("mlp_ratio", 0.0),
        ("time_scale", 0.0),
        ("preset", "dit-xxl-2"),
    ],
)
def test_absurd_values_are_refused(field, value):
    with pytest.raises(ValueError, match=field):
        DiT(**{field: value})


def test_guidance_changes_three_channels_of_latents_as_in_the_official_code():
    data = DataSpec(4, 8, 10)
    network = DiT(patch_size=2, width=48, depth=1, num_heads=3, null_class=True).build(data, LABEL)
    for parameter in network.parameters():
        parameter.data.normal_(0, 0.2)
    denoiser, sigma = Denoiser(network.eval(), scalings=edm_scalings), torch.tensor([0.5, 3.0])
    x, cond = torch.randn(2, 4, 8, 8), Cond(label=torch.tensor([1, 7]))
    plain, without = denoiser(x, sigma, cond), denoiser(x, sigma)
    guided = Guided(denoiser, 2.0)(x, sigma, cond)
    torch.testing.assert_close(guided[:, :3], (3 * plain - 2 * without)[:, :3])
    assert torch.equal(guided[:, 3], plain[:, 3])
    assert not torch.allclose(plain[:, 3], without[:, 3])
