"""Exported pipelines draw cmkit's pictures, and cmkit draws from pipelines of diffusers."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

import numpy as np
import pytest
import torch
from cmkit_latent import pipelines
from cmkit_std.preconds.discrete import Discrete
from cmkit_std.samplers import lcm as samplers
from cmkit_std.samplers.euler import Euler
from diffusers import UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file
from tiny import tiny_bert, tiny_sd, tiny_sdxl

import cmkit.plugins
from cmkit.cli import main
from cmkit.errors import inline
from cmkit.export import quiet
from cmkit.plan import space_of
from cmkit.plugins import register
from cmkit.recipe import load
from cmkit.runs.finished import drawn_from
from cmkit.tensors import save_weights

ENTRY = EntryPoint("latent", "cmkit_latent.manifest", "cmkit")
LCM = {
    "precond": {"use": "discrete", "timestep_scaling": 10.0, "unit_start": True},
    "guidance": 6.5,
}


@pytest.fixture(scope="module", autouse=True)
def registry(tmp_path_factory):
    """cmkit with this package, as if it were installed."""
    others = [entry for entry in entry_points(group="cmkit") if entry.value != ENTRY.value]
    found = register([*others, ENTRY])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cmkit.plugins, "discover", lambda: found)
        patch.setattr("cmkit.cli.entry.discover", lambda: found)
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield found


@pytest.fixture(scope="module")
def sd(tmp_path_factory):
    return tiny_sd(tmp_path_factory.mktemp("sd"))


@pytest.fixture(scope="module")
def guided(tmp_path_factory):
    """A pipeline whose network embeds the guidance weight."""
    return tiny_sd(tmp_path_factory.mktemp("guided"), time_cond_proj_dim=8)


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory):
    return tiny_sdxl(tmp_path_factory.mktemp("sdxl"))


@pytest.fixture(scope="module")
def guided_xl(tmp_path_factory):
    return tiny_sdxl(tmp_path_factory.mktemp("guided_xl"), time_cond_proj_dim=8)


@pytest.fixture
def cli(monkeypatch, capsys, tmp_path):
    """Call the command line in a fresh folder; (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["cmkit", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            main()
        out, err = capsys.readouterr()
        return caught.value.code, out, err

    return call


def recipe(folder, denoiser=LCM, **tables):
    """Write r.toml, a recipe that draws with the weights of a pipeline's folder."""
    tables = {
        "dataset": {"use": "invented", "resolution": 16},
        "codec": {"use": "autoencoder", "weights": str(folder)},
        "text": {"use": "clip", "weights": str(folder)},
        "backbone": {"use": "sd_unet", "folder": str(folder)},
        "denoiser": {"weights": str(folder), **denoiser},
        "sampler": {"use": "lcm", "steps": 4},
        **tables,
    }
    lines = [f"{key} = {inline(table)}" for key, table in tables.items() if table is not None]
    Path("r.toml").write_text('name = "tiny"\n' + "\n".join(lines))
    return "r.toml"


def loud(folder):
    """A file with the weights of a pipeline's network, of which all act, in our names."""
    network = UNet2DConditionModel.from_pretrained(folder / "unet")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    save_weights(
        Path("loud.safetensors"), {f"unet.{name}": v for name, v in network.state_dict().items()}
    )
    return "loud.safetensors"


def pixels(name):
    with Image.open(name) as picture:
        return np.array(picture).astype(int)


def exported(cli, *arguments):
    """What `export` says of the folder `out`."""
    code, out, err = cli("export", *arguments, "--to", "diffusers", "--device", "cpu", "--json")
    assert code == 0, err
    return json.loads(out)


def refused(result, code, *words):
    """One line with these words and this exit code."""
    assert result[0] == code, result
    lines = [line for line in result[2].splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    for word in words:
        assert word in lines[0]


DIFFUSION = {"precond": "discrete", "guidance": 3.0}
EMBEDS = {"embeds_guidance": True}
LINEAR = {"use": "discrete", "timestep_scaling": 5.0, "spacing": "linear", "beta_end": 0.01}
V = {"use": "discrete", "prediction": "v_prediction"}
FAST, SLOW = {"use": "lcm", "steps": 3}, {"use": "ddim", "steps": 11}
ODD = {"use": "lcm", "steps": 3, "grid": 40}


@pytest.mark.parametrize(
    ("name", "denoiser", "sampler", "pipeline"),
    [
        ("sd", {}, FAST, "StableDiffusionPipeline"),
        ("sd", {"guidance": None, "precond": LINEAR}, ODD, "StableDiffusionPipeline"),
        ("sd", {"precond": "discrete"}, FAST, "StableDiffusionPipeline"),
        ("guided", EMBEDS, FAST, "LatentConsistencyModelPipeline"),
        ("sdxl", {}, FAST, "StableDiffusionXLPipeline"),
        ("guided_xl", EMBEDS, FAST, "StableDiffusionXLPipeline"),
        ("sd", DIFFUSION, SLOW, "StableDiffusionPipeline"),
        ("sdxl", {**DIFFUSION, "precond": V}, SLOW, "StableDiffusionXLPipeline"),
    ],
)
def test_a_pipeline_draws_the_same_picture(name, denoiser, sampler, pipeline, request, cli):
    folder = request.getfixturevalue(name)
    denoiser = {**LCM, "weights": loud(folder), **denoiser}
    denoiser = {key: value for key, value in denoiser.items() if value is not None}
    said = exported(cli, recipe(folder, denoiser, sampler=sampler), "out")
    scheduler = "LCMScheduler" if sampler["use"] == "lcm" else "EulerDiscreteScheduler"
    assert (said["pipeline"], said["scheduler"]) == (pipeline, scheduler)
    assert said["difference"] < 0.01


@pytest.fixture
def exported_lcm(guided, cli):
    """The folder of a latent consistency model."""
    exported(cli, recipe(guided, {**LCM, **EMBEDS, "weights": loud(guided)}), "out")
    return Path("out")


def test_its_folder_says_what_it_is_and_how_to_draw(exported_lcm):
    index = json.loads((exported_lcm / "model_index.json").read_text())
    assert index["unet"] == ["diffusers", "UNet2DConditionModel"]
    assert index["text_encoder"] == ["transformers", "CLIPTextModel"]
    assert index["safety_checker"] == [None, None]
    assert index["requires_safety_checker"] is False
    scheduler = json.loads((exported_lcm / "scheduler" / "scheduler_config.json").read_text())
    expected = {
        "beta_schedule": "scaled_linear",
        "original_inference_steps": 50,
        "timestep_scaling": 10.0,
        "prediction_type": "epsilon",
        "steps_offset": 1,
    }
    assert scheduler.items() >= expected.items()
    assert json.loads((exported_lcm / "unet" / "config.json").read_text())["sample_size"] == 8
    card = (exported_lcm / "README.md").read_text()
    drawing = card.split("```python\n")[1].split("```")[0]
    assert len(drawing.splitlines()) == 3
    assert 'pipeline("a red apple", num_inference_steps=4, guidance_scale=7.5)' in drawing
    assert "- backbone `sd_unet`: Rombach" in card
    assert "arXiv:2310.04378" in card


def test_the_lines_of_the_card_draw(exported_lcm, monkeypatch):
    card = (exported_lcm / "README.md").read_text()
    with quiet():
        exec(card.split("```python\n")[1].split("```")[0], {})  # noqa: S102
    assert pixels("picture.png").shape == (16, 16, 3)


def test_what_was_exported_is_drawn_from_without_a_recipe(exported_lcm, cli):
    """The same weights, steps and guidance: the same picture as from the recipe itself."""
    prompt = ["--prompt", "a frog", "--seed", 3, "--guidance", 6.5, "--out"]
    for source, out in (("r.toml", "a.png"), ("out", "b.png")):
        code, _, err = cli("sample", source, *prompt, out)
        assert code == 0, err
    assert np.abs(pixels("a.png") - pixels("b.png")).max() <= 1
    assert pixels("a.png").std() > 5


@pytest.mark.parametrize("name", ["sd", "sdxl", "guided"])
def test_a_pipeline_goes_through_cmkit_unchanged(name, request, cli):
    folder = request.getfixturevalue(name)
    steps = [] if name == "guided" else ["--set", "sampler.steps=3"]
    said = exported(cli, folder, "out", *steps)
    assert said["difference"] < 0.01
    for part in ("unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model"):
        theirs, ours = (load_file(f"{place}/{part}.safetensors") for place in (folder, "out"))
        assert theirs.keys() == ours.keys()
        assert all(torch.equal(tensor, ours[key]) for key, tensor in theirs.items())
    kept = ("beta_schedule", "beta_start", "beta_end", "num_train_timesteps", "steps_offset")
    before, after = (
        json.loads((place / "scheduler/scheduler_config.json").read_text())
        for place in (folder, Path("out"))
    )
    if name != "guided":
        assert {key: after[key] for key in kept} == {key: before[key] for key in kept}


def test_an_encoder_like_bert_and_a_tiny_autoencoder_are_exported(tmp_path, cli, registry):
    from diffusers import AutoencoderTiny

    torch.manual_seed(0)
    widths = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    blocks = {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
    AutoencoderTiny(**widths, **blocks).save_pretrained(tmp_path / "vae")
    text = {"use": "sentence", "weights": str(tiny_bert(tmp_path / "bert")), "length": 8}
    codec = {"use": "autoencoder", "weights": str(tmp_path / "vae"), "dtype": "bf16"}
    source = recipe(tmp_path, codec=codec, text=text, backbone={"use": "sd_unet", "preset": "tiny"})
    tables = load(source, [], registry)
    data = space_of(tables, tables.dataset.spec())
    network = tables.backbone.build(data, frozenset({"text"}))
    save_weights(tmp_path / "w.safetensors", network.state_dict())
    said = exported(cli, source, "out", "--set", f"denoiser.weights={tmp_path}/w.safetensors")
    assert said["difference"] < 0.01
    again = drawn_from("out", [], registry, 1, prompts=["red"])
    assert (again.text.length, again.text.mask) == (8, True)
    assert type(again.text).__name__ == "Sentence"


def spoilt_scheduler(monkeypatch, **config):
    """Samplers say another scheduler than they draw by."""
    for sampler in (samplers.LCM, Euler):
        true = sampler.scheduler

        def said(self, *given, true=true):
            found = true(self, *given)
            return replace(found, config={**found.config, **config})

        monkeypatch.setattr(sampler, "scheduler", said)


@pytest.mark.parametrize(
    "config",
    [
        {"beta_schedule": "linear"},
        {"beta_end": 0.02},
        {"prediction_type": "v_prediction"},
        {"original_inference_steps": 25},
        {"timestep_scaling": 1e-5},
    ],
)
def test_a_wrong_scheduler_is_seen_and_nothing_is_kept(config, guided, cli, monkeypatch):
    source = recipe(guided, {**LCM, **EMBEDS, "weights": loud(guided)})
    spoilt_scheduler(monkeypatch, **config)
    result = cli("export", source, "out", "--to", "diffusers")
    refused(result, 4, "out: not kept, diffusers draws another picture", "of 255")
    assert not [path for path in Path().iterdir() if "out" in path.name]


def test_a_forgotten_guidance_weight_is_seen(guided, cli, monkeypatch):
    source = recipe(guided, {**LCM, **EMBEDS, "weights": loud(guided)})
    index = pipelines.index_of
    monkeypatch.setattr(
        pipelines, "index_of", lambda *given: index(*given[:2], given[2] - {"guidance"})
    )
    monkeypatch.setattr(
        UNet2DConditionModel, "forward", _deaf(UNet2DConditionModel.forward), raising=True
    )
    refused(cli("export", source, "out", "--to", "diffusers"), 4, "another picture")


def _deaf(forward):
    """A network that hears nothing of its guidance weight when a pipeline calls it."""

    def said(self, *given, **named):
        if named.get("return_dict") is False and "cross_attention_kwargs" in named:
            named["timestep_cond"] = None
        return forward(self, *given, **named)

    return said


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        ({"sampler": {"use": "lcm", "grid": 30}}, 2, ("r.toml:7: sampler", "grid = 25")),
        ({"sampler": {"use": "heun"}}, 2, ("sampler", "diffusion model")),
        ({"sampler": {"use": "ddim"}}, 2, ("sampler", '"lcm"')),
        ({"sampler": {"use": "multistep"}}, 2, ("sampler", "denoiser.precond", "consistency")),
        ({"sampler": None}, 2, ("sampler", "say how to draw")),
        ({"codec": {"use": "patches", "components": 4}}, 2, ("codec", "draw with `cmkit sample`")),
        (
            {"text": {"use": "words", "length": 4, "width": 16}},
            2,
            ("text", "no pipeline of diffusers"),
        ),
        ({"denoiser": {**LCM, "guidance": -0.5}}, 2, ("denoiser.guidance = -0.5", "drop it")),
        (
            {"rescaler": {"use": "global", "skip": 0.9}},
            2,
            ("skip.0 = 0.9", "--drop-scales", "cmkit sample"),
        ),
        (
            {"rescaler": {"use": "per_timestep", "sigmas": [1.0, 14.0], "skip": [1.0, 1.2]}},
            2,
            ("depend on the noise level", "--drop-scales"),
        ),
    ],
)
def test_what_diffusers_has_no_like_of_is_refused_with_the_cure(changes, code, words, sd, cli):
    denoiser = {**LCM, "weights": loud(sd), **changes.pop("denoiser", {})}
    if changes.get("sampler") and changes["sampler"]["use"] == "heun":
        denoiser["precond"] = "discrete"
    codec = changes.get("codec")
    side = 32 if codec else 16
    tables = {"dataset": {"use": "invented", "resolution": side}, **changes}
    before = sorted(Path().rglob("*"))
    result = cli("export", recipe(sd, denoiser, **tables), "out", "--to", "diffusers")
    refused(result, code, *words)
    assert sorted(Path().rglob("*")) == sorted([*before, Path("r.toml")])


def test_scales_are_dropped_where_that_is_said(sd, cli):
    rescaler = {"use": "global", "skip": 0.9}
    source = recipe(sd, {**LCM, "weights": loud(sd)}, rescaler=rescaler)
    assert exported(cli, source, "out", "--drop-scales")["difference"] < 0.01
    assert exported(cli, source, "two", "--rescaler", "off")["difference"] < 0.01


def test_a_target_that_exists_stays_as_it_is(sd, cli):
    Path("out").mkdir()
    result = cli("export", recipe(sd), "out", "--to", "diffusers")
    refused(result, 2, "out: exists already; name a new folder")
    assert not any(Path("out").iterdir())


def test_without_diffusers_the_package_is_named(sd, cli, monkeypatch):
    monkeypatch.setattr("cmkit.export.importlib.util.find_spec", lambda name: None)
    result = cli("export", recipe(sd), "out", "--to", "diffusers")
    refused(result, 9, "needs the package diffusers; pip install 'diffusers>=0.42,<0.44'")


def test_an_autoencoder_with_a_shift_has_no_pipeline(sd, cli, tmp_path):
    folder = shutil.copytree(sd, tmp_path / "shifted")
    changed(folder / "vae" / "config.json", shift_factor=0.1)
    result = cli("export", recipe(folder), "out", "--to", "diffusers")
    refused(result, 2, "codec", "shift_factor", "choose another autoencoder")


def changed(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize(
    ("name", "spoil", "code", "words"),
    [
        ("sd", lambda f: shutil.rmtree(f / "vae"), 4, ("half a pipeline, without vae;",)),
        ("sd", lambda f: shutil.rmtree(f / "tokenizer"), 4, ("without tokenizer",)),
        ("sd", lambda f: shutil.rmtree(f / "scheduler"), 4, ("without scheduler",)),
        ("sdxl", lambda f: shutil.rmtree(f / "text_encoder_2"), 4, ("without text_encoder_2",)),
        ("sd", lambda f: (f / "model_index.json").unlink(), 4, ("no model_index.json",)),
        ("sd", lambda f: (f / "model_index.json").write_text("{"), 4, ("damaged",)),
        ("sd", lambda f: weights_of(f / "vae").unlink(), 4, ("vae", "no weights")),
        ("sd", lambda f: weights_of(f / "unet").unlink(), 4, ("unet", "no weights")),
        (
            "sd",
            lambda f: changed(f / "model_index.json", _class_name="FluxPipeline"),
            4,
            ("no installed backbone draws from a FluxPipeline",),
        ),
        (
            "sd",
            lambda f: changed(f / "scheduler/scheduler_config.json", rescale_betas_zero_snr=True),
            2,
            ("rescale_betas_zero_snr",),
        ),
        (
            "sd",
            lambda f: changed(f / "scheduler/scheduler_config.json", beta_schedule="sigmoid"),
            2,
            ("beta_schedule = 'sigmoid'", "known: scaled_linear"),
        ),
        (
            "sd",
            lambda f: changed(f / "model_index.json", text_encoder=["transformers", "T5Model2"]),
            2,
            ("T5Model2",),
        ),
    ],
)
def test_half_a_pipeline_is_one_line(name, spoil, code, words, request, cli, tmp_path):
    folder = shutil.copytree(request.getfixturevalue(name), tmp_path / "half")
    spoil(folder)
    result = cli("sample", folder, "--prompt", "a frog", "--out", "a.png")
    refused(result, code, "half", *words)
    assert not Path("a.png").exists()


def weights_of(folder):
    found = folder / "diffusion_pytorch_model.safetensors"
    return found if found.is_file() else folder / "model.safetensors"


def test_a_pipeline_asks_for_prompts(sd, cli):
    refused(cli("sample", sd, "--out", "a.png"), 2, "nothing to draw from", "--prompt")


@pytest.mark.parametrize(("name", "w"), [("sd", 6.5), ("sdxl", 4.0), ("guided", 6.5)])
def test_it_is_drawn_from_as_diffusers_does_by_default(name, w, request, registry):
    folder = request.getfixturevalue(name)
    tables = drawn_from(folder, [], registry, 1, prompts=["a frog"])
    assert (tables.denoiser.guidance, tables.denoiser.embeds_guidance) == (w, name == "guided")
    assert tables.precond == Discrete(unit_start=True)
    assert (tables.data.channels, tables.data.resolution) == (3, 16)
    assert tables.sampler.steps == 50


def test_weights_in_several_files_are_those_of_one(sd, cli, tmp_path):
    """diffusers divides what is above 10 GB."""
    folder = shutil.copytree(sd, tmp_path / "sharded")
    weights_of(folder / "unet").unlink()
    network = UNet2DConditionModel.from_pretrained(sd / "unet")
    network.save_pretrained(folder / "unet", max_shard_size="40KB")
    assert len(list((folder / "unet").glob("*-of-*.safetensors"))) > 2
    for source, out in ((sd, "a.png"), (folder, "b.png")):
        code, _, err = cli("sample", source, "--prompt", "a frog", "--steps", 3, "--out", out)
        assert code == 0, err
    assert (pixels("a.png") == pixels("b.png")).all()


def test_a_graph_takes_features_of_prompts_and_the_guidance_weight(guided, cli):
    recipe(guided, denoiser={**LCM, **EMBEDS}, dataset={"use": "invented", "resolution": 16})
    code, out, err = cli("export", "r.toml", "out", "--to", "torch")
    assert code == 0, err
    assert float(out.split("differs by ")[1].split()[0]) < 1e-4
    for said in (err, Path("out/README.md").read_text()):
        assert "the denoiser alone, of latents and features of prompts" in " ".join(said.split())
    about = json.loads(Path("out/model.json").read_text())
    assert about["inputs"].keys() == {"x", "sigma", "guidance", "text"}
    assert about["guidance"] == 6.5
    assert "pixels" not in about
    graph = torch.export.load("out/model.pt2").module()
    shapes = {name: one["shape"][1:] for name, one in about["inputs"].items()}
    given = {name: torch.ones(2, *shape) for name, shape in shapes.items()}
    x, sigma = given.pop("x"), given.pop("sigma")
    plain = graph(x, sigma, **given)
    for name in given:
        assert (graph(x, sigma, **{**given, name: 3 * given[name]}) - plain).abs().max() > 0
    assert "# text: features of a prompt" in Path("out/README.md").read_text()
