"""Adapter lora: sizes, what is trained, files that diffusers loads, files of others, mixing."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from cmkit_latent import factors, injected
from cmkit_latent.backbone import SDUNet
from cmkit_latent.lora import Lora
from cmkit_std.backbones.adm import ADM
from cmkit_std.backbones.dit import DiT
from cmkit_std.backbones.edm2 import EDM2
from cmkit_std.backbones.songunet import SongUNet
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from tiny import tiny_sd, tiny_sdxl
from torch import nn

from cmkit import CheckpointError, Cond, DataSpec, RecipeError, TextSpec
from cmkit.plan.networks import load_into
from cmkit.testing import check_adapter
from cmkit.testing.subjects import told
from cmkit.train.training import _average

SD = TextSpec(5, 12)
TEXT = {
    "sd15": TextSpec(77, 768),
    "sdxl": TextSpec(77, 2048, pooled=1280, size=True),
    "ssd1b": TextSpec(77, 2048, pooled=1280, size=True),
}


def data_of(text: TextSpec = SD, side: int = 8) -> DataSpec:
    return DataSpec(4, side, text=text)


def built(seed: int = 0, **options):
    """A network whose every weight acts."""
    network = SDUNet(**{"preset": "tiny", **options}).build(data_of(), SD.conditions)
    return spread(network, seed)


def spread(network, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.1, generator=generator)
    return network.eval()


def given(text: TextSpec = SD, n: int = 2):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 4, 8, 8, generator=generator)
    return x, torch.linspace(999, 19, n), Cond(**told(text, n))


def attached(network=None, seed: int = 7, **options):
    """A network with an adapter that acts."""
    network = network or built()
    adapter = Lora(**{"rank": 2, "alpha": 3.0, **options})
    adapter.attach(network)
    generator = torch.Generator().manual_seed(seed)
    for layer in injected.layers_of(network).values():
        nn.init.normal_(layer.lora_B["default"].weight, std=0.3, generator=generator)
        nn.init.normal_(layer.lora_A["default"].weight, std=0.3, generator=generator)
    return network, adapter


@pytest.mark.parametrize(
    ("preset", "size", "layers"),
    [("sd15", 67_518_464, 280), ("ssd1b", 105_168_896, 425), ("sdxl", 197_017_600, 790)],
)
def test_sizes_are_those_that_the_authors_publish(preset, size, layers):
    text = TEXT[preset]
    with torch.device("meta"):
        network = SDUNet(preset=preset).build(data_of(text, 64), text.conditions)
        Lora().attach(network)
    assert sum(p.numel() for p in network.parameters() if p.requires_grad) == size
    assert len(injected.layers_of(network)) == layers


@torch.no_grad()
def test_a_fresh_adapter_changes_nothing_and_alone_requires_gradients():
    network, call = built(), given()
    before = network(*call, {})
    own = {id(p) for p in network.parameters()}
    Lora(rank=2).attach(network)
    assert torch.equal(network(*call, {}), before)
    trained = [p for p in network.parameters() if p.requires_grad]
    assert trained
    assert not own & {id(p) for p in trained}


@torch.no_grad()
def test_off_it_is_the_network_bit_for_bit_and_what_requires_gradients_stays():
    network, call = built(), given()
    before = network(*call, {})
    network, adapter = attached(network)
    requires = [p.requires_grad for p in network.parameters()]
    with adapter.off(network):
        assert torch.equal(network(*call, {}), before)
        assert [p.requires_grad for p in network.parameters()] == requires
    assert not torch.equal(network(*call, {}), before)
    frozen = _average(copy.deepcopy(network))
    with adapter.off(frozen):
        pass
    assert not any(p.requires_grad for p in frozen.parameters())


@torch.no_grad()
def test_sites_act_on_an_adapted_network_as_on_the_folded_one():
    network, adapter = attached()
    call = given()
    scales = {site: torch.tensor(0.5 + 0.01 * k) for k, site in enumerate(network.sites)}
    plain, scaled = network(*call, {}), network(*call, scales)
    for site in network.sites:
        assert not torch.equal(network(*call, {site: torch.tensor(0.5)}), plain)
    names = built().state_dict().keys()
    adapter.fold(network)
    assert network.state_dict().keys() == names
    torch.testing.assert_close(network(*call, {}), plain, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(network(*call, scales), scaled, rtol=1e-4, atol=1e-5)
    early = {site: s for site, s in scales.items() if site not in network.late}
    late = {site: s for site, s in scales.items() if site in network.late}
    assert torch.equal(network.decode(network.encode(*call, early), late), network(*call, scales))


SMALL = {"channels": 16, "channel_mult": (1, 2), "num_res_blocks": 1, "attention_resolutions": (8,)}
PIXELS = {
    "adm": ADM(**SMALL, norm_groups=8, num_heads=2, norm_channels=1),
    "adm-updown": ADM(**SMALL, norm_groups=8, num_heads=2, resblock_updown=True),
    "dit": DiT(width=16, depth=1, num_heads=2),
    "songunet": SongUNet(**SMALL),
    "songunet-residual": SongUNet(
        **SMALL, encoder_type="residual", resample_filter=(1, 3, 3, 1), embedding_type="fourier"
    ),
}


@pytest.mark.parametrize("name", PIXELS)
def test_networks_of_pixels_are_adapted_and_every_layer_acts(name):
    data = DataSpec(1, 16)
    network = spread(PIXELS[name].build(data, frozenset()))
    x = torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(1))
    t = torch.tensor([0.1, 0.5])
    before = network(x, t, Cond(), {}).detach()
    network, adapter = attached(network)
    out = network.train()(x, t, Cond(), {})
    out.square().sum().backward()
    for layer_name, layer in injected.layers_of(network).items():
        gradient = layer.lora_B["default"].weight.grad
        assert gradient is not None, layer_name
        assert gradient.any(), layer_name
    network.eval()
    with torch.no_grad(), adapter.off(network):
        off = network(x, t, Cond(), {})
    # On a CPU adm computes plain convolutions of doubled pixels in another way.
    torch.testing.assert_close(off, before, rtol=0, atol=1e-5 if name.startswith("adm") else 0)
    with torch.no_grad():
        adapted = network(x, t, Cond(), {})
        adapter.fold(network)
        torch.testing.assert_close(network(x, t, Cond(), {}), adapted, rtol=1e-3, atol=1e-4)


def test_networks_without_such_layers_and_targets_that_match_nothing_are_refused():
    with pytest.raises(RecipeError, match="no linear layers or convolutions of torch"):
        Lora().attach(EDM2(channels=16, num_head_channels=8).build(DataSpec(1, 16), frozenset()))
    with pytest.raises(RecipeError, match='no layer is called "to_z"; there are'):
        Lora(targets=("to_q", "to_z")).attach(built())
    network = built()
    Lora(targets=("to_q",)).attach(network)
    assert all(name.endswith(".to_q") for name in injected.layers_of(network))


def test_averages_share_the_frozen_weights():
    network, _ = attached()
    average = _average(network)
    base = {n: p for n, p in network.named_parameters() if not p.requires_grad}
    copies = dict(average.named_parameters())
    assert base
    assert all((copies[name] is p) == (name in base) for name, p in network.named_parameters())


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize(
    ("kind", "layers"), [(StableDiffusionPipeline, 79), (StableDiffusionXLPipeline, 177)]
)
def test_a_file_is_loaded_whole_by_diffusers_and_draws_the_same_picture(tmp_path, kind, layers):
    """The official scripts' files load 47 of 79 and 81 of 177."""
    make = tiny_sd if kind is StableDiffusionPipeline else tiny_sdxl
    folder = make(tmp_path / "pipeline", **SHAPES[layers])
    network = of_folder(folder)
    script = injected.AUTHORS[:-2]  # without the embedding of time
    network, adapter = attached(network, rank=4, alpha=2, targets=script)
    names = list(injected.layers_of(network))
    path = tmp_path / "pytorch_lora_weights.safetensors"
    adapter.write(network, path)
    pipeline = loaded(kind, folder)
    assert len(names) == layers
    plain = picture(pipeline)
    pipeline.load_lora_weights(tmp_path)
    found = injected.layers_of(pipeline.unet)
    assert [f"unet.{name}" for name in found] == names
    assert all([*layer.scaling.values()] == [0.5] for layer in found.values())
    drawn = picture(pipeline)
    assert not torch.equal(drawn, plain)
    ours = loaded(kind, folder)
    ours.unet = network.unet
    assert torch.equal(picture(ours), drawn)


SHAPES = {79: {}, 177: {"layers_per_block": 2}}


def of_folder(folder):
    backbone = SDUNet(folder=str(folder))
    config = json.loads((folder / "unet" / "config.json").read_text())
    xl = config["addition_embed_type"] is not None
    more = {"pooled": 12, "size": True} if xl else {}
    text = TextSpec(16, config["cross_attention_dim"], **more)
    data = data_of(text)
    network = backbone.build(data, text.conditions)
    load_into(network, str(folder), backbone, data)
    return network.eval()


def loaded(kind, folder):
    pipeline = kind.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def picture(pipeline):
    generator = torch.Generator().manual_seed(3)
    out = pipeline("a red apple", num_inference_steps=2, generator=generator, output_type="latent")
    return out.images


def files_of(network, folder):
    """The adapter of a network as several tools write it: name, tensors, metadata, rest."""
    found = injected.taken(network)
    plain = {layer.removeprefix("unet."): f for layer, f in found.items()}
    peft = {}
    for layer, f in plain.items():
        peft[f"{layer}.lora_A.weight"], peft[f"{layer}.lora_B.weight"] = f.a, f.b
    kohya = {}
    for layer, f in plain.items():
        name = "lora_unet_" + layer.replace(".", "_")
        kohya |= {f"{name}.lora_down.weight": f.a, f"{name}.lora_up.weight": f.b}
        kohya[f"{name}.alpha"] = torch.tensor(f.alpha)
    table = {f"unet.{key}": value for key, value in factors.config(found).items()}
    return {
        "diffusers": ({f"unet.{k}": v for k, v in peft.items()}, {"lora_adapter_metadata": table}),
        "script": ({f"base_model.model.{k}": v for k, v in peft.items()}, {}),
        "script, half mended": ({f"unet.base_model.model.{k}": v for k, v in peft.items()}, {}),
        "kohya": (kohya, {}),
        "no alpha": ({f"unet.{k}": v for k, v in peft.items()}, {}),
    }


def kept(path, tensors, about):
    about = {key: json.dumps(value) for key, value in about.items()}
    save_file({k: v.contiguous() for k, v in tensors.items()}, path, about or None)
    return path


@torch.no_grad()
@pytest.mark.parametrize("form", ["diffusers", "script", "script, half mended", "kohya"])
def test_files_of_others_are_read(tmp_path, form):
    network, _ = attached()
    tensors, about = files_of(network, tmp_path)[form]
    path = kept(tmp_path / "a.safetensors", tensors, about)
    other = built()
    Lora(weights=str(path), alpha=3.0 if "script" in form else None).attach(other)
    assert torch.equal(other(*given(), {}), network(*given(), {}))


@torch.no_grad()
def test_what_peft_saves_is_read_with_its_alpha(tmp_path):
    """adapter_model.safetensors beside adapter_config.json, in a folder."""
    network = built()
    options = LoraConfig(r=2, lora_alpha=5, target_modules=["to_q", "conv1"], use_rslora=True)
    tuned = get_peft_model(copy.deepcopy(network).unet, options)
    for name, parameter in tuned.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.3)
    tuned.save_pretrained(tmp_path)
    Lora(weights=str(tmp_path)).attach(network)
    x, t, cond = given()
    assert torch.allclose(network(x, t, cond, {}), tuned(x, t, cond.text).sample, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t, "says no alpha, without which its scale is unknown; say adapter.alpha"),
        (lambda t: {k.replace("unet.", "unet.x"): v for k, v in t.items()}, "of its .* layers are"),
        (lambda t: {k: v for k, v in t.items() if "mid_block" not in k or "lora_A" in k}, "lack a"),
        (lambda t: {"text_encoder.a.lora_A.weight": torch.ones(2, 2), **t}, "of the text encoder"),
        (lambda t: {"unet.a.hada_w1_a": torch.ones(2, 2)}, "is of LoHa; only LoRA"),
        (lambda t: {"unet.a.weight": torch.ones(2, 2)}, "is no factor of LoRA"),
        (lambda t: {}, "no adapter in it"),
        (lambda t: {k: v[:1] if "lora_A" in k else v for k, v in t.items()}, "have no product"),
        (
            lambda t: {
                k: v[..., :3, :3] if "lora_A" in k and v.ndim == 2 else v for k, v in t.items()
            },
            "no alpha|is changed from",
        ),
    ],
)
def test_files_that_do_not_fit_are_refused_in_one_line(tmp_path, change, said):
    network, _ = attached()
    tensors, _ = files_of(network, tmp_path)["no alpha"]
    path = kept(tmp_path / "a.safetensors", change(tensors), {})
    alpha = None if "says no alpha" in said else 3.0
    with pytest.raises(CheckpointError, match=said) as caught:
        Lora(weights=str(path), alpha=alpha).attach(built())
    assert "\n" not in str(caught.value)


def test_a_rank_that_the_file_has_not_is_refused(tmp_path):
    network, adapter = attached()
    adapter.write(network, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="of rank 2, not rank = 8"):
        Lora(weights=str(tmp_path / "a.safetensors"), rank=8).attach(built())
    with pytest.raises(CheckpointError, match="no weights of an adapter"):
        Lora(weights=str(tmp_path / "b.safetensors")).attach(built())


def test_a_file_that_diffusers_would_not_load_whole_is_refused(tmp_path, monkeypatch):
    """As if alpha were forgotten, or names were another's."""
    network, adapter = attached()
    path = tmp_path / "a.safetensors"
    config = factors.config
    monkeypatch.setattr(factors, "config", lambda found: {**config(found), "lora_alpha": 2})
    with pytest.raises(CheckpointError, match=r"diffusers would load 0 of \d+ layers"):
        adapter.write(network, path)


@torch.no_grad()
def test_mixed_ranks_and_alphas_are_kept_in_files(tmp_path):
    network, adapter = attached()
    adapter.write(network, tmp_path / "a.safetensors")
    other, adapter = attached(built(), rank=3, alpha=1.0, targets=("to_q", "conv1"), seed=8)
    adapter.write(other, tmp_path / "b.safetensors")
    both = {str(tmp_path / "a.safetensors"): 0.8, str(tmp_path / "b.safetensors"): 0.5}
    Lora(weights=both).mix(tmp_path / "c.safetensors")
    ranks = {f.rank for f in factors.read(tmp_path / "c.safetensors", "c", None).values()}
    assert ranks == {2, 5}
    one, two = built(), built()
    Lora(weights=both).attach(one)
    Lora(weights=str(tmp_path / "c.safetensors")).attach(two)
    assert torch.equal(one(*given(), {}), two(*given(), {}))
    Lora().write(two, tmp_path / "d.safetensors")  # counts what diffusers loads of it
    plain = built().state_dict()
    Lora().fold(one)
    folded = one.state_dict()
    for source, count in ((network, 0.8), (other, 0.5)):
        for layer, f in injected.taken(source).items():
            plain[f"{layer}.weight"] += count * f.change().view_as(plain[f"{layer}.weight"])
    for name, tensor in folded.items():
        torch.testing.assert_close(tensor, plain[name], rtol=1e-4, atol=1e-5)
    with pytest.raises(CheckpointError, match=r"of rank 3, and .* of 2"):
        Lora(weights=both, how="factors").mix(tmp_path / "e.safetensors")


def test_sums_that_make_no_sense_are_refused(tmp_path):
    network, adapter = attached()
    for name in "ab":
        adapter.write(network, tmp_path / f"{name}.safetensors")
    a, b = (str(tmp_path / f"{name}.safetensors") for name in "ab")
    with pytest.raises(ValueError, match="all count 0"):
        Lora(weights={a: 0.0, b: 0.0})
    with pytest.raises(CheckpointError, match="sum to nothing"):
        Lora(weights={a: 1.0, b: -1.0}, how="factors").mix(tmp_path / "c.safetensors")
    with pytest.raises(CheckpointError, match="sum to nothing"):
        Lora(weights={a: 1.0, b: -1.0}).mix(tmp_path / "c.safetensors")
    other = spread(DIT.build(DataSpec(1, 16), frozenset()))
    attached(other)[1].write(other, tmp_path / "d.safetensors")
    with pytest.raises(CheckpointError, match="of other networks"):
        Lora(weights={a: 1.0, str(tmp_path / "d.safetensors"): 1.0}).mix(tmp_path / "c.safetensors")
    kohya, _ = files_of(network, tmp_path)["kohya"]
    path = kept(tmp_path / "k.safetensors", kohya, {})
    with pytest.raises(CheckpointError, match="kohya's names"):
        Lora(weights={str(path): 1.0, a: 1.0}).mix(tmp_path / "c.safetensors")


DIT = DiT(width=16, depth=1, num_heads=2)


@torch.no_grad()
@pytest.mark.parametrize("how", ["add", "factors"])
def test_sums_are_those_of_peft(tmp_path, how):
    """Its "cat", and its "linear" of the squares of the numbers."""
    layers = nn.ModuleDict({"lin": nn.Linear(6, 5), "conv": nn.Conv2d(3, 4, 3)})
    alphas, counts = {"one": 2.0, "two": 6.0}, {"one": 0.8, "two": 0.5}
    options = {
        n: LoraConfig(r=2, lora_alpha=alpha, target_modules=[*layers], init_lora_weights=False)
        for n, alpha in alphas.items()
    }
    model = get_peft_model(layers, options["one"], "one")
    model.add_adapter("two", options["two"])
    kind, numbers = (
        ("cat", counts)
        if how == "add"
        else ("linear", {name: count**2 for name, count in counts.items()})
    )
    model.base_model.add_weighted_adapter(
        [*counts], [*numbers.values()], "peft", combination_type=kind
    )
    read = {
        name: {
            layer: factors.Factors(
                model.base_model.model[layer].lora_A[name].weight,
                model.base_model.model[layer].lora_B[name].weight,
                alphas[name],
            )
            for layer in layers
        }
        for name in counts
    }
    for layer, ours in factors.mixed(read, counts, how).items():
        theirs = model.base_model.model[layer].get_delta_weight("peft").flatten(1)
        torch.testing.assert_close(ours.change(), theirs, rtol=1e-6, atol=1e-7)


def test_it_keeps_the_laws_of_an_adapter():
    check_adapter(Lora(rank=2, alpha=3.0))
    check_adapter(Lora(rank=3))
