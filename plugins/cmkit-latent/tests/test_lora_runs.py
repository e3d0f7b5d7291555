"""Adapter lora from the recipe to the pictures: what is trained, kept, and drawn from."""

from __future__ import annotations

from dataclasses import replace
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

import numpy as np
import pytest
import torch
from cmkit_latent import factors, injected
from safetensors.torch import load_file
from tiny import tiny_sd

from cmkit import CheckpointError, Cond, RecipeError
from cmkit.export import export
from cmkit.plan import build, build_teacher, coding_of, plan
from cmkit.plugins import register
from cmkit.recipe import load, stage_keys
from cmkit.runs import run
from cmkit.runs.drawing import draw
from cmkit.runs.finished import drawn_from
from cmkit.stop import StopSignal
from cmkit.train import start, train

CPU = torch.device("cpu")
TOML = """\
name = "lora"
seed = 3
dataset = { use = "invented", channels = 4, resolution = 8, images = 24, texts = 5 }
text = { use = "words", length = 5, width = 16 }
cache = false
backbone = { use = "sd_unet", folder = "sd" }
adapter = { use = "lora", rank = 2, alpha = 4.0 }
teacher = { weights = "sd", precond = "discrete" }
train = { steps = 4, batch = 4, save_every = 2, log_every = 2, lr = 1e-2, precision = "fp32" }
sampler = { use = "lcm", steps = 2 }
sample = { images = 6, batch = 3, precision = "fp32" }

[denoiser]
precond = { use = "discrete", timestep_scaling = 10.0, unit_start = true }
init = "teacher"

[objective]
use = "lcm"
num_sigmas = 51
skip = 1
w_min = 6.5
w_max = 6.5
embed_guidance = false
target_ema = 0.0
"""


@pytest.fixture(scope="module")
def registry():
    latent = EntryPoint("latent", "cmkit_latent.manifest", "cmkit")
    return register([*(e for e in entry_points(group="cmkit") if e.name != "latent"), latent])


@pytest.fixture(scope="module")
def sd(tmp_path_factory):
    return tiny_sd(tmp_path_factory.mktemp("sd") / "sd")


@pytest.fixture
def toml(tmp_path, monkeypatch, sd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    Path("sd").symlink_to(sd)
    Path("lora.toml").write_text(TOML)
    return "lora.toml"


def begun(toml, registry, *sets):
    made = plan(load(toml, sets, registry))
    return start(made, CPU, coding_of(made, CPU).null)


def finished(toml, registry, *sets, out="runs"):
    *_, last = run(plan(load(toml, sets, registry)), registry, Path(out), CPU, StopSignal())
    return Path(last.folder)


def sizes(network):
    counts = [0, 0]
    for parameter in network.parameters():
        counts[parameter.requires_grad] += parameter.numel()
    return counts


def test_a_plan_counts_the_adapter_apart_and_no_second_network(toml, registry):
    made = plan(load(toml, [], registry))
    network = build(made, CPU).network
    frozen, trained = sizes(network)
    assert made.trained == trained > 0
    assert made.parameters == frozen + trained
    # Gradients, two numbers of the optimizer, one average; neither teacher nor target.
    assert made.memory == 4 * (frozen + trained * 5)
    assert made.disk < 4 * frozen + 10**6
    full = plan(load(toml, ["adapter.rank=4"], registry))
    assert stage_keys(full.recipe)["train"] != stage_keys(made.recipe)["train"]
    copied = plan(load(toml, ["objective.target_ema=0.5"], registry))
    assert copied.memory == made.memory + 4 * trained


def test_the_teacher_is_the_same_network_with_the_adapter_off(toml, registry):
    training = begun(toml, registry)
    models = training.models
    assert models.teacher.network is models.online.network
    assert models.target is models.online
    held = {p.data_ptr(): p.nbytes for d in (models.online, models.teacher, *models.ema.values())
            for p in d.parameters()}  # fmt: skip
    frozen, trained = sizes(models.online.network)
    assert sum(held.values()) == 4 * (frozen + 2 * trained)
    x, sigma = torch.randn(2, 4, 8, 8), torch.tensor([3.0, 14.0])
    cond = Cond(text=torch.randn(2, 5, 16))
    plain = build_plain(training.plan)
    list(train(training))
    with torch.no_grad():
        expected = plain(x, sigma, cond)
        assert torch.equal(models.teacher(x, sigma, cond), expected)
        assert not torch.allclose(models.online(x, sigma, cond), expected, rtol=1e-3)
    assert models.online.network.training


def build_plain(made):
    """The teacher as a copy of its own."""
    alone = replace(made, recipe=replace(made.recipe, adapter=None))
    return build_teacher(alone, CPU, None)


def test_a_teacher_in_bf16_computes_what_a_copy_would(toml, registry):
    training = begun(toml, registry, 'teacher.dtype="bf16"')
    x, sigma = torch.randn(2, 4, 8, 8), torch.tensor([3.0, 14.0])
    cond = Cond(text=torch.randn(2, 5, 16))
    with torch.no_grad():
        expected = build_plain(training.plan)(x, sigma, cond)
        assert torch.equal(training.models.teacher(x, sigma, cond), expected)


OTHER = [
    'teacher.weights="other"',
    'denoiser={precond={use="discrete",timestep_scaling=10.0},weights="sd"}',
]


def test_another_teacher_has_a_network_of_its_own(toml, registry):
    copied = Path("other")
    copied.mkdir()
    for path in Path("sd").resolve().iterdir():
        (copied / path.name).symlink_to(path)
    training = begun(toml, registry, *OTHER)
    assert training.models.teacher.network is not training.models.online.network


def test_frozen_weights_never_move(toml, registry):
    training = begun(toml, registry, "objective.target_ema=0.5", "train.optimizer=adamw")
    copies = [training.models.online, training.models.target, *training.models.ema.values()]
    before = [{k: v.clone() for k, v in d.network.state_dict().items()} for d in copies]
    for _ in train(training):
        pass
    for denoiser, was in zip(copies, before, strict=True):
        for name, tensor in denoiser.network.state_dict().items():
            assert torch.equal(tensor, was[name]) == ("lora_" not in name), name
    optimized = {name for g in training.optimizer.param_groups for name in g["param_names"]}
    assert optimized
    assert all("lora_" in name for name in optimized)


def test_a_run_keeps_the_adapter_alone_and_is_drawn_from(toml, registry):
    folder = finished(toml, registry)
    kept = load_file(folder / "model.safetensors")
    assert all("lora_" in name for name in kept)
    network = build(plan(load(toml, [], registry)), CPU).network
    assert sum(t.numel() for t in kept.values()) == sizes(network)[1]
    for file in folder.glob("checkpoints/*/online.safetensors"):
        assert all("lora_" in name for name in load_file(file))
    found = factors.read(folder / "model.safetensors", "model", None)
    assert {f.scale for f in found.values()} == {2.0}
    recipe = drawn_from(folder, [], registry, 6)
    list(draw(recipe, 3, (), Path("a.npz"), CPU))
    samples = np.concatenate([np.load(f)["arr_0"] for f in sorted(folder.glob("samples/*.npz"))])
    drawn = np.load("a.npz")
    assert np.array_equal(drawn[drawn.files[0]], samples)
    for at in ("@2", ":online", "@4:ema-0.999"):
        other = drawn_from(f"{folder}{at}", [], registry, 6)
        list(draw(other, 3, (), Path(f"b{at[:2]}.npz"), CPU))
    assert np.array_equal(np.load("b@4.npz")[drawn.files[0]], samples)
    assert not np.array_equal(np.load("b@2.npz")[drawn.files[0]], samples)
    again = [f'adapter={{use="lora",weights="{folder}"}}']
    network = build(plan(load(toml, again, registry)), CPU).network
    for layer, f in injected.taken(network).items():
        assert torch.equal(f.a, found[layer].a)
        assert torch.equal(f.b, found[layer].b)


def test_a_training_goes_on_to_the_same_bits(toml, registry):
    whole = finished(toml, registry, out="whole")
    finished(toml, registry, "train.steps=2", out="parts")
    both = finished(toml, registry, out="parts")
    first, second = (load_file(f / "model.safetensors") for f in (whole, both))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("sets", "said"),
    [
        (["denoiser.init=random"], "it changes a trained network: say denoiser.weights"),
        (["adapter.targets=['nothing']"], 'no layer is called "nothing"'),
        (['adapter.weights="no.safetensors"'], "no weights of an adapter"),
        (['backbone={use="edm2",channels=16}', "text.length=5"], "cannot embed text|adapter"),
    ],
)
def test_what_does_not_fit_is_one_line(toml, registry, sets, said):
    with pytest.raises((RecipeError, CheckpointError), match=said) as caught:
        plan(load(toml, sets, registry))
    assert "\n" not in str(caught.value)


@pytest.fixture
def merged(registry, monkeypatch, capsys):
    """`cmkit merge ..`: exit code and what it says."""
    monkeypatch.setattr("cmkit.plugins.discover", lambda: registry)

    def call(*arguments):
        from cmkit.cli import main

        monkeypatch.setattr("sys.argv", ["cmkit", "merge", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            main()
        return caught.value.code, "".join(capsys.readouterr())

    return call


def test_adapters_are_merged_and_folded_into_weights(toml, registry, merged):
    one = finished(toml, registry)
    two = finished(toml, registry, "adapter.rank=3", "seed=5")
    code, said = merged(f"{one}=0.8", f"{two}/model.safetensors=0.5", "both.safetensors")
    assert (code, said.splitlines()[-1].startswith("both.safetensors: written from")) == (0, True)
    Path("base.toml").write_text(
        TOML.split("[objective]")[0]
        .replace('init = "teacher"', 'weights = "sd"')
        .replace('adapter = { use = "lora", rank = 2, alpha = 4.0 }\n', "")
        .replace('teacher = { weights = "sd", precond = "discrete" }\n', "")
    )
    code, said = merged("both.safetensors=1", "full.safetensors", "--fold", "base.toml")
    assert code == 0, said
    full = load_file("full.safetensors")
    own = load_file("sd/unet/diffusion_pytorch_model.safetensors")
    assert full.keys() == {f"unet.{name}" for name in own}
    parts = {
        n: factors.read(f / "model.safetensors", "x", None) for n, f in ((0.8, one), (0.5, two))
    }
    for name, weight in own.items():
        layer = f"unet.{name.removesuffix('.weight')}"
        for count, found in parts.items():
            if name.endswith(".weight") and layer in found:
                weight = weight + count * found[layer].change().view_as(weight)
        torch.testing.assert_close(full[f"unet.{name}"], weight, rtol=1e-4, atol=1e-6)
    for words, code, told in (
        (("both.safetensors", "c.safetensors"), 2, "write what it counts"),
        ((f"{one}=1", f"{two}=1", "c.safetensors", "--how", "factors"), 4, "equal ranks"),
        ((f"{one}=0", f"{two}=0", "c.safetensors"), 2, "all count 0"),
        ((f"{one}=1", "full.safetensors"), 2, "exists already"),
        ((f"{one}=1", "folder"), 2, "name a .safetensors file"),
        (("sd/none.safetensors=1", "c.safetensors"), 4, "no weights of an adapter"),
        ((f"{one}=1", "c.safetensors", "--use", "lola"), 9, "did you mean 'lora'"),
    ):
        got, said = merged(*words)
        assert (got, told in said) == (code, True), said
        assert len(said.strip().splitlines()) == 1
    assert not Path("c.safetensors").exists()


PIXELS = """\
name = "digits"
dataset = { use = "digits" }
backbone = { use = "adm", channels = 16, channel_mult = [1], num_res_blocks = 1, norm_groups = 8 }
objective = { use = "ict", start_scales = 4, end_scales = 8 }
train = { steps = 3, batch = 8, lr = 1e-2, optimizer = "adamw", precision = "fp32" }
sampler = { use = "multistep" }
sample = { images = 16, precision = "fp32" }
"""


def test_a_consistency_model_of_pixels_is_tuned_searched_and_drawn_from(toml, registry):
    Path("base.toml").write_text(PIXELS)
    base = finished("base.toml", registry)
    tuned = [
        f'denoiser.weights="{base}"',
        'adapter={use="lora",rank=2}',
        'rescaler={use="global"}',
        "search={images=32,batch=32,minimize='fid',grid={skip=[0.9,1.0]},confirm_seeds=2,"
        "precision='fp32'}",
        'metric=[{use="fidelity",extractor="cmkit-digits"}]',
    ]
    folder = finished("base.toml", registry, *tuned)
    small, whole = (load_file(f / "model.safetensors") for f in (folder, base))
    assert all("lora_" in name for name in small)
    assert "lora_" not in "".join(whole)
    recipe = drawn_from(folder, [], registry, 16)
    assert recipe.denoiser.weights == str(base)
    assert recipe.adapter.weights == str(folder / "model.safetensors")
    list(draw(recipe, 0, (), Path("a.npz"), CPU))
    samples = np.concatenate([np.load(f)["arr_0"] for f in sorted(folder.glob("samples/*.npz"))])
    assert np.array_equal(np.load("a.npz")["arr_0"], samples)
    before = np.load(next(base.glob("samples/*.npz")))["arr_0"]
    assert not np.array_equal(before, samples)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_a_tuned_run_is_exported_as_the_folded_network(toml, registry):
    """The pipeline has the weights of the base and of its adapter, added up, and draws alike."""
    Path("base.toml").write_text(PIXELS)
    base = finished("base.toml", registry)
    sets = [f'denoiser.weights="{base}"', 'adapter={use="lora",rank=2}', "train.lr=0.1"]
    folder = finished("base.toml", registry, *sets)
    *_, last = export(drawn_from(folder, [], registry, 1), Path("out"), registry, CPU, False)
    assert last.result["pipeline"] == "ConsistencyModelPipeline"
    assert last.result["difference"] < 0.5
    kept = load_file("out/unet/diffusion_pytorch_model.safetensors")
    assert not [name for name in kept if "lora_" in name]
    change = factors.read(folder / "model.safetensors", "tuned", None)["conv_out"].change()
    whole = load_file(base / "model.safetensors")["conv_out.weight"]
    torch.testing.assert_close(kept["conv_out.weight"], whole + change.view_as(whole))
    assert change.abs().max() > 1e-3


ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("name", ["sd15", "ssd1b", "sdxl"])
def test_shipped_recipes_train_adapters_alone(name, registry):
    recipe = load(ROOT / "recipes" / f"lcm_lora_{name}.toml", ["metric=[]"], registry)
    assert recipe.needs == {"teacher", "boundary"}
    assert recipe.objective.w_min == recipe.objective.w_max == 6.5
    assert recipe.denoiser.guidance is None
    assert recipe.teacher.backbone == recipe.backbone
    assert recipe.adapter.rank == recipe.adapter.alpha == 64
    assert recipe.backbone.preset == name
