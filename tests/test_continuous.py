"""Continuous-time consistency models: limits of the discrete ones, and forward mode."""

import pytest
import torch
from cmkit_std.backbones.adm import ADM
from cmkit_std.backbones.dit import DiT
from cmkit_std.backbones.songunet import SongUNet
from cmkit_std.objectives import distances
from cmkit_std.objectives.ccd import CCD
from cmkit_std.objectives.cct import CCT
from cmkit_std.objectives.cd import CD
from cmkit_std.objectives.comparison import levels
from cmkit_std.objectives.ct import CT
from cmkit_std.objectives.distances import limit
from pydantic import ValidationError

from cmkit import Cond, DataSpec, Denoiser, Models, Noise, Phase, Rng
from cmkit.functional import derivative
from tests.toys import GaussianDenoiser, GaussianFlow, TinyNetwork

CPU = torch.device("cpu")
X0 = 0.5 * torch.randn(
    256, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
)


class Fractions(Rng):
    """The same fractions of the grid for every N, whether as an index or as a number."""

    def uniform(self, n):
        return (torch.arange(n, dtype=torch.float64) + 0.5) / n

    def integers(self, high, n):
        return (self.uniform(n) * high).long()


def online():
    torch.manual_seed(3)
    return Denoiser(TinyNetwork(), Noise(0.1, 10.0)).double().eval()


def gradient(objective, num_sigmas=None):
    """Gradient of the mean loss in the online weights, (n,) float64, on fixed fractions."""
    models = Models(online(), online(), GaussianDenoiser(s=0.5))
    rng = Fractions(0, "law", 0, CPU)
    loss = objective.loss(models, X0, Cond(), Phase(0, num_sigmas), rng).mean()
    return torch.cat(
        [g.flatten() for g in torch.autograd.grad(loss, list(models.online.parameters()))]
    )


@pytest.mark.parametrize("weighting", ["uniform", "karras"])
@pytest.mark.parametrize(
    ("discrete", "continuous"),
    [(CT, CCT), (CD, CCD)],
    ids=["ct", "cd"],
)
def test_gradient_of_the_discrete_loss_times_the_intervals_tends_to_the_continuous(
    discrete, continuous, weighting
):
    """With a target held fixed, (N - 1) grad L_N -> grad L: the error falls with the gap."""
    expected = gradient(continuous(distance="l2", gap="grid", weighting=weighting))
    errors = []
    for n in (2_001, 8_001):
        got = (n - 1) * gradient(discrete(distance="l2", weighting=weighting), n)
        errors.append(float((got - expected).norm() / expected.norm()))
    assert errors[0] < 1e-2
    assert errors[1] < errors[0] / 2.5


@pytest.mark.parametrize("distance", ["l1", "l2"])
def test_loss_without_stop_gradient_is_the_limit_of_the_discrete_one(distance):
    """(N - 1)^2 L_N -> L for "l2", (N - 1) L_N for "l1"."""
    models = Models(online(), online(), GaussianDenoiser(s=0.5))
    rng, power = Fractions(0, "law", 0, CPU), {"l1": 1, "l2": 2}[distance]
    continuous = CCD(distance=distance, gap="grid", stop_gradient=False)
    expected = continuous.loss(models, X0, Cond(), Phase(0), rng).mean()
    rng = Fractions(0, "law", 0, CPU)
    value = CCD(distance=distance, gap="grid").loss(models, X0, Cond(), Phase(0), rng).mean()
    torch.testing.assert_close(value, expected)
    rng = Fractions(0, "law", 0, CPU)
    n = 4_001
    discrete = CD(distance=distance).loss(models, X0, Cond(), Phase(0, n), rng).mean()
    torch.testing.assert_close((n - 1) ** power * discrete, expected, rtol=1e-2, atol=0)


def test_gradient_without_stop_gradient_is_that_of_the_loss():
    """By finite differences of the loss in one weight."""
    objective, models = CCD(distance="l2", stop_gradient=False), Models(online(), online())
    models.teacher = GaussianDenoiser(s=0.5)

    def loss():
        rng = Fractions(0, "law", 0, CPU)
        return objective.loss(models, X0, Cond(), Phase(0), rng).mean()

    weight, h = models.online.network.first.weight, 1e-5
    (expected,) = torch.autograd.grad(loss(), weight)
    ends = []
    for step in (h, -2 * h):
        weight.data[0, 0, 1, 1] += step
        ends.append(loss().detach())
    assert float(expected[0, 0, 1, 1]) == pytest.approx(float((ends[0] - ends[1]) / (2 * h)), 1e-4)


def test_exact_function_does_not_change_along_the_exact_ode():
    """The tangent of Gaussian data's f along its probability-flow ODE is zero."""
    flow = GaussianFlow(s=0.7)
    models = Models(flow, flow, GaussianDenoiser(s=0.7))
    for distance in ("l1", "l2"):
        objective = CCD(distance=distance, gap="grid")
        loss = objective.loss(models, X0, Cond(), Phase(0), Rng(0, "law", 0, CPU))
        assert loss.shape == (len(X0),)
        assert loss.abs().max() < 1e-20 if distance == "l2" else loss.abs().max() < 1e-10
    training = CCT(distance="l2").loss(models, X0, Cond(), Phase(0), Rng(0, "law", 0, CPU))
    assert training.min() > 1e-9


@pytest.mark.slow
def test_training_has_the_gradient_of_distillation_from_the_exact_teacher_on_average():
    """Theorem 6: given x, the mean slope (x - x0) / sigma is that of the exact denoiser."""
    x0 = 0.5 * torch.randn(200_000, 1, 1, 1, dtype=torch.float64)
    gradients = []
    for objective in (CCT(distance="l2"), CCD(distance="l2")):
        models = Models(online(), online(), GaussianDenoiser(s=0.5))
        rng = Fractions(0, "law", 0, CPU)
        loss = objective.loss(models, x0, Cond(), Phase(0), rng).mean()
        parameters = list(models.online.parameters())
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]))
    training, distillation = gradients
    assert (training - distillation).norm() < 0.03 * distillation.norm()


def test_level_and_gap_are_those_of_a_fine_grid():
    noise, n = Noise(), 100_001
    grid = noise.sigmas(n, CPU, torch.float64)
    sigma, gap = levels(noise, torch.linspace(0, 1, n, dtype=torch.float64))
    torch.testing.assert_close(sigma, grid)
    torch.testing.assert_close(gap[1:-1] / (n - 1), (grid[2:] - grid[:-2]) / 2, rtol=1e-6, atol=0)


def test_hessian_product_of_a_distance_is_the_second_order_of_its_value():
    """For any twice differentiable distance: "l2-32", whose Hessian is known by its values."""
    f, v = torch.randn(3, 1, 8, 8, dtype=torch.float64), torch.randn(3, 1, 8, 8).double()
    f.requires_grad_()
    got = limit("l2-32", f, v)
    torch.testing.assert_close(got.detach(), distances.l2_32(f.detach(), f.detach() - v))
    (gradient,) = torch.autograd.grad(got.sum(), f)
    h = 1e-6
    near = f.detach().requires_grad_()
    (expected,) = torch.autograd.grad(distances.l2_32(near, (near - h * v).detach()).sum(), near)
    torch.testing.assert_close(gradient, expected / h)


def test_lpips_is_compared_by_its_second_order(tmp_path):
    """Along v, d(f, f - h v) / h^2 -> v H v / 2."""
    from safetensors.torch import save_file
    from torchvision.models import squeezenet1_1

    weights = str(tmp_path / "squeeze.safetensors")
    save_file(squeezenet1_1(weights=None).state_dict(), weights)
    f, v = torch.rand(2, 1, 8, 8) * 2 - 1, torch.randn(2, 1, 8, 8)
    got = limit("lpips", f, v, "squeeze", weights)
    h = 3e-3
    expected = distances.lpips(f, f - h * v, "squeeze", weights) / h**2
    torch.testing.assert_close(got, expected, rtol=0.05, atol=0)


SMALL = {"channels": 32, "channel_mult": (1, 2), "num_res_blocks": 1, "dropout": 0.3}
BACKBONES = [
    ADM(**SMALL, attention_resolutions=(4,), num_heads=2),
    ADM(**SMALL, resblock_updown=True, use_scale_shift_norm=False, norm_groups=8),
    SongUNet(**SMALL, attention_resolutions=(4,)),
    SongUNet(preset="ncsnpp", **SMALL, attention_resolutions=(4,), fourier_scale=0.02),
    DiT(width=64, depth=2, num_heads=2),
]


def fresh(backbone, layout, dtype=torch.float64):
    network = backbone.build(DataSpec(3, 8), frozenset())
    for parameter in network.parameters():  # zero ones hide what is behind them
        torch.nn.init.normal_(parameter, std=0.05)
    return Denoiser(network.to(dtype).to(memory_format=layout), Noise(0.1, 10.0)).train()


def tangent(denoiser, x, sigma, dx, rng):
    """df/dsigma where x moves by dx = dx/dsigma."""
    return derivative(denoiser, (x, sigma), (dx, torch.ones_like(sigma)), rng)[1]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("backbone", BACKBONES, ids=["adm", "adm2", "ddpmpp", "ncsnpp", "dit"])
def test_tangent_is_the_derivative_of_a_pass_with_the_same_dropout(backbone, layout):
    """Of every built-in backbone in both memory layouts, by central differences."""
    from cmkit import shared_dropout

    denoiser, rng, h = fresh(backbone, layout), Rng(0, "law", 0, CPU), 1e-5
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64).to(memory_format=layout)
    sigma, dx = torch.rand(4, dtype=torch.float64) + 0.5, torch.randn_like(x)
    with torch.no_grad():
        got = tangent(denoiser, x, sigma, dx, rng)
        ends = []
        for step in (h, -h):
            with shared_dropout(rng):
                ends.append(denoiser(x + step * dx, sigma + step))
    torch.testing.assert_close(got, (ends[0] - ends[1]) / (2 * h), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("stop_gradient", [True, False])
@pytest.mark.parametrize("backbone", BACKBONES, ids=["adm", "adm2", "ddpmpp", "ncsnpp", "dit"])
def test_every_weight_of_every_backbone_learns_under_autocast(backbone, stop_gradient):
    denoiser = fresh(backbone, torch.channels_last, torch.float32)
    teacher = fresh(backbone, torch.channels_last, torch.float32).requires_grad_(False)
    objective = CCD(distance="l2", stop_gradient=stop_gradient)
    x0 = torch.randn(2, 3, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        rng = Rng(0, "law", 0, CPU)
        loss = objective.loss(Models(denoiser, denoiser, teacher), x0, Cond(), Phase(0), rng)
    loss.mean().backward()
    assert loss.dtype == torch.float32
    assert all(p.grad is not None and p.grad.isfinite().all() for p in denoiser.parameters())


def test_tangent_is_in_float32_under_autocast():
    denoiser = fresh(BACKBONES[0], torch.channels_last, torch.float32).eval()
    x, sigma = torch.randn(2, 3, 8, 8), torch.tensor([0.5, 2.0])
    with torch.no_grad():
        exact = tangent(denoiser, x, sigma, x, Rng(0, "law", 0, CPU))
        with torch.autocast("cpu", torch.bfloat16):
            cast = tangent(denoiser, x, sigma, x, Rng(0, "law", 0, CPU))
    assert torch.equal(exact, cast)


def test_lpips_without_stop_gradient_is_refused():
    with pytest.raises(ValidationError, match='"lpips" needs stop_gradient = true'):
        CCD(distance="lpips", stop_gradient=False)


@pytest.mark.parametrize("model", [CCD, CCT])
def test_lpips_without_weights_fails_before_training(model, tmp_path, monkeypatch):
    from cmkit import DownloadError

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(DownloadError, match=r"vgg16-397923af\.pth"):
        model(distance="lpips").check(DataSpec(3, 64))
    model(distance="l2").check(DataSpec(3, 64))
