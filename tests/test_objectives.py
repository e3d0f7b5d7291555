import math

import pytest
import torch
from cmkit_std.objectives import distances
from cmkit_std.objectives.cd import CD
from cmkit_std.objectives.ct import CT
from cmkit_std.objectives.edm import EDM
from cmkit_std.objectives.ict import ICT, lognormal_mass
from cmkit_std.objectives.pd import PD
from cmkit_std.objectives.weightings import weighting
from pydantic import ValidationError

from cmkit import Cond, DataSpec, Denoiser, DownloadError, Models, Noise, Phase, Rng, edm_scalings
from tests.toys import GaussianDenoiser, GaussianFlow, TinyNetwork

CPU = torch.device("cpu")


def gaussian_loss(objective, num_sigmas):
    """Mean loss of the exact f on Gaussian data, in float64, over a grid of num_sigmas points."""
    flow, teacher = GaussianFlow(s=0.7), GaussianDenoiser(s=0.7)
    models = Models(teacher if "diffusion" in objective.needs else flow, flow, teacher)
    x0 = 0.7 * torch.randn(20_000, 1, 1, 1, dtype=torch.float64)
    phase = Phase(0, num_sigmas)
    return objective.loss(models, x0, Cond(), phase, Rng(0, "law", 0, CPU)).mean()


@pytest.mark.parametrize(
    ("objective", "times"),
    [
        (CT(distance="l2"), 4),
        (CD(distance="l2", solver="euler"), 16),
        (CD(distance="l2", solver="heun"), 64),
        (PD(distance="l2", weighting="uniform"), 4),
    ],
    ids=["ct", "cd-euler", "cd-heun", "pd"],
)
def test_loss_of_the_exact_function_falls_with_the_order_of_the_solver(objective, times):
    """When the grid is doubled: 4, 16 and 64 times for errors of order 1, 2 and 3 in the gap."""
    ratio = gaussian_loss(objective, 401) / gaussian_loss(objective, 801)
    assert ratio == pytest.approx(times, rel=0.1)


def test_ict_terms_are_pseudo_huber_over_the_gap():
    """At 8 points the loss is the sum over intervals of mass x distance / gap, by quadrature."""
    objective, noise, n = ICT(huber_c=0.03), Noise(), 8
    got = gaussian_loss(objective, n)
    sigmas = noise.sigmas(n, CPU, torch.float64)
    mass = lognormal_mass(noise, n, -1.1, 2.0, CPU)
    mass = mass / mass.sum()
    flow = GaussianFlow(s=0.7)
    x0 = 0.7 * torch.randn(20_000, 1, 1, 1, dtype=torch.float64)
    z = torch.randn_like(x0)
    expected = 0.0
    for i in range(n - 1):
        ends = [flow(x0 + sigmas[j] * z, sigmas[j].expand(len(x0))).flatten() for j in (i + 1, i)]
        huber = ((ends[0] - ends[1]) ** 2 + 0.03**2).sqrt() - 0.03
        expected += float(mass[i] * huber.mean() / (sigmas[i + 1] - sigmas[i]))
    assert float(got) == pytest.approx(expected, rel=0.05)


def test_ct_pairs_the_larger_level_with_the_online_network():
    seen = {}

    class Spy(GaussianFlow):
        def forward(self, x, sigma, cond=None):
            seen[self.role] = (x, sigma)
            return super().forward(x, sigma, cond)

    online, target = Spy(), Spy()
    online.role, target.role = "online", "target"
    x0 = torch.randn(64, 1, 4, 4)
    objective = CT(distance="l2")
    phase = objective.phase(50, 100)
    objective.loss(Models(online, target), x0, Cond(), phase, Rng(0, "law", 0, CPU))
    (x_high, high), (x_low, low) = seen["online"], seen["target"]
    sigmas = Noise().sigmas(phase.num_sigmas)
    index = torch.searchsorted(sigmas, low)
    assert torch.equal(sigmas[index], low)
    assert torch.equal(sigmas[index + 1], high)
    torch.testing.assert_close(
        (x_high - x0) / high.view(-1, 1, 1, 1),
        (x_low - x0) / low.view(-1, 1, 1, 1),
        atol=2e-3,
        rtol=1e-3,
    )


@pytest.mark.parametrize(("end_scales", "last"), [(150, 151), (200, 201)])
def test_ct_schedule_runs_from_2_to_the_published_end(end_scales, last):
    objective = CT(end_scales=end_scales)
    total = 1000
    counts = [objective.phase(k, total).num_sigmas for k in range(total)]
    assert counts[0] == 2
    assert counts[-1] == last
    assert counts == sorted(counts)


def test_ct_grid_never_has_fewer_than_2_points():
    assert CT(start_scales=1).phase(0, 1000).num_sigmas == 2


def test_ct_schedule_is_the_official_formula():
    k, total, s0, s1 = 300, 1000, 2, 150
    scales = math.ceil(math.sqrt(k / total * ((s1 + 1) ** 2 - s0**2) + s0**2) - 1)
    phase = CT().phase(k, total)
    assert phase.num_sigmas == scales + 1
    assert phase.target_ema == pytest.approx(math.exp(2 * math.log(0.95) / scales))


def test_ct_first_decay_is_mu0_squared_by_the_code_and_mu0_by_the_paper():
    assert CT().phase(0, 100).target_ema == pytest.approx(0.95**2)
    assert CT(mu_denominator="n").phase(0, 100).target_ema == pytest.approx(0.95)


def test_ict_schedule_doubles_every_50k_of_400k_steps():
    counts = {k: ICT().phase(k, 400_000).num_sigmas for k in range(0, 400_000, 50_000)}
    assert list(counts.values()) == [11, 21, 41, 81, 161, 321, 641, 1281]
    assert ICT().phase(49_999, 400_000).num_sigmas == 11
    assert ICT().phase(10**9, 400_000).num_sigmas == 1281


@pytest.mark.parametrize("end_scales", [1280, 1281, 1289])
def test_ict_counts_its_doublings_by_the_floor_of_the_ratio(end_scales):
    """K' = floor(K / (log2 floor(s1 / s0) + 1)): 128 is 7 doublings, so is all below 129."""
    objective = ICT(end_scales=end_scales)
    counts = [objective.phase(k, 400_000).num_sigmas for k in (49_999, 50_000, 99_999, 100_000)]
    assert counts == [11, 21, 21, 41]


def test_lognormal_mass_is_the_normal_law_of_log_sigma():
    noise = Noise()
    mass = lognormal_mass(noise, 11, -1.1, 2.0, CPU)
    normal = torch.distributions.Normal(
        torch.tensor(-1.1, dtype=torch.float64), torch.tensor(2.0, dtype=torch.float64)
    )
    cdf = normal.cdf(noise.sigmas(11, CPU, torch.float64).log())
    expected = (cdf[1:] - cdf[:-1]) / (cdf[-1] - cdf[0])
    torch.testing.assert_close(mass / mass.sum(), expected, rtol=1e-6, atol=0)


def test_l1_is_the_mean_absolute_difference_of_each_image():
    a, b = torch.zeros(2, 3, 4, 4), torch.full((2, 3, 4, 4), 0.5)
    assert torch.equal(distances.l1(a, b), torch.full((2,), 0.5))


@pytest.mark.parametrize(
    "objective", [CT(distance="l2"), CT(distance="pseudo_huber"), ICT(), CD(distance="l2")]
)
def test_online_and_target_share_dropout_masks(objective):
    """With one grid interval of almost no width and the same weights, only masks could differ.

    Scalings of a diffusion model, because near sigma_min a consistency model hides its network.
    """
    denoiser = Denoiser(TinyNetwork(), Noise(0.5, 0.5 + 1e-6), edm_scalings).train()
    phase = type(objective.phase(0, 1))(0, 2)
    x0 = torch.randn(16, 1, 8, 8)
    a, b = [], []
    denoiser.register_forward_hook(
        lambda m, i, out: (a if torch.is_grad_enabled() else b).append(out)
    )
    teacher = GaussianDenoiser()
    objective.loss(Models(denoiser, denoiser, teacher), x0, Cond(), phase, Rng(0, "law", 0, CPU))
    torch.testing.assert_close(a[0], b[0], atol=1e-4, rtol=1e-4)


ALL = [
    CT(distance="l2"),
    CD(distance="l2", solver="heun"),
    CD(distance="l2", solver="euler"),
    PD(distance="l2"),
    ICT(),
]


def named(objective) -> str:
    return type(objective).__name__.lower() + getattr(objective, "solver", "")


@pytest.mark.parametrize("objective", ALL, ids=named)
def test_no_gradient_reaches_target_or_teacher(objective):
    online, target, teacher = (Denoiser(TinyNetwork()) for _ in range(3))
    loss = objective.loss(
        Models(online, target, teacher),
        torch.randn(4, 1, 8, 8),
        Cond(),
        objective.phase(9, 10),
        Rng(0, "law", 0, CPU),
    )
    assert loss.shape == (4,)
    loss.mean().backward()
    assert all(p.grad is None for p in (*target.parameters(), *teacher.parameters()))
    assert all(p.grad is not None for p in online.parameters())


@pytest.mark.parametrize("model", [CT, CD, PD])
@pytest.mark.parametrize("name", ["snr", "snr+1", "karras", "truncated-snr"])
def test_weight_is_that_of_the_level_of_the_online_network(model, name):
    online, other = Denoiser(TinyNetwork()).eval(), Denoiser(TinyNetwork()).eval()
    levels = []
    online.register_forward_hook(lambda _module, args, _out: levels.append(args[1]))
    x0, phase = torch.randn(16, 1, 8, 8), Phase(0, 9)

    def loss(name):
        objective = model(distance="l2", weighting=name)
        rng = Rng(0, "law", 0, CPU)
        return objective.loss(Models(online, other, other), x0, Cond(), phase, rng)

    torch.testing.assert_close(loss(name), loss("uniform") * weighting(name, levels[0], 0.5))


def test_weightings_have_their_closed_forms():
    sigma = torch.tensor([0.1, 2.0], dtype=torch.float64)
    expected = {
        "uniform": [1, 1],
        "snr": [100, 0.25],
        "snr+1": [101, 1.25],
        "truncated-snr": [100, 1],
        "karras": [(s**2 + 0.5**2) / (s * 0.5) ** 2 for s in (0.1, 2.0)],
    }
    for name, values in expected.items():
        known = torch.tensor(values, dtype=torch.float64)
        torch.testing.assert_close(weighting(name, sigma, 0.5), known)


@pytest.mark.parametrize(("solver", "levels"), [("euler", ["high"]), ("heun", ["high", "low"])])
def test_cd_teacher_solves_from_the_online_point_to_the_target_point(solver, levels):
    """The target sees what the solver made of the online network's input, at the lower level."""
    models = Models(*(Denoiser(TinyNetwork()).eval() for _ in range(3)))
    seen = {}
    for role in ("online", "target", "teacher"):
        getattr(models, role).register_forward_hook(
            lambda _module, args, out, role=role: seen.setdefault(role, []).append((*args, out))
        )
    cond = Cond(label=torch.arange(16))
    CD(distance="l2", solver=solver).loss(
        models, torch.randn(16, 1, 8, 8), cond, Phase(0, 9), Rng(0, "law", 0, CPU)
    )
    ((x, high, *_),), ((x_low, low, *_),) = seen["online"], seen["target"]
    sigmas = Noise().sigmas(9)
    assert torch.equal(sigmas[torch.searchsorted(sigmas, low) + 1], high)
    known = {"high": high, "low": low}
    assert all(
        torch.equal(call[1], known[level])
        for call, level in zip(seen["teacher"], levels, strict=True)
    )
    assert torch.equal(seen["teacher"][0][0], x)
    slopes = [(x - x0_hat) / sigma.view(-1, 1, 1, 1) for x, sigma, _, x0_hat in seen["teacher"]]
    gap = (low - high).view(-1, 1, 1, 1)
    torch.testing.assert_close(x_low, x + sum(slopes) / len(slopes) * gap)
    assert all(call[2] is cond for calls in seen.values() for call in calls)


def test_cd_is_fixed_unless_told_to_grow():
    assert CD().phase(0, 100) == Phase(0, 40, 0.95)
    assert CD().phase(99, 100) == Phase(99, 40, 0.95)
    growing = CD(num_sigmas=2, end_scales=150, adaptive_ema=True)
    like = CT()
    for step in (0, 1, 500, 999):
        assert growing.phase(step, 1000) == like.phase(step, 1000)


def test_ct_can_be_fixed():
    assert CT(num_sigmas=18, target_ema=0.0).phase(7, 100) == Phase(7, 18, 0.0)


def test_decay_of_the_target_is_that_of_the_published_runs():
    """mu0^(s0 / (N - 1)): 0.9025 of 0.95 at N = 2, and at the last step near 1."""
    assert CT().phase(0, 1000).target_ema == pytest.approx(0.9025)
    assert CT().phase(999, 1000).target_ema == pytest.approx(0.95 ** (2 / 150))
    assert CT(end_scales=200).phase(999, 1000).target_ema == pytest.approx(0.95 ** (2 / 200))


def test_pd_halves_its_steps_and_renews_the_teacher_where_a_round_ends():
    objective = PD(start_scales=8, round_steps=10)
    phases = [objective.phase(step, 70) for step in range(70)]
    counts = [int(phase.log["num_steps"]) for phase in phases]
    assert counts == [8] * 10 + [4] * 10 + [2] * 20 + [1] * 30
    assert [phase.num_sigmas for phase in phases] == [2 * n + 1 for n in counts]
    assert [p.step for p in phases if p.renew_teacher] == [9, 19, 39]
    assert not objective.phase(9, 10).renew_teacher


def test_pd_student_that_makes_two_steps_of_its_teacher_has_no_loss():
    """On a grid of three points the student's step is known: two Euler steps from sigma_max."""
    teacher = GaussianDenoiser(s=0.7)
    low, middle, high = (float(sigma) for sigma in Noise().sigmas(3, CPU, torch.float64))

    class TwoSteps(Denoiser):
        def forward(self, x, sigma, cond=None):
            end = x
            for a, b in ((high, middle), (middle, low)):
                level = torch.full((len(x),), a, dtype=torch.float64)
                end = end + (end - teacher(end, level)) / a * (b - a)
            return x + high * (end - x) / (high - low)

    student = TwoSteps(TinyNetwork())
    x0 = torch.randn(16, 1, 4, 4, dtype=torch.float64)
    loss = PD(distance="l2").loss(
        Models(student, student, teacher), x0, Cond(), Phase(0, 3), Rng(0, "law", 0, CPU)
    )
    assert loss.max() < 1e-20


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"end_scales": 39}, "end_scales 39 must not be below num_sigmas 40"),
        ({"adaptive_ema": True, "target_ema": 0.0}, "needs a target_ema above 0"),
    ],
)
def test_cd_schedule_that_makes_no_sense_is_refused(options, said):
    with pytest.raises(ValidationError, match=said):
        CD(**options)


def test_l2_at_32_pixels_resizes_both_images():
    a, b = torch.rand(2, 3, 64, 64), torch.rand(2, 3, 64, 64)
    # From 64 to 32 pixels, bilinear is the mean of each 2x2 block.
    small = [torch.nn.functional.avg_pool2d(image, 2) for image in (a, b)]
    torch.testing.assert_close(distances.l2_32(a, b), distances.l2(*small))
    assert distances.l2_32(torch.zeros(1, 1, 8, 8), torch.ones(1, 1, 8, 8)) == 1


@pytest.mark.parametrize("model", [CT, CD, PD])
def test_every_objective_takes_every_distance(model, monkeypatch):
    seen = []
    monkeypatch.setattr(
        distances, "lpips", lambda a, b, *options: seen.append(options) or distances.l2(a, b)
    )
    x0 = torch.randn(4, 1, 8, 8)
    models = Models(*(Denoiser(TinyNetwork()).eval() for _ in range(3)))
    losses = {}
    for name in ("l1", "l2", "l2-32", "lpips", "pseudo_huber"):
        objective = model(
            distance=name, weighting="uniform", huber_c=0.1, lpips_net="alex", lpips_weights="w"
        )
        loss = objective.loss(models, x0, Cond(), Phase(0, 9), Rng(0, "law", 0, CPU))
        losses[name] = float(loss.mean().detach())
    assert seen == [("alex", "w")]
    assert losses["lpips"] == losses["l2"]
    assert len(set(losses.values())) == 4


@pytest.mark.parametrize("model", [CT, CD, PD])
def test_lpips_without_weights_fails_before_training(model, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(DownloadError, match=r"vgg16-397923af\.pth"):
        model(distance="lpips").check(DataSpec(3, 64))
    model(distance="l2").check(DataSpec(3, 64))


def test_lpips_pools_by_average_and_takes_small_grey_images(tmp_path):
    from safetensors.torch import save_file
    from torchvision.models import squeezenet1_1

    weights = tmp_path / "squeeze.safetensors"
    save_file(squeezenet1_1(weights=None).state_dict(), weights)
    a, b = torch.rand(2, 1, 8, 8) * 2 - 1, torch.rand(2, 1, 8, 8) * 2 - 1
    options = {"net": "squeeze", "weights": str(weights)}
    assert distances.lpips(a, b, **options).shape == (2,)
    assert torch.equal(distances.lpips(a, a, **options), torch.zeros(2))
    model = distances._lpips("squeeze", str(weights), CPU)
    kinds = [type(m).__name__ for m in model.net.modules()]
    assert "AvgPool2d" in kinds
    assert "MaxPool2d" not in kinds


@pytest.mark.parametrize("model", [CT, ICT])
def test_scales_that_shrink_are_refused(model):
    with pytest.raises(ValidationError, match="end_scales 5 must not be below"):
        model(start_scales=10, end_scales=5)


def test_edm_loss_of_the_exact_denoiser_is_1_at_every_level():
    """E (D - x0)^2 = s^2 sigma^2 / (s^2 + sigma^2): "karras" weights it to 1 at s = sigma_data."""
    denoiser = GaussianDenoiser(s=0.5)
    x0 = 0.5 * torch.randn(20_000, 1, 1, 1, dtype=torch.float64)
    for p_mean in (-4.0, -1.2, 3.0):
        objective = EDM(p_mean=p_mean, p_std=0.1)
        phase = objective.phase(0, 100)
        loss = objective.loss(Models(denoiser, denoiser), x0, Cond(), phase, Rng(0, "law", 0, CPU))
        assert loss.shape == (len(x0),)
        assert float(loss.mean()) == pytest.approx(1, rel=0.05)


def test_edm_levels_are_lognormal():
    seen = []

    class Spy(GaussianDenoiser):
        def forward(self, x, sigma, cond=None):
            seen.append(sigma.log())
            return super().forward(x, sigma, cond)

    objective, spy = EDM(p_mean=-0.5, p_std=0.7), Spy()
    x0 = torch.randn(20_000, 1, 1, 1)
    objective.loss(Models(spy, spy), x0, Cond(), objective.phase(0, 1), Rng(0, "law", 0, CPU))
    assert float(seen[0].mean()) == pytest.approx(-0.5, abs=0.02)
    assert float(seen[0].std()) == pytest.approx(0.7, rel=0.02)


def test_edm_dropout_comes_from_the_step_alone():
    from cmkit import Denoiser

    denoiser = Denoiser(TinyNetwork(), scalings=edm_scalings).train()
    x0, objective = torch.randn(4, 1, 8, 8), EDM()
    losses = []
    for stray in (1, 2):
        torch.manual_seed(stray)
        rng = Rng(0, "law", 0, CPU)
        losses.append(
            objective.loss(Models(denoiser, denoiser), x0, Cond(), objective.phase(0, 1), rng)
        )
    assert torch.equal(*losses)
