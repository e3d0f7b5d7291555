"""Laws of mean flows, most on Gaussian data, whose average velocities are known exactly."""

import math
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import EntryPoint, entry_points

import pytest
import torch
from cmkit_meanflow import velocity
from cmkit_meanflow.objective import MeanFlow
from cmkit_meanflow.sampler import MeanFlowSampler

import cmkit
from cmkit import Cond, Denoiser, Models, Network, Noise, Rng, testing
from cmkit.errors import RecipeError

CPU = torch.device("cpu")
S = 0.7
"""Standard deviation of the Gaussian data."""


class Tiny(Network):
    """A network that sees where it is to jump to."""

    def __init__(self):
        super().__init__()
        self.first = torch.nn.Conv2d(1, 4, 3, padding=1)
        self.second = torch.nn.Conv2d(4, 1, 3, padding=1)
        self.dropout = torch.nn.Dropout(0.5)

    def forward(self, x, c_noise, cond, scales):
        emb = torch.sin(4 * c_noise) + torch.cos(4 * cond.sigma_to)
        h = self.first(x) + emb.view(-1, 1, 1, 1)
        return self.second(self.dropout(torch.tanh(h)))


class Exact(Denoiser):
    """x0_hat of the average velocity of Gaussian data: x_s = x q with
    q = sqrt((S^2 + s^2) / (S^2 + sigma^2)), solved for x0_hat, without its 0 / 0 at s = sigma."""

    def forward(self, x, sigma, cond):
        s = cond.sigma_to
        self.seen.append((sigma[0].item(), s[0].item()))
        total = S**2 + sigma**2
        q = ((S**2 + s**2) / total).sqrt()
        return x * (S**2 * (sigma + s) / (total * (sigma * q + s))).view(-1, 1, 1, 1)


def exact():
    made = Exact(Tiny(), None, cmkit.edm_scalings)
    made.seen = []
    return made


def denoiser(network=None, noise=None):
    return Denoiser((network or Tiny()).double(), noise, cmkit.edm_scalings)


def rng():
    return Rng(3, "t", 0, CPU)


def batch(n=64):
    g = torch.Generator().manual_seed(1)
    return S * torch.randn(n, 1, 4, 4, generator=g, dtype=torch.float64)


def noisy(n=64):
    """Images, their noise levels, lower ones to jump to, and their noise."""
    g = torch.Generator().manual_seed(5)
    sigma = torch.randn(n, generator=g, dtype=torch.float64).exp()
    s = sigma * torch.rand(n, generator=g, dtype=torch.float64)
    z = torch.randn(n, 1, 4, 4, generator=g, dtype=torch.float64)
    return batch(n) + sigma.view(-1, 1, 1, 1) * z, sigma, s, z


def loss(objective, online, x0):
    models = Models(online, online)
    return objective.loss(models, x0, Cond(), objective.phase(0, 10), rng())


def target(made, x, sigma, s, slope, derivative="forward"):
    return velocity.target(made, x, sigma, s, slope, Cond(), derivative, rng())


def u_of_t(made, x_t, t, r):
    """u(x_t, r, t) by its definition in t, for t and r (B, 1, 1, 1)."""
    sigma, s = (t / (1 - t)).flatten(), (r / (1 - r)).flatten()
    return (x_t - made(x_t / (1 - t), sigma, Cond(sigma_to=s))) / t


def test_the_objective_keeps_the_laws_of_its_kind():
    testing.check_objective(MeanFlow())


def test_average_velocity_of_gaussian_data_carries_its_points():
    x, sigma, s, _ = noisy()
    u = velocity.average(exact(), x, sigma, s, Cond())
    sigma, s = sigma.view(-1, 1, 1, 1), s.view(-1, 1, 1, 1)
    t, r = sigma / (1 + sigma), s / (1 + s)
    arrived = (1 - t) * x - (t - r) * u
    wanted = (1 - r) * x * ((S**2 + s**2) / (S**2 + sigma**2)).sqrt()
    torch.testing.assert_close(arrived, wanted, rtol=1e-10, atol=1e-10)


def test_exact_average_velocity_is_its_own_target():
    x, sigma, s, _ = noisy()
    made = exact()
    instant = made(x, sigma, Cond(sigma_to=sigma))
    slope = (x - instant) / sigma.view(-1, 1, 1, 1)
    u = velocity.average(made, x, sigma, s, Cond())
    torch.testing.assert_close(target(made, x, sigma, s, slope), u, rtol=1e-8, atol=1e-8)
    v = velocity.average(made, x, sigma, sigma, Cond())
    assert (u - v).abs().max() > 0.1  # the derivative is no small term here


def test_where_r_is_t_the_target_is_the_velocity_of_flow_matching():
    x, sigma, _, z = noisy()
    x0 = x - sigma.view(-1, 1, 1, 1) * z
    torch.testing.assert_close(target(denoiser().eval(), x, sigma, sigma, z), z - x0)


def test_target_is_that_of_the_paper_in_t():
    x, sigma, s, z = noisy()
    made, column = denoiser().eval(), sigma.view(-1, 1, 1, 1)
    t, r = column / (1 + column), (s / (1 + s)).view(-1, 1, 1, 1)
    v, x_t, h = z - (x - column * z), (1 - t) * x, 1e-6
    change = u_of_t(made, x_t + h * v, t + h, r) - u_of_t(made, x_t - h * v, t - h, r)
    wanted = v - (t - r) * change / (2 * h)
    torch.testing.assert_close(target(made, x, sigma, s, z), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("power", [0.0, 1.0, 0.5])
def test_gradient_is_that_of_the_weighted_squared_error(power):
    online, x0 = denoiser().eval(), batch(8)
    network = online.network
    loss(MeanFlow(power=power, equal=0.5), online, x0).sum().backward()
    same = rng()
    draws = (-0.4 + same.normal_like(x0.new_empty(2, 8))).exp()
    low, high = draws.amin(0), draws.amax(0)
    s = torch.where(same.uniform(8) < 0.5, high, low)
    assert 0 < (s == high).sum() < 8
    z = same.normal_like(x0)
    sigma = high.view(-1, 1, 1, 1)
    x, t = x0 + sigma * z, sigma / (1 + sigma)
    u = u_of_t(online, (1 - t) * x, t, (s / (1 + s)).view(-1, 1, 1, 1))
    error = (u - target(online, x, high, s, z).detach()).flatten(1).square().sum(1)
    weight = (error.detach() + 1e-3) ** -power
    found = torch.autograd.grad((weight * error).sum(), list(network.parameters()))
    for parameter, expected in zip(network.parameters(), found, strict=True):
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("scale", [0.01, 1.0, 50.0])
def test_forward_derivative_is_the_central_difference(scale):
    made = denoiser().eval()
    x, sigma, s, z = noisy()
    x, sigma, s = x - sigma.view(-1, 1, 1, 1) * z, scale * sigma, scale * s
    x = x + sigma.view(-1, 1, 1, 1) * z
    forward, difference = (target(made, x, sigma, s, z, name) for name in ("forward", "difference"))
    torch.testing.assert_close(forward, difference, rtol=1e-4, atol=1e-6 * (1 + scale))


def test_central_difference_stays_on_the_path_at_high_noise_in_float32():
    g = torch.Generator().manual_seed(4)
    sigma, s = torch.full((64,), 60.0), torch.full((64,), 0.1)
    x, made = 60 * torch.randn(64, 1, 4, 4, generator=g), exact()
    slope = (x - made(x, sigma, Cond(sigma_to=sigma))) / 60
    forward, difference = (target(made, x, sigma, s, slope, k) for k in ("forward", "difference"))
    torch.testing.assert_close(forward, difference, rtol=1e-2, atol=1e-2)


def test_forward_derivative_goes_through_the_unet_of_cmkit():
    adm = cmkit.discover().load("backbone", "adm")(
        channels=32, channel_mult=(1, 2), num_res_blocks=1, attention_resolutions=(4,), time_scale=4
    )
    network = adm.build(cmkit.DataSpec(1, 8, 10), frozenset({"label", "sigma_to"}))
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    x, sigma, s, z = noisy(4)
    x, z = (torch.nn.functional.interpolate(i, scale_factor=2) for i in (x, z))
    with torch.no_grad():
        forward, difference = (
            velocity.target(
                denoiser(network), x, sigma, s, z, Cond(label=torch.arange(4)), name, rng()
            )
            for name in ("forward", "difference")
        )
    torch.testing.assert_close(forward, difference, rtol=1e-4, atol=1e-4)


def test_share_of_equal_levels_is_the_objectives():
    class Seen(Denoiser):
        def forward(self, x, sigma, cond):
            pairs.append((sigma, cond.sigma_to))
            return super().forward(x, sigma, cond)

    for equal in (0.0, 0.75, 1.0):
        pairs: list = []
        loss(
            MeanFlow(equal=equal),
            Seen(Tiny().double(), Noise(0.1, 3.0), cmkit.edm_scalings),
            batch(4000),
        )
        sigma, s = pairs[-1]
        assert (s == sigma).double().mean().item() == pytest.approx(equal, abs=0.03)
        assert (s <= sigma).all()
        assert s.min() == pytest.approx(0.1)
        assert sigma.max() == pytest.approx(3.0)


def test_dropout_masks_are_the_same_in_the_derivative_and_in_the_network():
    network, seen = Tiny().train(), []
    network.dropout.register_forward_hook(lambda module, given, out: seen.append(out == 0))
    loss(MeanFlow(derivative="difference"), denoiser(network), batch())
    assert len(seen) == 3
    assert 0.3 < seen[0].double().mean() < 0.7
    assert all(torch.equal(mask, seen[0]) for mask in seen)


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_any_number_of_jumps_lands_on_the_flow(steps):
    made = exact()
    x = made.noise.sigma_max * batch()
    sampler = MeanFlowSampler(steps=steps, clamp=False)
    found = sampler.sample(made, x, Cond(), lambda k: pytest.fail("draws noise"))
    high, low = made.noise.sigma_max, made.noise.sigma_min
    flow = x * math.sqrt((S**2 + low**2) / (S**2 + high**2))
    # The last jump goes on to 0: it passes the flow's end at sigma_min by less than sigma_min.
    torch.testing.assert_close(found, flow, rtol=0, atol=low * x.abs().max().item() / high)
    assert sampler.nfe == len(made.seen) == steps
    assert made.seen[0][0] == high
    assert made.seen[-1][1] == pytest.approx(low)


def test_jumps_are_equally_long_in_t():
    made = exact()
    MeanFlowSampler(steps=4).sample(made, batch(), Cond(), lambda k: None)
    times = [sigma / (1 + sigma) for sigma, _ in made.seen]
    gaps = [a - b for a, b in zip(times, [*times[1:], 0.0], strict=True)]
    assert gaps == pytest.approx([gaps[0]] * 4)


def test_sampler_keeps_the_other_conditions():
    class Label(Exact):
        def forward(self, x, sigma, cond):
            assert cond.label is label
            return super().forward(x, sigma, cond)

    label = torch.arange(64)
    made = Label(Tiny(), None, cmkit.edm_scalings)
    made.seen = []
    MeanFlowSampler(steps=2).sample(made, batch(), replace(Cond(), label=label), lambda k: None)
    assert len(made.seen) == 2


RECIPE = """\
name = "tiny"
dataset = { use = "digits" }
backbone = { use = "adm", channels = 32, channel_mult = [1], num_res_blocks = 1, time_scale = 4.0 }
denoiser = { precond = "edm" }
objective = { use = "meanflow" }
sampler = { use = "meanflow", steps = 2 }
train = { steps = 2, batch = 4, log_every = 1, precision = "fp32" }
"""


@pytest.fixture
def registry():
    """What cmkit finds when this package is installed."""
    from cmkit.plugins import register

    mine = EntryPoint("cmkit-meanflow", "cmkit_meanflow.manifest", "cmkit")
    others = [e for e in entry_points(group="cmkit") if e.value != mine.value]
    return register([*others, mine])


def plan(tmp_path, registry, *overrides):
    from cmkit import plan, recipe

    (tmp_path / "tiny.toml").write_text(RECIPE)
    return plan.plan(recipe.load(tmp_path / "tiny.toml", overrides, registry))


def test_recipe_trains_and_samples(tmp_path, registry):
    from cmkit.train import start, train

    planned = plan(tmp_path, registry)
    training = start(planned, CPU)
    assert all(math.isfinite(step.log["loss"]) for step in train(training))
    x, cond = torch.randn(2, 1, 8, 8), Cond(label=torch.arange(2))
    with torch.no_grad():
        sampler = planned.recipe.sampler
        images = sampler.sample(training.models.online.eval(), x, cond, lambda k: None)
    assert images.shape == x.shape
    assert images.isfinite().all()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ('denoiser.precond="consistency"', 'denoiser.precond = "edm"'),
        ("objective.equal=2.0", "objective.equal"),
        ("sampler.steps=0", "sampler.steps"),
    ],
)
def test_recipe_that_cannot_work_is_refused(tmp_path, registry, override, message):
    with pytest.raises(RecipeError, match=message):
        plan(tmp_path, registry, override)


def test_listing_the_parts_imports_no_torch():
    code = (
        "import sys, cmkit_meanflow.manifest as m, cmkit_meanflow.objective as o\n"
        "import cmkit_meanflow.sampler as s; m.cmkit_register()\n"
        "o.MeanFlow.model_json_schema(); s.MeanFlowSampler.model_json_schema()\n"
        "print('torch' in sys.modules)"
    )
    command = [sys.executable, "-c", f"import sys; sys.path[:0] = {sys.path!r}\n{code}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
