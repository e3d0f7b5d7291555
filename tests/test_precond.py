"""Laws of preconds: their formulas, what recipes say of them, and what they refuse."""

from __future__ import annotations

import re

import pytest
import torch
from cmkit_std.backbones.adm import ADM
from cmkit_std.discrete import DiscreteNoise, rounded
from cmkit_std.objectives.weightings import weighting
from cmkit_std.preconds.consistency import Consistency
from cmkit_std.preconds.discrete import Discrete
from cmkit_std.preconds.edm import EDM
from cmkit_std.preconds.iddpm import IDDPM
from cmkit_std.preconds.ve import VE
from cmkit_std.preconds.vp import VP
from cmkit_std.rescalers.global_ import Global
from safetensors.torch import load_file, save_file

from cmkit import (
    CheckpointError,
    Cond,
    DataSpec,
    Denoiser,
    Guided,
    Network,
    Noise,
    PluginError,
    RecipeError,
    Rng,
    discover,
    edm_scalings,
)
from cmkit.plan import build, build_teacher, plan
from cmkit.plan.checks import check_sampler
from cmkit.recipe import load, run_name, schema
from cmkit.testing import check_precond
from cmkit.traits import interchangeable, traits
from tests.test_run import RECIPE as TINY
from tests.toys import TinyNetwork

LINEAR = {"spacing": "linear", "beta_start": 1e-4, "beta_end": 0.02}
PRECONDS = {
    "consistency": Consistency(),
    "edm": EDM(),
    "vp": VP(),
    "ve": VE(),
    "iddpm": IDDPM(),
    "latent": Discrete(),
    "linear": Discrete(**LINEAR),
    "cosine": Discrete(spacing="cosine"),
    "velocity": Discrete(prediction="v_prediction"),
    "sample": Discrete(prediction="sample"),
    "lcm": Discrete(timestep_scaling=10.0),
}
"""Every column, with each prediction."""


def axis(precond) -> Noise:
    return precond.noise(*precond.levels, 7.0) or Noise(*precond.levels)


def scaled(precond, sigma):
    return precond.scalings(sigma, 0.5, precond.levels[0])


@pytest.mark.parametrize("precond", PRECONDS.values(), ids=PRECONDS)
def test_every_precond_keeps_the_laws_of_its_kind(precond):
    check_precond(precond, compile=type(precond) in (Discrete, IDDPM, VP))


class Oracle(Network):
    """Returns what it was told to, and remembers its inputs."""

    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, x, c_noise, cond, scales):
        self.seen = x, c_noise
        return self.answer


SAYS = {
    "vp": lambda x0, z, alpha, s: z,
    "iddpm": lambda x0, z, alpha, s: z,
    "ve": lambda x0, z, alpha, s: -z,
    "latent": lambda x0, z, alpha, s: z,
    "velocity": lambda x0, z, alpha, s: alpha * z - s * x0,
    "sample": lambda x0, z, alpha, s: x0,
}
"""What the network of each column estimates, of x_vp = alpha x0 + s z."""


@pytest.mark.parametrize("name", SAYS)
def test_a_network_that_knows_the_answer_denoises_exactly(name):
    precond = PRECONDS[name]
    x0, z = torch.randn(3, 1, 4, 4).double(), torch.randn(3, 1, 4, 4).double()
    sigma = torch.tensor([0.1, 2.0, 10.0]).double()
    if name not in ("vp", "ve"):
        sigma = rounded(precond.schedule, sigma)
    s = sigma.view(-1, 1, 1, 1)
    alpha = 1 / (1 + s**2).sqrt()
    network = Oracle(SAYS[name](x0, z, alpha, s * alpha))
    denoiser = Denoiser(network, axis(precond), precond.scalings)
    torch.testing.assert_close(denoiser(x0 + s * z, sigma), x0)
    seen, c_noise = network.seen
    if name == "ve":
        torch.testing.assert_close(seen, x0 + s * z)
        torch.testing.assert_close(c_noise, (sigma / 2).log())
    else:
        torch.testing.assert_close(seen, alpha * x0 + s * alpha * z)
        assert ((c_noise >= 0) & (c_noise <= 999)).all()


def test_steps_are_told_by_the_nearest_level():
    levels = torch.tensor(IDDPM().schedule.sigmas(), dtype=torch.float64)
    assert torch.equal(rounded(IDDPM().schedule, levels), levels)
    assert scaled(IDDPM(), levels).c_noise.tolist() == list(range(-1, 1000))
    for precond in (Discrete(), Discrete(**LINEAR), Discrete(spacing="cosine")):
        levels = torch.tensor(precond.schedule.sigmas(), dtype=torch.float64)
        assert scaled(precond, levels * 1.0001).c_noise.tolist() == list(range(1000))
        assert precond.levels == (levels[0], levels[-1])


def test_the_cosine_schedule_is_that_of_its_paper():
    """alpha_t^2 = f(t) / f(0), f(t) = cos^2((t / T + 0.008) / 1.008 pi / 2), and betas to 0.999."""
    t = torch.arange(1001, dtype=torch.float64) / 1000
    f = torch.cos((t + 0.008) / 1.008 * torch.pi / 2) ** 2
    betas = (1 - f[1:] / f[:-1]).clamp(max=0.999)
    schedule = Discrete(spacing="cosine").schedule
    torch.testing.assert_close(torch.tensor(schedule.betas(), dtype=torch.float64), betas)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_time_of_vp_is_the_inverse_of_its_noise_level(dtype):
    t, betas = torch.logspace(-5, 0, 50, dtype=dtype), VP().betas
    torch.testing.assert_close(betas.time(betas.sigma(t)), t)


def test_vp_tells_its_network_the_time_in_steps():
    c_noise = scaled(VP(), VP().betas.sigma(torch.tensor([0.25, 1.0]).double())).c_noise
    torch.testing.assert_close(c_noise, torch.tensor([0.25, 1.0]).double() * 999)


def test_slope_of_vp_is_the_derivative_of_its_noise_level():
    t = torch.linspace(0.01, 1, 9, dtype=torch.float64, requires_grad=True)
    (derivative,) = torch.autograd.grad(VP().betas.sigma(t).sum(), t)
    torch.testing.assert_close(VP().betas.slope(t), derivative)


def test_vp_knows_the_noise_levels_between_the_ends_of_its_time():
    ends = VP().betas.sigma(torch.tensor([VP().epsilon, 1.0], dtype=torch.float64))
    torch.testing.assert_close(ends, torch.tensor(VP().known, dtype=torch.float64))


def test_weight_of_edm_undoes_its_c_out():
    sigma = torch.logspace(-2, 2, 9)
    c_out = edm_scalings(sigma, 0.5, 0.0).c_out
    torch.testing.assert_close(weighting("karras", sigma, 0.5) * c_out**2, torch.ones(9))


def test_a_denoiser_of_any_column_is_rescaled():
    denoiser = Denoiser(TinyNetwork(), axis(VP()), VP().scalings).eval()
    x, sigma = torch.randn(2, 1, 4, 4), torch.tensor([0.5, 3.0])
    other = denoiser.rescaled(Global(skip=0.5))
    assert not torch.allclose(other(x, sigma), denoiser(x, sigma))
    assert torch.equal(denoiser.rescaled(Global())(x, sigma), denoiser(x, sigma))


def test_tables_of_levels_are_made_once_and_serve_training_after_sampling():
    from cmkit_std.discrete import table

    schedule, cpu = Discrete(steps=77).schedule, torch.device("cpu")
    with torch.inference_mode(), torch.device("meta"):
        first = table(schedule, cpu, torch.float32)
    assert first is table(schedule, cpu, torch.float32)
    assert first.device == cpu
    assert not first.is_inference()


def test_fractions_of_the_way_give_each_step_its_share():
    noise = DiscreteNoise.of(Discrete(steps=10).schedule)
    drawn = noise.sigma_at(torch.linspace(0, 1, 10_001, dtype=torch.float64)[:-1])
    assert set(drawn.unique(return_counts=True)[1].tolist()) == {1000}


TRAITS = {
    "consistency": {"boundary", "continuous"},
    "edm": {"diffusion", "identity", "continuous", "edm"},
    "vp": {"diffusion", "identity", "continuous"},
    "ve": {"diffusion", "identity", "continuous"},
    "iddpm": {"diffusion", "identity"},
    "latent": {"diffusion", "identity"},
    "sample": {"diffusion"},
    "lcm": {"boundary", "identity"},
}


@pytest.mark.parametrize("name", TRAITS)
def test_what_holds_of_scalings_is_found_by_trying(name):
    precond = PRECONDS[name]
    assert traits(precond.scalings, axis(precond), 0.5) == TRAITS[name]


def test_the_identity_of_clean_images_takes_both_of_its_coefficients():
    def heard(sigma, sigma_data, sigma_min):
        return edm_scalings(sigma, sigma_data, sigma_min)._replace(c_out=1 + sigma)

    assert "identity" not in traits(heard, Noise(), 0.5)


@pytest.mark.parametrize("precond", [Consistency(), Discrete(timestep_scaling=10.0)])
def test_at_its_boundary_a_consistency_model_ignores_its_network(precond):
    low = precond.levels[0]
    x, sigma = torch.randn(3, 1, 8, 8), torch.full((3,), low)
    out = Denoiser(TinyNetwork(), axis(precond), precond.scalings).eval()(x, sigma)
    kept = 1.0 if isinstance(precond, Consistency) else (1 + low**2) ** -0.5
    assert torch.equal(out, x) if kept == 1 else torch.allclose(out, kept * x)


@pytest.mark.parametrize("name", PRECONDS)
def test_a_network_hears_its_target_level_by_the_number_that_means_this_level(name):
    precond, seen = PRECONDS[name], []

    class Ears(TinyNetwork):
        def forward(self, x, c_noise, cond, scales):
            seen.append((c_noise, cond.sigma_to))
            return super().forward(x, c_noise, cond, scales)

    sigma = torch.linspace(*precond.levels, 5, dtype=torch.float64)
    denoiser = Denoiser(Ears().double(), axis(precond), precond.scalings)
    x, cond = torch.zeros(5, 1, 8, 8, dtype=torch.float64), Cond(sigma_to=sigma.flip(0))
    for model in (denoiser, Guided(denoiser, w=1.0)):
        model(x, sigma, cond)
    assert len(seen) == 3
    assert all(torch.equal(c_noise.flip(0), to) for c_noise, to in seen)
    assert torch.equal(cond.sigma_to, sigma.flip(0)), "callers speak of noise levels"


def test_networks_are_interchangeable_where_inputs_and_meaning_agree():
    same = {("consistency", "edm"), ("latent", "lcm"), ("iddpm", "cosine")}
    for a in PRECONDS:
        for b in PRECONDS:
            agree = a == b or (a, b) in same or (b, a) in same
            assert interchangeable(PRECONDS[a].scalings, PRECONDS[b].scalings) == agree, (a, b)


RECIPE = """\
name = "steps"
seed = 1
dataset = { use = "digits" }

[denoiser]
precond = { use = "discrete", steps = 50, timestep_scaling = 10.0 }
init = "teacher"
guidance = 1.0

[teacher]
weights = "WEIGHTS"
precond = { use = "discrete", steps = 50 }

[backbone]
use = "adm"
channels = 16
norm_groups = 8
channel_mult = [1]
num_res_blocks = 1
attention_resolutions = []
num_head_channels = 16
null_class = true
time_scale = 1.0
learn_sigma = true

[objective]
use = "lcm"
num_sigmas = 50
skip = 5
w_min = 0.0
w_max = 2.0

[train]
steps = 2
batch = 8
lr = 1e-3
precision = "fp32"

[sampler]
use = "lcm"
steps = 2
grid = 10

[sample]
images = 4
precision = "fp32"
"""
TEACHER = [
    ('precond = { use = "discrete", steps = 50, timestep_scaling = 10.0 }\ninit = "teacher"\n',
     'precond = { use = "discrete", steps = 50 }\n'),
    ('[teacher]\nweights = "WEIGHTS"\nprecond = { use = "discrete", steps = 50 }\n', ""),
    ('use = "lcm"\nnum_sigmas = 50\nskip = 5\nw_min = 0.0\nw_max = 2.0\n',
     'use = "edm"\nnoise_levels = "grid"\nweighting = "snr"\nlabel_dropout = 0.1\n'),
    ('use = "lcm"\nsteps = 2\ngrid = 10\n', 'use = "ddim"\nsteps = 5\n'),
    ('name = "steps"', 'name = "teacher"'),
]  # fmt: skip


@pytest.fixture
def written(tmp_path):
    """Writes the recipe above, changed; its teacher's weights are there."""

    def write(*changes, name="steps.toml"):
        text = RECIPE
        for old, new in changes:
            assert old in text, old
            text = text.replace(old, new)
        weights = tmp_path / "teacher.safetensors"
        if "WEIGHTS" in text and not weights.exists():
            backbone = load(write(*TEACHER, name="of.toml"), [], discover()).backbone
            network = backbone.build(DataSpec(1, 8, 10), frozenset({"label"}))
            save_file(network.state_dict(), weights)
        path = tmp_path / name
        path.write_text(text.replace("WEIGHTS", str(weights)))
        return path

    return write


def planned(path, *overrides):
    return plan(load(path, overrides, discover()))


def refusal(path, *overrides, error=RecipeError) -> str:
    with pytest.raises(error) as caught:
        planned(path, *overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.slow
def test_a_discrete_teacher_is_trained_distilled_and_sampled_by_recipes(written, cmkit, tmp_path):
    """DDPM training of a teacher with a learned variance, LCM of it, and samples of both."""
    done, _, err = cmkit("run", written(*TEACHER, name="teacher.toml"), "--device", "cpu")
    assert done == 0, err
    (teacher,) = (tmp_path / "runs").glob("teacher-*")
    student = written(("WEIGHTS", str(teacher)))
    done, _, err = cmkit("run", student, "--device", "cpu")
    assert done == 0, err
    (run,) = (tmp_path / "runs").glob("steps-*")
    weights, given = (load_file(folder / "model.safetensors") for folder in (run, teacher))
    assert weights["conv_out.weight"].shape[0] == given["conv_out.weight"].shape[0] == 2
    done, _, err = cmkit("sample", run, "-n", "2", "--out", "again.npz", "--device", "cpu")
    assert done == 0, err
    wrong = ['teacher.precond="edm"', 'denoiser.precond="consistency"']
    said = refusal(student, *wrong)
    assert "was trained under other scalings; set the precond beside it to { use =" in said
    assert 'use = "discrete", ' in said


def test_models_of_a_recipe_have_its_scalings_and_its_axis(written):
    made = planned(written())
    student, teacher = build(made, torch.device("cpu")), build_teacher(made, torch.device("cpu"))
    assert isinstance(student.noise, DiscreteNoise)
    assert student.noise == teacher.noise
    low = torch.full((1,), student.noise.sigma_min)
    ends = [d.scalings(low, 0.5, student.noise.sigma_min).c_out for d in (student, teacher)]
    assert ends[0] == 0 != ends[1]


def test_a_name_means_a_table_with_use_alone_and_defaults_change_no_hash(written):
    plain = load(written(), ['denoiser.precond="edm"'], discover())
    assert plain.resolved["denoiser"]["precond"] == "edm"
    assert (plain.denoiser.sigma_min, plain.denoiser.sigma_max) == (0.002, 80.0)
    table = load(written(), ['denoiser.precond={use="edm"}'], discover())
    assert run_name(table) == run_name(plain)
    given = load(written(), [], discover())
    full = load(written(), ["denoiser.precond.spacing='scaled_linear'"], discover())
    assert run_name(full) == run_name(given)
    assert given.denoiser.sigma_max == pytest.approx(Discrete(steps=50).levels[1])
    assert ("precond", "discrete") in list(given.used())


def test_a_resolved_recipe_is_the_same_recipe(written, tmp_path):
    recipe = load(written(), [], discover())
    (tmp_path / "resolved.toml").write_text(recipe.toml())
    again = load(tmp_path / "resolved.toml", [], discover())
    assert run_name(again) == run_name(recipe)
    assert planned(tmp_path / "resolved.toml").recipe.precond == recipe.precond


def test_existing_recipes_keep_their_hash(written):
    """Run folders are named by it."""
    path = written()
    path.write_text(
        'name = "x"\ndataset = { use = "digits" }\nbackbone = { use = "adm" }\n'
        'denoiser = { precond = "edm" }\nteacher = { weights = "y" }\n'
        'objective = { use = "ct" }\ntrain = { steps = 1, batch = 2 }\n'
    )
    assert run_name(load(path, [], discover())) == "x-6fdd6b04"


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (['denoiser.precond="emd"'], "denoiser.precond: no precond is called 'emd'; did you mean"),
        (['denoiser.precond={use="vq"}'], "denoiser.precond.use: no precond is called 'vq'"),
        (["denoiser.precond.stps=3"], "denoiser.precond.stps: unknown key; did you mean 'steps'?"),
        (["denoiser.precond=3"], "denoiser.precond: expected a table such as"),
        (["teacher.precond.beta_end=1e-5"], "beta_start 0.00085 must not be above beta_end"),
        (["teacher.precond.steps=50000"], "50000 such steps leave nothing of an image"),
    ],
)
def test_a_mistake_in_a_precond_has_its_place(written, overrides, said):
    with pytest.raises((RecipeError, PluginError)) as caught:
        load(written(), overrides, discover())
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ["denoiser.sigma_max=10.0"],
            "sigma_max 10: its precond knows noise levels|drop both keys",
        ),
        (["denoiser.sigma_max=80.0"], r"knows noise levels 0\.029\d+ to 0\.\d+; set"),
        (['denoiser.precond={use="ve", low=0.02}', "denoiser.sigma_min=0.01"], "0.02 to 100"),
        (
            ['denoiser.precond="consistency"', 'denoiser.init="random"'],
            "it knows noise levels 0.02",
        ),
        (["objective.num_sigmas=51"], "a grid of 51 points: the schedule has 50 steps"),
        (['denoiser.precond={use="discrete", steps=50}'], "needs the boundary of a consistency"),
        (["denoiser.precond.prediction='v_prediction'"], "another input or output of the network"),
    ],
)
def test_what_does_not_fit_the_scalings_is_refused_before_any_work(written, overrides, said):
    assert re.search(said, refusal(written(), *overrides))


@pytest.mark.parametrize(
    ("objective", "precond", "said"),
    [
        ("{use='pd', start_scales=4}", "'consistency'", "scalings of a diffusion model"),
        ("{use='ict'}", "'edm'", "boundary of a consistency model"),
        ("{use='cct'}", "{use='discrete', timestep_scaling=10.0}", "hears of every change"),
    ],
)
def test_objectives_get_the_scalings_that_they_need(written, objective, precond, said):
    overrides = [f"objective={objective}", f"denoiser.precond={precond}"]
    assert said in refusal(written(), *overrides, 'denoiser.init="random"')


@pytest.mark.parametrize(
    ("weights", "backbone", "precond", "said"),
    [
        ("dit:DiT-XL-2-256x256", "use='dit'", "'edm'", "needs backbone.time_scale = 1, not 1000"),
        (
            "dit:DiT-XL-2-256x256",
            "use='dit', time_scale=1.0",
            "'edm'",
            '{ use = "discrete", spacing = "linear", beta_start = 0.0001, beta_end = 0.02 }',
        ),
        (
            "guided-diffusion:64x64_diffusion",
            "use='adm', preset='guided-diffusion-64'",
            "{use='discrete', spacing='linear', beta_start=1e-4, beta_end=0.02}",
            'precond = { use = "discrete", spacing = "cosine" }',
        ),
        (
            "guided-diffusion:64x64_diffusion",
            "use='adm', time_scale=1.0, learn_sigma=true",
            "{use='discrete', spacing='cosine'}",
            "needs backbone.new_attention_order = true",
        ),
        ("openai:ct_bedroom256", "use='adm'", "{use='vp'}", 'precond = "edm", or "consistency"'),
        ("edm:cifar10-32x32-cond-vp", "use='songunet'", "{use='vp'}", 'precond = "edm"'),
    ],
)
def test_published_weights_under_another_column_are_refused_with_the_cure(
    written, monkeypatch, tmp_path, weights, backbone, precond, said
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = written(*TEACHER)
    text = path.read_text()
    path.write_text(text[: text.index("[backbone]")] + text[text.index("[sampler]") :])
    overrides = [f"backbone={{{backbone}}}", f"denoiser.precond={precond}"]
    overrides += [f'denoiser.weights="{weights}"', "denoiser.guidance=0.0"]
    assert said in refusal(path, *overrides)


@pytest.mark.slow
def test_published_weights_under_their_column_are_planned(written, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = written(*TEACHER)
    text = path.read_text().replace("guidance = 1.0\n", "")
    path.write_text(text[: text.index("[backbone]")] + text[text.index("[sampler]") :])
    made = planned(
        path,
        "backbone={use='dit', preset='dit-xl-2', time_scale=1.0}",
        "denoiser.precond={use='discrete', spacing='linear', beta_start=1e-4, beta_end=0.02}",
        'denoiser.weights="dit:DiT-XL-2-256x256"',
    )
    (download,) = made.downloads
    assert download.url == "https://dl.fbaipublicfiles.com/DiT/models/DiT-XL-2-256x256.pt"


GUIDED = ADM(
    channels=32,
    channel_mult=(1,),
    num_res_blocks=1,
    attention_resolutions=(8,),
    num_head_channels=8,
    time_scale=1.0,
    learn_sigma=True,
)


@pytest.mark.parametrize("new", [None, True])
def test_learned_variances_are_kept_in_weights_and_left_out_of_the_output(new):
    options = GUIDED.model_copy(update={"new_attention_order": new})
    network = options.build(DataSpec(3, 8), frozenset()).eval()
    state = {name: torch.randn_like(t) for name, t in network.state_dict().items()}
    network.load_state_dict(state)
    assert state["conv_out.weight"].shape[0] == 6
    x = torch.randn(2, 3, 8, 8)
    out = network(x, torch.tensor([3.0, 400.0]), Cond(), {})
    assert out.shape == x.shape
    for name in ("conv_out.weight", "conv_out.bias"):
        state[name][3:] += 1
    network.load_state_dict(state)
    assert torch.equal(network(x, torch.tensor([3.0, 400.0]), Cond(), {}), out)
    (layout,) = (own for own in options.layouts(DataSpec(3, 8)) if own.name == "guided-diffusion")
    theirs = layout.write(state)
    assert layout.matches(theirs)
    assert theirs["out.2.weight"].shape[0] == 6
    own, same = "encoder.1.1.qkv.weight", "input_blocks.1.1.qkv.weight"
    assert torch.equal(theirs[same], state[own][..., 0]) == bool(new)
    back = layout.read(theirs)
    assert all(torch.equal(back[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize(
    ("size", "label", "millions"), [(64, True, 296), (128, True, 422), (256, True, 554)]
)
def test_presets_of_guided_diffusion_have_the_sizes_that_its_paper_reports(size, label, millions):
    """Table 4 and 5 of Dhariwal, Nichol, 2021."""
    with torch.device("meta"):
        network = ADM(preset=f"guided-diffusion-{size}").build(
            DataSpec(3, size, 1000), frozenset({"label"})
        )
    assert round(sum(p.numel() for p in network.parameters()) / 1e6) == millions


def test_layouts_of_discrete_networks_want_steps_as_they_are():
    options = GUIDED.model_copy(update={"time_scale": 1000.0})
    (layout,) = (own for own in options.layouts(DataSpec(3, 8)) if own.name == "guided-diffusion")
    with pytest.raises(CheckpointError, match=r"time_scale = 1000\.0: guided-diffusion .* with 1;"):
        layout.read({})


def test_levels_of_diffusion_training_may_be_those_of_the_grid():
    from cmkit_std.objectives.edm import EDM as Objective  # noqa: N811

    from cmkit import Models

    noise, seen = DiscreteNoise.of(Discrete(steps=20).schedule), []
    spy = Denoiser(TinyNetwork(), noise, Discrete(steps=20).scalings)
    spy.register_forward_hook(lambda _module, args, _out: seen.append(args[1]))
    objective = Objective(noise_levels="grid", weighting="snr")
    rng = Rng(0, "law", 0, torch.device("cpu"))
    x0 = torch.randn(4000, 1, 2, 2)
    objective.loss(Models(spy, spy), x0, Cond(), objective.phase(0, 1), rng)
    levels, counts = seen[0].unique(return_counts=True)
    assert torch.equal(levels, noise.sigmas(20))
    assert counts.min() > 120


def test_schema_completes_preconds_by_name_and_by_table():
    definitions = schema(discover())["$defs"]
    for table in ("denoiser", "teacher"):
        names, tables = definitions[table]["properties"]["precond"]["anyOf"]
        assert {"edm", "consistency", "discrete", "vp", "ve", "iddpm"} <= set(names["enum"])
        assert {"$ref": "#/$defs/precond.discrete"} in tables["oneOf"]


DIFFUSION_SAMPLERS = ("ablation", "ancestral", "ddim", "dpm", "edm", "euler", "heun", "progdist")


@pytest.mark.parametrize("sampler", DIFFUSION_SAMPLERS)
def test_samplers_of_diffusion_models_refuse_a_consistency_model(sampler, tmp_path):
    (tmp_path / "tiny.toml").write_text(TINY)

    def planned(*overrides):
        said = [f"sampler={{use={sampler!r}}}", *overrides]
        check_sampler(load(tmp_path / "tiny.toml", said, discover()))

    with pytest.raises(RecipeError, match="sampler: it needs the scalings of a diffusion model"):
        planned()
    planned("objective={use='edm'}", "denoiser.precond='edm'")
    planned("objective={use='edm'}")  # a diffusion model under the scalings of the other kind
    with pytest.raises(RecipeError, match="sampler: it needs"):
        planned("denoiser.precond={use='discrete', timestep_scaling=10.0}")


@pytest.mark.parametrize("sampler", ["multistep", "lcm"])
def test_samplers_of_consistency_models_take_any_scalings(sampler, tmp_path):
    """Objectives such as scm end in a consistency model under those of a diffusion model."""
    (tmp_path / "tiny.toml").write_text(TINY)
    for precond in ("consistency", "edm"):
        overrides = [f"sampler={{use={sampler!r}}}", f"denoiser.precond={precond!r}"]
        overrides.append("objective={use='edm'}")
        plan(load(tmp_path / "tiny.toml", overrides, discover()))
