"""Backbone sd_unet: diffusers' networks, their sites, conditions, weights and refusals."""

from __future__ import annotations

import copy
import json
import subprocess
import sys

import pytest
import torch
from cmkit_latent.backbone import SDUNet
from cmkit_latent.network import guidance_waves
from cmkit_std.objectives.lcm import LCM
from cmkit_std.preconds.discrete import Discrete
from diffusers import LatentConsistencyModelPipeline, UNet2DConditionModel
from diffusers.models.resnet import ResnetBlock2D
from safetensors.torch import load_file
from torch import nn

from cmkit import CheckpointError, Cond, DataSpec, PluginError, RecipeError, TextSpec
from cmkit.errors import CmkitError
from cmkit.plan.networks import load_into
from cmkit.testing import check_backbone
from cmkit.testing.subjects import told
from cmkit.weights import find, identity

SD, XL = TextSpec(5, 12), TextSpec(5, 12, pooled=6, size=True)
TEXT = {
    "sd15": TextSpec(77, 768),
    "sd21": TextSpec(77, 1024),
    "sdxl": TextSpec(77, 2048, pooled=1280, size=True),
    "ssd1b": TextSpec(77, 2048, pooled=1280, size=True),
}
GUIDED = frozenset({"guidance"})


def data_of(text: TextSpec, side: int = 8) -> DataSpec:
    return DataSpec(4, side, text=text)


def built(text: TextSpec = SD, also=frozenset(), seed: int = 0, **options):
    """A network whose every weight acts."""
    backbone = SDUNet(**{"preset": "tiny", **options})
    network = backbone.build(data_of(text), text.conditions | also)
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.1, generator=generator)
    return network.eval()


def given(text: TextSpec = SD, n: int = 2):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 4, 8, 8, generator=generator)
    t = torch.linspace(999, 19, n)
    return x, t, Cond(guidance=torch.linspace(1.0, 7.5, n), **told(text, n))


def scales_of(network, value=0.5):
    return {site: torch.tensor(value + 0.01 * k) for k, site in enumerate(network.sites)}


@pytest.mark.parametrize(
    ("preset", "parameters", "skips", "embeddings"),
    [
        ("sd15", 859_520_964, 12, 22),
        ("sd21", 865_910_724, 12, 22),
        ("sdxl", 2_567_463_684, 9, 17),
        ("ssd1b", 1_331_334_404, 9, 16),
    ],
)
def test_presets_have_the_published_sizes(preset, parameters, skips, embeddings):
    text = TEXT[preset]
    with torch.device("meta"):
        network = SDUNet(preset=preset).build(data_of(text, 64), text.conditions)
    assert sum(p.numel() for p in network.parameters()) == parameters
    families = [site.partition(".")[0] for site in network.sites]
    assert families == ["skip"] * skips + ["emb"] * embeddings
    decoder = sum(isinstance(m, ResnetBlock2D) for m in network.unet.up_blocks.modules())
    assert {"skip.0", f"emb.{embeddings - 1}"} <= network.late
    assert len(network.late) == skips + decoder


@pytest.mark.parametrize("text", [SD, XL], ids=["sd", "xl"])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_it_keeps_the_laws_of_a_backbone(text, checkpointed):
    backbone = SDUNet(preset="tiny", gradient_checkpointing=checkpointed)
    check_backbone(backbone, data_of(text), compile=False)


@pytest.mark.compile
def test_it_is_compiled_whole():
    check_backbone(SDUNet(preset="tiny"))


@torch.no_grad()
@pytest.mark.parametrize("text", [SD, XL], ids=["sd", "xl"])
def test_it_is_the_network_of_diffusers_bit_for_bit(text):
    network, (x, t, cond) = built(text, GUIDED), given(text)
    added = {"text_embeds": cond.pooled, "time_ids": cond.size} if text.pooled else None
    waves = guidance_waves(cond.guidance, 256)
    expected = network.unet(x, t, cond.text, timestep_cond=waves, added_cond_kwargs=added).sample
    assert torch.equal(network(x, t, cond, {}), expected)


@torch.no_grad()
def test_a_skip_is_scaled_where_it_is_joined_and_the_main_path_stays():
    """skip.i is what the last block but i of the decoder joins; skip.0 comes from the input."""
    network, call, seen = built(), given(), []
    joins = [resnet for block in network.unet.up_blocks for resnet in block.resnets]
    first = []
    network.unet.conv_in.register_forward_hook(lambda *call: first.append(call[-1]))
    for join in joins:
        join.norm1.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    network(*call, {})
    plain = list(seen)
    assert torch.equal(plain[-1][:, -16:], first[0])
    for i in range(len(joins)):
        seen.clear()
        network(*call, {f"skip.{i}": torch.tensor(0.5)})
        place = len(joins) - 1 - i
        assert all(torch.equal(a, b) for a, b in zip(seen[:place], plain[:place], strict=True))
        changed, before = seen[place], plain[place]
        skip = (changed != before).any(dim=(0, 2, 3)).nonzero()[0].item()
        assert torch.equal(changed[:, :skip], before[:, :skip])
        assert torch.equal(changed[:, skip:], 0.5 * before[:, skip:])
        width = {0: 16, 1: 16, 2: 16, 3: 32}[i]
        assert changed.shape[1] - skip == width


@torch.no_grad()
def test_an_embedding_is_scaled_for_one_block_before_its_activation():
    network, call, seen, names = built(), given(), [], []

    def keep(block, name):
        block.time_emb_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        block.register_forward_pre_hook(lambda *_: names.append(name))

    for name, block in network.unet.named_modules():
        if isinstance(block, ResnetBlock2D):
            keep(block, name)
    network(*call, {})
    plain, order = list(seen), list(names)
    emb = network.unet.time_embedding(network.unet.get_time_embed(call[0], call[1]))
    down = [name for name in order if name.startswith("down")]
    assert order[: len(down) + 2] == [*down, "mid_block.resnets.0", "mid_block.resnets.1"]
    for j in range(len(order)):
        seen.clear()
        network(*call, {f"emb.{j}": torch.tensor([0.5, 2.0])})
        scaled = torch.nn.functional.silu(emb * torch.tensor([[0.5], [2.0]]))
        assert torch.equal(seen[j], scaled)
        for k, (now, before) in enumerate(zip(seen, plain, strict=True)):
            assert k == j or torch.equal(now, before)


@pytest.mark.parametrize(
    "blocks",
    [
        {"mid_block_type": "UNetMidBlock2D"},
        {
            "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
            "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
        },
    ],
    ids=["no attention in the middle, as SSD-1B", "none in the first of the decoder, as SD 1.5"],
)
@torch.no_grad()
def test_decoding_is_forward_wherever_blocks_have_no_attention(tmp_path, blocks):
    """Skips and late embeddings scaled after encoding."""
    config = {**SDUNet(preset="tiny").config(data_of(XL), XL.conditions)}
    config |= {"layers_per_block": 2, **blocks}
    (tmp_path / "config.json").write_text(json.dumps(config))
    network, call = built(XL, preset=None, folder=str(tmp_path)), given(XL)
    late = {site: s for site, s in scales_of(network).items() if site in network.late}
    early = {site: s for site, s in scales_of(network).items() if site not in network.late}
    assert "emb.0" in early
    encoded = network.encode(*call, early)
    for some in (late, {}):
        assert torch.equal(network.decode(encoded, some), network(*call, early | some))
    assert not torch.equal(network(*call, early), network(*call, {}))


@pytest.mark.parametrize("scaled", [False, True])
def test_checkpointing_changes_no_gradient(scaled):
    grads = []
    for checkpointed in (False, True):
        network = built(gradient_checkpointing=checkpointed).train()
        scales = {k: v.requires_grad_() for k, v in scales_of(network).items()} if scaled else {}
        network(*given(), scales).square().sum().backward()
        own = [*network.parameters(), *scales.values()]
        grads.append([p.grad for p in own])
    assert all(torch.allclose(a, b, rtol=1e-5) for a, b in zip(*grads, strict=True))
    assert any(getattr(m, "gradient_checkpointing", False) for m in network.modules())


def test_checkpointing_computes_blocks_again():
    network, calls = built(gradient_checkpointing=True).train(), []
    network.unet.up_blocks[0].resnets[0].conv1.register_forward_hook(lambda *_: calls.append(1))
    network(*given(), {}).sum().backward()
    assert len(calls) == 2


@torch.no_grad()
def test_nothing_is_rescaled_after_a_call():
    network, (x, t, cond) = built(), given()
    plain = network.unet(x, t, cond.text).sample
    assert not torch.equal(network(x, t, cond, scales_of(network)), plain)
    assert torch.equal(network.unet(x, t, cond.text).sample, plain)


@torch.no_grad()
def test_a_copy_has_sites_of_its_own():
    network, call = built(), given()
    copied = copy.deepcopy(network)
    half = scales_of(network)
    seen = []
    copied.unet.conv_out.register_forward_pre_hook(
        lambda *_: seen.append((copied._hooked.scales, network._hooked.scales))
    )
    assert torch.equal(copied(*call, half), network(*call, half))
    assert seen == [(half, {})]


@torch.no_grad()
def test_blocks_that_diffusers_calls_in_another_way_are_refused():
    network, (x, t, cond) = built(), given()
    block = network.unet.up_blocks[0]
    skips = [torch.zeros(2, 32, 4, 4)]
    with pytest.raises(PluginError, match="res_hidden_states_tuple"):
        block(torch.zeros(2, 32, 4, 4), skips, None)
    resnet = network.unet.down_blocks[0].resnets[0]
    with pytest.raises(PluginError, match="features and an embedding"):
        resnet(torch.zeros(2, 16, 8, 8), temb=torch.zeros(2, 64))
    resnet._forward_pre_hooks.clear()  # as if it were called by its `forward`
    network(x, t, cond, {"skip.0": torch.tensor(0.5)})
    with pytest.raises(PluginError, match=r"diffusers 0\.\d+.*nothing was called at emb\.0"):
        network(x, t, cond, {"emb.0": torch.tensor(0.5)})
    with pytest.raises(PluginError, match=r"nothing was called at emb\.0"):
        network.encode(x, t, cond, {"emb.0": torch.tensor(0.5)})


@torch.no_grad()
def test_rounded_weights_compute_the_same_under_autocast():
    network, call = built(XL, GUIDED), given(XL)
    with torch.autocast("cpu", torch.bfloat16):
        before = network(*call, scales_of(network))
        network.lower(torch.bfloat16)
        assert torch.equal(network(*call, scales_of(network)), before)
    assert before.dtype == torch.float32


@torch.no_grad()
def test_a_fresh_embedding_of_guidance_changes_nothing():
    backbone, data = SDUNet(preset="tiny"), data_of(SD)
    teacher = backbone.build(data, SD.conditions)
    student = backbone.build(data, SD.conditions | GUIDED)
    left, more = student.load_state_dict(teacher.state_dict(), strict=False)
    assert (left, more) == (["unet.time_embedding.cond_proj.weight"], [])
    x, t, cond = given()
    assert torch.equal(student(x, t, cond, {}), teacher(x, t, cond, {}))
    nn.init.normal_(student.unet.time_embedding.cond_proj.weight)
    assert not torch.equal(student(x, t, cond, {}), teacher(x, t, cond, {}))


@pytest.mark.parametrize("dim", [32, 33, 256])
def test_the_guidance_weight_is_the_scale_less_1(dim):
    """The pipeline of diffusers embeds guidance_scale - 1, 1000 times as large."""
    scale = torch.tensor([1.0, 4.5, 8.5])
    embed = LatentConsistencyModelPipeline.get_guidance_scale_embedding
    waves, exact = guidance_waves(scale - 1, dim), guidance_waves(scale.double() - 1, dim)
    expected = embed(None, scale - 1, dim)
    torch.testing.assert_close(waves, expected, rtol=0, atol=2e-3)  # of 7500 rad in float32
    torch.testing.assert_close(exact.float(), expected, rtol=0, atol=2e-3)


@torch.no_grad()
@pytest.mark.parametrize("inner", ["", "unet"], ids=["network", "pipeline"])
@pytest.mark.parametrize("text", [SD, XL], ids=["sd", "xl"])
def test_weights_of_diffusers_are_read_and_written(tmp_path, text, inner):
    network, call = built(text, GUIDED), given(text)
    network.unet.save_pretrained(tmp_path / inner)
    data, name = data_of(text), str(tmp_path)
    backbone = SDUNet(folder=name)
    assert backbone.identity()["config"]["time_cond_proj_dim"] == 256
    other = backbone.build(data, text.conditions | GUIDED)
    assert load_into(other, name, backbone, data) == ()
    assert torch.equal(other(*call, {}), network(*call, {}))
    assert identity(name, backbone).keys() == {"weights"}
    (layout,) = backbone.layouts(data)
    written = layout.write(other.state_dict())
    assert (
        written.keys() == load_file(tmp_path / inner / "diffusion_pytorch_model.safetensors").keys()
    )
    again = UNet2DConditionModel.from_config(layout.config(other.state_dict()))
    again.load_state_dict(written)
    assert again.config.time_cond_proj_dim == 256
    said = {key: v for key, v in again.config.items() if not key.startswith("_")}
    assert said == {key: v for key, v in network.unet.config.items() if not key.startswith("_")}


def test_a_half_precision_variant_is_read(tmp_path):
    network = built()
    network.half().unet.save_pretrained(tmp_path / "unet", variant="fp16")
    backbone = SDUNet(preset="tiny")
    other = backbone.build(data_of(SD), SD.conditions)
    load_into(other, str(tmp_path), backbone, data_of(SD))
    half, own = network.state_dict(), other.state_dict()
    assert all(torch.equal(half[name].float(), own[name]) for name in half)


def test_names_of_the_hub_are_looked_up(tmp_path, monkeypatch):
    """By cmkit_latent.hub, which knows folders and downloads."""
    built().unet.save_pretrained(tmp_path / "unet")
    asked = []

    class Hub:
        @staticmethod
        def folder_of(weights, what, parts=(), config_only=False):
            asked.append((weights, what, config_only))
            return tmp_path

    monkeypatch.setitem(sys.modules, "cmkit_latent.hub", Hub)
    backbone = SDUNet(folder="hub:someone/model")
    assert find("hub:someone/model", backbone).path == tmp_path
    network = backbone.build(data_of(SD), SD.conditions)
    load_into(network, "hub:someone/model", backbone, data_of(SD))
    hub = "hub:someone/model"
    assert set(asked) == {(hub, "weights", False), (hub, "backbone.folder", True)}


@pytest.mark.parametrize(
    ("said", "wrong"),
    [
        ({"prediction_type": "epsilon"}, None),
        ({"prediction_type": "v_prediction"}, 'prediction = "v_prediction"'),
        ({}, None),
        ({"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}, None),
        ({"beta_schedule": "linear"}, 'spacing = "linear"'),
        ({"beta_start": 0.0001}, "beta_start = 0.0001"),
        ({"num_train_timesteps": 500}, "steps = 500"),
        ({"beta_schedule": "sigmoid"}, "beta_schedule = 'sigmoid' is not known here"),
    ],
)
def test_the_schedule_of_a_pipeline_is_compared(tmp_path, said, wrong):
    (tmp_path / "unet").mkdir()
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "unet" / "config.json").write_text("{}")
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(said))
    backbone = SDUNet(preset="sd15")
    for name in (tmp_path, tmp_path / "unet"):
        assert backbone.located(str(name)) == name
        if wrong is None:
            backbone.check_published(str(name), Discrete())
            continue
        with pytest.raises(RecipeError, match=wrong):
            backbone.check_published(str(name), Discrete())
    assert backbone.located(str(tmp_path / "scheduler")) is None


@pytest.mark.parametrize(
    ("options", "data", "conditions", "said"),
    [
        ({"preset": "sd15"}, DataSpec(3, 64, text=TEXT["sd15"]), None, "in_channels are 4"),
        ({"preset": "sd15"}, data_of(TEXT["sd15"], 60), None, "latents divisible by 8"),
        ({"preset": "sd15"}, data_of(TEXT["sd21"], 64), None, "reads 768 numbers a token"),
        ({"preset": "sd15"}, DataSpec(4, 64), frozenset(), r"add a \[text\] table"),
        ({"preset": "sd15"}, data_of(XL, 64), None, "cannot embed pooled, size"),
        ({"preset": "sdxl"}, data_of(TextSpec(77, 2048), 64), None, "pooled and size beside"),
        ({"preset": "sdxl"}, data_of(TextSpec(77, 2048, 1280), 64), None, "reads size beside"),
        (
            {"preset": "sdxl"},
            data_of(TextSpec(77, 2048, 768, True), 64),
            None,
            "1280 pooled numbers .* gives 768",
        ),
    ],
)
def test_what_does_not_fit_is_refused(options, data, conditions, said):
    conditions = data.text.conditions if conditions is None else conditions
    with pytest.raises(RecipeError, match=said) as caught:
        SDUNet(**options).build(data, conditions)
    assert str(caught.value).startswith("backbone.preset = ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "error", "said"),
    [
        (None, CheckpointError, "no config.json in it, nor in its unet/"),
        ("{", CheckpointError, "fetch it again"),
        ("[]", CheckpointError, "no JSON object"),
        ('{"_class_name": "AutoencoderKL"}', CheckpointError, "AutoencoderKL"),
        ('{"class_embed_type": "timestep"}', RecipeError, "asks for classes"),
        ('{"addition_embed_type": "image"}', RecipeError, "asks for what it is not told"),
        ('{"encoder_hid_dim_type": "image_proj"}', RecipeError, "asks for pictures"),
        ('{"cross_attention_dim": 12, "time_cond_proj_dim": 64}', RecipeError, "embeds_guidance"),
        ('{"cross_attention_dim": 12, "novelty": 1}', CheckpointError, "novelty"),
        ('{"cross_attention_dim": 12, "norm_num_groups": 7}', CheckpointError, "divisible"),
        ('{"cross_attention_dim": 12, "mid_block_type": "New"}', CheckpointError, "New"),
    ],
)
def test_a_folder_that_describes_no_such_network_is_refused(tmp_path, content, error, said):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(error, match=said) as caught:
        SDUNet(folder=str(tmp_path)).build(data_of(SD), SD.conditions)
    assert isinstance(caught.value, CmkitError)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("options", [{}, {"preset": "sd15", "folder": "x"}])
def test_preset_and_folder_exclude_each_other(options):
    with pytest.raises(ValueError, match=r"either preset, one of sd15, .*, or folder"):
        SDUNet(**options)


def test_for_a_smoke_test_it_is_tiny_and_fits():
    for options in ({"preset": "sdxl"}, {"folder": "nowhere"}):
        backbone = SDUNet(**options)
        changed = {**backbone.model_dump(), **backbone.smallest(data_of(XL))}
        network = SDUNet(**changed).build(data_of(XL), XL.conditions | GUIDED)
        assert sum(p.numel() for p in network.parameters()) < 500_000


def test_a_missing_prompt_is_named():
    network, (x, t, _) = built(XL), given()
    with pytest.raises(ValueError, match="cond needs text, pooled and size"):
        network(x, t, Cond(text=torch.zeros(2, 5, 12)), {})


def test_a_teacher_of_prompts_needs_no_null_class():
    network = built()
    LCM().check_networks(network, network)
    network.prompted = False
    with pytest.raises(RecipeError, match="reads no prompts, and has no null class"):
        LCM().check_networks(network, network)


def test_its_options_are_read_without_torch():
    code = (
        "import sys; from cmkit_latent.backbone import SDUNet; SDUNet(preset='sd15');"
        " sys.exit(bool({'torch', 'diffusers'} & sys.modules.keys()))"
    )
    paths = f"import sys; sys.path[:0] = {sys.path!r}; "
    assert subprocess.run([sys.executable, "-c", paths + code], check=False).returncode == 0


def test_adapters_leave_the_sites_alone():
    peft = pytest.importorskip("peft")
    network, call = built(), given()
    before = network(*call, scales_of(network))
    network.unet.add_adapter(peft.LoraConfig(r=2, target_modules=["conv1", "time_emb_proj"]))
    assert torch.allclose(network(*call, scales_of(network)), before, atol=1e-5)
