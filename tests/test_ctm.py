"""Laws of trajectory models: their jumps, objective `ctm` and sampler `gamma`."""

import math

import pytest
import torch
from cmkit_std.backbones.adm import ADM
from cmkit_std.objectives.ctm import CTM, gradient_norm, gradient_ratio, last_weight
from cmkit_std.samplers.gamma import Gamma
from cmkit_std.samplers.heun import Heun
from cmkit_std.samplers.multistep import Multistep
from cmkit_std.trajectory import denoised, jump
from pydantic import ValidationError

from cmkit import (
    CheckpointError,
    Cond,
    DataSpec,
    Denoiser,
    Models,
    Network,
    Noise,
    Phase,
    RecipeError,
    Rng,
    discover,
    edm_scalings,
)
from cmkit.plan import plan
from cmkit.recipe import load
from cmkit.train import start, train
from tests.test_teacher import RECIPE, save_weights
from tests.toys import Counting, GaussianDenoiser, GaussianFlow, TinyNetwork

CPU = torch.device("cpu")
OUTER = ["euler", "variance", "euler_variance_mixed"]


class Pairs(Network):
    """A small network that reads both noise levels."""

    def __init__(self):
        super().__init__()
        self.inner, self.both = TinyNetwork(), torch.nn.Linear(2, 1)

    def forward(self, x, c_noise, cond, scales):
        to = c_noise if cond.sigma_to is None else cond.sigma_to + 1
        shift = self.both(torch.stack([c_noise, to], 1).to(x.dtype)).view(-1, 1, 1, 1)
        return self.inner(x, c_noise, cond, scales) + shift


class GaussianJumps(Denoiser):
    """g such that G is the exact flow of x0 ~ N(0, s^2) from sigma to sigma_to; g tends to the
    exact denoiser where the two meet."""

    def __init__(self, s: float = 0.7, noise: Noise | None = None):
        super().__init__(TinyNetwork(), noise, scalings=edm_scalings)
        self.s = s

    def forward(self, x, sigma, cond=None):
        to = cond.sigma_to
        flow = ((self.s**2 + to**2) / (self.s**2 + sigma**2)).sqrt()
        share = (flow - to / sigma) / (1 - to / sigma)
        share = torch.where(to == sigma, self.s**2 / (self.s**2 + sigma**2), share)
        return x * share.view(-1, 1, 1, 1)


def exact(x, sigma, sigma_to, s=0.7):
    return x * math.sqrt((s**2 + sigma_to**2) / (s**2 + sigma**2))


def models_of(dtype=torch.float32):
    """Three different networks: the online one, its frozen target and a teacher."""
    online, target, teacher = (Denoiser(Pairs().to(dtype), scalings=edm_scalings) for _ in range(3))
    return Models(online, target.requires_grad_(False), teacher.eval().requires_grad_(False))


def levels(*values):
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("outer", OUTER)
def test_a_jump_to_where_it_stands_is_the_identity(outer):
    denoiser = Denoiser(Pairs().double(), scalings=edm_scalings)
    x, sigma = torch.randn(3, 1, 4, 4).double(), levels(80.0, 0.5, 0.002)
    torch.testing.assert_close(jump(denoiser, x, sigma, sigma, outer=outer), x, rtol=1e-12, atol=0)
    assert torch.equal(jump(denoiser, x, sigma, sigma), x)


@pytest.mark.parametrize("outer", OUTER)
def test_the_estimate_is_the_tangent_of_the_jump(outer):
    """dG / dsigma_to = (x - D) / sigma where sigma_to meets sigma (CTM, lemma 1)."""
    denoiser = Denoiser(Pairs().double(), scalings=edm_scalings).eval()
    x, sigma, step = torch.randn(3, 1, 4, 4).double(), levels(20.0, 1.0, 0.1), 1e-6
    cond = Cond(sigma_to=sigma)

    class Still(Denoiser):
        """g that is frozen in sigma_to, whose change is of second order."""

        def forward(self, x, sigma, _cond):
            return denoiser(x, sigma, cond)

    still = Still(denoiser.network, scalings=edm_scalings)
    ahead = jump(still, x, sigma, sigma * (1 - step), outer=outer)
    slope = (x - ahead) / (sigma * step).view(-1, 1, 1, 1)
    x0_hat = x - sigma.view(-1, 1, 1, 1) * slope
    torch.testing.assert_close(
        x0_hat, denoised(denoiser, x, sigma, outer=outer), rtol=1e-4, atol=1e-4
    )


def test_jumps_tell_the_network_where_to_and_keep_the_other_conditions():
    seen = []

    class Spy(GaussianDenoiser):
        def forward(self, x, sigma, cond=None):
            seen.append((sigma, cond))
            return super().forward(x, sigma, cond)

    x, label = torch.zeros(2, 1, 2, 2), torch.tensor([3, 4])
    sigma, to = torch.tensor([5.0, 1.0]), torch.tensor([0.5, 0.1])
    jump(Spy(), x, sigma, to, Cond(label=label))
    denoised(Spy(), x, sigma, Cond(label=label))
    assert torch.equal(seen[0][1].sigma_to, to)
    assert torch.equal(seen[1][1].sigma_to, sigma)
    assert all(cond.label is label for _, cond in seen)


def test_the_exact_g_makes_the_exact_flow_and_to_sigma_min_the_consistency_function():
    x = torch.randn(3, 1, 4, 4).double()
    sigma, to = levels(80.0, 2.0, 0.1), levels(5.0, 0.3, 0.002)
    got = jump(GaussianJumps(), x, sigma, to)
    ratio = ((0.49 + to**2) / (0.49 + sigma**2)).sqrt().view(-1, 1, 1, 1)
    torch.testing.assert_close(got, x * ratio, rtol=1e-9, atol=0)
    low = levels(0.002, 0.002, 0.002)
    got = jump(GaussianJumps(), x, sigma, low)
    torch.testing.assert_close(got, GaussianFlow(0.7)(x, sigma), rtol=1e-9, atol=1e-12)


def gaussian_loss(objective, num_sigmas):
    flow = GaussianJumps()
    models = Models(flow, flow, GaussianDenoiser(0.7))
    x0 = 0.7 * torch.randn(20_000, 1, 1, 1, dtype=torch.float64)
    phase = Phase(0, num_sigmas)
    return objective.loss(models, x0, Cond(), phase, Rng(0, "law", 0, CPU)).mean()


@pytest.mark.parametrize(("solver", "times"), [("euler", 16), ("heun", 64)])
def test_loss_of_the_exact_jumps_falls_with_the_order_of_the_solver(solver, times):
    """As of consistency distillation: one step of a gap of one makes errors of order 2 and 3."""
    objective = CTM(distance="l2", max_gap=1, solver=solver, dsm_weight=0.0)
    ratio = gaussian_loss(objective, 401) / gaussian_loss(objective, 801)
    assert ratio == pytest.approx(times, rel=0.15)


def test_gap_is_drawn_in_proportion_to_its_steps():
    weights = CTM(distance="l2").gap_weights(40)
    assert weights.tolist() == list(range(1, 40))
    assert CTM(distance="l2", max_gap=3).gap_weights(40).tolist() == [1, 2, 3]


def test_levels_are_ordered_and_lie_on_the_grid():
    """0 <= s <= u < t, t - u the same for the batch, the solver's steps neighbours; all occur."""
    n, met = 6, set()
    grid = Noise().sigmas(n)
    index = {float(sigma): i for i, sigma in enumerate(grid)}
    objective = CTM(num_sigmas=n, distance="l2", dsm_weight=0.0)
    x0 = torch.zeros(64, 1, 2, 2)
    for step in range(40):
        calls = {"online": [], "target": [], "teacher": []}
        models = models_of()
        for name, seen in calls.items():
            getattr(models, name).register_forward_hook(
                lambda _module, args, _out, seen=seen: seen.append(args)
            )
        rng = Rng(0, "levels", step, CPU)
        objective.loss(models, x0, Cond(), Phase(0, n), rng)
        (_, t, at_t), (_, u, at_u) = calls["online"]
        assert torch.equal(at_t.sigma_to, at_u.sigma_to)
        for (_, here, cond), inner in zip(calls["target"], (at_t, at_u), strict=True):
            assert torch.equal(here, inner.sigma_to)
            assert torch.equal(cond.sigma_to, grid[:1].expand(64))
        t, u, s = ([index[float(v)] for v in sigma] for sigma in (t, u, at_t.sigma_to))
        gaps = {a - b for a, b in zip(t, u, strict=True)}
        (gap,) = gaps
        assert len(calls["teacher"]) == 2 * gap
        assert all(b >= c >= 0 for b, c in zip(u, s, strict=True))
        walked = [index[float(call[1][0])] for call in calls["teacher"]]
        assert walked == [t[0] - k for k in range(gap + 1) for _ in range(2)][1:-1]
        met |= set(zip(t, u, s, strict=True))
    assert met == {(t, u, s) for t in range(n) for u in range(t) for s in range(u + 1)}


def test_gradient_reaches_the_online_network_through_the_frozen_target_and_no_other():
    models = models_of()
    objective = CTM(num_sigmas=6, distance="l2")
    x0 = torch.randn(4, 1, 4, 4)
    loss = objective.loss(models, x0, Cond(), Phase(0, 6), Rng(0, "law", 0, CPU))
    assert loss.shape == (4,)
    loss.mean().backward()
    assert all(p.grad is not None for p in models.online.parameters())
    for frozen in (models.target, models.teacher):
        assert all(p.grad is None for p in frozen.parameters())


def test_the_target_has_no_gradient():
    """The gradient is that of the distance to a constant: a finite difference that moves only the
    estimate's weights agrees with it."""
    torch.manual_seed(1)
    models = models_of(torch.float64)
    objective = CTM(num_sigmas=6, distance="l2", dsm_weight=0.0)
    x0 = torch.randn(8, 1, 4, 4).double()

    def loss():
        return objective.loss(models, x0, Cond(), Phase(0, 6), Rng(0, "law", 0, CPU)).mean()

    calls, weight = [], models.online.network.both.weight

    def only_first(_module, _args):
        calls.append(None)
        # The first call is the estimate's; the target's sees the weights as they were.
        weight.data.copy_(moved if len(calls) == 1 else kept)

    kept = weight.detach().clone()
    loss().backward()
    step, direction = 1e-5, torch.ones_like(kept)
    ends = []
    for sign in (1, -1):
        moved = kept + sign * step * direction
        calls.clear()
        handle = models.online.register_forward_pre_hook(only_first)
        with torch.no_grad():
            ends.append(float(loss()))
        handle.remove()
        weight.data.copy_(kept)
    slope = (ends[0] - ends[1]) / (2 * step)
    assert slope == pytest.approx(float((weight.grad * direction).sum()), rel=1e-4)


def test_score_matching_has_half_its_levels_lognormal_and_half_from_the_upper_grid():
    objective, noise = CTM(distance="l2"), Noise()
    x0 = torch.zeros(40_001, 1, 1, 1, dtype=torch.float64)
    sigma = objective.noise_levels(noise, x0, Rng(0, "law", 0, CPU))
    first, second = sigma[:20_000], sigma[20_000:]
    assert first.log().mean() == pytest.approx(-1.2, abs=0.03)
    assert first.log().std() == pytest.approx(1.2, abs=0.03)
    place = (second ** (1 / 7) - 0.002 ** (1 / 7)) / (80 ** (1 / 7) - 0.002 ** (1 / 7))
    assert place.min() == pytest.approx(0.3, abs=1e-3)
    assert place.max() == pytest.approx(1.0, abs=1e-3)
    assert place.mean() == pytest.approx(0.65, abs=0.01)


def test_score_matching_of_the_exact_model_is_the_posterior_variance():
    """E (D - x0)^2 = s^2 sigma^2 / (s^2 + sigma^2), by which EDM's weight is divided here."""
    objective = CTM(distance="l2", dsm_weighting="uniform", p_std=1e-6, grid_share=1e-6)
    x0 = 0.7 * torch.randn(200_000, 1, 1, 1, dtype=torch.float64)
    flow = GaussianJumps()
    loss = objective.score_matching(Models(flow, flow), x0, Cond(), Rng(0, "law", 0, CPU))
    for half, sigma in ((loss[:100_000], math.exp(-1.2)), (loss[100_000:], 80.0)):
        assert half.mean() == pytest.approx(0.49 * sigma**2 / (0.49 + sigma**2), rel=0.03)


def test_adaptive_weight_makes_the_gradients_of_both_terms_equal():
    models = models_of(torch.float64)
    weight = last_weight(models.online.network)
    assert weight is models.online.network.both.weight
    x0 = torch.randn(4, 1, 4, 4).double()

    def gradient(**options):
        objective = CTM(num_sigmas=6, distance="l2", **options)
        loss = objective.loss(models, x0, Cond(), Phase(0, 6), Rng(0, "law", 0, CPU)).mean()
        return torch.autograd.grad(loss, weight)[0]

    consistency = gradient(dsm_weight=0.0)
    for factor in (1.0, 3.0):
        matching = gradient(dsm_weight=factor) - consistency
        assert matching.norm() == pytest.approx(factor * float(consistency.norm()), rel=1e-2)
    plain = gradient(dsm_adaptive=False) - consistency
    assert plain.norm() > 2 * consistency.norm()


def test_adaptive_weight_is_bounded_where_a_gradient_vanishes():
    w = torch.ones(2, 2, requires_grad=True)
    assert gradient_ratio(gradient_norm(1e9 * w.sum(), w), 0 * w.sum(), w) == 1e4
    assert gradient_ratio(gradient_norm(0 * w.sum(), w), w.sum(), w) == 0


def test_gap_power_weighs_near_jumps_more():
    t, s = torch.tensor([2.0, 2.0]), torch.tensor([1.0, 0.0])
    assert CTM(distance="l2", gap_power=2.0).weight(t, s, 0.5).tolist() == [4.0, 1.0]


def never(k):
    raise AssertionError("drew noise")


@pytest.mark.parametrize("options", [{"steps": 1}, {"steps": 5}, {"sigmas": (10.0, 0.5)}, {}])
def test_without_gamma_jumps_are_deterministic_and_exact(options):
    sampler, flow = Gamma(gamma=0.0, clamp=False, **options), Counting(GaussianJumps())
    x = 80 * torch.randn(2, 1, 4, 4).double()
    out = sampler.sample(flow, x, Cond(), never)
    torch.testing.assert_close(out, exact(x, 80.0, 0.002), rtol=1e-9, atol=0)
    assert sampler.nfe == len(flow.seen)
    assert flow.seen == pytest.approx(sampler.levels(Noise())[:-1])


def test_full_gamma_is_multistep_consistency_sampling():
    flow, sigmas = GaussianJumps(), (5.0, 0.5)
    draws = torch.randn(3, 2, 1, 4, 4).double()
    x = 80 * draws[0]
    ours = Gamma(gamma=1.0, sigmas=sigmas).sample(flow, x, Cond(), lambda k: draws[k])
    theirs = Multistep(sigmas=sigmas).sample(GaussianFlow(0.7), x, Cond(), lambda k: draws[k])
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("gamma", [0.0, 0.3, 0.9, 1.0])
def test_every_gamma_reproduces_gaussian_data(gamma):
    s = 0.2
    x = math.sqrt(80**2 + s**2) * torch.randn(40_000, 1, 1, 1, dtype=torch.float64)
    sampler = Gamma(gamma=gamma, steps=4)
    out = sampler.sample(GaussianJumps(s), x, Cond(), lambda k: torch.randn_like(x))
    assert out.std() == pytest.approx(s, rel=0.02)


def test_gamma_says_how_far_below_the_next_level_a_jump_ends():
    """s - sigma_min = sqrt(1 - gamma^2) (sigma' - sigma_min)."""
    ends = []

    class Spy(GaussianJumps):
        def forward(self, x, sigma, cond=None):
            ends.append(float(cond.sigma_to[0]))
            return super().forward(x, sigma, cond)

    x = torch.zeros(1, 1, 2, 2).double()
    Gamma(gamma=0.6, sigmas=(1.002,)).sample(Spy(), x, Cond(), lambda k: x)
    assert ends == pytest.approx([0.802, 0.002])


def test_jumps_are_clamped_only_where_they_end_at_sigma_min():
    class Bright(GaussianJumps):
        def forward(self, x, sigma, cond=None):
            seen.append(x)
            return torch.full_like(x, 3.0)

    x, zero = torch.zeros(1, 1, 2, 2), lambda k: torch.zeros(1, 1, 2, 2)
    for gamma, inside in ((0.0, 3.0 * (1 - 0.5 / 80)), (1.0, 1.0)):
        seen = []
        out = Gamma(gamma=gamma, sigmas=(0.5,)).sample(Bright(), x, Cond(), zero)
        assert float(seen[1].max()) == pytest.approx(inside)
        assert torch.equal(out, torch.ones_like(x))


def test_walks_take_a_trajectory_model_for_its_diffusion_model():
    x = 80 * torch.randn(2, 1, 4, 4).double()
    found = Heun(steps=6).sample(GaussianJumps(), x, Cond(), never)
    wanted = Heun(steps=6).sample(GaussianDenoiser(0.7), x, Cond(), never)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(
    ("part", "options", "message"),
    [
        (Gamma, {"gamma": 1.1}, "less than or equal to 1"),
        (Gamma, {"gamma": -0.1}, "greater than or equal to 0"),
        (Gamma, {"sigmas": (1.0, 2.0)}, "must fall"),
        (Gamma, {"sigmas": (1.0,), "steps": 3}, "give one of them"),
        (CTM, {"num_sigmas": 18, "max_gap": 18}, "max_gap 18 must be below num_sigmas 18"),
    ],
)
def test_options_that_cannot_be_are_refused(part, options, message):
    with pytest.raises(ValidationError, match=message):
        part(**options)


def test_levels_outside_the_noise_axis_are_refused():
    x = torch.zeros(1, 1, 2, 2)
    with pytest.raises(RecipeError, match="between sigma_min"):
        Gamma(sigmas=(90.0,)).sample(GaussianJumps(), x, Cond(), never)


CTM_RECIPE = RECIPE.replace(
    'objective = { use = "cd"', 'sampler = { use = "gamma", steps = 2 }\nobjective = { use = "ctm"'
).replace('init = "teacher"', 'init = "teacher"\nprecond = "edm"')


@pytest.fixture
def planned(tmp_path):
    """The plan of the recipe after changes, beside its teacher's weights."""
    save_weights(tmp_path / "teacher.safetensors")

    def of(*changes):
        text = CTM_RECIPE
        for old, new in changes:
            assert old in text
            text = text.replace(old, new)
        text = text.replace("WEIGHTS", str(tmp_path / "teacher.safetensors"))
        (tmp_path / "tiny.toml").write_text(text)
        return plan(load(tmp_path / "tiny.toml", [], discover()))

    return of


def test_a_recipe_trains_a_student_that_embeds_what_its_teacher_does_not(planned):
    training = start(planned(), CPU)
    online, teacher = training.models.online.network, training.models.teacher.network
    assert online.time_s is not None
    assert teacher.time_s is None
    assert torch.equal(online.time[0].weight, teacher.time[0].weight)
    before = online.time_s[0].weight.clone()
    losses = [step.log["loss"] for step in train(training)]
    assert all(math.isfinite(loss) for loss in losses)
    assert not torch.equal(online.time_s[0].weight, before)


def test_weights_of_edms_network_that_embeds_the_target_level_want_its_labels_there():
    options = {"norm_channels": 4, "time_scale": 1.0, "resblock_updown": True}
    backbone = ADM(channels=64, channel_mult=[1], num_head_channels=64, **options)
    data = DataSpec(1, 8, 10)
    (layout,) = (layout for layout in backbone.layouts(data) if layout.name == "edm")
    state = backbone.build(data, frozenset({"label", "sigma_to"})).state_dict()
    with pytest.raises(CheckpointError, match="label_sigma_to = false"):
        layout.write(state)
    with pytest.raises(CheckpointError, match="label_sigma_to = false"):
        layout.read({"model.map_layer0_s.weight": torch.zeros(1)})


def test_a_backbone_that_cannot_embed_the_target_level_is_refused(planned, monkeypatch):
    monkeypatch.setattr(ADM, "accepts", frozenset({"label"}))
    with pytest.raises(RecipeError, match="backbone: cannot embed sigma_to; it accepts label"):
        planned()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ([('\nprecond = "edm"', "")], 'set denoiser.precond = "edm"'),
        (
            [('[teacher]\nweights = "WEIGHTS"\n', ""), ('init = "teacher"', 'init = "random"')],
            r"it distils a teacher: add a \[teacher\] table",
        ),
    ],
)
def test_a_recipe_without_what_it_needs_is_refused(planned, changes, message):
    with pytest.raises(RecipeError, match=message):
        planned(*changes)
