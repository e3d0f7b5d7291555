"""Adapter lora on the networks of pixels: layers, graphs, sites, recipes, files for others."""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

import pytest
import torch
from cmkit_latent import injected
from cmkit_latent.lora import Lora
from cmkit_std.backbones.adm import ADM
from cmkit_std.backbones.dit import DiT
from cmkit_std.backbones.edm2 import EDM2
from cmkit_std.backbones.songunet import SongUNet
from cmkit_std.rescalers.global_ import Global
from torch import nn

from cmkit import Cond, DataSpec, Denoiser, RecipeError, TextSpec
from cmkit.plan import plan
from cmkit.plugins import register
from cmkit.recipe import load, run_name
from cmkit.tensors import save_weights

RECIPES = Path(__file__).parents[3] / "recipes"
SMALL = {"channels": 16, "channel_mult": (1, 2), "num_res_blocks": 1, "attention_resolutions": (8,)}
NETWORKS = {
    "adm": ADM(**SMALL, norm_groups=8, num_heads=2),
    "adm-updown": ADM(**SMALL, norm_groups=8, num_heads=2, resblock_updown=True),
    "dit": DiT(width=16, depth=2, num_heads=2, patch_size=4),
    "songunet": SongUNet(**SMALL),
}
DATA = DataSpec(1, 16, 10, text=TextSpec(5, 12))


@pytest.fixture(scope="module")
def registry():
    latent = EntryPoint("latent", "cmkit_latent.manifest", "cmkit")
    return register([*(e for e in entry_points(group="cmkit") if e.name != "latent"), latent])


def adapted(name: str, **options):
    """A network whose every weight acts, with an adapter that acts, on labels and guidance."""
    network = NETWORKS[name].build(DATA, frozenset({"label", "guidance"}))
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.1, generator=generator)
    adapter = Lora(**{"rank": 2, **options})
    adapter.attach(network)
    for layer in injected.layers_of(network).values():
        for half in (layer.lora_A, layer.lora_B):
            nn.init.normal_(half["default"].weight, std=0.1, generator=generator)
    return network.eval(), adapter


def given(n: int = 2):
    x = torch.randn(n, 1, 16, 16, generator=torch.Generator().manual_seed(1))
    return x, torch.linspace(0.1, 0.5, n), Cond(torch.arange(n), guidance=torch.ones(n))


@pytest.mark.compile
@pytest.mark.parametrize("name", NETWORKS)
def test_an_adapted_network_compiles_whole_once_for_all_scales(name):
    network, _ = adapted(name)
    call = given()
    compiled = torch.compile(network, fullgraph=True, backend="eager")
    for stance, value in (("default", 1.1), ("fail_on_recompile", 0.7)):
        scales = dict.fromkeys(network.sites, torch.tensor(value))
        with torch.compiler.set_stance(stance):
            out = compiled(*call, scales)
        torch.testing.assert_close(out, network(*call, scales), rtol=1e-5, atol=1e-5)


@pytest.mark.compile
def test_training_through_a_compiled_adapted_network_has_the_same_gradients():
    gradients = []
    for compiling in (False, True):
        torch._dynamo.reset()
        network, _ = adapted("adm")
        if compiling:
            network.compile(fullgraph=True, backend="eager")
        network.train()(*given(), {}).square().sum().backward()
        gradients.append({n: p.grad for n, p in network.named_parameters() if p.requires_grad})
    plain, compiled = gradients
    assert plain.keys() == compiled.keys()
    assert all("lora_" in name for name in plain)
    for name, gradient in plain.items():
        torch.testing.assert_close(compiled[name], gradient, rtol=1e-3, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", NETWORKS)
def test_every_site_acts_and_a_rescaled_adapted_network_is_the_rescaled_folded_one(name):
    network, adapter = adapted(name)
    call = given()
    plain = network(*call, {})
    for site in network.sites:
        assert not torch.allclose(network(*call, {site: torch.tensor(0.5)}), plain), site
    skip = 0.8 if any(site.startswith("skip.") for site in network.sites) else 1.0
    denoiser = Denoiser(network).rescaled(Global(skip=skip, emb=1.2))
    x, _, cond = call
    before = denoiser(x, torch.tensor([0.5, 3.0]), cond)
    adapter.fold(network)
    assert not injected.layers_of(network)
    torch.testing.assert_close(denoiser(x, torch.tensor([0.5, 3.0]), cond), before,
                               rtol=1e-3, atol=1e-4)  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("name", ["adm", "adm-updown", "songunet"])
def test_a_search_shares_the_encoder_of_a_folded_network(name):
    network, adapter = adapted(name)
    call = given()
    late = {site: torch.tensor(0.7) for site in network.late}
    expected = network(*call, late)
    adapter.fold(network)  # as whatever draws does
    shared = network.decode(network.encode(*call, {}), late)
    torch.testing.assert_close(shared, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("adm", ("qkv", "proj")),
        ("adm-updown", ("conv1", "conv2")),
        ("dit", ("attn.qkv", "mlp.fc1")),
        ("dit", ("film",)),
        ("songunet", ("film", "time.0")),
    ],
)
def test_targets_are_the_layers_own_names(name, targets):
    fresh = NETWORKS[name].build(DATA, frozenset({"label", "guidance"}))
    names = [layer for layer, _ in fresh.named_modules()]
    wanted = {n for n in names for target in targets if f".{n}".endswith(f".{target}")}
    network, _ = adapted(name, targets=targets)
    assert set(injected.layers_of(network)) == wanted
    assert len(wanted) > len(targets)


def test_without_targets_every_linear_layer_and_convolution_is_adapted_prompts_among_them():
    network = NETWORKS["adm"].build(DATA, frozenset({"text"}))
    wanted = {n for n, m in network.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    Lora(rank=2).attach(network)
    assert set(injected.layers_of(network)) == wanted
    assert {"text.token", "text.out", "conv_out"} <= wanted


def test_a_backbone_without_such_layers_is_refused_in_one_line(tmp_path, registry):
    file = tmp_path / "edm2.toml"
    file.write_text(f"""\
name = "edm2"
dataset = {{ use = "invented", channels = 1, resolution = 16 }}
backbone = {{ use = "edm2", channels = 16, num_head_channels = 8 }}
denoiser = {{ precond = "edm", weights = "{tmp_path}/w.safetensors" }}
adapter = {{ use = "lora", rank = 2 }}
objective = {{ use = "edm" }}
train = {{ steps = 1, batch = 2 }}
""")
    backbone = EDM2(channels=16, num_head_channels=8)
    save_weights(
        tmp_path / "w.safetensors", backbone.build(DataSpec(1, 16), frozenset()).state_dict()
    )
    with pytest.raises(RecipeError, match=r"edm2.toml:5: adapter: .*no linear layers") as caught:
        plan(load(file, [], registry))
    assert "\n" not in str(caught.value)


def test_the_recipe_tunes_the_model_of_the_demo(registry):
    base = load(RECIPES / "digits_rescaled_ct.toml", [], registry)
    tuned = load(RECIPES / "digits_lora.toml", [], registry)
    assert tuned.denoiser.weights == f"run:{run_name(base)}"
    assert tuned.backbone == base.backbone
    assert tuned.dataset == base.dataset.model_copy(update={"inverted": True})
