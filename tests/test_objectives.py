import math

import pytest
import torch
from cmkit_std.objectives import distances
from cmkit_std.objectives.ct import CT
from cmkit_std.objectives.edm import EDM
from cmkit_std.objectives.ict import ICT, lognormal_mass
from pydantic import ValidationError

from cmkit import Cond, DownloadError, Models, Noise, Rng
from cmkit.kinds import DataSpec
from tests.toys import GaussianDenoiser, GaussianFlow, TinyNetwork

CPU = torch.device("cpu")


def gaussian_loss(objective, num_sigmas):
    """Mean loss of the exact f on Gaussian data, in float64, over a grid of num_sigmas points."""
    flow = GaussianFlow(s=0.7)
    x0 = 0.7 * torch.randn(20_000, 1, 1, 1, dtype=torch.float64)
    phase = objective.phase(0, 100)
    phase = type(phase)(0, num_sigmas, phase.target_ema)
    return objective.loss(Models(flow, flow), x0, Cond(), phase, Rng(0, "law", 0, CPU)).mean()


def test_ct_loss_falls_4_times_when_the_grid_is_doubled():
    objective = CT(distance="l2")
    ratio = gaussian_loss(objective, 201) / gaussian_loss(objective, 401)
    assert ratio == pytest.approx(4, rel=0.1)


def test_ict_terms_are_pseudo_huber_over_the_gap():
    """At 8 points the loss is the sum over intervals of mass x distance / gap, by quadrature."""
    objective, noise, n = ICT(huber_c=0.03), Noise(), 8
    got = gaussian_loss(objective, n)
    sigmas = noise.sigmas(n, CPU, torch.float64)
    mass = lognormal_mass(noise, n, -1.1, 2.0, CPU)
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


def test_lognormal_mass_is_the_normal_law_of_log_sigma():
    noise = Noise()
    mass = lognormal_mass(noise, 11, -1.1, 2.0, CPU)
    normal = torch.distributions.Normal(
        torch.tensor(-1.1, dtype=torch.float64), torch.tensor(2.0, dtype=torch.float64)
    )
    cdf = normal.cdf(noise.sigmas(11, CPU, torch.float64).log())
    expected = (cdf[1:] - cdf[:-1]) / (cdf[-1] - cdf[0])
    torch.testing.assert_close(mass, expected, rtol=1e-6, atol=0)


def test_distances_have_their_closed_forms():
    a, b = torch.zeros(2, 3, 4, 4), torch.full((2, 3, 4, 4), 0.5)
    assert torch.equal(distances.l1(a, b), torch.full((2,), 0.5))
    assert torch.equal(distances.l2(a, b), torch.full((2,), 0.25))
    c = 0.00054 * math.sqrt(48)
    expected = math.sqrt(48 * 0.25 + c * c) - c
    torch.testing.assert_close(distances.pseudo_huber(a, b), torch.full((2,), expected))


def test_pseudo_huber_is_of_the_whole_image_not_of_pixels():
    a, b = torch.zeros(1, 1, 2, 2), torch.tensor([[[[3.0, 4.0], [0.0, 0.0]]]])
    torch.testing.assert_close(distances.pseudo_huber(a, b, c=0.0), torch.tensor([5.0]))


@pytest.mark.parametrize("objective", [CT(distance="l2"), CT(distance="pseudo_huber"), ICT()])
def test_online_and_target_share_dropout_masks(objective):
    """With one grid interval of almost no width and the same weights, only masks could differ."""
    from cmkit import Denoiser

    denoiser = Denoiser(TinyNetwork(), Noise(0.5, 0.5 + 1e-6)).train()
    phase = type(objective.phase(0, 1))(0, 2)
    x0 = torch.randn(16, 1, 8, 8)
    a, b = [], []
    denoiser.register_forward_hook(
        lambda m, i, out: (a if torch.is_grad_enabled() else b).append(out)
    )
    objective.loss(Models(denoiser, denoiser), x0, Cond(), phase, Rng(0, "law", 0, CPU))
    torch.testing.assert_close(a[0], b[0], atol=1e-4, rtol=1e-4)


def test_no_gradient_reaches_the_target():
    from cmkit import Denoiser

    online, target = Denoiser(TinyNetwork()), Denoiser(TinyNetwork())
    objective = CT(distance="l2")
    loss = objective.loss(
        Models(online, target),
        torch.randn(4, 1, 8, 8),
        Cond(),
        objective.phase(9, 10),
        Rng(0, "law", 0, CPU),
    )
    assert loss.shape == (4,)
    loss.mean().backward()
    assert all(p.grad is None for p in target.parameters())
    assert all(p.grad is not None for p in online.parameters())


def test_lpips_without_weights_fails_before_training(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(DownloadError, match=r"vgg16-397923af\.pth"):
        CT(distance="lpips").check(DataSpec(3, 64))


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

    denoiser = Denoiser(TinyNetwork(), precond="edm").train()
    x0, objective = torch.randn(4, 1, 8, 8), EDM()
    losses = []
    for stray in (1, 2):
        torch.manual_seed(stray)
        rng = Rng(0, "law", 0, CPU)
        losses.append(
            objective.loss(Models(denoiser, denoiser), x0, Cond(), objective.phase(0, 1), rng)
        )
    assert torch.equal(*losses)
