"""Latent consistency distillation: guidance, skipped steps, the embedded weight, dropped labels."""

from dataclasses import replace

import pytest
import torch
from cmkit_std.backbones.adm import ADM
from cmkit_std.backbones.dit import DiT
from cmkit_std.backbones.songunet import SongUNet
from cmkit_std.discrete import DiscreteNoise, nearest, rounded
from cmkit_std.objectives.edm import EDM
from cmkit_std.objectives.lcm import LCM
from cmkit_std.preconds.discrete import Discrete
from cmkit_std.preconds.schedule import Schedule
from cmkit_std.samplers.euler import Euler
from cmkit_std.samplers.lcm import LCM as LCMSampler  # noqa: N811
from pydantic import ValidationError
from safetensors.torch import save_file

from cmkit import (
    Cond,
    DataSpec,
    Denoiser,
    Guided,
    Models,
    Noise,
    RecipeError,
    Rng,
    discover,
    edm_scalings,
)
from cmkit.plan import for_sampling, plan
from cmkit.recipe import load
from cmkit.sample import Draws, sample
from cmkit.train import start, train
from tests.toys import GaussianDenoiser, GaussianFlow, TinyNetwork

CPU = torch.device("cpu")
DATA = DataSpec(1, 8, 10)
SMALL = {
    "channels": 32,
    "channel_mult": [1],
    "num_res_blocks": 1,
    "attention_resolutions": [],
    "num_head_channels": 16,
}
LABEL = frozenset({"label"})


def filled(network):
    torch.manual_seed(5)
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            if name != "guidance.weight":
                tensor.normal_(std=0.1)
    return network.eval()


class ByLabel(Denoiser):
    """The exact denoiser of N(0, s^2), s = 0.7 with a label and 0.4 without."""

    def __init__(self):
        super().__init__(TinyNetwork())
        self.near, self.far = GaussianDenoiser(0.7), GaussianDenoiser(0.4)

    def forward(self, x, sigma, cond=None):
        return (self.far if cond.label is None else self.near)(x, sigma)


class GuidedFlow(Denoiser):
    """The exact flow of `ByLabel` under guidance w: x' / x = d ln sigma (1 - D_w / x), whose D_w is
    a mean of two Gaussians' with weights 1 + w and -w."""

    def forward(self, x, sigma, cond=None):
        w, sigma = cond.guidance.double(), sigma.double()
        low = self.noise.sigma_min
        log = sum(
            weight * 0.5 * torch.log((s**2 + low**2) / (s**2 + sigma**2))
            for weight, s in ((1 + w, 0.7), (-w, 0.4))
        )
        return x * log.exp().view(-1, 1, 1, 1)


def labels(n: int) -> Cond:
    return Cond(label=torch.arange(n) % 10)


def loss_of(objective, models, x0, cond=None):
    rng = Rng(0, "law", 0, CPU)
    return objective.loss(models, x0, cond or labels(len(x0)), objective.phase(0, 1), rng)


def test_no_guidance_is_the_teacher_with_its_label_bit_for_bit():
    network = filled(ADM(**SMALL, null_class=True).build(DATA, LABEL))
    teacher, x = Denoiser(network, scalings=edm_scalings), torch.randn(4, 1, 8, 8)
    sigma = torch.tensor([0.01, 0.5, 3.0, 70.0])
    assert torch.equal(Guided(teacher, 0.0)(x, sigma, labels(4)), teacher(x, sigma, labels(4)))
    assert not torch.equal(Guided(teacher, 0.1)(x, sigma, labels(4)), teacher(x, sigma, labels(4)))
    torch.testing.assert_close(Guided(teacher, -1.0)(x, sigma, labels(4)), teacher(x, sigma))


def test_guidance_moves_away_from_no_label_by_the_weight_of_each_image():
    teacher, x, sigma = ByLabel(), torch.randn(3, 1, 4, 4), torch.tensor([0.5, 1.0, 2.0])
    w = torch.tensor([0.0, 1.5, 8.0])
    near, far = teacher.near(x, sigma), teacher.far(x, sigma)
    out = Guided(teacher)(x, sigma, replace(labels(3), guidance=w))
    torch.testing.assert_close(out, near + w.view(-1, 1, 1, 1) * (near - far))
    with pytest.raises(ValueError, match=r"cond\.guidance"):
        Guided(teacher)(x, sigma, labels(3))


@pytest.mark.parametrize(("solver", "times"), [("euler", 16), ("heun", 64)])
def test_loss_of_the_exact_guided_flow_falls_with_the_order_of_the_solver(solver, times):
    """When skipped steps are halved: 16 and 64 times for errors of order 2 and 3 in the gap."""

    def loss(skip):
        objective = LCM(
            num_sigmas=1601, skip=skip, solver=solver, distance="l2", w_min=0.5, w_max=2.0
        )
        x0 = 0.7 * torch.randn(20_000, 1, 1, 1, dtype=torch.float64)
        flow = GuidedFlow(TinyNetwork())
        return loss_of(objective, Models(flow, flow, ByLabel()), x0).mean()

    assert loss(4) / loss(2) == pytest.approx(times, rel=0.1)


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_teacher_crosses_k_intervals_in_one_step_and_fewer_only_at_the_end(solver):
    online, target, teacher = GuidedFlow(TinyNetwork()), GuidedFlow(TinyNetwork()), ByLabel()
    seen = {}
    for role, denoiser in (("online", online), ("target", target)):
        denoiser.register_forward_hook(
            lambda _module, args, _out, role=role: seen.update({role: args})
        )
    objective = LCM(num_sigmas=9, skip=3, solver=solver, w_min=1.0, w_max=4.0)
    loss_of(objective, Models(online, target, teacher), torch.randn(500, 1, 2, 2))
    (x, high, cond), (x_low, low, cond_low) = seen["online"], seen["target"]
    sigmas = Noise().sigmas(9)
    i, j = torch.searchsorted(sigmas, high), torch.searchsorted(sigmas, low)
    assert sorted(set(i.tolist())) == list(range(1, 9))
    assert torch.equal(j, (i - 3).clamp(min=0))
    guided, gap = Guided(teacher), (low - high).view(-1, 1, 1, 1)
    slope = (x - guided(x, high, cond)) / high.view(-1, 1, 1, 1)
    if solver == "heun":
        end = x + slope * gap
        slope = (slope + (end - guided(end, low, cond)) / low.view(-1, 1, 1, 1)) / 2
    torch.testing.assert_close(x_low, x + slope * gap)
    assert cond is cond_low
    assert 1.0 <= cond.guidance.min() < 1.1
    assert 3.9 < cond.guidance.max() <= 4.0
    assert cond.guidance.unique().numel() > 400


def test_huber_distance_is_of_each_number():
    online, target, teacher = GuidedFlow(TinyNetwork()), GaussianFlow(), ByLabel()
    x0, outs = torch.randn(8, 1, 2, 2, dtype=torch.float64), []
    for denoiser in (online, target):
        denoiser.register_forward_hook(lambda _module, _args, out: outs.append(out))
    loss = loss_of(LCM(huber_c=0.01), Models(online, target, teacher), x0)
    expected = (((outs[0] - outs[1]) ** 2 + 1e-4).sqrt() - 0.01).mean((1, 2, 3))
    torch.testing.assert_close(loss, expected)


def test_no_gradient_reaches_target_or_teacher():
    networks = [ADM(**SMALL, null_class=True).build(DATA, LABEL | {"guidance"}) for _ in range(3)]
    online, target, teacher = (Denoiser(filled(network)) for network in networks)
    loss_of(LCM(), Models(online, target, teacher), torch.randn(4, 1, 8, 8)).mean().backward()
    assert all(p.grad is None for p in (*target.parameters(), *teacher.parameters()))
    assert online.network.guidance.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"w_min": 3.0, "w_max": 2.0}, r"w_min 3\.0 must not be above w_max 2\.0"),
        ({"num_sigmas": 20, "skip": 20}, "skip 20 must be below num_sigmas 20"),
    ],
)
def test_ranges_that_make_no_sense_are_refused(options, said):
    with pytest.raises(ValidationError, match=said):
        LCM(**options)


SONG = SongUNet(channels=16, channel_mult=(1,), num_res_blocks=1, null_class=True)


@pytest.mark.parametrize("options", [ADM(**SMALL, null_class=True), SONG], ids=["adm", "songunet"])
@torch.no_grad()
def test_fresh_guidance_embedding_changes_no_bit(options):
    plain, steered_ = (options.build(DATA, LABEL | extra) for extra in (set(), {"guidance"}))
    filled(plain)
    fresh = steered_.state_dict()
    steered_.load_state_dict({**fresh, **plain.state_dict()})
    steered_.eval()
    x, c_noise = torch.randn(3, 1, 8, 8), torch.tensor([-1.0, 0.0, 1.0])
    cond = replace(labels(3), guidance=torch.tensor([0.0, 1.5, 9.0]))
    assert torch.equal(plain(x, c_noise, cond, {}), steered_(x, c_noise, cond, {}))
    steered_.guidance.weight.normal_(std=0.1)
    moved = (plain(x, c_noise, cond, {}) - steered_(x, c_noise, cond, {})).abs().amax((1, 2, 3))
    assert (moved > 0).all()


@pytest.mark.parametrize(
    "options",
    [ADM(**SMALL, null_class=True), DiT(width=32, depth=1, num_heads=2, null_class=True), SONG],
    ids=["adm", "dit", "songunet"],
)
@torch.no_grad()
def test_absent_label_means_the_null_class(options):
    network = filled(options.build(DATA, LABEL))
    x, c_noise = torch.randn(3, 1, 8, 8), torch.zeros(3)
    null = Cond(label=torch.full((3,), network.null_label))
    assert network.null_label == 10
    assert torch.equal(network(x, c_noise, Cond(), {}), network(x, c_noise, null, {}))
    assert type(options)(**{**options.model_dump(), "null_class": False}).build(
        DATA, LABEL
    ).null_label is None  # fmt: skip


def test_labels_are_dropped_with_their_probability_by_the_rng_alone():
    network, seen = ADM(**SMALL, null_class=True).build(DATA, LABEL), []

    class Spy(GaussianDenoiser):
        def forward(self, x, sigma, cond=None):
            seen.append(cond.label)
            return super().forward(x, sigma)

    spy = Spy()
    spy.network = network
    x0, cond = torch.randn(20_000, 1, 1, 1), labels(20_000)
    for stray in (1, 2):
        torch.manual_seed(stray)
        loss_of(EDM(label_dropout=0.2), Models(spy, spy), x0, cond)
    loss_of(EDM(), Models(spy, spy), x0, cond)
    assert torch.equal(seen[0], seen[1])
    dropped = seen[0] == 10
    assert dropped.float().mean() == pytest.approx(0.2, abs=0.01)
    assert torch.equal(seen[0][~dropped], cond.label[~dropped])
    assert torch.equal(seen[2], cond.label)


def counted(network) -> list:
    calls = []
    network.register_forward_hook(lambda *_: calls.append(1))
    return calls


RECIPE = """\
name = "tiny"
dataset = { use = "digits" }
objective = { use = "lcm", num_sigmas = 11, skip = 2, w_min = 0.0, w_max = 3.0 }
sampler = { use = "lcm", steps = 3, grid = 5 }
sample = { images = 4, batch = 2 }

[denoiser]
init = "teacher"
guidance = 1.5

[teacher]
weights = "WEIGHTS"

[backbone]
use = "adm"
channels = 32
channel_mult = [1]
num_res_blocks = 1
attention_resolutions = []
num_head_channels = 16
null_class = true

[train]
steps = 3
batch = 8
lr = 1e-2
log_every = 1
precision = "fp32"
"""


@pytest.fixture
def planned(tmp_path, request):
    """Plans the recipe above with overrides, and without some of its text; its backbone is `adm`
    unless a test gives another."""
    weights = tmp_path / "teacher.safetensors"
    backbone = getattr(request, "param", ADM(**SMALL, null_class=True))
    teacher = filled(backbone.build(DATA, LABEL))
    save_file(teacher.state_dict(), weights)

    def of(*overrides, drop=(), put=()):
        text = RECIPE.replace("WEIGHTS", str(weights))
        if backbone is SONG:
            put = [
                *put,
                ("num_head_channels = 16\n", ""),
                ('use = "adm"\nchannels = 32', 'use = "songunet"\nchannels = 16'),
            ]
        for old in drop:
            assert old in text
            text = text.replace(old, "")
        for old, new in put:
            assert old in text
            text = text.replace(old, new)
        (tmp_path / "lcm.toml").write_text(text)
        return plan(load(tmp_path / "lcm.toml", overrides, discover()))

    of.teacher = teacher
    return of


@pytest.mark.parametrize(
    "planned", [ADM(**SMALL, null_class=True), SONG], indirect=True, ids=["adm", "songunet"]
)
def test_student_is_its_teacher_with_a_fresh_guidance_embedding_that_learns(planned):
    found = planned()
    assert found.conditions == {"label", "guidance"}
    training = start(found, CPU)
    student = training.models.online.network
    assert student.guidance.weight.abs().sum() == 0
    for name, tensor in planned.teacher.state_dict().items():
        assert torch.equal(student.state_dict()[name], tensor), name
    for step in train(training):
        assert step.log["loss"] >= 0
    assert student.guidance.weight.abs().sum() > 0


@pytest.mark.parametrize("embedded", [True, False])
def test_evaluations_are_those_that_the_plan_says(planned, embedded):
    """A network that embeds w costs one a step, guidance of another two."""
    put = () if embedded else [('use = "lcm", num_sigmas = 11, skip = 2, w_min = 0.0, w_max = 3.0',
                                'use = "edm", label_dropout = 0.1')]  # fmt: skip
    found = planned(put=put)
    denoiser = for_sampling(found, CPU, "fp32")
    calls = counted(denoiser.network)
    draws = Draws(found.data, 0)
    list(sample(denoiser, found.recipe.sampler, draws, range(2), 2, CPU, "fp32"))
    assert len(calls) == found.nfe == (3 if embedded else 6)


@pytest.mark.parametrize(
    ("w", "embedded", "said"), [(0.0, True, 0), (3.0, True, 0), (3.5, True, 1), (3.5, False, 0)]
)
def test_a_weight_that_no_training_sees_is_told(planned, w, embedded, said):
    """A network that embeds w knows those of its training alone; another is guided by any."""
    told = f"denoiser.guidance is {w:g}, and the network learns weights from 0 to 3"
    found = planned(f"denoiser.guidance={w}", f"objective.embed_guidance={str(embedded).lower()}")
    assert found.notes.count(told) == said


def test_weight_of_the_recipe_reaches_the_network_that_embeds_it():
    seen, inner = [], GaussianDenoiser()
    inner.register_forward_hook(lambda _module, args, _out: seen.append(args[2]))
    Guided(inner, 1.5, embedded=True)(torch.zeros(2, 1, 1, 1), torch.ones(2), labels(2))
    ((cond,),) = [seen]
    assert cond.guidance.tolist() == [1.5, 1.5]
    assert torch.equal(cond.label, labels(2).label)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"drop": ["guidance = 1.5\n"]}, "say with which guidance to sample"),
        ({"put": [("null_class = true", "null_class = false")]}, "null_class = true"),
        (
            {
                "put": [
                    ("num_sigmas = 11, skip = 2, w_min = 0.0, w_max = 3.0", "label_dropout = 0.1"),
                    ('use = "lcm", label', 'use = "edm", label'),
                    ("null_class = true", "null_class = false"),
                ]
            },
            "null_class = true",
        ),
    ],
)
def test_what_cannot_be_guided_is_refused_before_any_work(planned, changes, said, monkeypatch):
    if "null_class = false" in str(changes):
        weights = filled(ADM(**SMALL).build(DATA, LABEL)).state_dict()
        monkeypatch.setattr("cmkit.plan.networks.shapes", lambda _found: weights)
    with pytest.raises(RecipeError, match=said) as caught:
        planned(**changes)
    assert "\n" not in str(caught.value)


def test_lcm_sampler_is_one_step_and_then_fresh_noise_at_skipped_levels():
    flow, levels = GaussianFlow(), Noise().sigmas(51, dtype=torch.float64).flip(0)
    z = [torch.randn(2, 1, 4, 4, dtype=torch.float64) for _ in range(4)]
    out = LCMSampler(steps=4, clamp=False).sample(flow, 80 * z[0], Cond(), z.__getitem__)
    x0 = flow(80 * z[0], levels[:1])
    for k, i in enumerate((12, 25, 37), 1):
        x0 = flow(x0 + levels[i] * z[k], levels[i : i + 1])
    torch.testing.assert_close(out, x0)
    with pytest.raises(ValidationError, match="steps 6 must not be above grid 5"):
        LCMSampler(steps=6, grid=5)


def test_euler_is_ddim():
    """x_vp' = alpha' x0_hat + s' eps_hat of a whole walk, at the levels of our Euler sampler."""
    denoiser = GaussianDenoiser()
    x = 80 * torch.randn(3, 1, 2, 2, dtype=torch.float64)
    out = Euler(steps=10, clamp=False).sample(denoiser, x, Cond(), None)
    sigmas = [*Noise().sigmas(10, dtype=torch.float64).flip(0).tolist(), 0.0]
    alphas = [(1 + sigma**2) ** -0.5 for sigma in sigmas]
    x_vp = alphas[0] * x
    for k in range(10):
        x0 = denoiser(x_vp / alphas[k], torch.full((3,), sigmas[k], dtype=torch.float64))
        s, s_next = ((1 - alphas[i] ** 2) ** 0.5 for i in (k, k + 1))
        x_vp = alphas[k + 1] * x0 + s_next * (x_vp - alphas[k] * x0) / s
    torch.testing.assert_close(out, x_vp)


def test_discrete_levels_are_the_steps_of_the_schedule():
    noise = DiscreteNoise.of(Schedule())
    assert noise.steps(51)[:3].tolist() == [0, 19, 39]
    assert noise.steps(1000).tolist() == list(range(1000))
    alphas = torch.tensor(Schedule().alphas_cumprod(), dtype=torch.float64)
    torch.testing.assert_close(
        noise.sigmas(51, dtype=torch.float64), ((1 - alphas) / alphas).sqrt()[noise.steps(51)]
    )
    ends = noise.sigmas(51, dtype=torch.float64)[[0, -1]].tolist()
    assert ends == [noise.sigma_min, noise.sigma_max]
    schedule, sigma = Discrete().schedule, noise.sigmas(1000, dtype=torch.float64)
    assert torch.equal(nearest(schedule, sigma * 1.0001), torch.arange(1000))
    assert torch.equal(rounded(schedule, sigma * 1.0001), sigma)
    spread = noise.steps(18)
    assert spread[[0, -1]].tolist() == [0, 999]
    assert set(spread.diff().tolist()) <= {58, 59}
    with pytest.raises(RecipeError, match="1001 points: the schedule has 1000 steps"):
        noise.sigmas(1001)


def test_a_student_that_is_not_told_w_and_a_target_without_a_copy_are_options():
    assert LCM().needed() == LCM.needs == {"target", "teacher", "guidance", "boundary"}
    assert LCM(embed_guidance=False).needed() == {"target", "teacher", "boundary"}
    assert LCM(target_ema=0.0).needed() == {"teacher", "guidance", "boundary"}
